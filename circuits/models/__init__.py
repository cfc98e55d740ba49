"""Checkpoint → `HookedTransformer` and back, logit parity, fingerprints, and running a model.

This folder and ``circuits.units`` are the only places that know TransformerLens' names. Importing TransformerLens takes
seconds; what needs it is imported when it is first used, so that training, which does not, need not wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuits.models.adapters import merge_adapter
from circuits.models.architectures import ParameterSource, architecture_of
from circuits.models.fingerprints import fingerprint_of, fingerprint_of_folder
from circuits.models.folder import checksums
from circuits.models.forward import answer_logits, embed, final_residual, refuse_hooks, run_layer, unembed
from circuits.models.huggingface import empty_huggingface, lending, load_config, load_huggingface, load_tokenizer
from circuits.models.quiet import quiet
from circuits.models.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from circuits.models.changes import difference
    from circuits.models.description import describe
    from circuits.models.hooks import HookPoints, capture, head_output, hooked
    from circuits.models.lean import LeanLayer, LeanModel, Linear, Norm
    from circuits.models.loading import (
        DTYPES,
        Checkpoint,
        HookedTransformer,
        Parity,
        checkpoint_of,
        editing,
        facts_of,
        fingerprint,
        huggingface_view,
        identity,
        load_model,
        parameters_of,
        require_start,
        save_model,
        shape_of,
    )
    from circuits.models.positional import positional_parameters, positional_weights
    from circuits.models.projections import COMPONENTS, Projection, component_of, projections_of, unit_readers, watching

_HOOKED = {
    "COMPONENTS": "projections",
    "DTYPES": "loading",
    "Checkpoint": "loading",
    "HookPoints": "hooks",
    "HookedTransformer": "loading",
    "LeanLayer": "lean",
    "LeanModel": "lean",
    "Linear": "lean",
    "Norm": "lean",
    "Parity": "loading",
    "Projection": "projections",
    "capture": "hooks",
    "checkpoint_of": "loading",
    "component_of": "projections",
    "describe": "description",
    "difference": "changes",
    "editing": "loading",
    "facts_of": "loading",
    "fingerprint": "loading",
    "head_output": "hooks",
    "hooked": "hooks",
    "huggingface_view": "loading",
    "identity": "loading",
    "load_model": "loading",
    "parameters_of": "loading",
    "projections_of": "projections",
    "positional_parameters": "positional",
    "positional_weights": "positional",
    "require_start": "loading",
    "save_model": "loading",
    "shape_of": "loading",
    "unit_readers": "projections",
    "watching": "projections",
}

__all__ = [
    "COMPONENTS",
    "DTYPES",
    "Checkpoint",
    "HookPoints",
    "HookedTransformer",
    "LeanLayer",
    "LeanModel",
    "Linear",
    "Norm",
    "ParameterSource",
    "Parity",
    "Projection",
    "answer_logits",
    "architecture_of",
    "capture",
    "checkpoint_of",
    "checksums",
    "component_of",
    "describe",
    "difference",
    "editing",
    "embed",
    "empty_huggingface",
    "facts_of",
    "final_residual",
    "fingerprint",
    "fingerprint_of",
    "fingerprint_of_folder",
    "head_output",
    "hooked",
    "huggingface_view",
    "identity",
    "lending",
    "load_config",
    "load_huggingface",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "parameters_of",
    "positional_parameters",
    "positional_weights",
    "projections_of",
    "quiet",
    "refuse_hooks",
    "require_start",
    "run_layer",
    "save_model",
    "shape_of",
    "unembed",
    "uninterrupted",
    "unit_readers",
    "watching",
]


def __getattr__(name: str) -> Any:
    if name not in _HOOKED:
        raise AttributeError(f"module 'circuits.models' has no attribute {name!r}")
    return getattr(import_module(f"circuits.models.{_HOOKED[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOOKED])
