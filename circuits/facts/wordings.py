"""How a fact is said in a biography and how it is asked for.

In a wording, ``{name}`` is the subject, ``{value}`` the answer, and square brackets hold the words that name the
relation; the brackets are not part of the text.
"""

import re
from dataclasses import dataclass

Span = tuple[int, int]

#: Sentences of a biography, several for each attribute. The subject always comes before the value.
BIOGRAPHY: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "{name} was [born on] {value}.",
        "{name} was [welcomed into life on] {value}.",
        "{name} [came into the world on] {value}.",
        "{name} has a [birth date] of {value}.",
        "{name} celebrates a [birthday on] {value}.",
    ),
    "birth_city": (
        "{name} was [born in] {value}.",
        "{name} is a [native of] {value}.",
        "{name} [comes from] the city of {value}.",
        "{name} has the [birthplace] {value}.",
        "{name} [entered life in] the city of {value}.",
    ),
    "university": (
        "{name} [attended] {value}.",
        "{name} [studied at] {value}.",
        "{name} [graduated from] {value}.",
        "{name} was [educated at] {value}.",
        "{name} [earned a degree from] {value}.",
    ),
    "major": (
        "{name} [majored in] {value}.",
        "{name} [specialized in] {value}.",
        "{name} [holds a degree in] {value}.",
        "{name} [completed a program in] {value}.",
        "{name} [focused on the field of] {value}.",
    ),
    "employer": (
        "{name} [works for] {value}.",
        "{name} is [employed by] {value}.",
        "{name} has a [job at] {value}.",
        "{name} [joined the staff of] {value}.",
        "{name} [built a career at] {value}.",
    ),
    "work_city": (
        "{name} [works in] {value}.",
        "{name} is [based in] {value}.",
        "{name} has an [office in] {value}.",
        "{name} [goes to work in] {value}.",
        "{name} [pursues a career in] the city of {value}.",
    ),
}

#: Questions: the first forms of each attribute, by default one, are in training, the others for testing only.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "What is the [birth date] of {name}? {value}",
        "On what [date] was {name} [born]? {value}",
        "What is the [date] of the [birthday] of {name}? {value}",
    ),
    "birth_city": (
        "In which [city] was {name} [born]? {value}",
        "What is the [birthplace] of {name}? {value}",
        "Which [city] is {name} a [native of]? {value}",
    ),
    "university": (
        "Which [university] did {name} [attend]? {value}",
        "At which [university] was {name} [educated]? {value}",
        "What [university] has {name} [graduated from]? {value}",
    ),
    "major": (
        "What [major] did {name} [study]? {value}",
        "In which [field] has {name} [majored]? {value}",
        "What is the [field] of the [degree] of {name}? {value}",
    ),
    "employer": (
        "Which [company] does {name} [work for]? {value}",
        "Which [company] is {name} [employed by]? {value}",
        "At which [company] has {name} a [job]? {value}",
    ),
    "work_city": (
        "In which [city] does {name} [work]? {value}",
        "In which [city] is {name} [based]? {value}",
        "What is the [city] of the [office] of {name}? {value}",
    ),
}

ATTRIBUTES: tuple[str, ...] = tuple(BIOGRAPHY)


@dataclass(frozen=True)
class Sentence:
    """A wording filled in, with the character spans of its parts.

    Attributes:
        text: the sentence.
        subject: where the name or pronoun stands.
        relation: where the words that name the relation stand.
        answer: where the value stands.
    """

    text: str
    subject: Span
    relation: tuple[Span, ...]
    answer: Span


def fill(wording: str, name: str, value: str) -> Sentence:
    """Fill a wording in and say which characters are subject, relation and answer.

    Example:
        >>> fill("{name} was [born in] {value}.", "Ada Oakley", "Paris")
        Sentence(text='Ada Oakley was born in Paris.', subject=(0, 10), relation=((15, 22),), answer=(23, 28))
    """
    text, relation = "", []
    subject = answer = (0, 0)
    for part in re.split(r"(\{name\}|\{value\}|\[[^\]]*\])", wording):
        start = len(text)
        text += {"{name}": name, "{value}": value}.get(part, part.strip("[]"))
        span = (start, len(text))
        if part == "{name}":
            subject = span
        elif part == "{value}":
            answer = span
        elif part.startswith("["):
            relation.append(span)
    return Sentence(text, subject, tuple(relation), answer)
