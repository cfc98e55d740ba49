"""What is measured on: a model of the study's shape, and its questions. Speed does not depend on training."""

import tempfile

from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.models import Model, load_model
from circuits.tasks import Task
from circuits.training import new_model


def study_model(family: str = "llama") -> Model:
    tokenizer = word_tokenizer()
    return load_model(new_model(f"tiny-{family}", tokenizer), tokenizer=tokenizer)


def study_task() -> Task:
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, DatasetSettings(people=100))
        return dataset.task("qa_ood", word_tokenizer())
