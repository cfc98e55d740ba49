"""The rows of a dataset of facts: biographies and questions of one person, and the examples that tasks make of them.

A row says where its subject, its relation and its answers stand, in characters of its text.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from circuits.facts.people import Person, draw_index, permutation
from circuits.facts.settings import DatasetSettings
from circuits.facts.wordings import BIOGRAPHY, QUESTIONS, Sentence, fill
from circuits.tasks import Example

Row = dict[str, Any]


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
    """The questions of one person: each attribute in every form, of which the first are in training."""
    for attribute in settings.attributes:
        for wording, question in enumerate(QUESTIONS[attribute]):
            sentence = fill(question, person.name, person.facts[attribute])
            yield _row(person, "qa", wording, [attribute], [sentence], settings.opening)


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
