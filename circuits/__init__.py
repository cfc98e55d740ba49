"""Which parts of a model do two tasks share, and what happens without them?

Names are imported when they are first used, so that ``import circuits`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.errors import CircuitsError
    from circuits.facts import DatasetSettings, FactDataset, make_dataset
    from circuits.figures import attention_figure, heads_figure, save_figure
    from circuits.interventions import Intervention, ablate_heads, patch_heads, run_interventions
    from circuits.masks import (
        ParameterMask,
        graft,
        graft_by_score,
        mean,
        revert,
        shared_parameters,
        shared_size,
        units_of,
        zero,
    )
    from circuits.metrics import evaluate
    from circuits.models import load_model, save_model
    from circuits.rankings import attention_scores, rank_units, read_head
    from circuits.sweeps import SweepPlan, run_sweep, sweep_heads, sweep_patches
    from circuits.tasks import Task
    from circuits.tracing import GradientTrace, trace_gradients
    from circuits.training import train
    from circuits.units import Head, KVGroup, Neuron

_HOMES = {
    "CircuitsError": "errors",
    "DatasetSettings": "facts",
    "FactDataset": "facts",
    "GradientTrace": "tracing",
    "Head": "units",
    "Intervention": "interventions",
    "KVGroup": "units",
    "Neuron": "units",
    "ParameterMask": "masks",
    "SweepPlan": "sweeps",
    "Task": "tasks",
    "ablate_heads": "interventions",
    "attention_figure": "figures",
    "attention_scores": "rankings",
    "evaluate": "metrics",
    "graft": "masks",
    "graft_by_score": "masks",
    "heads_figure": "figures",
    "load_model": "models",
    "make_dataset": "facts",
    "mean": "masks",
    "patch_heads": "interventions",
    "rank_units": "rankings",
    "read_head": "rankings",
    "revert": "masks",
    "run_interventions": "interventions",
    "run_sweep": "sweeps",
    "save_figure": "figures",
    "save_model": "models",
    "shared_parameters": "masks",
    "shared_size": "masks",
    "sweep_heads": "sweeps",
    "sweep_patches": "sweeps",
    "trace_gradients": "tracing",
    "train": "training",
    "units_of": "masks",
    "zero": "masks",
}

__all__ = [
    "CircuitsError",
    "DatasetSettings",
    "FactDataset",
    "GradientTrace",
    "Head",
    "Intervention",
    "KVGroup",
    "Neuron",
    "ParameterMask",
    "SweepPlan",
    "Task",
    "ablate_heads",
    "attention_figure",
    "attention_scores",
    "evaluate",
    "graft",
    "graft_by_score",
    "heads_figure",
    "load_model",
    "make_dataset",
    "mean",
    "patch_heads",
    "rank_units",
    "read_head",
    "revert",
    "run_interventions",
    "run_sweep",
    "save_figure",
    "save_model",
    "shared_parameters",
    "shared_size",
    "sweep_heads",
    "sweep_patches",
    "trace_gradients",
    "train",
    "units_of",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    return getattr(import_module(f"circuits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
