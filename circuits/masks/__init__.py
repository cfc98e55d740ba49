"""Influenced and shared sets, their algebra, and acting with them on weights: revert, zero, mean, graft."""

from circuits.masks.ablation import NAMES_OF_ANSWERS, ablate_mask, ablation_means, ablation_summary
from circuits.masks.acting import MASK_MODES, graft, mean, revert, zero
from circuits.masks.at_positions import ablate_at, graft_at
from circuits.masks.centralisation import gini, top_share
from circuits.masks.grafting import SCORES, graft_by_optimisation, graft_by_score
from circuits.masks.grafts import Graft
from circuits.masks.mask import ParameterMask, covered_parameters, unit_mask
from circuits.masks.shared import (
    FRACTIONS,
    SCOPES,
    influenced_parameters,
    shared_parameters,
    sharing,
    sharing_curve,
)
from circuits.masks.sizes import shared_size, units_of

__all__ = [
    "FRACTIONS",
    "MASK_MODES",
    "NAMES_OF_ANSWERS",
    "SCOPES",
    "SCORES",
    "Graft",
    "ParameterMask",
    "ablate_at",
    "ablate_mask",
    "ablation_means",
    "ablation_summary",
    "covered_parameters",
    "gini",
    "graft",
    "graft_at",
    "graft_by_optimisation",
    "graft_by_score",
    "influenced_parameters",
    "mean",
    "revert",
    "shared_parameters",
    "shared_size",
    "sharing",
    "sharing_curve",
    "top_share",
    "unit_mask",
    "units_of",
    "zero",
]
