"""Checkpoint → `HookedTransformer` and back, logit parity, fingerprints, and running a model.

This folder and ``circuits.units`` are the only places that know TransformerLens' names. Importing TransformerLens takes
seconds; what needs it is imported when it is first used, so that training, which does not, need not wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuits.models.architectures import ParameterSource, architecture_of
from circuits.models.forward import answer_logits, final_residual, unembed
from circuits.models.huggingface import load_huggingface, load_tokenizer
from circuits.models.quiet import quiet

if TYPE_CHECKING:
    from circuits.models.hooks import HookPoints, capture, head_output, hooked
    from circuits.models.lean import LeanLayer, LeanModel, Linear, Norm
    from circuits.models.loading import (
        Checkpoint,
        HookedTransformer,
        checkpoint_of,
        editing,
        facts_of,
        fingerprint,
        identity,
        load_model,
        parameters_of,
        save_model,
        shape_of,
    )
    from circuits.models.projections import Projection, Recording, recording, unit_projections

_HOOKED = {
    "Checkpoint": "loading",
    "HookPoints": "hooks",
    "HookedTransformer": "loading",
    "LeanLayer": "lean",
    "LeanModel": "lean",
    "Linear": "lean",
    "Norm": "lean",
    "Projection": "projections",
    "Recording": "projections",
    "capture": "hooks",
    "head_output": "hooks",
    "hooked": "hooks",
    "checkpoint_of": "loading",
    "editing": "loading",
    "facts_of": "loading",
    "fingerprint": "loading",
    "identity": "loading",
    "load_model": "loading",
    "parameters_of": "loading",
    "recording": "projections",
    "save_model": "loading",
    "shape_of": "loading",
    "unit_projections": "projections",
}

__all__ = [
    "Checkpoint",
    "HookPoints",
    "HookedTransformer",
    "LeanLayer",
    "LeanModel",
    "Linear",
    "Norm",
    "ParameterSource",
    "Projection",
    "Recording",
    "answer_logits",
    "architecture_of",
    "capture",
    "checkpoint_of",
    "editing",
    "facts_of",
    "final_residual",
    "fingerprint",
    "head_output",
    "hooked",
    "identity",
    "load_huggingface",
    "load_model",
    "load_tokenizer",
    "parameters_of",
    "quiet",
    "recording",
    "save_model",
    "shape_of",
    "unembed",
    "unit_projections",
]


def __getattr__(name: str) -> Any:
    if name not in _HOOKED:
        raise AttributeError(f"module 'circuits.models' has no attribute {name!r}")
    return getattr(import_module(f"circuits.models.{_HOOKED[name]}"), name)
