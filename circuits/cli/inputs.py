"""What commands read, checked before anything slow begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.cli.terminal import busy, say
from circuits.errors import CircuitsError
from circuits.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from circuits.facts import FactDataset
    from circuits.models import Model
    from circuits.tasks import Task
    from circuits.units import Head


def check_table(path: Path) -> None:
    """Refuse a file that is no parquet file before anything is loaded."""
    from circuits.storage import check_ending

    check_ending(path, (".parquet",), "table")


def check_folder(path: Path) -> None:
    """Refuse a file where a folder is to be, before anything is loaded."""
    if path.exists() and not path.is_dir():
        raise CircuitsError(f"{path} is a file: name a folder")


def is_folder(path: Path) -> bool:
    """Whether a result goes into the folder of a sweep, and not into a file."""
    return not path.suffix


def check_sweep(chat: bool, drop_bad: bool) -> None:
    """Refuse what a sweep in a folder does not have."""
    for given, option in ((chat, "--chat"), (drop_bad, "--drop-bad")):
        if given:
            raise CircuitsError(f"a sweep into a folder has no {option}: give a .parquet file as --out")


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that is no checkpoint before anything is loaded."""
    if not folder.is_dir():
        raise CircuitsError(f"there is no folder {folder}: give the path of a checkpoint on this machine")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CircuitsError(f"{folder} is no checkpoint: it has no config.json")


@dataclass(frozen=True)
class Opened:
    """The tasks of a command, and the people that some of them ask."""

    tasks: "list[Task]"
    dataset: "FactDataset | None"
    tokenizer: "PreTrainedTokenizerBase"


def open_tasks(
    model: Path,
    names: Sequence[str],
    data: Path | None = None,
    *,
    examples: int | None = None,
    seed: int = 0,
    chat: bool = False,
    drop_bad: bool = False,
    other: Path | None = None,
) -> Opened:
    """The tasks of these names for a checkpoint's tokenizer; its weights are not loaded.

    Splits that are called held out must be that, also for another checkpoint that is asked the same. Says how many
    lines were dropped.
    """
    from circuits.facts import check_held_out, check_task_names, needs_people, open_task, people_of

    check_task_names(names)
    check_checkpoint(model)
    dataset = people_of(names, model, data)
    if dataset is not None:
        for one in (model, other):
            if one is not None:
                check_held_out(one, dataset, [name for name in names if needs_people(name)])
    tokenizer = tokenizer_of(model)
    options: dict[str, Any] = {"examples": examples, "seed": seed, "chat": chat, "drop_bad": drop_bad}
    with busy("reading tasks"):
        tasks = [open_task(name, tokenizer, dataset, **options) for name in names]
    for task in tasks:
        if dropped := task.provenance.get("dropped"):
            say(f"{task.name}: {counted(len(dropped), 'line')} dropped, the first: {dropped[0]}")
    return Opened(tasks, dataset, tokenizer)


def tokenizer_of(model: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, without its weights."""
    with busy(f"loading the tokenizer of {model}"):
        from circuits.models import load_tokenizer
        from circuits.models.huggingface import has_tokenizer

        if not has_tokenizer(model) and (model / "config.json").is_file():
            raise CircuitsError(f"the checkpoint {model} has no tokenizer: save one beside its weights")
        return load_tokenizer(model)


def check_same_tokens(model: Path, other: Path) -> None:
    """Refuse two checkpoints that read other tokens, before their weights are loaded."""
    from circuits.models import same_tokenizer

    if not same_tokenizer(tokenizer_of(model), tokenizer_of(other)):
        raise CircuitsError(
            f"{model} and {other} have different tokenizers: what they make of a prompt cannot be compared"
        )


def load(model: Path, dtype: str = "float32", device: str | None = None) -> "Model":
    """Load a checkpoint, saying so."""
    with busy(f"loading {model}"):
        from circuits.models import load_model

        return load_model(model, dtype, device)


def facts(model: "Model", opened: Opened, seed: int, **settings: Any) -> dict[str, Any]:
    """What a table came from."""
    from circuits.models import facts_of

    people = {} if opened.dataset is None else {"dataset": opened.dataset.fingerprint}
    tasks = {task.name: task.provenance for task in opened.tasks}
    return {**facts_of(model), **people, "tasks": tasks, "seed": seed, "settings": settings}


def check_heads(names: list[str] | None, mask: Path | None = None, top: int | None = None) -> None:
    """Refuse what names no heads before anything is loaded."""
    from circuits.units import Head

    for name in names or ():
        Head.parse(name)
    if (mask is None) != (top is None):
        raise CircuitsError("--mask and --top name the heads of a mask together: give both")
    if names and mask is not None:
        raise CircuitsError("heads and a mask were given: name them with --head, or with --mask and --top")
    if mask is not None and not mask.is_file():
        raise CircuitsError(f"there is no file {mask}")


def heads_of(
    names: list[str] | None, model: "Model", mask: Path | None = None, top: int | None = None
) -> "list[Head] | None":
    """The heads of these names, or those with the largest Shared Size in a mask of the model; None if none is named."""
    from circuits.masks import ParameterMask, units_of
    from circuits.models import shape_of
    from circuits.units import Head

    if mask is not None:
        loaded = ParameterMask.load(mask)
        loaded.check(model)
        return units_of(loaded, Head, top=top)
    shape = shape_of(model)
    return [Head.parse(name, shape) for name in names] if names else None


def planned_heads(names: list[str] | None, mask: Path | None = None, top: int | None = None) -> Any:
    """The same heads as the units of a `circuits.SweepPlan`."""
    return (names or "heads") if mask is None else {"mask": mask, "kind": "heads", "top": top}
