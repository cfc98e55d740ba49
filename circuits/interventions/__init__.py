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

__all__ = [
    "ABLATIONS",
    "ablate_heads",
    "matching_positions",
    "mean_head_outputs",
    "pair_formats",
    "pair_people",
    "patch_heads",
    "patched_outputs",
    "replace_heads",
]
