"""Acting on activations: ablation and patching, by hooks one at a time, and by the fast exact engine."""

from circuits.interventions.attribution import screen_interventions
from circuits.interventions.effects import effects_table, run_interventions
from circuits.interventions.engine import Engine
from circuits.interventions.heads import (
    ABLATIONS,
    ablate_heads,
    mean_head_outputs,
    patch_heads,
    patched_outputs,
    replace_heads,
)
from circuits.interventions.intervention import MODES, UNIT_SITES, Intervention, cumulative, pairs, single
from circuits.interventions.memory import arithmetic
from circuits.interventions.pairing import (
    matching_positions,
    pair_counterfactuals,
    pair_formats,
    pair_groups,
    pair_people,
)

__all__ = [
    "ABLATIONS",
    "MODES",
    "UNIT_SITES",
    "Engine",
    "Intervention",
    "ablate_heads",
    "arithmetic",
    "cumulative",
    "effects_table",
    "matching_positions",
    "mean_head_outputs",
    "pair_counterfactuals",
    "pair_formats",
    "pair_groups",
    "pair_people",
    "pairs",
    "patch_heads",
    "patched_outputs",
    "replace_heads",
    "run_interventions",
    "screen_interventions",
    "single",
]
