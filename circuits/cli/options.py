"""Options that several commands have, and what can be chosen."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Recipe(StrEnum):
    """Training recipes."""

    MIXED = "mixed"
    TWO_STAGE = "two-stage"
    TWO_STAGE_GENTLE = "two-stage-gentle"
    BIO_ONLY = "bio-only"
    QA_ONLY = "qa-only"


class Family(StrEnum):
    """Model families of the study."""

    LLAMA = "llama"
    PYTHIA = "pythia"


class Condition(StrEnum):
    """How the study's facts are told."""

    SINGLE = "single"
    AUGMENTED = "augmented"


class Width(StrEnum):
    """How wide an image is in print."""

    COLUMN = "column"
    PAGE = "page"


class MaskMode(StrEnum):
    """What masked parameters become."""

    REVERT = "revert"
    ZERO = "zero"
    MEAN = "mean"


class GraftMethod(StrEnum):
    """How a graft is found."""

    CHANGE = "change"
    GRADIENT_X_CHANGE = "gradient_x_change"
    OPTIMISATION = "optimisation"


class Ranked(StrEnum):
    """What is ranked."""

    HEADS = "heads"
    NEURONS = "neurons"


class Rest(StrEnum):
    """Which model the parameters of no ranked unit are taken from."""

    FINE_TUNED = "fine_tuned"
    PRE = "pre"


class HeadMode(StrEnum):
    """What an ablated head puts out."""

    ZERO = "zero"
    MEAN = "mean"
    MEAN_BY_POSITION = "mean_by_position"
    RESAMPLE = "resample"


class Source(StrEnum):
    """Which run a head's output is taken from."""

    COUNTERFACTUALS = "counterfactuals"
    PEOPLE = "people"
    FORMATS = "formats"


def task_option(*words: str) -> Any:
    """The option that names a task, or several; ``words`` say what for."""
    what = (
        "a file of prompts (.jsonl, .json, .csv, .parquet), a ready source (ioi, greater_than, repeated), or a split "
        "of the people (bio, qa_id, qa_ood, qa_id_unseen, qa_ood_unseen)"
    )
    return typer.Option("--task", help=f"{words[0]}: {what}. {' '.join(words[1:])}".strip(), show_default=False)


Model = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face checkpoint, or of a PEFT adapter.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the people, for their splits; a checkpoint made by 'circuits train' knows its own.",
        show_default=False,
    ),
]
Pre = Annotated[Path, typer.Option(help="Checkpoint before fine-tuning.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Csv = Annotated[bool, typer.Option("--csv", help="Also write the table as CSV.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA if there is any.", show_default=False)
]
Examples = Annotated[
    int | None,
    typer.Option(
        help="Use so many examples, drawn with the seed; default: all, and 32 of a ready source.",
        min=1,
        show_default=False,
    ),
]
HeadsMask = Annotated[
    Path | None,
    typer.Option("--mask", help="With --top: take the heads of this parameter mask.", show_default=False),
]
Top = Annotated[
    int | None,
    typer.Option(
        "--top", help="With --mask: its so many heads with the largest Shared Size.", min=1, show_default=False
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")]
DropBad = Annotated[bool, typer.Option("--drop-bad", help="Go on without the lines of a file that cannot be used.")]
