"""``circuits patch``: heads' outputs from another run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.inputs import (
    Opened,
    check_names,
    check_sweep,
    check_table,
    facts,
    heads_of,
    is_folder,
    load,
    open_tasks,
)
from circuits.cli.options import (
    Chat,
    Csv,
    Data,
    Device,
    DropBad,
    Dtype,
    Model,
    Seed,
    Source,
    task_option,
)
from circuits.cli.sweep import run_into
from circuits.cli.terminal import busy, say, show
from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.tasks import Task


def patch(
    model: Model,
    data: Data = None,
    task: Annotated[str, task_option("The run that is changed", "Default: qa_ood.")] = "qa_ood",
    source: Annotated[
        Source | None,
        typer.Option(
            "--from",
            help="counterfactuals: each prompt's own. people: another person's run of the same question. formats: the "
            "same person's biography. Default: counterfactuals if the task has them, else people.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to patch alone, such as L2H1; may be repeated. Default: every head."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Parquet file, or a folder: a sweep that goes on when it is interrupted.")
    ] = Path("runs/patches.parquet"),
    examples: Annotated[int, typer.Option(help="Use so many examples, drawn with the seed.", min=1)] = 200,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Patch every head's output from another run into a task's."""
    if task == "bio":
        raise CircuitsError("patch changes the run of a question, but bio has none: choose qa_id or qa_ood")
    if not is_folder(out):
        check_table(out)
    else:
        check_sweep(chat, drop_bad)
    check_names(head)
    opened = open_tasks(model, [task], data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    [target] = opened.tasks
    source = source or (Source.PEOPLE if target.counterfactuals is None else Source.COUNTERFACTUALS)
    if is_folder(out):
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=task,
            examples=examples,
            units=head or "heads",
            modes="patch",
            source=source.value,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        run_into(plan, out)
        return
    with busy("pairing"):
        other = _paired(opened, task, source, seed, chat, drop_bad)
    loaded = load(model, dtype, device)
    from circuits.storage import write_table
    from circuits.sweeps import sweep_patches

    table = sweep_patches(loaded, other, target, source.value, heads_of(head, loaded))
    settings = {"source": source.value, "task": target.name, "examples": examples, "heads": head}
    write_table(out, table, facts(loaded, opened, seed, **settings), csv)
    columns = ["head", "exact_match_effect", "log_prob_effect", "source_exact_match"]
    shown = table.sort_values("log_prob_effect")[[column for column in columns if column in table]]
    show(shown, str(out))
    if "source_exact_match" in table:
        say("source_exact_match: how often the other run's answer is given")


def _paired(opened: Opened, name: str, source: Source, seed: int, chat: bool, drop_bad: bool) -> "Task":
    """The run that values come from, in the order of the task."""
    from circuits.facts import open_task
    from circuits.interventions import pair_counterfactuals, pair_formats, pair_people

    [target] = opened.tasks
    if source is Source.COUNTERFACTUALS:
        return pair_counterfactuals(target)
    if source is Source.FORMATS:
        if opened.dataset is None:
            raise CircuitsError(f"formats are the people's: {name} is no split of theirs, so take another --from")
        return pair_formats(target, opened.dataset.task("bio", opened.tokenizer))
    # partners come from all of the task, whatever is drawn of it
    among = open_task(name, opened.tokenizer, opened.dataset, chat=chat, drop_bad=drop_bad)
    return pair_people(target, seed, among)
