"""How alike two tasks are inside a model: their gradients, their activations, and what an answer rests on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.consistency.gradients import (
        BY,
        KINDS,
        GradientConsistency,
        gradient_consistency,
        gradient_consistency_along,
    )

_LATER = {
    "BY": "gradients",
    "KINDS": "gradients",
    "GradientConsistency": "gradients",
    "gradient_consistency": "gradients",
    "gradient_consistency_along": "gradients",
}

__all__ = [
    "BY",
    "KINDS",
    "GradientConsistency",
    "gradient_consistency",
    "gradient_consistency_along",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'circuits.consistency' has no attribute {name!r}")
    return getattr(import_module(f"circuits.consistency.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
