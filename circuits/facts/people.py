"""Made-up people: unique names, six attributes drawn independently, and a split into QA-ID and QA-OOD.

1. Every draw comes from ``random.Random`` seeded with the dataset's seed, the person and the purpose, and uses only
   ``random()``, whose stream Python guarantees; so a person does not depend on how many others there are, and the
   files are the same to the byte on every machine.
2. Names are first × last names without repetition while those suffice, then first × middle × last. Name tokens are
   shared among people on purpose: a model must bind the pair to recall anything.
3. A random permutation decides whose questions are in training (``qa_id``) and whose are held out (``qa_ood``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from circuits.errors import CircuitsError
from circuits.facts.pools import DAYS, MONTHS, POOLS, YEARS


@dataclass(frozen=True)
class Person:
    """One made-up person.

    Attributes:
        person: the number of the person, from 0.
        name: the full name, unique in the dataset.
        pronoun: ``She`` or ``He``.
        split: ``qa_id`` if the person's questions are in training, ``qa_ood`` if they are held out.
        facts: attribute → value.
    """

    person: int
    name: str
    pronoun: str
    split: str
    facts: dict[str, str]


def draw_index(random: Random, count: int) -> int:
    """A number from 0 to ``count - 1``."""
    return int(random.random() * count)


def permutation(random: Random, count: int) -> list[int]:
    """The numbers from 0 to ``count - 1`` in random order (Fisher and Yates)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draw_index(random, last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def _date(random: Random) -> str:
    month, day, year = (pool[draw_index(random, len(pool))] for pool in (MONTHS, DAYS, YEARS))
    return f"{month} {day}, {year}"


def make_people(count: int, seed: int = 0, qa_id_fraction: float = 0.5, *, pools: str = "invented") -> Iterator[Person]:
    """Make up people, one at a time.

    Args:
        count: how many people, at least 2.
        seed: the seed of every draw.
        qa_id_fraction: the share of people whose questions are in training, between 0 and 1; at least one person
            falls on each side.
        pools: ``invented`` or ``familiar`` names and values, see `circuits.facts.pools`.

    Raises:
        CircuitsError: there are no such pools or not enough names, or the share is not between 0 and 1.

    Example:
        >>> [person.name for person in make_people(3, seed=1)]
        ['Benedict Rutherford', 'Fatima Kirkpatrick', 'Benedict Ravenscroft']
    """
    if pools not in POOLS:
        raise CircuitsError(f"there are no pools {pools!r}: choose from {', '.join(POOLS)}")
    chosen = POOLS[pools]
    first_names, last_names, most = chosen.first_names, chosen.last_names, chosen.most_people
    if not 2 <= count <= most:
        raise CircuitsError(f"the number of people is {count}: it must be from 2 to {most}")
    if not 0 < qa_id_fraction < 1:
        raise CircuitsError(f"the QA-ID fraction is {qa_id_fraction}: it must lie between 0 and 1")
    short = len(first_names) * len(last_names)
    names = permutation(Random(f"{seed}/names"), short if count <= short else most)
    in_training = max(1, min(count - 1, round(count * qa_id_fraction)))
    trained = set(permutation(Random(f"{seed}/split"), count)[:in_training])
    for person in range(count):
        rest, last = divmod(names[person], len(last_names))
        middle, first = divmod(rest, len(first_names))
        parts = [first_names[first], *([last_names[middle]] if count > short else []), last_names[last]]
        random = Random(f"{seed}/person/{person}")
        yield Person(
            person,
            " ".join(parts),
            chosen.pronouns[parts[0]],
            "qa_id" if person in trained else "qa_ood",
            {"birth_date": _date(random)}
            | {
                attribute: pool[draw_index(random, len(pool))]
                for attribute, pool in {
                    "birth_city": chosen.cities,
                    "university": chosen.universities,
                    "major": chosen.majors,
                    "employer": chosen.employers,
                    "work_city": chosen.cities,
                }.items()
            },
        )
