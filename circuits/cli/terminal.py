"""What a person at a terminal sees."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
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


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
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
    for row in table.head(most).itertuples(index=False):
        shown.add_row(*(cell(value) for value in row))
    console = Console()
    console.print(shown)
    if len(table) > most:
        console.print(f"… and {len(table) - most} more rows", style="dim")
