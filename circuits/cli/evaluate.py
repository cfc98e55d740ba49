"""``circuits evaluate``: scores of every answer."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_table, facts, load, open_tasks
from circuits.cli.options import Chat, Csv, Data, Device, DropBad, Dtype, Examples, Model, Seed, task_option
from circuits.cli.terminal import say_csv, show, with_intervals


def evaluate(
    model: Model,
    data: Data = None,
    task: Annotated[list[str] | None, task_option("What to score", "May be repeated; default: every split.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for one row per answer.", show_default=False)] = None,
    examples: Examples = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Score a checkpoint: exact match and log-probability of every answer, and its logit less its foil's."""
    if out is not None:
        check_table(out)
    from circuits.facts import SPLITS

    opened = open_tasks(model, task or SPLITS, data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    loaded = load(model, dtype, device)
    import pandas

    from circuits.analysis import accuracies
    from circuits.metrics import evaluate as score
    from circuits.storage import write_table

    tables = [score(loaded, one).assign(task=one.name) for one in opened.tasks]
    table = pandas.concat(tables, ignore_index=True)
    if out is not None:
        write_table(out, table, facts(loaded, opened, seed, examples=examples), csv)
    show(with_intervals(accuracies(table)), str(model))
    if out is not None:
        say_csv(csv, out)
