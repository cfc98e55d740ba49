"""Many interventions as one resumable job, and sweeps over the heads of a model in memory."""

from circuits.sweeps.heads import sweep_heads, sweep_patches
from circuits.sweeps.plan import Job, SweepPlan
from circuits.sweeps.run import SweepState, run_sweep, sweep_state

__all__ = [
    "Job",
    "SweepPlan",
    "SweepState",
    "run_sweep",
    "sweep_heads",
    "sweep_patches",
    "sweep_state",
]
