"""``circuits compare``: two models on the same tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.analyse import HeldOut, Only, Skip, Start, Tasks, analysis_options, without
from circuits.cli.executors import with_executor
from circuits.cli.inputs import check_folder, check_same_tokens, load, open_tasks
from circuits.cli.options import (
    Chat,
    Data,
    Device,
    DropBad,
    Dtype,
    Model,
    Seed,
)
from circuits.cli.terminal import resumable, say, show

if TYPE_CHECKING:
    from circuits.executors import Executor


@analysis_options
@with_executor
def compare(
    model: Model,
    other: Annotated[Path, typer.Argument(help="The other one.", show_default=False)],
    task: Tasks,
    pre: Start = None,
    out: Annotated[Path, typer.Option(help="Folder for both analyses, tables of differences and report.html.")] = Path(
        "runs/comparison"
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
    """Analyse two models on the same tasks, and set every number of one beside the other's."""
    check_folder(out)
    opened = open_tasks(model, task, data, seed=seed, chat=chat, drop_bad=drop_bad, other=other)
    by_step = without(opened.tasks, held_out)
    from circuits.analysis import AnalysisSettings, check_steps
    from circuits.analysis import compare as run

    chosen = AnalysisSettings(seed=seed, tasks_by_step=by_step, **settings)
    check_steps(only, skip)
    check_same_tokens(model, other)
    one, two = load(model, dtype, device), load(other, dtype, device)
    before = None if pre is None else load(pre, dtype, device)
    names = (model.name, other.name) if model.name != other.name else (str(model), str(other))
    with resumable():
        found = run(
            one,
            two,
            opened.tasks,
            out=out,
            pre=before,
            names=names,
            settings=chosen,
            only=only,
            skip=skip,
            say=say,
            executor=executor,
        )
    if "accuracy" in found.tables:
        table = found.tables["accuracy"]
        columns = [
            name for name in table if name in ("task", "answers") or name.endswith(("_a", "_b", "_difference", "_q"))
        ]
        show(table[columns], f"a: {names[0]}, b: {names[1]}")
    say(f"{found.report}")
