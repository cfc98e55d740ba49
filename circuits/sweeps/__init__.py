"""Many interventions as one resumable job, and sweeps over the heads of a model in memory."""

from circuits.sweeps.heads import sweep_heads, sweep_patches
from circuits.sweeps.pace import SweepEstimate, SweepPace, estimate_sweep
from circuits.sweeps.plan import Job, SweepPlan
from circuits.sweeps.run import SweepState, run_sweep, sweep_state

__all__ = [
    "Job",
    "SweepEstimate",
    "SweepPace",
    "SweepPlan",
    "SweepState",
    "estimate_sweep",
    "run_sweep",
    "sweep_heads",
    "sweep_patches",
    "sweep_state",
]
