"""``circuits analyse``: one model on its tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import check_folder, load, open_tasks
from circuits.cli.options import Chat, Data, Device, DropBad, Dtype, Model, Seed, task_option
from circuits.cli.settings import options_of
from circuits.cli.terminal import resumable, say, show

if TYPE_CHECKING:
    from circuits.analysis import Analysis

Tasks = Annotated[list[str], task_option("What the model is asked", "May be repeated.")]
Start = Annotated[
    Path | None,
    typer.Option(
        "--pre", help="The checkpoint before fine-tuning, to revert to and to graft into.", show_default=False
    ),
]
Only = Annotated[
    list[str] | None, typer.Option(help="Only this step and those it needs; several times.", show_default=False)
]
Skip = Annotated[list[str] | None, typer.Option(help="Not this step; several times.", show_default=False)]
analysis_options = options_of(
    "analysis.case.AnalysisSettings", "fraction", "draws", "keep", "examples", "rest", "neurons", "drawn"
)


@analysis_options
def analyse(
    model: Model,
    task: Tasks,
    pre: Start = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, figures, summary.json and report.html.")] = Path(
        "runs/analysis"
    ),
    only: Only = None,
    skip: Skip = None,
    data: Data = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    **settings: Any,
) -> None:
    """What do the tasks share, what happens without it, and which heads and neurons is it? Resumes where it was."""
    check_folder(out)
    opened = open_tasks(model, task, data, seed=seed, chat=chat, drop_bad=drop_bad)
    loaded = load(model, dtype, device)
    before = None if pre is None else load(pre, dtype, device)
    from circuits.analysis import AnalysisSettings
    from circuits.analysis import analyse as run

    with resumable():
        chosen = AnalysisSettings(seed=seed, **settings)
        found = run(loaded, opened.tasks, before, out=out, settings=chosen, only=only, skip=skip, say=say)
    tell(found)


def tell(found: "Analysis") -> None:
    """Print what an analysis found first."""
    from circuits.analysis import top_table

    if "accuracy" in found.tables:
        table = found.tables["accuracy"]
        show(table[[name for name in table if not name.endswith(("_low", "_high"))]], str(found.folder))
    top = top_table(found.tables, 8)
    if top is not None:
        show(top, "the heads that matter most: change of the answers without each, and 95 % interval")
    say(f"{found.report}")
