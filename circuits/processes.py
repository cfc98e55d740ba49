"""Several calls at once, each in a process of its own with one thread: the fastest layout for small models on a CPU.

1. Calls begin in the order given, at most ``workers`` at a time; a call waits for the one it names as ``after``. One
   worker is this process.
2. The bars that a call draws (`circuits.progress`) and the lines that it says are shown by the caller's process.
3. A worker ends itself when its parent has died or wants to stop, so that nothing goes on writing unseen: what a call
   leaves behind must be something that it can take up again.
"""

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from circuits import progress
from circuits.errors import CircuitsError
from circuits.executors import end_with

_say: list[Callable[[str], None]] = []


@dataclass(frozen=True)
class Call:
    """A function to call in a process of its own.

    Attributes:
        name: of the call.
        function: that can be pickled.
        arguments: of the function, by name.
        after: the name of the call that must be done before it.
    """

    name: str
    function: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None


def check_order(calls: Sequence[Call]) -> None:
    """Refuse calls that wait for what will not be done.

    Raises:
        CircuitsError: a call waits for one that is not there.

    Example:
        >>> check_order([Call("second", print, after="first")])
        Traceback (most recent call last):
        circuits.errors.CircuitsError: the job second waits for first, which is not among the jobs
    """
    for call in calls:
        if call.after is not None and call.after not in {other.name for other in calls if other is not call}:
            raise CircuitsError(f"the job {call.name} waits for {call.after}, which is not among the jobs")


def side_by_side(calls: Sequence[Call], workers: int = 2, say: Callable[[str], None] | None = None) -> None:
    """Make several calls in processes of one thread each, which compute as a thread of this process would.

    Args:
        calls: in the order in which they begin.
        workers: processes at a time; with 1 the calls are made here, one after another.
        say: called with each line that a call gives to `say_from_call`.

    Raises:
        CircuitsError: a call waits for one that is not there; and whatever a call raises, the others being stopped.
    """
    check_order(calls)
    if workers == 1:
        return _here(calls, say)
    context = multiprocessing.get_context("spawn")
    reports, (reader, alive) = context.Queue(), context.Pipe(duplex=False)
    waiting, running, done = list(calls), dict[Future[None], str](), set[str]()
    shown = _Shown(say)
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (reports, reader)) as pool:
            try:
                while waiting or running:
                    for call in [call for call in waiting if call.after is None or call.after in done]:
                        running[pool.submit(_call, call.function, dict(call.arguments))] = call.name
                        waiting.remove(call)
                    finished, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                    shown.read(reports)
                    for future in finished:
                        future.result()
                        done.add(running.pop(future))
            except BaseException:
                # workers end when this is closed
                alive.close()
                raise
        # a process that ends well has sent all that it had to say
        shown.read(reports)
    finally:
        alive.close()
        shown.close()


def _here(calls: Sequence[Call], say: Callable[[str], None] | None) -> None:
    done, waiting = set[str](), list(calls)
    _say[:] = [] if say is None else [say]
    while waiting:
        for call in [call for call in waiting if call.after is None or call.after in done]:
            call.function(**call.arguments)
            done.add(call.name)
            waiting.remove(call)


def say_from_call(line: str) -> None:
    """Have a line said where `side_by_side` was called."""
    for say in _say:
        say(line)


class _Shown:
    """The workers' bars and lines, in the process that a person sees."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say, self._bars, self._any = say, dict[Any, Any](), False

    def read(self, reports: Any) -> None:
        """Show what has come."""
        while True:
            try:
                kind, *report = reports.get_nowait()
            except queue.Empty:
                return
            if kind == "say":
                if self._say is not None:
                    self._say(*report)
                continue
            bar, description, total, unit, begun, now = report
            if bar not in self._bars:
                self._bars[bar], self._any = progress.bar(description, total, unit, begun), True
            self._bars[bar].update(now - self._bars[bar].n)
            if kind == "close":
                self._bars.pop(bar).close()

    def close(self) -> None:
        """Take all bars away."""
        for one in self._bars.values():
            one.close()
        if self._any and sys.stderr.isatty():
            # bars that end one above the other leave the cursor at the end of a line
            sys.stderr.write("\r")
            sys.stderr.flush()


def _start_worker(reports: Any, alive: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(alive)
    import torch

    torch.set_num_threads(1)
    # weights that fade towards zero would slow small models down several times
    torch.set_flush_denormal(True)
    _say[:] = [lambda line: reports.put(("say", line))]
    progress.report_to(reports.put)


def _call(function: Callable[..., None], arguments: dict[str, Any]) -> None:
    function(**arguments)
