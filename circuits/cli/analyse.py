"""``circuits analyse``: one model on its tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.executors import with_executor
from circuits.cli.inputs import check_folder, load, open_tasks
from circuits.cli.options import (
    Chat,
    Data,
    Device,
    DropBad,
    Dtype,
    Model,
    Seed,
    task_option,
)
from circuits.cli.settings import options_of
from circuits.cli.terminal import resumable, say, show
from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.analysis import Analysis
    from circuits.executors import Executor
    from circuits.tasks import Task

#: Their names, without loading what does them.
STEPS = (
    "evaluate, trace, share, ablate, graft, sweep, neurons, patch, rank, attend, consistency, localise, signature, "
    "integrate"
)
Tasks = Annotated[list[str], task_option("What the model is asked", "May be repeated.")]
Start = Annotated[
    Path | None,
    typer.Option(
        "--pre", help="The checkpoint before fine-tuning, to revert to and to graft into.", show_default=False
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STEP", help=f"Only this step and those it needs, of {STEPS}. May be repeated.", show_default=False
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="STEP", help="Not this step. May be repeated.", show_default=False)
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Score this task, but hold it out of the shared set. May be repeated.", show_default=False
    ),
]
analysis_options = options_of(
    "analysis.case.AnalysisSettings", "fraction", "draws", "keep", "examples", "rest", "neurons", "drawn"
)


@analysis_options
@with_executor
def analyse(
    model: Model,
    task: Tasks,
    pre: Start = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, figures, summary.json and report.html.")] = Path(
        "runs/analysis"
    ),
    only: Only = None,
    skip: Skip = None,
    held_out: HeldOut = None,
    data: Data = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    executor: "Executor | str" = "serial",
    seed: Seed = 0,
    **settings: Any,
) -> None:
    """What do the tasks share, what happens without it, and which heads and neurons is it? Resumes where it was."""
    check_folder(out)
    opened = open_tasks(model, task, data, seed=seed, chat=chat, drop_bad=drop_bad)
    by_step = without(opened.tasks, held_out)
    from circuits.analysis import AnalysisSettings, check_steps
    from circuits.analysis import analyse as run

    chosen = AnalysisSettings(seed=seed, tasks_by_step=by_step, **settings)
    check_steps(only, skip)
    loaded = load(model, dtype, device)
    before = None if pre is None else load(pre, dtype, device)
    with resumable():
        found = run(
            loaded,
            opened.tasks,
            before,
            out=out,
            settings=chosen,
            only=only,
            skip=skip,
            say=say,
            executor=executor,
        )
    tell(found)


def without(tasks: Sequence["Task"], held_out: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """`AnalysisSettings.tasks_by_step` for an analysis that traces all but these tasks.

    Raises:
        CircuitsError: there is no such task, or none is left.
    """
    if not held_out:
        return {}
    names = [task.name for task in tasks]
    for name in held_out:
        if name not in names:
            raise CircuitsError(f"there is no task {name!r} to hold out: choose from {', '.join(names)}")
    left = tuple(name for name in names if name not in held_out)
    if not left:
        raise CircuitsError("every task is held out: at least one has to be traced")
    return {"trace": left}


def tell(found: "Analysis") -> None:
    """Print what an analysis found first."""
    from circuits.analysis import top_table

    if "accuracy" in found.tables:
        table = found.tables["accuracy"]
        show(table[[name for name in table if not name.endswith(("_low", "_high"))]], str(found.folder))
    top = top_table(found.tables, 8)
    if top is not None:
        what = "change of the logit difference (of the log-probability where tasks have no foils)"
        show(top, f"the heads that matter most: {what}, and 95 % interval")
    say(f"{found.report}")
