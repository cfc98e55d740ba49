"""The dataset of facts: people, their biographies and their questions, as JSON lines on disk.

A dataset is a folder with ``people.jsonl``, ``bio.jsonl``, ``qa.jsonl`` and ``dataset.json`` (settings, counts, the
version and the fingerprint). One row of ``bio.jsonl`` is a sentence or a whole biography; one row of ``qa.jsonl`` a
question with its answer (`circuits.facts.rows`).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from circuits.errors import CircuitsError
from circuits.facts.people import make_people
from circuits.facts.rows import Row, biography_rows, example_of, question_rows
from circuits.facts.settings import DatasetSettings
from circuits.storage import atomic_folder, digest, library_version, read_json, write_json
from circuits.tasks import Example, Task

if TYPE_CHECKING:
    import datasets
    import pandas
    from transformers import PreTrainedTokenizerBase

#: The splits that a task can be made of.
SPLITS: tuple[str, ...] = ("bio", "qa_id", "qa_ood", "qa_id_unseen", "qa_ood_unseen")


def make_dataset(folder: str | Path, settings: DatasetSettings | None = None) -> "FactDataset":
    """Make people up, write their biographies and questions to ``folder``, and open it.

    People are written one after another, so that memory does not grow with their number. The files are the same to
    the byte for the same settings and version.

    Args:
        folder: where the dataset goes; an older dataset there is replaced.
        settings: what to make; the default is the study's.

    Raises:
        CircuitsError: the folder holds something that is no dataset.

    Example:
        >>> import tempfile
        >>> dataset = make_dataset(tempfile.mkdtemp() + "/facts", DatasetSettings(people=50))
        >>> dataset.counts["qa_ood"]
        150
    """
    folder, settings = Path(folder), settings or DatasetSettings()
    if folder.is_file():
        raise CircuitsError(f"{folder} is a file: name a folder for the dataset")
    if folder.exists() and not (folder / "dataset.json").is_file() and any(folder.iterdir()):
        raise CircuitsError(f"{folder} holds something that is no dataset: choose another folder")
    counts = dict.fromkeys(SPLITS, 0)
    with atomic_folder(folder) as temporary:
        with (
            (temporary / "people.jsonl").open("w", encoding="utf-8", newline="\n") as people,
            (temporary / "bio.jsonl").open("w", encoding="utf-8", newline="\n") as bio,
            (temporary / "qa.jsonl").open("w", encoding="utf-8", newline="\n") as qa,
        ):
            for person in make_people(settings.people, settings.seed, settings.qa_id_fraction, pools=settings.pools):
                people.write(json.dumps(asdict(person), ensure_ascii=False) + "\n")
                for row in biography_rows(person, settings):
                    bio.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts["bio"] += len(row["attributes"])
                for row in question_rows(person, settings):
                    qa.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts[person.split + ("_unseen" if row["wording"] >= settings.questions else "")] += 1
        write_json(
            temporary / "dataset.json",
            {
                "kind": "facts",
                "version": library_version(),
                "settings": asdict(settings),
                "counts": counts,
                "fingerprint": _fingerprint(temporary),
            },
        )
    return FactDataset(folder)


def _fingerprint(folder: Path) -> str:
    parts = []
    for name in ("people.jsonl", "bio.jsonl", "qa.jsonl"):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                parts.append(digest(block))
    return digest(*parts)


class FactDataset:
    """A dataset of facts on disk.

    Args:
        folder: what `make_dataset` or ``circuits data`` wrote.

    Attributes:
        folder: the folder.
        settings: what it was made from.
        counts: answers in each split.
        fingerprint: names its content.

    Raises:
        CircuitsError: the folder is missing, is no dataset, is empty, or its files were changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CircuitsError(f"there is no folder {self.folder}: make a dataset with 'circuits data --out DIR'")
        if not (self.folder / "dataset.json").is_file():
            raise CircuitsError(f"{self.folder} is no dataset: it has no dataset.json")
        card = read_json(self.folder / "dataset.json")
        for name in ("people.jsonl", "bio.jsonl", "qa.jsonl"):
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size == 0:
                raise CircuitsError(f"the dataset {self.folder} is empty: {name} is missing or has no rows")
        try:
            settings = dict(card["settings"])
            if "attributes" in settings:
                settings["attributes"] = tuple(settings["attributes"])
            self.settings = DatasetSettings(**settings)
            self.counts: dict[str, int] = card["counts"]
            self.fingerprint: str = card["fingerprint"]
        except (KeyError, TypeError):
            raise CircuitsError(f"{self.folder / 'dataset.json'} is damaged: make the dataset again") from None
        if _fingerprint(self.folder) != self.fingerprint:
            raise CircuitsError(f"the files of the dataset {self.folder} were changed after it was made: make it again")

    def __repr__(self) -> str:
        return f"FactDataset({str(self.folder)!r}, people={self.settings.people}, fingerprint={self.fingerprint})"

    def people(self) -> "pandas.DataFrame":
        """One row for each person: ``person``, ``name``, ``pronoun``, ``split`` and the six attributes."""
        import pandas

        with (self.folder / "people.jsonl").open(encoding="utf-8") as file:
            people = [json.loads(line) for line in file]
        facts = [person.pop("facts") for person in people]
        return pandas.concat([pandas.DataFrame(people), pandas.DataFrame(facts)], axis="columns")

    def rows(self, split: str, people: Iterable[int] | None = None) -> Iterator[Row]:
        """The rows of a split, read one at a time.

        Args:
            split: ``bio`` (all biographies), ``qa_id`` and ``qa_ood`` (questions in the forms used in training),
                ``qa_id_unseen`` and ``qa_ood_unseen`` (forms never trained on).
            people: only these people.

        Raises:
            CircuitsError: there is no such split, or a person is not in the dataset.
        """
        if split not in SPLITS:
            raise CircuitsError(f"there is no split {split!r}: choose from {', '.join(SPLITS)}")
        wanted = None if people is None else set(people)
        for person in wanted or ():
            if not 0 <= person < self.settings.people:
                raise CircuitsError(
                    f"there is no person {person} in {self.folder}: it has people 0 to {self.settings.people - 1}"
                )
        with (self.folder / f"{split.split('_')[0]}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                unseen = "_unseen" if row["format"] == "qa" and row["wording"] >= self.settings.questions else ""
                if (split == "bio" or row["split"] + unseen == split) and (wanted is None or row["person"] in wanted):
                    yield row

    def examples(self, split: str, people: Iterable[int] | None = None) -> Iterator[Example]:
        """The rows of a split as examples; see `rows`."""
        return map(example_of, self.rows(split, people))

    def task(
        self,
        split: str,
        tokenizer: "PreTrainedTokenizerBase",
        people: Iterable[int] | None = None,
        *,
        chat: bool = False,
    ) -> Task:
        """A split as a task; biographies that say the same sentence twice count it once.

        Args:
            split: ``bio``, ``qa_id``, …
            tokenizer: of the model.
            people: only these.
            chat: put each row into the tokenizer's chat template, the text before the answer as the user's turn.

        Returns:
            The task: its groups are people, its spans ``subject`` and ``relation``, and ``attribute`` stands beside
            each answer.

        Raises:
            CircuitsError: there is no such split or person, or the tokenizer does not fit.

        Example:
            >>> import tempfile
            >>> from circuits.facts import word_tokenizer
            >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
            >>> dataset.task("qa_id", word_tokenizer())
            Task('qa_id', examples=12, answers=12, pos=13, spans=[subject, relation])
        """
        examples = {example.text: example for example in self.examples(split, people)}.values()
        facts = {"dataset": self.fingerprint, "split": split, "grouped": True}
        return Task.from_examples(split, examples, tokenizer, provenance=facts, chat=chat)

    def stream(self, kind: Literal["bio", "qa"]) -> "datasets.IterableDataset":
        """All rows of one format as a streaming `datasets.IterableDataset`, for data larger than memory."""
        import datasets

        stream = datasets.load_dataset(
            "json", data_files=str(self.folder / f"{kind}.jsonl"), split="train", streaming=True
        )
        return stream
