"""What is measured on: a model of the study's shape, and its questions. Speed does not depend on training."""

import tempfile

from circuits.datasets import DatasetSettings, Task, make_dataset, word_tokenizer
from circuits.models import Model, load_model
from circuits.training import new_model


def study_model(family: str = "llama") -> Model:
    tokenizer = word_tokenizer()
    return load_model(new_model(f"tiny-{family}", tokenizer), tokenizer=tokenizer)


def study_task() -> Task:
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, DatasetSettings(people=100))
        return Task.from_dataset(dataset, "qa_ood", word_tokenizer())
