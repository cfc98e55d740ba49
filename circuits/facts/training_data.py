"""What a checkpoint was trained on: its dataset, and which questions are held out for it."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from circuits.adapter_config import base_of, is_adapter
from circuits.errors import CircuitsError, CircuitsWarning
from circuits.facts.dataset import SPLITS, FactDataset
from circuits.facts.wordings import ATTRIBUTES
from circuits.storage import read_json


def dataset_of(checkpoint: str | Path) -> FactDataset:
    """The dataset a checkpoint was trained on, found through its ``circuits.json``.

    Raises:
        CircuitsError: the folder is no checkpoint or does not say, or the dataset is gone or is another one now.
    """
    checkpoint = Path(checkpoint)
    folder, facts = _card(checkpoint)
    if "data" not in facts:
        raise CircuitsError(
            f"{checkpoint} does not say what it was trained on: give a task of your own (--task), or its people "
            "(--data)"
        )
    dataset = FactDataset((folder / facts["data"]).resolve())
    if dataset.fingerprint != facts["dataset"]:
        raise CircuitsError(
            f"{checkpoint} was trained on the dataset {facts['dataset']}, but {dataset.folder} is "
            f"{dataset.fingerprint}: name the right one (--data)"
        )
    return dataset


def check_held_out(
    checkpoint: str | Path, dataset: FactDataset, splits: Iterable[str] = SPLITS, *, people: Iterable[int] | None = None
) -> None:
    """Refuse questions as held out (``qa_ood``) that ask people whose questions a checkpoint was trained on.

    People are the same if their names and all of their facts are. A checkpoint that was trained on this dataset, or on
    no questions, or that does not say on which, passes; one whose own dataset is gone passes with a `CircuitsWarning`.

    Args:
        checkpoint: its folder.
        dataset: what it is to be asked.
        splits: those that are asked; only the ones of held-out people are looked at.
        people: only these people are asked.

    Raises:
        CircuitsError: the folder is no checkpoint, or some of the questions are not held out for it.
    """
    checkpoint = Path(checkpoint)
    folder, facts = _card(checkpoint)
    held_out = [split for split in splits if split.startswith("qa_ood")]
    if not held_out or "data" not in facts or facts["dataset"] == dataset.fingerprint or not _was_asked(facts):
        return
    try:
        own = dataset_of(checkpoint)
    except CircuitsError:
        warnings.warn(
            f"{checkpoint} was trained on questions of the dataset {facts['dataset']}, which is not at "
            f"{(folder / facts['data']).resolve()} any more: whether {' and '.join(held_out)} of "
            f"{dataset.folder} ask people it was trained on cannot be checked",
            CircuitsWarning,
            stacklevel=2,
        )
        return
    trained = {who for who, _ in _identities(own, "qa_id")}
    known = {person for who, person in _identities(dataset, "qa_ood") if who in trained}
    people = None if people is None else set(people)
    for split in held_out:
        asked = [row["person"] for row in dataset.rows(split, people)]
        count = sum(person in known for person in asked)
        if count:
            raise CircuitsError(
                f"{count} of {len(asked)} questions of {split} in {dataset.folder} ask people whose questions "
                f"{checkpoint} was trained on: take its own dataset, {own.folder}, or leave out {split}"
            )


def _card(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """What the ``circuits.json`` of a checkpoint says, or nothing if it has none, and the folder that it lies in.

    An adapter that names no data has its base's.
    """
    if not checkpoint.is_dir():
        raise CircuitsError(f"there is no folder {checkpoint}: give the path of a checkpoint on this machine")
    if not any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CircuitsError(f"{checkpoint} is no checkpoint: it has no config.json")
    card = checkpoint / "circuits.json"
    facts = read_json(card) if card.is_file() else {}
    if "data" not in facts and is_adapter(checkpoint):
        return _card(base_of(checkpoint))
    return checkpoint.resolve(), facts


def _was_asked(facts: dict[str, Any]) -> bool:
    """Whether questions were in the training of a checkpoint. A start is saved before any, and names no stage."""
    if "stage" in facts:
        return bool(facts["stage"]["qa_rows"])
    return "start" not in facts


def _identities(dataset: FactDataset, split: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """The people of a split: name and facts, which are the same in every dataset, and the number in this one."""
    people = dataset.people()
    chosen = people[people["split"] == split]
    columns = ["name", *(attribute for attribute in ATTRIBUTES if attribute in chosen)]
    return zip(chosen[columns].itertuples(index=False, name=None), chosen["person"], strict=True)
