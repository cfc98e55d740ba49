"""What a dataset of facts is made from."""

from dataclasses import dataclass

from circuits.errors import CircuitsError
from circuits.facts.pools import POOLS
from circuits.facts.wordings import ATTRIBUTES, BIOGRAPHY, QUESTIONS


@dataclass(frozen=True)
class DatasetSettings:
    """What a dataset is made from.

    Attributes:
        people: number of people, 2 to 144,000 with the invented pools.
        qa_id_fraction: share of people whose questions are in training.
        biographies: biographies of each person.
        wordings: sentences for each attribute that biographies draw from, 1 to 5.
        questions: forms of each question in training, 1 or 2; the rest are unseen.
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
    questions: int = 1
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
        if not 1 <= self.questions <= (seen := min(map(len, QUESTIONS.values())) - 1):
            raise CircuitsError(
                f"the number of forms of each question in training is {self.questions}: it must be from 1 to {seen}, "
                "so that one is left to ask in unseen words"
            )
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
