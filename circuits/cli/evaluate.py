"""``circuits evaluate``: scores of every answer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.inputs import check_table, facts, load, open_tasks
from circuits.cli.options import Chat, Csv, Data, Device, DropBad, Dtype, Examples, Model, Seed, task_option
from circuits.cli.terminal import say_csv, show, with_intervals

if TYPE_CHECKING:
    from circuits.statistics import Kind


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
    import numpy
    import pandas

    from circuits.metrics import METRICS
    from circuits.metrics import evaluate as score
    from circuits.statistics import intervals
    from circuits.storage import write_table

    tables = [score(loaded, one).assign(task=one.name) for one in opened.tasks]
    table = pandas.concat(tables, ignore_index=True)
    if out is not None:
        write_table(out, table, facts(loaded, opened, seed, examples=examples), csv)
    metrics = [metric for metric in (*METRICS, "logit_diff") if metric in table]
    rows = []
    for name, part in table.groupby("task", sort=False):
        rows.append(row := {"task": name, "answers": len(part)})
        groups = part["group"].to_numpy() if "group" in part else None
        for metric in metrics:
            values = part[metric].to_numpy(float)
            row[metric] = values.mean()
            kind: Kind = "share" if metric in ("exact_match", "first_token") else "real"
            if not numpy.isnan(values).any():
                row |= dict(zip((f"{metric}_low", f"{metric}_high"), intervals(values, groups, kind=kind), strict=True))
    show(with_intervals(pandas.DataFrame(rows)), str(model))
    if out is not None:
        say_csv(csv, out)
