"""What a person at a terminal sees."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
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


def counted(count: int, what: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "line"), counted(1200, "line")
        ('1 line', '1,200 lines')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


#: Columns of shares of answers, and of differences between them; a difference is said in points of percent.
_SUCCESS = ("exact_match", "first_token", "source_exact_match", "before", "after", "drop")


def _is_success(column: str) -> bool:
    return column.removesuffix("_effect") in _SUCCESS or column == "changed" or column.startswith("random drop")


def cell(value: Any, success: bool = False) -> str:
    """A value as a person reads it: whole numbers with commas, success in percent.

    Example:
        >>> cell(737280), cell(344169.0), cell(0.000123), cell(1.0, success=True)
        ('737,280', '344,169', '0.000123', '100.0%')
    """
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


def show(table: "DataFrame", title: str, most: int = 24) -> None:
    """Print a table for a person."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", header_style="bold")
    numbers = table.select_dtypes("number").columns
    for column in table.columns:
        shown.add_column(str(column), justify="right" if column in numbers else "left", overflow="fold")
    success = [_is_success(str(column)) for column in table.columns]
    for row in table.head(most).itertuples(index=False):
        shown.add_row(*map(cell, row, success))
    console = Console()
    console.print(shown)
    if len(table) > most:
        console.print(f"… and {len(table) - most} more rows", style="dim")
