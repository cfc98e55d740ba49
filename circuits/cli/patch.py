"""``circuits patch``: heads' outputs from another run."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_names, check_table, facts, heads_of, is_folder, load, open_dataset, task_of
from circuits.cli.options import Csv, Data, Device, Dtype, Model, Seed, Source, Split
from circuits.cli.sweep import run_into
from circuits.cli.terminal import show
from circuits.errors import CircuitsError


def patch(
    model: Model,
    data: Data = None,
    source: Annotated[
        Source,
        typer.Option(
            "--from", help="formats: the same person's biography. people: another person's run of the same question."
        ),
    ] = Source.PEOPLE,
    split: Annotated[Split, typer.Option(help="The run that is changed: a question split.")] = Split.QA_OOD,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to patch alone, such as L2H1; may be repeated. Default: every head."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Parquet file, or a folder: a sweep that goes on when it is interrupted.")
    ] = Path("runs/patches.parquet"),
    examples: Annotated[int, typer.Option(help="Use so many examples, drawn with the seed.", min=1)] = 200,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Patch every head's output from another run into the question's run."""
    if split is Split.BIO:
        raise CircuitsError("patch changes the run of a question, but bio has none: choose qa_id or qa_ood")
    if not is_folder(out):
        check_table(out)
    check_names(head)
    if is_folder(out):
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=split.value,
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
    dataset = open_dataset(data, model, [split])
    loaded = load(model, dtype, device)
    from circuits.interventions import pair_formats, pair_people
    from circuits.storage import write_table
    from circuits.sweeps import sweep_patches

    heads = heads_of(head, loaded)
    target = task_of(dataset, split.value, loaded, examples, seed)
    if source is Source.FORMATS:
        other = pair_formats(target, task_of(dataset, "bio", loaded, None, seed))
    else:
        other = pair_people(target, seed, task_of(dataset, split.value, loaded, None, seed))
    table = sweep_patches(loaded, other, target, source.value, heads)
    settings = {"source": source.value, "split": split.value, "examples": examples, "heads": head}
    write_table(out, table, facts(loaded, dataset, seed, **settings), csv)
    columns = ["unit", "exact_match_effect", "log_prob_effect", "source_exact_match"]
    shown = table.sort_values("log_prob_effect")[[column for column in columns if column in table]]
    show(shown, f"{out}: source_exact_match is how often the other run's answer is given")
