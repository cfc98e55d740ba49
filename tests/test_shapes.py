import pytest
import torch
from jaxtyping import TypeCheckError

from circuits.masks import gini
from circuits.metrics import score_answers


def test_shapes_are_checked_at_run_time(tasks):
    with pytest.raises(TypeCheckError):
        gini(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError):
        score_answers(torch.zeros(4), tasks["bio"])
