"""Progress that a person sees: a bar in a terminal and in Jupyter, nothing in a log file."""

import itertools
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
#: Seconds between two reports of a bar in another process.
_PAUSE = 0.2

_elsewhere: list[Callable[[tuple[Any, ...]], None]] = []
_count = itertools.count()


def report_to(report: Callable[[tuple[Any, ...]], None]) -> None:
    """In a process that nobody sees: have bars reported, in place of being drawn.

    Args:
        report: called with ``("bar" or "close", which, description, total, unit, done before, done)``.
    """
    _elsewhere[:] = [report]


def bar(description: str, total: int, unit: str = "it", done: int = 0) -> Any:
    """A tqdm bar with rate and time left; it vanishes when done, and is silent where nobody looks.

    Args:
        description: what is going on.
        total: how much there is to do.
        unit: of what.
        done: how much of it was done before; no part of the rate.
    """
    if _elsewhere:
        return _Reported(description, total, unit, done)
    with warnings.catch_warnings():
        # tqdm calls its choice between terminal and notebook experimental, and misses widgets aloud
        warnings.simplefilter("ignore")
        from tqdm.autonotebook import tqdm
        from tqdm.std import tqdm as terminal

    # a worker process has the same terminal, but its parent shows how far it is
    looked_at = (tqdm is not terminal or sys.stderr.isatty()) and multiprocessing.parent_process() is None
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=done,
        disable=not looked_at,
        leave=False,
        dynamic_ncols=True,
    )


class _Reported:
    """A bar that another process draws."""

    def __init__(self, *about: Any) -> None:
        self._about, self._which, self._last = about, (os.getpid(), next(_count)), -_PAUSE
        self.n = about[-1]
        self.update(0)

    def update(self, by: float = 1) -> None:
        """Say how far it is, if that is not said all the time."""
        self.n += by
        if time.monotonic() - self._last >= _PAUSE:
            self._last = time.monotonic()
            self._say("bar")

    def close(self) -> None:
        """Take the bar away."""
        self._say("close")

    def _say(self, kind: str) -> None:
        for report in _elsewhere:
            report((kind, self._which, *self._about, self.n))

    def __enter__(self) -> "_Reported":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stages(does: str) -> Callable[[str, int, int], None]:
    """A function that draws a bar for each stage of training, told its name, the steps done, and all its steps.

    Args:
        does: what is done in a stage.
    """
    bars: dict[str, Any] = {}

    def show(stage: str, step: int, steps: int) -> None:
        if stage not in bars:
            bars[stage] = bar(f"{does} {stage}", steps, "step")
        bars[stage].update(step - bars[stage].n)
        if step == steps:
            bars[stage].close()

    return show


def track(items: Iterable[Item], description: str, total: int, unit: str = "it") -> Iterator[Item]:
    """Go through items with a bar.

    Example:
        >>> sum(track(range(4), "adding", 4))
        6
    """
    with bar(description, total, unit) as shown:
        for item in items:
            yield item
            shown.update()


def counted(count: int, what: str, several: str = "") -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "line"), counted(1200, "line"), counted(0, "loss", "losses")
        ('1 line', '1,200 lines', '0 losses')
    """
    return f"{count:,} {what if count == 1 else several or f'{what}s'}"


def duration(seconds: float) -> str:
    """A time as a person says it, in the largest unit it has two of.

    Example:
        >>> duration(4.2), duration(300), duration(9000), duration(864000), duration(math.inf)
        ('4 seconds', '5 minutes', '2.5 hours', '10 days', 'unknown time')
    """
    if math.isinf(seconds):
        return "unknown time"
    for unit, size, digits in (("day", 86400, 0), ("hour", 3600, 1), ("minute", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}s"
    return counted(round(seconds), "second")
