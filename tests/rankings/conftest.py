"""A fine-tuned model and what it was before, and a task that the fine-tuned one answers without a mistake."""

from dataclasses import replace

import pytest
import torch

from circuits.models import Model
from circuits.tasks import Task
from tests.conftest import loaded


@pytest.fixture
def pre(family) -> Model:
    return loaded(family, seed=1)


@pytest.fixture
def recalled(model, tasks) -> Task:
    """Questions whose answers are one token: the one that the model predicts."""
    task = tasks["qa_ood"]
    task = task.select(task.answers.loc[task.answers["end"] - task.answers["start"] == 1, "example"].tolist()[:8])
    tokens = task.tokens.clone()
    starts = torch.tensor(task.answers["start"].tolist())
    examples = torch.arange(len(task))
    with torch.no_grad():
        tokens[examples, starts] = model(tokens)[examples, starts - 1].argmax(-1)
    return replace(task, name="recalled", tokens=tokens)
