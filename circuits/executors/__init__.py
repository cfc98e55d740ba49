"""Who runs jobs: one process, several on this machine, a Ray cluster, or Slurm. Jobs know nothing of it."""

from circuits.executors.arithmetic import on_threads
from circuits.executors.choice import EXECUTORS, choose_executor
from circuits.executors.local import Processes, Serial, cores, end_with
from circuits.executors.protocol import Executor, Run, Work
from circuits.executors.ray_cluster import Ray
from circuits.executors.slurm import Slurm
from circuits.executors.tries import cut

__all__ = [
    "EXECUTORS",
    "Executor",
    "Processes",
    "Ray",
    "Run",
    "Serial",
    "Slurm",
    "Work",
    "choose_executor",
    "cores",
    "cut",
    "end_with",
    "on_threads",
]
