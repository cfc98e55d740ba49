"""How pages of analyses write numbers and names."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas

from circuits.figures.style import label

#: The two ways to take the top parameters, in words.
SCOPE_WORDS = {"global": "of all parameters", "tensor": "of each tensor"}


def named_tasks(table: pandas.DataFrame) -> pandas.DataFrame:
    """A table with its tasks as figures name them."""
    return table.assign(**{name: table[name].map(label) for name in ("task", "other") if name in table})


def percent(value: float | None) -> str:
    """A share."""
    return "–" if value is None or value != value else f"{value:.1%}"


def two(value: float | None) -> str:
    """A number with two digits after the point."""
    return "–" if value is None or value != value else f"{value:.2f}"


def signed(written: Callable[[float | None], str]) -> Callable[[float | None], str]:
    """The same with a plus sign where there is no minus."""

    def signed(value: float | None) -> str:
        return f"{'+' * (value is not None and value >= 0)}{written(value)}"

    return signed


def interval(row: Mapping[str, Any], name: str, written: Callable[[float | None], str]) -> str:
    """A number with its interval, if it has one."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return written(row[name]) + ("" if low is None or low != low else f" ({written(low)} to {written(high)})")
