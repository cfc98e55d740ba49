"""Checkpoint → hookable model and back; families, the arithmetic that all numbers come from, fingerprints.

This package and ``circuits.units`` are the only places that know TransformerLens' names. Importing TransformerLens
takes seconds; what needs it is imported when it is first used, so that training, which does not, need not wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuits.models.adapters import merge_adapter
from circuits.models.arithmetic import SITES, LeanModel, Site, Visits
from circuits.models.checkpoint import (
    Checkpoint,
    Model,
    Parity,
    checkpoint_of,
    lean_model,
    parameters_of,
    rows_of,
    shape_of,
)
from circuits.models.families import family_of
from circuits.models.fingerprints import (
    editing,
    facts_of,
    fingerprint,
    fingerprint_of,
    fingerprint_of_folder,
    identity,
    require_start,
    same_parameters,
)
from circuits.models.folder import checksums
from circuits.models.forward import answer_logits, capture, check_task, logits_at, refuse_hooks
from circuits.models.hookable import hook_name, hook_points, hooked, user_hooks
from circuits.models.huggingface import load_config, load_huggingface, load_tokenizer, same_tokenizer
from circuits.models.layer import LeanLayer, Linear, Norm, Taps, Use
from circuits.models.layout import Layout
from circuits.models.place import Place
from circuits.models.positional import positional_parameters, positional_weights
from circuits.models.quiet import quiet
from circuits.models.rows import Row
from circuits.models.saving import save_model
from circuits.models.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from circuits.models.checkpoint_difference import difference
    from circuits.models.description import describe
    from circuits.models.loading import DTYPES, load_model

_LATER = {
    "DTYPES": "loading",
    "describe": "description",
    "difference": "checkpoint_difference",
    "load_model": "loading",
}

__all__ = [
    "DTYPES",
    "SITES",
    "Checkpoint",
    "Layout",
    "LeanLayer",
    "LeanModel",
    "Linear",
    "Model",
    "Norm",
    "Parity",
    "Place",
    "Row",
    "Site",
    "Taps",
    "Use",
    "Visits",
    "answer_logits",
    "capture",
    "check_task",
    "checkpoint_of",
    "checksums",
    "describe",
    "difference",
    "editing",
    "facts_of",
    "family_of",
    "fingerprint",
    "fingerprint_of",
    "fingerprint_of_folder",
    "hook_name",
    "hook_points",
    "hooked",
    "identity",
    "lean_model",
    "load_config",
    "load_huggingface",
    "load_model",
    "load_tokenizer",
    "logits_at",
    "merge_adapter",
    "parameters_of",
    "positional_parameters",
    "positional_weights",
    "quiet",
    "refuse_hooks",
    "require_start",
    "rows_of",
    "same_parameters",
    "same_tokenizer",
    "save_model",
    "shape_of",
    "uninterrupted",
    "user_hooks",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'circuits.models' has no attribute {name!r}")
    return getattr(import_module(f"circuits.models.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
