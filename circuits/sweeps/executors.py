"""Who runs the jobs of a sweep: one process, or several. Jobs know nothing of it.

1. An executor is given the work, a function of a job that can be sent to another process, and then lists of jobs.
2. It runs the work on each job, in any order, anywhere that sees the sweep's folder, and hands back each job with what
   the work returned, as soon as it did.
3. An executor for a cluster engine is one more class with ``run`` and ``close``, under its name in `EXECUTORS`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Protocol, runtime_checkable

from circuits.errors import CircuitsError
from circuits.sweeps.plan import Job

#: Runs a job; False if another process is at it.
Work = Callable[[Job], bool]


@runtime_checkable
class Executor(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
        """Run jobs, and give each back with what the work returned."""
        ...

    def close(self, stop: bool = False) -> None:
        """Let go of everything; with ``stop``, at once, in the middle of jobs."""
        ...


class Serial:
    """One job after another, in this process.

    Args:
        work: runs a job.
        workers: 1, or not given.
        threads: that a job computes on.

    Raises:
        CircuitsError: more workers were asked for.
    """

    def __init__(self, work: Work, workers: int | None = None, threads: int = 1) -> None:  # noqa: ARG002
        if workers not in (None, 1):
            raise CircuitsError(f"the executor serial is one worker, not {workers}: choose processes")
        self._work = work

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
        """Run jobs, and give each back with what the work returned."""
        for job in jobs:
            yield job, self._work(job)

    def close(self, stop: bool = False) -> None:
        """Nothing is held."""


class Processes:
    """Several processes on this machine, each with the models loaded once.

    A worker ends at once when this process stops or dies, also by SIGKILL. A script that asks for processes starts
    its work under ``if __name__ == "__main__":``, because each worker reads the script too.

    Args:
        work: runs a job; it is sent to each worker.
        workers: processes; if not given, as many as the cores have room for.
        threads: that a job computes on.

    Raises:
        CircuitsError: there are to be no workers.
    """

    def __init__(self, work: Work, workers: int | None = None, threads: int = 1) -> None:
        if workers is not None and workers < 1:
            raise CircuitsError(f"there are to be {workers} workers: 1 is the least")
        context = multiprocessing.get_context("spawn")
        reader, self._alive = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(workers or max(1, _cores() // threads), context, _begin, (work, reader))

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
        """Run jobs, and give each back with what the work returned."""
        # workers begin at the first jobs and inherit what is blocked: Ctrl-C is this process's to answer
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            running = {self._pool.submit(_run, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            raise CircuitsError(
                "a worker process was killed, perhaps for lack of memory; finished jobs are kept: take fewer workers "
                "to go on"
            ) from None

    def close(self, stop: bool = False) -> None:
        """Let the workers end; with ``stop``, at once, in the middle of jobs."""
        if stop:
            self._alive.close()
        self._pool.shutdown(cancel_futures=True)
        self._alive.close()


EXECUTORS: dict[str, Callable[[Work, int | None, int], Executor]] = {"serial": Serial, "processes": Processes}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: dict[str, Work] = {}


def _begin(work: Work, alive: Connection) -> None:
    _worker["work"] = work
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except EOFError:
        os._exit(1)


def _run(job: Job) -> bool:
    return _worker["work"](job)
