"""``circuits heads``: every head, scored for every behaviour."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import load, open_tasks
from circuits.cli.options import Chat, Csv, Data, Device, DropBad, Dtype, Examples, Model, Seed, task_option
from circuits.cli.terminal import busy, say, say_csv, show, with_intervals


def heads(
    model: Model,
    task: Annotated[str, task_option("Whose prompts are read")],
    out: Annotated[
        Path | None,
        typer.Option(help="A page to sort, filter and look into (.html), or the table (.parquet).", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="Heads to print for each behaviour.", min=1)] = 3,
    example: Annotated[int, typer.Option(help="Which example's patterns the page shows, from 0.", min=0)] = 0,
    examples: Examples = None,
    csv: Csv = False,
    data: Data = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Score every head for every behaviour: previous, duplicate and first token, induction, and pairs of spans."""
    from circuits.errors import CircuitsError
    from circuits.storage import check_ending, write_table

    if out is not None:
        check_ending(out, (".html", ".parquet"), "page or table")
    if csv and (out is None or out.suffix != ".parquet"):
        raise CircuitsError("--csv is written beside a table: give a .parquet file as --out")
    opened = open_tasks(model, [task], data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    [read] = opened.tasks
    from circuits.rankings import behaviour_scores, head_patterns, prompt_length

    prompt_length(read, example)  # refuses an example that is not there
    loaded = load(model, dtype, device)
    with busy("scoring heads"):
        table = behaviour_scores(loaded, read)
    best = table.sort_values("excess", ascending=False, kind="stable").groupby("behaviour", sort=False).head(top)
    order = {name: place for place, name in enumerate(table["behaviour"].unique())}
    best = best.sort_values("behaviour", key=lambda names: names.map(order), kind="stable")
    named = {name: name.replace("excess", "above uniform") for name in best}
    show(
        with_intervals(best[["behaviour", "unit", *table.columns[4:]]].rename(columns=named)),
        f"Heads with the most attention above uniform on {read.name}",
        len(best),
    )
    if out is None:
        return
    if out.suffix == ".html":
        from circuits.figures import write_gallery

        write_gallery(
            table, head_patterns(loaded, read, example=example), out, title=f"Heads of {model.name} on {read.name}"
        )
    else:
        from circuits.cli.inputs import facts

        write_table(out, table, facts(loaded, opened, seed), csv)
        say_csv(csv, out)
    say(f"{out}: {table['unit'].nunique()} heads, {table['behaviour'].nunique()} behaviours")
