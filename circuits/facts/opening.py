"""Tasks by name, as commands and plans give them: a split of the people, a ready source, or a file of prompts."""

from pathlib import Path
from typing import TYPE_CHECKING

from circuits.errors import CircuitsError
from circuits.facts.facts import SPLITS, FactDataset
from circuits.tasks import SOURCES, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a ready source makes, if nothing else is said.
_PROMPTS = 32


def needs_people(name: str | Path) -> bool:
    """Whether a task of this name is a split of the people's dataset."""
    return str(name) in SPLITS


def check_task_name(name: str | Path) -> None:
    """Refuse, before anything is loaded, a name that is neither a split, nor a source, nor a file that is there.

    Raises:
        CircuitsError: it is none of these.
    """
    if not needs_people(name) and str(name) not in SOURCES and not Path(name).exists():
        raise CircuitsError(
            f"there is no task {str(name)!r}: give a file of prompts (.jsonl, .json, .csv, .parquet), a ready source "
            f"({', '.join(SOURCES)}) or a split of the people ({', '.join(SPLITS)})"
        )


def open_task(
    name: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    dataset: FactDataset | None = None,
    *,
    examples: int | None = None,
    seed: int = 0,
    chat: bool = False,
    drop_bad: bool = False,
) -> Task:
    """A task by its name.

    Args:
        name: a split, such as ``qa_ood``; a ready source, such as ``ioi``; a file of prompts; or a task that was saved
            (``.safetensors``).
        tokenizer: of the model.
        dataset: the people; for splits alone.
        examples: as many are drawn; all if not given, and 32 of a ready source.
        seed: of the draw.
        chat: put each prompt into the tokenizer's chat template.
        drop_bad: go on without the lines of a file that cannot be used.

    Raises:
        CircuitsError: there is no such task, or it does not fit the tokenizer.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> open_task("iio", word_tokenizer())
        Traceback (most recent call last):
        circuits.errors.CircuitsError: there is no task 'iio': give a file of prompts ...
    """
    check_task_name(name)
    if str(name) in SOURCES:
        prompts = SOURCES[str(name)](examples or _PROMPTS, seed, tokenizer)
        return Task.of(prompts, tokenizer, str(name), chat=chat)
    if needs_people(name):
        if dataset is None:
            raise CircuitsError(f"{name} is a split of the people, but there is no dataset: name its folder")
        task = dataset.task(str(name), tokenizer, chat=chat)
    elif Path(name).suffix == ".safetensors":
        task = Task.load(name)
    else:
        task = Task.from_file(name, tokenizer, chat=chat, drop_bad=drop_bad)
    return task if examples is None else task.sample(examples, seed)
