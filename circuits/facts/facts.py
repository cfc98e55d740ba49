"""The dataset of facts: people, their biographies and their questions, as JSON lines on disk.

A dataset is a folder with ``people.jsonl``, ``bio.jsonl``, ``qa.jsonl`` and ``dataset.json`` (settings, counts, the
version and the fingerprint). One row of ``bio.jsonl`` is a sentence or a whole biography; one row of ``qa.jsonl`` a
question with its answer. Rows say where the subject, the relation and the answers stand, in characters.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from circuits.adapter_config import base_of, is_adapter
from circuits.errors import CircuitsError, CircuitsWarning
from circuits.facts.people import Person, draw_index, make_people, permutation
from circuits.facts.pools import POOLS
from circuits.facts.wordings import ATTRIBUTES, BIOGRAPHY, QUESTIONS, Sentence, fill
from circuits.storage import atomic_folder, digest, library_version, read_json, write_json
from circuits.tasks import Example, Task

if TYPE_CHECKING:
    import datasets
    import pandas
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

#: The splits that a task can be made of.
SPLITS: tuple[str, ...] = ("bio", "qa_id", "qa_ood", "qa_id_unseen", "qa_ood_unseen")


@dataclass(frozen=True)
class DatasetSettings:
    """What a dataset is made from.

    Attributes:
        people: number of people, 2 to 144,000 with the invented pools.
        qa_id_fraction: share of people whose questions are in training.
        biographies: biographies of each person.
        wordings: sentences for each attribute that biographies draw from, 1 to 5.
        order: ``permuted`` or ``fixed`` order of the sentences of a biography.
        mention: ``name`` in every sentence, or the ``pronoun`` after the first one.
        row: one ``sentence`` or one whole ``biography`` a row.
        pools: ``invented`` names and values, or ``familiar`` ones, which pretrained models know.
        attributes: the attributes that are told and asked, in the order of a ``fixed`` biography.
        opening: text in front of every row, such as ``Fact:``. Without one, and without a first token of the
            tokenizer's own, a biography begins with the name itself, and pretrained models read a first token badly.
        seed: seed of every draw.
    """

    people: int = 200
    qa_id_fraction: float = 0.5
    biographies: int = 3
    wordings: int = 5
    order: str = "permuted"
    mention: str = "name"
    row: str = "sentence"
    pools: str = "invented"
    attributes: tuple[str, ...] = ATTRIBUTES
    opening: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        most = min(len(wordings) for wordings in BIOGRAPHY.values())
        if self.pools not in POOLS:
            raise CircuitsError(f"there are no pools {self.pools!r}: choose from {', '.join(POOLS)}")
        people = POOLS[self.pools].most_people
        if not 2 <= self.people <= people:
            raise CircuitsError(f"the number of people is {self.people}: it must be from 2 to {people}")
        for attribute in self.attributes:
            if attribute not in ATTRIBUTES:
                raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise CircuitsError(f"the attributes are {list(self.attributes)}: name one or more, each once")
        if self.opening != self.opening.strip():
            raise CircuitsError(f"the opening is {self.opening!r}: leave out the spaces around it, one is set after it")
        if not 0 < self.qa_id_fraction < 1:
            raise CircuitsError(f"the QA-ID fraction is {self.qa_id_fraction}: it must lie between 0 and 1")
        if self.biographies < 1:
            raise CircuitsError(f"there are {self.biographies} biographies for each person: 1 is the least")
        if not 1 <= self.wordings <= most:
            raise CircuitsError(f"the number of wordings is {self.wordings}: it must be from 1 to {most}")
        for name, choices in {
            "order": ("permuted", "fixed"),
            "mention": ("name", "pronoun"),
            "row": ("sentence", "biography"),
        }.items():
            if getattr(self, name) not in choices:
                raise CircuitsError(f"{name} is {getattr(self, name)!r}: it must be {' or '.join(choices)}")
        if self.mention == "pronoun" and self.row == "sentence":
            raise CircuitsError(
                "a sentence with a pronoun alone names nobody: with mention=pronoun, row must be biography"
            )


#: People for a pretrained model. It reads names and values as single tokens, and no name is a row's first token.
FAMILIAR = DatasetSettings(
    people=120,
    biographies=10,
    pools="familiar",
    attributes=("birth_city", "university", "employer", "major"),
    opening="Fact:",
)


def _row(
    person: Person, kind: str, wording: int, attributes: list[str], sentences: list[Sentence], opening: str
) -> Row:
    """Join the opening and the sentences with spaces; their spans move along."""
    row: Row = {
        "person": person.person,
        "name": person.name,
        "format": kind,
        "split": person.split,
        "wording": wording,
        "text": opening,
        "attributes": attributes,
        "subject": [],
        "relation": [],
        "answer": [],
    }
    for sentence in sentences:
        start = len(row["text"]) + 1 if row["text"] else 0
        row["text"] = f"{row['text']} {sentence.text}".lstrip()
        for role, spans in {
            "subject": [sentence.subject],
            "relation": sentence.relation,
            "answer": [sentence.answer],
        }.items():
            row[role] += [[start + left, start + right] for left, right in spans]
    return row


def biography_rows(person: Person, settings: DatasetSettings) -> Iterator[Row]:
    """The biographies of one person.

    ``wording`` of a row is the number of the wording for a sentence, and the number of the biography for a whole one.
    """
    for biography in range(settings.biographies):
        random = Random(f"{settings.seed}/biography/{person.person}/{biography}")
        count = len(settings.attributes)
        chosen = {attribute: draw_index(random, settings.wordings) for attribute in settings.attributes}
        order = permutation(random, count) if settings.order == "permuted" else range(count)
        sentences: dict[str, Sentence] = {}
        for attribute in (settings.attributes[index] for index in order):
            subject = person.pronoun if sentences and settings.mention == "pronoun" else person.name
            sentences[attribute] = fill(BIOGRAPHY[attribute][chosen[attribute]], subject, person.facts[attribute])
        if settings.row == "biography":
            yield _row(person, "bio", biography, list(sentences), list(sentences.values()), settings.opening)
        else:
            for attribute, sentence in sentences.items():
                yield _row(person, "bio", chosen[attribute], [attribute], [sentence], settings.opening)


def question_rows(person: Person, settings: DatasetSettings) -> Iterator[Row]:
    """The questions of one person: each attribute in every form; ``wording`` 0 is the form used in training."""
    for attribute in settings.attributes:
        for wording, question in enumerate(QUESTIONS[attribute]):
            sentence = fill(question, person.name, person.facts[attribute])
            yield _row(person, "qa", wording, [attribute], [sentence], settings.opening)


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
            for person in make_people(settings.people, settings.seed, settings.qa_id_fraction, settings.pools):
                people.write(json.dumps(asdict(person), ensure_ascii=False) + "\n")
                for row in biography_rows(person, settings):
                    bio.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts["bio"] += len(row["attributes"])
                for row in question_rows(person, settings):
                    qa.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts[person.split + ("_unseen" if row["wording"] else "")] += 1
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


def example_of(row: Row) -> Example:
    """A row of a dataset as an example: its person is the group, its spans are ``subject`` and ``relation``.

    Example:
        >>> sentence = fill("{name} was [born in] {value}.", "Priscilla Oakley", "Paris")
        >>> row = {"person": 0, "attributes": ["birth_city"], "text": sentence.text,
        ...        "subject": [sentence.subject], "relation": sentence.relation, "answer": [sentence.answer]}
        >>> example = example_of(row)
        >>> [example.text[left:right] for left, right in example.spans["relation"]]
        ['born in']
    """
    about = [{"group": row["person"], "attribute": attribute} for attribute in row["attributes"]]
    return Example(row["text"], row["answer"], about, {name: row[name] for name in ("subject", "relation")})


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
            split: ``bio`` (all biographies), ``qa_id`` and ``qa_ood`` (questions in the form used in training),
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
                unseen = "_unseen" if row["format"] == "qa" and row["wording"] else ""
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


def _was_asked(facts: Row) -> bool:
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
