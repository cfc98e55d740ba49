"""What commands read, checked before anything slow begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.cli.terminal import busy
from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.facts import FactDataset
    from circuits.models import Model
    from circuits.tasks import Task


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


def open_dataset(data: Path | None, model: Path, splits: Sequence[str]) -> "FactDataset":
    """The dataset in a folder, or the one a checkpoint was trained on; splits called held out must be that."""
    from circuits.facts import FactDataset, check_held_out, dataset_of

    if not model.is_dir():
        raise CircuitsError(f"there is no folder {model}: give the path of a checkpoint on this machine")
    dataset = dataset_of(model) if data is None else FactDataset(data)
    check_held_out(model, dataset, splits)
    return dataset


def load(model: Path, dtype: str = "float32", device: str | None = None) -> "Model":
    """Load a checkpoint, saying so."""
    with busy(f"loading {model}"):
        from circuits.models import load_model

        return load_model(model, dtype, device)


def task_of(dataset: "FactDataset", split: str, model: "Model", examples: int | None, seed: int) -> "Task":
    """A split of a dataset, or examples drawn from it."""
    if model.tokenizer is None:
        raise CircuitsError("the checkpoint has no tokenizer: save one beside its weights")
    task = dataset.task(split, model.tokenizer)
    return task if examples is None else task.sample(examples, seed)


def facts(model: "Model", dataset: "FactDataset", seed: int, **settings: Any) -> dict[str, Any]:
    """What a table came from."""
    from circuits.models import facts_of

    return {**facts_of(model), "dataset": dataset.fingerprint, "seed": seed, "settings": settings}


def heads_of(names: list[str] | None, model: "Model") -> list[Any] | None:
    """The heads of these names, if there are any."""
    from circuits.models import shape_of
    from circuits.units import Head

    shape = shape_of(model)
    return [Head.parse(name, shape) for name in names] if names else None


def check_names(names: list[str] | None) -> None:
    """Refuse what is no head's name before anything is loaded."""
    from circuits.units import Head

    for name in names or ():
        Head.parse(name)
