"""What a person at a terminal sees."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Say what is going on, on a terminal, until it is done."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def resumable() -> Iterator[None]:
    """Say how to go on when the user interrupts."""
    try:
        yield
    except KeyboardInterrupt as error:
        how = "; ".join(getattr(error, "__notes__", ["give the same command again to go on"]))
        typer.echo(f"circuits: interrupted; {how}", err=True)
        raise typer.Exit(130) from None


def say(text: str) -> None:
    """Print a line."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def say_csv(csv: bool, *tables: Path) -> None:
    """Say which CSV files `circuits.storage.write_table` wrote beside tables, if it was asked to."""
    if csv:
        say(f"and {', '.join(str(table.with_suffix('.csv')) for table in tables)}")


#: Columns of shares of answers, and of differences between them; a difference is said in points of percent.
_SUCCESS = ("exact_match", "first_token", "source_exact_match", "before", "after", "drop", "excess")


def _is_success(column: str) -> bool:
    name = column.replace(" ", "_").removesuffix("_low").removesuffix("_high").removesuffix("_effect")
    return name in _SUCCESS or name == "changed" or name.endswith("_drop")


def cell(value: Any, success: bool = False) -> str:
    """A value as a person reads it: whole numbers with commas, success in percent.

    Example:
        >>> cell(737280), cell(344169.0), cell(0.000123), cell(1.0, success=True)
        ('737,280', '344,169', '0.000123', '100.0%')
    """
    if value is None or type(value).__name__ == "NAType":
        return "–"
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if success and not math.isnan(value):
        return f"{round(float(value), 3) + 0.0:.1%}"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    value = float(value)
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or (value and value.is_integer()) else f"{value:.4g}"


def between(low: float, high: float, success: bool = False) -> str:
    """An interval as a person reads it; nothing where there is none.

    Example:
        >>> between(-0.123, 0.05, success=True), between(-1.2345, 2.0), between(math.nan, math.nan)
        ('-12.3 to 5.0%', '-1.2 to 2.0', '')
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    if success:
        return f"{100 * low:.1f} to {100 * high:.1f}%"
    # two digits of how wide it is
    digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 4
    first, last = (f"{round(float(end), digits) + 0.0:,.{digits}f}" for end in (low, high))
    return f"{first} to {last}"


def with_intervals(table: "DataFrame") -> "DataFrame":
    """Put beside each column the interval and the corrected p-value q that the table has for it, in few columns.

    Example:
        >>> import pandas
        >>> table = pandas.DataFrame({"unit": ["L0H1"], "log_prob_effect": [-1.5]})
        >>> ends = {"log_prob_effect_low": [-2.0], "log_prob_effect_high": [-1.0], "log_prob_effect_q": [0.01]}
        >>> with_intervals(table.assign(**ends)).to_dict("records")
        [{'unit': 'L0H1', 'log_prob_effect': -1.5, '95 %': '-2.0 to -1.0', 'q': '0.01'}]
    """
    import pandas

    shown, told = [], {f"{name}{end}" for name in table for end in ("_low", "_high", "_p", "_q")}
    for name in table:
        if name in told:
            continue
        shown.append(table[name])
        if f"{name}_low" in table:
            ends = zip(table[f"{name}_low"], table[f"{name}_high"], strict=True)
            texts = [between(low, high, _is_success(str(name))) for low, high in ends]
            shown.append(pandas.Series(texts, table.index, name="95 %", dtype=object))
        for which in ("p", "q"):
            if f"{name}_{which}" in table and (which == "q" or f"{name}_q" not in table):
                shown.append(table[f"{name}_{which}"].map("{:.2g}".format, na_action="ignore").fillna("").rename(which))
    return pandas.concat(shown, axis=1)


def effects(table: "DataFrame", what: Sequence[str], order: str, *, largest: bool = False) -> "DataFrame":
    """Effects of interventions with their intervals and q, the lowest first.

    Args:
        table: of interventions.
        what: columns that say what was done, and others to show; those that say the same in every row are left out.
        order: the effect to sort by, which also stands first.
        largest: the largest first, whether up or down.
    """
    kept = [name for name in what if name in table and (name in ("unit", "task") or table[name].nunique() > 1)]
    found = sorted((name for name in table if "_effect" in name), key=lambda name: not name.startswith(order))
    ordered = table.sort_values(order, key=abs if largest else None, ascending=not largest, kind="stable")
    return with_intervals(ordered[[*kept, *found]])


def show(table: "DataFrame", title: str, most: int = 24) -> None:
    """Print a table for a person; what is too wide for the terminal is named below it."""
    import textwrap

    from pandas.api.types import is_numeric_dtype
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 1000  # a file has room
    headers = [str(column).replace("_", " ") for column in table.columns]
    success = [_is_success(str(column)) for column in table.columns]
    right = [is_numeric_dtype(kind) or header in _ENDS for kind, header in zip(table.dtypes, headers, strict=True)]
    cells = [list(map(cell, row, success)) for row in table.head(most).itertuples(index=False)]
    columns, wide = list(zip(*cells, strict=True)) or [()] * len(headers), 0
    style: Any = {"box": SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False, "show_edge": False}
    shown, kept = Table(header_style="bold", **style), []
    for place, header in enumerate(headers):
        least = max(map(len, header.split()), default=0)
        width = max([least, *map(len, columns[place])])
        # neither words nor numbers are broken: a column is as wide as they are, and stands there whole or not at all
        needed = width if right[place] else min(width, max(least, _NARROW))
        if place and wide + needed > console.width:
            continue
        kept.append(place)
        wide += needed + 2
        shown.add_column(
            "\n".join(textwrap.wrap(header, width)),
            justify="right" if right[place] else "left",
            no_wrap=right[place],
            min_width=needed,
            overflow="fold",
        )
    for row in cells:
        shown.add_row(*(row[place] for place in kept))
    if title:
        console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(shown)
    if len(table) > most:
        console.print(f"… and {len(table) - most:,} more rows", style="dim", highlight=False)
    if len(kept) < len(headers):
        owners = [next(name for name in headers[place::-1] if name not in _ENDS) for place in range(len(headers))]
        pairs = enumerate(zip(headers, owners, strict=True))
        left = [name if name == owner else f"{name} of {owner}" for place, (name, owner) in pairs if place not in kept]
        console.print(f"no room for: {', '.join(left)}", style="dim", highlight=False, soft_wrap=True)


#: Columns of `with_intervals` that are read as numbers.
_ENDS = ("95 %", "p", "q")
#: What a column of texts may be folded to.
_NARROW = 16
