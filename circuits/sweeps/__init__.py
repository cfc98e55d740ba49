"""Many interventions as one job: every head ablated or patched alone."""

from circuits.sweeps.heads import strongest_heads, sweep_heads, sweep_patches

__all__ = ["strongest_heads", "sweep_heads", "sweep_patches"]
