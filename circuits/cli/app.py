"""The commands, in the order of ``--help``. Each imports what it needs when it runs, so that ``--help`` is quick."""

from typing import Annotated

import typer

from circuits.cli.ablate import ablate
from circuits.cli.analyse import analyse
from circuits.cli.attention import attention
from circuits.cli.compare import compare
from circuits.cli.data import data
from circuits.cli.diff import diff
from circuits.cli.evaluate import evaluate
from circuits.cli.graft import graft
from circuits.cli.heads import heads
from circuits.cli.info import info
from circuits.cli.patch import patch
from circuits.cli.rank import rank
from circuits.cli.share import share
from circuits.cli.study import report, study
from circuits.cli.sweep import sweep
from circuits.cli.tasks import tasks
from circuits.cli.trace import trace
from circuits.cli.train import train

app = typer.Typer(
    name="circuits",
    help="Which parts of a model do two tasks share, and what happens without them?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool | None) -> None:
    if show:
        from circuits.storage import library_version

        typer.echo(library_version())
        raise typer.Exit


@app.callback()
def circuits(
    version: Annotated[
        bool | None, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    """Which parts of a model do two tasks share, and what happens without them?"""


for command in (
    analyse, compare, info, diff, data, train, evaluate, trace, share, ablate, graft, rank, patch, attention, heads,
    study, report,
):  # fmt: skip
    app.command()(command)
app.add_typer(sweep, name="sweep")
app.add_typer(tasks, name="tasks")
