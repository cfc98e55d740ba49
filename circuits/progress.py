"""Progress that a person sees: a bar in a terminal and in Jupyter, nothing in a log file."""

import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def bar(description: str, total: int, unit: str = "it", done: int = 0) -> Any:
    """A tqdm bar with rate and time left; it vanishes when done, and is silent where nobody looks.

    Args:
        description: what is going on.
        total: how much there is to do.
        unit: of what.
        done: how much of it was done before; no part of the rate.
    """
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
