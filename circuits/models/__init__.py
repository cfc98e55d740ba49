"""Checkpoint → `HookedTransformer` and back, logit parity, fingerprints, and running a model.

This folder and ``circuits.units`` are the only places that know TransformerLens' names.
"""

from circuits.models.architectures import ParameterSource, architecture_of
from circuits.models.forward import HookPoints, answer_logits, capture, final_residual, unembed
from circuits.models.loading import (
    Checkpoint,
    HookedTransformer,
    checkpoint_of,
    fingerprint,
    load_huggingface,
    load_model,
    load_tokenizer,
    parameters_of,
    save_model,
    shape_of,
)
from circuits.models.projections import Projection, Recording, recording, unit_projections
from circuits.models.quiet import quiet

__all__ = [
    "Checkpoint",
    "HookPoints",
    "HookedTransformer",
    "ParameterSource",
    "Projection",
    "Recording",
    "answer_logits",
    "architecture_of",
    "capture",
    "checkpoint_of",
    "final_residual",
    "fingerprint",
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
