"""Executors by their names."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from circuits.errors import CircuitsError
from circuits.executors.local import Processes, Serial
from circuits.executors.protocol import Executor
from circuits.executors.ray_cluster import Ray
from circuits.executors.slurm import Slurm

EXECUTORS: dict[str, Callable[..., Executor]] = {"serial": Serial, "processes": Processes, "ray": Ray, "slurm": Slurm}


def choose_executor(executor: str | Executor, **settings: Any) -> Executor:
    """An executor by its name, or one that is given whole.

    Args:
        executor: ``serial``, ``processes``, ``ray``, ``slurm``, or an executor with its settings.
        settings: of the one that is named; those that are None are left at their defaults.

    Raises:
        CircuitsError: there is no such executor, it has no such setting, or a setting is wrong.

    Example:
        >>> choose_executor("processes", workers=3, address=None)
        Processes(workers=3)
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(executor, str):
        if settings:
            raise CircuitsError(f"{next(iter(settings))} is given beside an executor: give it to the executor")
        return executor
    if executor not in EXECUTORS:
        raise CircuitsError(f"there is no executor {executor!r}: choose from {', '.join(EXECUTORS)}")
    for name in settings:
        having = [other for other, kind in EXECUTORS.items() if name in {one.name for one in fields(kind)}]  # type: ignore[arg-type]
        if executor not in having:
            raise CircuitsError(
                f"the executor {executor} has no {name.replace('_', '-')}: choose {' or '.join(having)}"
            )
    return EXECUTORS[executor](**settings)
