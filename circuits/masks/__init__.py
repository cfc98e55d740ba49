"""Influenced and shared sets, their algebra, and acting with them on weights: revert, zero, mean, graft."""

from circuits.masks.acting import MODES, ablate_mask, graft, mean, revert, zero
from circuits.masks.mask import ParameterMask
from circuits.masks.shared import (
    gini,
    influenced_parameters,
    shared_parameters,
    shared_size,
    sharing,
    top_share,
)

__all__ = [
    "MODES",
    "ParameterMask",
    "ablate_mask",
    "gini",
    "graft",
    "influenced_parameters",
    "mean",
    "revert",
    "shared_parameters",
    "shared_size",
    "sharing",
    "top_share",
    "zero",
]
