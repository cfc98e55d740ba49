"""``circuits train``: checkpoints by the recipes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli.options import Recipe, Seed
from circuits.cli.settings import options_of
from circuits.cli.terminal import busy, resumable, say


@options_of(
    "training.recipes.Optimisation",
    *("steps", "rows", "qa_share", "learning_rate", "gentle_learning_rate", "dtype"),
)
def train(
    data: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/facts"),
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints: pre, and one for each stage.")] = Path(
        "runs/checkpoints"
    ),
    recipe: Annotated[
        list[Recipe] | None,
        typer.Option(help="What to train; may be given several times. Default: mixed and two-stage."),
    ] = None,
    start: Annotated[
        str, typer.Option(help="tiny-llama, tiny-pythia, tiny-pythia-untied, or the folder of a checkpoint.")
    ] = "tiny-llama",
    seed: Seed = 0,
    **settings: Any,
) -> None:
    """Train models on biographies and questions. Started again, it goes on where it was."""
    from circuits.facts import FactDataset

    dataset = FactDataset(data)
    with busy("starting"):
        import torch

        from circuits.progress import stages
        from circuits.training import Optimisation
        from circuits.training import train as train_recipe

    optimisation = Optimisation(**settings)
    torch.set_flush_denormal(True)
    for chosen in recipe or [Recipe.MIXED, Recipe.TWO_STAGE]:
        with resumable():
            folders = train_recipe(
                chosen.value, dataset, out, start=start, optimisation=optimisation, seed=seed, progress=stages("train")
            )
        for folder in folders:
            import pandas

            last = pandas.read_parquet(folder / "curve.parquet").iloc[-1]
            say(f"{folder}: BIO {last['bio']:.1%}, QA-ID {last['qa_id']:.1%}, QA-OOD {last['qa_ood']:.1%}")
