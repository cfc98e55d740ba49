"""What an executor is.

1. An executor is a few settings: how many workers, where, with what. `Executor.start` is given the work, a function of
   a job that can be sent to another process, and gives a function that runs lists of jobs while the block lasts.
2. That runs the work on each job, in any order, and hands back each job with what the work returned, as soon as it did.
   An error that the work raises is raised there.
3. A block that ends with an error stops all workers at once, in the middle of jobs.
4. A worker is sent the work once, and keeps it from job to job: what the work loads at its first job stays loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

#: Runs a job, which can be compared and hashed, and returns what became of it.
Work = Callable[[Any], Any]
#: Runs jobs, and gives each back with what the work returned.
Run = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]


@runtime_checkable
class Executor(Protocol):
    """Runs jobs.

    Attributes:
        shared: False if workers are known not to see the folders of the process that gives them jobs; otherwise they
            look.
    """

    @property
    def shared(self) -> bool:
        """Whether workers may see the folder."""
        ...

    def start(self, work: Work, folder: Path, *, threads: int = 1) -> AbstractContextManager[Run]:
        """Get workers, for the length of a block.

        Args:
            work: runs a job; it is sent to each worker.
            folder: where results go; an executor that leaves notes leaves them there.
            threads: that a job computes on.
        """
        ...
