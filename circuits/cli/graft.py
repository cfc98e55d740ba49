"""``circuits graft``: the fewest fine-tuned parameters that keep a task."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder, load, open_tasks
from circuits.cli.options import (
    Chat,
    Csv,
    Data,
    Device,
    DropBad,
    Dtype,
    Examples,
    GraftMethod,
    Model,
    Pre,
    Seed,
    task_option,
)
from circuits.cli.terminal import say, say_csv, show
from circuits.errors import CircuitsError


def graft(
    model: Model,
    pre: Pre,
    data: Data = None,
    by: Annotated[
        GraftMethod, typer.Option(help="Rank parameters by a score, or optimise a mask.")
    ] = GraftMethod.OPTIMISATION,
    keep: Annotated[float, typer.Option(help="Share of the fine-tuned accuracy to keep.")] = 0.95,
    task: Annotated[str, task_option("The task whose accuracy is kept", "Default: qa_id.")] = "qa_id",
    out: Annotated[Path, typer.Option(help="Folder for mask.safetensors, curve.parquet and the grafted model.")] = Path(
        "runs/graft"
    ),
    save: Annotated[bool, typer.Option("--model/--no-model", help="Save the grafted checkpoint in model/.")] = True,
    examples: Examples = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Find the fewest fine-tuned parameters that keep a task, and save the grafted model."""
    check_folder(out)
    if not 0 < keep <= 1:
        raise CircuitsError(f"the share to keep is {keep}: it must be more than 0 and at most 1")
    opened = open_tasks(model, [task], data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    [kept] = opened.tasks
    fine_tuned, before = load(model, dtype, device), load(pre, dtype, device)
    import os

    from circuits.masks import graft as grafted
    from circuits.masks import graft_by_optimisation, graft_by_score
    from circuits.models import save_model

    if by is GraftMethod.OPTIMISATION:
        found = graft_by_optimisation(before, fine_tuned, kept, keep=keep, seed=seed)
    else:
        found = graft_by_score(before, fine_tuned, kept, score=by.value, keep=keep)
    found.save(out)
    if csv:
        found.curve.to_csv(out / "curve.csv", index=False)
    if save:
        # where the people are, so that other commands find it as they do for a trained checkpoint
        place = {}
        if (people := opened.dataset) is not None:
            place = {"dataset": people.fingerprint, "data": os.path.relpath(people.folder, out / "model")}
        with grafted(before, found.mask, fine_tuned):
            save_model(before, out / "model", {**place, "graft": found.mask.provenance})
    [chosen] = found.curve[found.curve["chosen"]].index
    # of the curve what was taken, and the ends it lies between: no change and the largest graft
    ends = found.curve.loc[[found.curve.index[0], chosen, found.curve.index[-1]]]
    ends = ends.assign(graft=["smallest", "chosen", "largest"])
    told = f"the fewest found that keep {keep:.0%} of the accuracy on {kept.name}"
    shown = ends[["graft", "size", "fraction", "exact_match", "log_prob"]].drop_duplicates("size")
    show(shown, f"{out}: {found.mask.size:,} of {found.mask.total:,} parameters, {told}")
    say(f"{out / 'curve.parquet'}: all {len(found.curve)} sizes that were tried")
    say_csv(csv, out / "curve.parquet")
