"""Which parts of a model do two tasks share, and what happens without them?

Names are imported when they are first used, so that ``import circuits`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.datasets import DatasetSettings, FactDataset, Task, make_dataset
    from circuits.errors import CircuitsError
    from circuits.figures import attention_figure, heads_figure, save_figure
    from circuits.interventions import ablate_heads, patch_heads
    from circuits.masks import ParameterMask, graft, mean, revert, shared_parameters, shared_size, zero
    from circuits.metrics import evaluate
    from circuits.models import load_model, save_model
    from circuits.rankings import attention_scores, read_head
    from circuits.sweeps import sweep_heads, sweep_patches
    from circuits.tracing import GradientTrace, trace_gradients
    from circuits.training import train
    from circuits.units import Head, KVGroup, Neuron

_HOMES = {
    "CircuitsError": "errors",
    "DatasetSettings": "datasets",
    "FactDataset": "datasets",
    "GradientTrace": "tracing",
    "Head": "units",
    "KVGroup": "units",
    "Neuron": "units",
    "ParameterMask": "masks",
    "Task": "datasets",
    "ablate_heads": "interventions",
    "attention_figure": "figures",
    "attention_scores": "rankings",
    "evaluate": "metrics",
    "graft": "masks",
    "heads_figure": "figures",
    "load_model": "models",
    "make_dataset": "datasets",
    "mean": "masks",
    "patch_heads": "interventions",
    "read_head": "rankings",
    "revert": "masks",
    "save_figure": "figures",
    "save_model": "models",
    "shared_parameters": "masks",
    "shared_size": "masks",
    "sweep_heads": "sweeps",
    "sweep_patches": "sweeps",
    "trace_gradients": "tracing",
    "train": "training",
    "zero": "masks",
}

__all__ = [
    "CircuitsError",
    "DatasetSettings",
    "FactDataset",
    "GradientTrace",
    "Head",
    "KVGroup",
    "Neuron",
    "ParameterMask",
    "Task",
    "ablate_heads",
    "attention_figure",
    "attention_scores",
    "evaluate",
    "graft",
    "heads_figure",
    "load_model",
    "make_dataset",
    "mean",
    "patch_heads",
    "read_head",
    "revert",
    "save_figure",
    "save_model",
    "shared_parameters",
    "shared_size",
    "sweep_heads",
    "sweep_patches",
    "trace_gradients",
    "train",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    return getattr(import_module(f"circuits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
