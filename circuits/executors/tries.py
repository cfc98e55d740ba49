"""How often a job may be lost with its worker, and how jobs are cut into ranges."""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from circuits.errors import CircuitsError

#: Times that a job is begun, at most, before it is taken for the reason that its workers die.
MOST_TRIES = 5
#: Where losses are noted.
LOST = ".lost"
Job = TypeVar("Job")


class Tries:
    """Counts how often each job was lost.

    Args:
        most: times that a job is begun.
        folder: where each loss is noted, a line in ``.lost``; nowhere if not given.

    Example:
        >>> tries = Tries(2)
        >>> tries.lose("job 7")
        >>> tries.lose("job 7")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: 2 workers died at the same job, ...
    """

    def __init__(self, most: int = MOST_TRIES, folder: Path | None = None) -> None:
        self.most, self.folder = most, folder
        self._lost: Counter[Hashable] = Counter()

    def lose(self, job: Hashable, why: str = "") -> None:
        """Note that the worker of a job died.

        Raises:
            CircuitsError: it was not the first, and there have been enough.
        """
        self._lost[job] += 1
        if self.folder is not None and self.folder.is_dir():
            with (self.folder / LOST).open("a") as file:
                file.write(f"{time.time():.0f} {why.replace(chr(10), ' ')}\n")
        if self._lost[job] >= self.most:
            raise CircuitsError(
                f"{self.most} workers died at the same job, perhaps for lack of memory{f' ({why})' if why else ''}; "
                "finished jobs are kept: take fewer workers on a machine, or smaller jobs, to go on"
            )


def cut(jobs: Sequence[Job], ranges: int) -> list[list[Job]]:
    """Jobs in their order as so many ranges of nearly the same length, or fewer: none is empty.

    Example:
        >>> cut([1, 2, 3, 4, 5], 2), cut([1], 3)
        ([[1, 2], [3, 4, 5]], [[1]])
    """
    ranges = min(ranges, len(jobs))
    ends = [len(jobs) * number // ranges for number in range(ranges + 1)] if ranges else [0]
    return [list(jobs[start:stop]) for start, stop in pairwise(ends)]


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers that is none."""
    if workers is not None and workers < 1:
        raise CircuitsError(f"there are to be {workers} workers: 1 is the least")


def check_placement(gpus: float | None, cpus: int | None) -> None:
    """Refuse what no worker can have."""
    if gpus is not None and gpus < 0:
        raise CircuitsError(f"a worker is to have {gpus} GPUs: 0 is the least")
    if cpus is not None and cpus < 1:
        raise CircuitsError(f"a worker is to have {cpus} CPUs: 1 is the least")
