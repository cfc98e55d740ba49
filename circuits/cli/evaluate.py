"""``circuits evaluate``: scores of every answer."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_table, facts, load, open_dataset, task_of
from circuits.cli.options import Csv, Data, Device, Dtype, Examples, Model, Seed, Split
from circuits.cli.terminal import show


def evaluate(
    model: Model,
    data: Data = None,
    split: Annotated[list[Split] | None, typer.Option(help="What to score; default: every split.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for one row per answer.", show_default=False)] = None,
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Score a checkpoint: exact match and log-probability of every answer."""
    if out is not None:
        check_table(out)
    splits = split or list(Split)
    dataset = open_dataset(data, model, splits)
    loaded = load(model, dtype, device)
    import pandas

    from circuits.metrics import METRICS
    from circuits.metrics import evaluate as score
    from circuits.storage import write_table

    tables = []
    for chosen in splits:
        task = task_of(dataset, chosen.value, loaded, examples, seed)
        tables.append(score(loaded, task).assign(split=chosen.value))
    table = pandas.concat(tables, ignore_index=True)
    if out is not None:
        write_table(out, table, facts(loaded, dataset, seed, examples=examples), csv)
    means = table.groupby("split", sort=False)[list(METRICS)].mean().astype(float)
    show(means.assign(answers=table.groupby("split").size()).reset_index(), str(model))
