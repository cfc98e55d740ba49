"""Workers as the tasks of a Slurm job array, by submitit.

1. The jobs are cut into as many ranges as there are to be workers; each range is a task of the array. The command waits
   for them. Every time there are jobs to run, there is an array.
2. A task hands its results over when its range is done. What it has kept in the folder by then is kept, whatever
   becomes of it: begun again, it finds those jobs done.
3. A task that runs into its time limit, or is preempted, is requeued by submitit. One that is lost otherwise is
   submitted again, a bounded number of times.
4. Without Slurm, for a try, tasks are processes on this machine (``local``).
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.executors.protocol import Run, Work
from circuits.executors.tries import Tries, check_placement, check_workers, cut

#: Minutes of a task, where --sbatch does not say.
_MINUTES = 60
#: Times that a task may run into its limit and be requeued.
_REQUEUED = 100
_POLL = 0.5


@dataclass(frozen=True)
class Slurm:
    """Tasks of a Slurm job array.

    Args:
        workers: tasks of the array.
        gpus_per_worker: GPUs of each task.
        cpus_per_worker: CPUs of each task; if not given, as many as a job has threads.
        sbatch: options of sbatch without their dashes, such as ``{"partition": "gpu", "time": 120}``.
        local: processes on this machine instead, for a try.

    Raises:
        CircuitsError: a task is to have what none can have.
    """

    workers: int | None = None
    gpus_per_worker: int = 0
    cpus_per_worker: int | None = None
    sbatch: Mapping[str, str | int] = field(default_factory=dict)
    local: bool = False
    shared = True

    def __post_init__(self) -> None:
        if self.workers is None:
            raise CircuitsError("the executor slurm needs the number of workers, the tasks of its job array")
        check_workers(self.workers)
        check_placement(self.gpus_per_worker, self.cpus_per_worker)
        if self.gpus_per_worker != int(self.gpus_per_worker):
            raise CircuitsError(f"a task has whole GPUs, not {self.gpus_per_worker}")

    @contextmanager
    def start(self, work: Work, folder: Path, *, threads: int = 1) -> Iterator[Run]:
        """Arrays are submitted when there are jobs; their files are in ``.slurm`` in the folder.

        Raises:
            CircuitsError: submitit is not installed, there is no Slurm here, or it has no such option.
        """
        executor = self._executor(folder / ".slurm", threads)
        tries = Tries(folder=folder)
        under_way: list[tuple[Any, list[Any]]] = []

        def submit(ranges: Sequence[list[Any]]) -> None:
            tasks = executor.submit_array([_Range(work, tuple(jobs)) for jobs in ranges])
            under_way.extend(zip(tasks, ranges, strict=True))

        def run(jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
            if jobs:
                submit(cut(jobs, self.workers or 1))
            while under_way:
                ended = [one for one in under_way if one[0].done()]
                for one in ended:
                    under_way.remove(one)
                    task, some = one
                    results = _results(task)
                    if results is None:
                        tries.lose(some[0], f"task {task.job_id} of the array")
                        submit([some])
                    else:
                        yield from zip(some, results, strict=True)
                if not ended:
                    time.sleep(_POLL)

        try:
            yield run
        except BaseException:
            for task, _ in under_way:
                task.cancel(check=False)
            raise

    def _executor(self, folder: Path, threads: int) -> Any:
        try:
            import submitit
        except ImportError:
            raise CircuitsError("the executor slurm needs submitit: pip install 'fact-circuits[slurm]'") from None
        if not self.local and shutil.which("sbatch") is None:
            raise CircuitsError(
                "there is no sbatch here: give the command where Slurm's commands are, or choose ray or processes"
            )
        if self.local:
            local = submitit.LocalExecutor(folder, max_num_timeout=_REQUEUED)
            local.update_parameters(timeout_min=60 * 24 * 365)
            return local
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUED)
        known = executor._valid_parameters()
        options = {name.replace("-", "_"): value for name, value in self.sbatch.items()}
        settings: dict[str, Any] = {
            "job_name": "circuits",
            "time": _MINUTES,
            "cpus_per_task": self.cpus_per_worker or threads,
            "array_parallelism": self.workers,
        }
        if self.gpus_per_worker:
            settings["gpus_per_node"] = int(self.gpus_per_worker)
        settings |= {name: value for name, value in options.items() if name in known}
        others = {name: value for name, value in options.items() if name not in known}
        if others:
            settings["additional_parameters"] = others
        try:
            executor.update_parameters(**settings)
        except (ValueError, TypeError) as error:
            raise CircuitsError(f"sbatch has no such options: {str(error).splitlines()[0]}") from None
        return executor


@dataclass(frozen=True)
class _Range:
    """What a task does."""

    work: Work
    jobs: tuple[Any, ...]

    def __call__(self) -> tuple[list[Any], Exception | None]:
        done: list[Any] = []
        try:
            for job in self.jobs:
                done.append(self.work(job))
        except (CircuitsError, OSError) as error:
            return done, error
        return done, None

    def checkpoint(self) -> Any:
        """What submitit requeues at the time limit: the same, which finds the jobs that are done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _results(task: Any) -> list[Any] | None:
    """What a task handed over; None if it was lost."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        results, error = task.result()
    except FailedJobError as failed:
        raise RuntimeError(f"a task of the array failed:\n{failed}") from None
    except UncompletedJobError:
        return None
    if error is not None:
        raise error
    return list(results)
