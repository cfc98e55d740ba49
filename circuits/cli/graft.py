"""``circuits graft``: the fewest fine-tuned parameters that keep a task."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder, load, open_dataset, task_of
from circuits.cli.options import Csv, Data, Device, Dtype, Examples, GraftMethod, Model, Pre, Seed, Split
from circuits.cli.terminal import show
from circuits.errors import CircuitsError


def graft(
    model: Model,
    pre: Pre,
    data: Data = None,
    by: Annotated[
        GraftMethod, typer.Option(help="Rank parameters by a score, or optimise a mask.")
    ] = GraftMethod.OPTIMISATION,
    keep: Annotated[float, typer.Option(help="Share of the fine-tuned accuracy to keep.")] = 0.95,
    split: Annotated[Split, typer.Option(help="The task whose accuracy is kept.")] = Split.QA_ID,
    out: Annotated[Path, typer.Option(help="Folder for mask.safetensors, curve.parquet and the grafted model.")] = Path(
        "runs/graft"
    ),
    save: Annotated[bool, typer.Option("--model/--no-model", help="Save the grafted checkpoint in model/.")] = True,
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Find the fewest fine-tuned parameters that keep a task, and save the grafted model."""
    check_folder(out)
    if not 0 < keep <= 1:
        raise CircuitsError(f"the share to keep is {keep}: it must be more than 0 and at most 1")
    dataset = open_dataset(data, model, [split])
    fine_tuned, before = load(model, dtype, device), load(pre, dtype, device)
    import os

    from circuits.masks import graft as grafted
    from circuits.masks import graft_by_optimisation, graft_by_score
    from circuits.models import save_model

    task = task_of(dataset, split.value, fine_tuned, examples, seed)
    if by is GraftMethod.OPTIMISATION:
        found = graft_by_optimisation(before, fine_tuned, task, keep, seed=seed)
    else:
        found = graft_by_score(before, fine_tuned, task, by.value, keep)
    found.save(out)
    if csv:
        found.curve.to_csv(out / "curve.csv", index=False)
    if save:
        # where the dataset is, so that other commands find it as they do for a trained checkpoint
        place = {"dataset": dataset.fingerprint, "data": os.path.relpath(dataset.folder, out / "model")}
        with grafted(before, found.mask, fine_tuned):
            save_model(before, out / "model", {**place, "graft": found.mask.provenance})
    show(found.curve, f"{out}: {found!r}", len(found.curve))
