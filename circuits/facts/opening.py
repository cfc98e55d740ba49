"""Tasks by name, as commands and plans give them: a split of the people, a ready source, or a file of prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.errors import CircuitsError
from circuits.facts.dataset import SPLITS, FactDataset
from circuits.facts.training_data import dataset_of
from circuits.tasks import SOURCES, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a ready source makes, if nothing else is said.
_PROMPTS = 32


def needs_people(name: str | Path) -> bool:
    """Whether a task of this name is a split of the people's dataset."""
    return str(name) in SPLITS


def task_name(name: str | Path) -> str:
    """What the task that is opened by this name is called: a file's is called after its stem.

    Example:
        >>> task_name("qa_ood"), task_name("prompts/capitals.jsonl")
        ('qa_ood', 'capitals')
    """
    return str(name) if needs_people(name) or str(name) in SOURCES else Path(name).stem


def check_task_name(name: str | Path) -> None:
    """Refuse, before anything is loaded, a name that is neither a split, nor a source, nor a file that is there.

    Raises:
        CircuitsError: it is none of these.
    """
    if not needs_people(name) and str(name) not in SOURCES and not Path(name).exists():
        if Path(name).suffix or len(Path(name).parts) > 1:
            raise CircuitsError(f"there is no file {name}: give the path of a file of prompts")
        raise CircuitsError(
            f"there is no task {str(name)!r}: give a file of prompts (.jsonl, .json, .csv, .parquet), a ready source "
            f"({', '.join(SOURCES)}) or a split of the people ({', '.join(SPLITS)})"
        )


def check_task_names(names: Sequence[str | Path]) -> None:
    """Refuse, before anything is loaded, a name that is no task's, and tasks that would be called the same.

    Raises:
        CircuitsError: there is no such task, or two have the same name.
    """
    called: dict[str, str | Path] = {}
    for name in names:
        check_task_name(name)
        own = task_name(name)
        if own in called:
            raise CircuitsError(
                f"the task {name} is given twice: name it once"
                if str(called[own]) == str(name)
                else f"{called[own]} and {name} would both be called {own!r}: give one of the files another name"
            )
        called[own] = name


def people_of(
    names: Sequence[str | Path], checkpoint: str | Path, folder: str | Path | None = None
) -> FactDataset | None:
    """The people that tasks of these names ask: in a folder if it is given, or else those a checkpoint was trained on.

    Returns:
        Their dataset; None if no task is a split of it.

    Raises:
        CircuitsError: there is no such dataset, the checkpoint does not say which it was trained on, or a folder is
            given that no task needs.
    """
    if any(map(needs_people, names)):
        return dataset_of(checkpoint) if folder is None else FactDataset(folder)
    if folder is not None:
        raise CircuitsError(
            f"the dataset {folder} is given, but none of the tasks ({', '.join(map(str, names))}) is a split of its "
            "people: leave it out"
        )
    return None


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
            (``.safetensors``). A file's task is called after its stem.
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
        task = _saved(Path(name), tokenizer, chat)
    else:
        task = Task.from_file(name, tokenizer, chat=chat, drop_bad=drop_bad)
    return task if examples is None else task.sample(examples, seed)


def _saved(path: Path, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> Task:
    """A task that was saved as tokens, if they are this tokenizer's."""
    task = Task.load(path)
    vocabulary = task.provenance.get("vocabulary", len(tokenizer))
    if vocabulary != len(tokenizer):
        raise CircuitsError(
            f"{path} holds tokens of a tokenizer with {vocabulary:,} of them, and the model's has {len(tokenizer):,}: "
            "make the task again with the model's"
        )
    if chat and task.provenance.get("begins_with") != "the chat template":
        raise CircuitsError(f"{path} holds tokens already, which no chat template was put around: leave out the chat")
    return replace(task, name=task_name(path))
