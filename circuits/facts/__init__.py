"""Made-up people → biographies and questions: one source of tasks."""

from circuits.facts.dataset import SPLITS, FactDataset, make_dataset
from circuits.facts.opening import (
    check_task_name,
    check_task_names,
    needs_people,
    open_task,
    people_of,
    task_name,
)
from circuits.facts.people import Person, make_people
from circuits.facts.rows import example_of
from circuits.facts.settings import FAMILIAR, DatasetSettings
from circuits.facts.tokenizer import word_tokenizer
from circuits.facts.training_data import check_held_out, dataset_of
from circuits.facts.wordings import ATTRIBUTES, BIOGRAPHY, QUESTIONS, Sentence, fill

__all__ = [
    "ATTRIBUTES",
    "BIOGRAPHY",
    "FAMILIAR",
    "QUESTIONS",
    "SPLITS",
    "DatasetSettings",
    "FactDataset",
    "Person",
    "Sentence",
    "check_held_out",
    "check_task_name",
    "check_task_names",
    "dataset_of",
    "example_of",
    "fill",
    "make_dataset",
    "make_people",
    "needs_people",
    "open_task",
    "people_of",
    "task_name",
    "word_tokenizer",
]
