"""Metrics: from answer logits to exact match and log-probability, and intervals around means.

Exact match under greedy decoding equals "every answer token is the argmax under teacher forcing": one forward pass
(docs/method.md, section 6).
"""

from collections.abc import Sequence

import numpy
import pandas
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from circuits.datasets import Task
from circuits.models import answer_logits

#: The columns of a scored task: each is a number for every answer.
METRICS: tuple[str, ...] = ("exact_match", "first_token", "log_prob")


def score_answers(logits: Float[Tensor, "answer_token d_vocab"], task: Task) -> pandas.DataFrame:
    """Score answer logits, one row for each answer.

    Args:
        logits: as `circuits.models.answer_logits` gives them for the task.
        task: whose answers were predicted.

    Returns:
        ``task.answers`` with ``exact_match`` (every token is the argmax), ``first_token`` (the first one is) and
        ``log_prob`` (natural logarithm of the whole answer's probability).
    """
    return task.answers.assign(**{name: values.numpy() for name, values in answer_scores(logits, task).items()})


def answer_scores(logits: Float[Tensor, "answer_token d_vocab"], task: Task) -> dict[str, Shaped[Tensor, " answer"]]:
    """Score answer logits as `score_answers` does, without the table.

    Returns:
        Each of the `METRICS` for every answer, on the CPU.
    """
    where = task.answer_mask.nonzero()
    targets = task.tokens[where[:, 0], where[:, 1]].to(logits.device)
    right = (logits.argmax(-1) == targets).cpu()
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].double().cpu()
    owner = _owners(task)
    count = len(task.answers)
    first = torch.ones(len(owner), dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    wrong = torch.zeros(count).index_add_(0, owner, (~right).float())
    return {
        "exact_match": wrong == 0,
        "first_token": right[first],
        "log_prob": torch.zeros(count, dtype=torch.float64).index_add_(0, owner, log_probs),
    }


def _owners(task: Task) -> Int[Tensor, " answer_token"]:
    """The row of ``task.answers`` that each answer token belongs to; a task keeps both in reading order."""
    lengths = torch.as_tensor((task.answers["end"] - task.answers["start"]).to_numpy(copy=True))
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int = 256) -> pandas.DataFrame:
    """Score a model on every answer of a task.

    Args:
        model: a hooked model or a Hugging Face model.
        task: what to predict.
        batch_size: examples in one forward pass.

    Returns:
        One row for each answer: ``example``, ``person``, ``attribute``, ``value``, ``start``, ``end``,
        ``exact_match``, ``first_token``, ``log_prob``.

    Example:
        >>> from circuits.datasets import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> tokenizer = word_tokenizer()
        >>> task = Task.from_dataset(dataset, "qa_ood", tokenizer)
        >>> float(evaluate(new_model("tiny-llama", tokenizer), task).exact_match.mean())
        0.0
    """
    parts, offset = [], 0
    for batch in task.batches(batch_size):
        scored = score_answers(answer_logits(model, batch), batch)
        parts.append(scored.assign(example=scored["example"] + offset))
        offset += len(batch)
    return pandas.concat(parts, ignore_index=True)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent draws and its interval by Student's t.

    Returns:
        mean, lower and upper end; both ends are NaN for a single draw.

    Example:
        >>> [round(value, 2) for value in mean_interval([0.1, 0.2, 0.3])]
        [0.2, -0.05, 0.45]
    """
    from scipy import stats

    sample = numpy.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.sem(sample) * stats.t.ppf((1 + level) / 2, len(sample) - 1))
    return mean, mean - half, mean + half
