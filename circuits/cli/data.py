"""``circuits data``: people, biographies and questions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli.settings import options_of
from circuits.cli.terminal import busy, say


@options_of(
    "facts.settings.DatasetSettings",
    *("people", "qa_id_fraction", "biographies", "wordings", "questions", "order", "mention", "row", "seed"),
)
def data(
    out: Annotated[Path, typer.Option(help="Folder for the dataset.")] = Path("data/facts"),
    **settings: Any,
) -> None:
    """Make up people, their biographies and questions."""
    from circuits.facts import DatasetSettings, make_dataset

    chosen = DatasetSettings(**settings)
    with busy(f"making {chosen.people:,} people"):
        dataset = make_dataset(out, chosen)
    say(f"{out}: {chosen.people:,} people, fingerprint {dataset.fingerprint}")
    say("answers: " + ", ".join(f"{split} {count:,}" for split, count in dataset.counts.items()))
