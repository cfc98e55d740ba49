"""People → biographies and questions → tokenised tasks with answer positions and token roles."""

from circuits.datasets.facts import (
    FAMILIAR,
    SPLITS,
    DatasetSettings,
    FactDataset,
    check_held_out,
    dataset_of,
    make_dataset,
)
from circuits.datasets.people import Person, make_people
from circuits.datasets.task import Role, Task, tokenise
from circuits.datasets.tokenizer import word_tokenizer
from circuits.datasets.wordings import ATTRIBUTES, BIOGRAPHY, QUESTIONS, Sentence, fill

__all__ = [
    "ATTRIBUTES",
    "BIOGRAPHY",
    "FAMILIAR",
    "QUESTIONS",
    "SPLITS",
    "DatasetSettings",
    "FactDataset",
    "Person",
    "Role",
    "Sentence",
    "Task",
    "check_held_out",
    "dataset_of",
    "fill",
    "make_dataset",
    "make_people",
    "tokenise",
    "word_tokenizer",
]
