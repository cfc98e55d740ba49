"""Acting on activations: ablation and patching of attention heads."""

from circuits.interventions.heads import (
    ABLATIONS,
    ablate_heads,
    matching_positions,
    mean_head_outputs,
    pair_formats,
    pair_people,
    patch_heads,
    patched_outputs,
    replace_heads,
)
from circuits.interventions.intervention import (
    MODES,
    POSITIONS,
    SITES,
    Intervention,
    cumulative,
    pairs,
    single,
)
from circuits.interventions.standin import run_interventions, screen_interventions

__all__ = [
    "ABLATIONS",
    "MODES",
    "POSITIONS",
    "SITES",
    "Intervention",
    "ablate_heads",
    "cumulative",
    "matching_positions",
    "mean_head_outputs",
    "pair_formats",
    "pair_people",
    "pairs",
    "patch_heads",
    "patched_outputs",
    "replace_heads",
    "run_interventions",
    "screen_interventions",
    "single",
]
