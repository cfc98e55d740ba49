"""``circuits data``: people, biographies and questions."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.options import Seed
from circuits.cli.terminal import busy, say


def data(
    out: Annotated[Path, typer.Option(help="Folder for the dataset.")] = Path("data/facts"),
    people: Annotated[int, typer.Option(help="Number of people, 2 to 144000.")] = 200,
    qa_id_fraction: Annotated[float, typer.Option(help="Share of people whose questions are in training.")] = 0.5,
    biographies: Annotated[int, typer.Option(help="Biographies of each person.")] = 3,
    wordings: Annotated[int, typer.Option(help="Wordings of each attribute, 1 to 5.")] = 5,
    order: Annotated[str, typer.Option(help="Order of sentences: permuted or fixed.")] = "permuted",
    mention: Annotated[str, typer.Option(help="name in every sentence, or pronoun after the first.")] = "name",
    row: Annotated[str, typer.Option(help="One sentence or one biography a row.")] = "sentence",
    seed: Seed = 0,
) -> None:
    """Make up people, their biographies and questions."""
    from circuits.datasets import DatasetSettings, make_dataset

    settings = DatasetSettings(
        people=people,
        qa_id_fraction=qa_id_fraction,
        biographies=biographies,
        wordings=wordings,
        order=order,
        mention=mention,
        row=row,
        seed=seed,
    )
    with busy(f"making {people:,} people"):
        dataset = make_dataset(out, settings)
    say(f"{out}: {people:,} people, fingerprint {dataset.fingerprint}")
    say("answers: " + ", ".join(f"{split} {count:,}" for split, count in dataset.counts.items()))
