"""Many interventions as one job: every head ablated or patched alone."""

from circuits.sweeps.heads import sweep_heads, sweep_patches

__all__ = ["sweep_heads", "sweep_patches"]
