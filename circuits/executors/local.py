"""Workers on this machine: this process, or several."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.executors.protocol import Run, Work
from circuits.executors.tries import check_workers


@dataclass(frozen=True)
class Serial:
    """One job after another, in this process.

    Args:
        workers: 1, or not given.

    Raises:
        CircuitsError: more workers were asked for.

    Example:
        >>> with Serial().start(lambda job: job**2, Path(".")) as run:
        ...     print(list(run([2, 3])))
        [(2, 4), (3, 9)]
    """

    workers: int | None = None
    shared = True

    def __post_init__(self) -> None:
        if self.workers not in (None, 1):
            raise CircuitsError(f"the executor serial is one worker, not {self.workers}: choose processes")

    @contextmanager
    def start(self, work: Work, folder: Path, *, threads: int = 1) -> Iterator[Run]:  # noqa: ARG002
        """This process is the worker."""

        def run(jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
            for job in jobs:
                yield job, work(job)

        yield run


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine.

    A worker ends at once when this process stops or dies, also by SIGKILL. A script that asks for processes starts
    its work under ``if __name__ == "__main__":``, because each worker reads the script too.

    Args:
        workers: processes; if not given, as many as the cores have room for.

    Raises:
        CircuitsError: there are to be no workers.
    """

    workers: int | None = None
    shared = True

    def __post_init__(self) -> None:
        check_workers(self.workers)

    @contextmanager
    def start(self, work: Work, folder: Path, *, threads: int = 1) -> Iterator[Run]:  # noqa: ARG002
        """Each process is sent the work."""
        context = multiprocessing.get_context("spawn")
        reader, alive = context.Pipe(duplex=False)
        workers = self.workers or max(1, cores() // threads)
        pool = ProcessPoolExecutor(workers, context, _begin, (pickle.dumps(work), reader))
        # workers inherit what is blocked: Ctrl-C is this process's to answer
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(workers):
                pool.submit(_import)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        def run(jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
            running = {pool.submit(_run, job): job for job in jobs}
            for done in as_completed(running):
                try:
                    result = done.result()
                except BrokenProcessPool:
                    raise CircuitsError(
                        "a worker process was killed, perhaps for lack of memory; finished jobs are kept: take fewer "
                        "workers to go on"
                    ) from None
                yield running[done], result

        try:
            yield run
        except BaseException:
            # workers end when this is closed
            alive.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            alive.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_pickled: list[bytes] = []


def _begin(work: bytes, alive: Connection) -> None:
    # what follows takes seconds, and even then a worker ends with its parent
    _pickled.append(work)
    end_with(alive)


def end_with(alive: Connection) -> None:
    """End this process at once when the other end of a pipe is closed, as it is when the process that held it dies."""
    threading.Thread(target=_end, args=(alive,), daemon=True).start()


def _end(alive: Connection) -> None:
    try:
        alive.recv()
    except EOFError:
        os._exit(1)


@cache
def _read() -> Work:
    work: Work = pickle.loads(_pickled[0])  # noqa: S301
    return work


def _import() -> None:
    """Read the work, and with it all that it needs."""
    _read()


def _run(job: Any) -> Any:
    return _read()(job)
