"""Metrics: from answer logits to exact match and log-probability.

Exact match under greedy decoding equals "every answer token is the argmax under teacher forcing": one forward pass
(docs/method.md, section 6).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from circuits.errors import CircuitsError
from circuits.models import answer_logits
from circuits.statistics import Kind
from circuits.tasks import Task

#: The columns of a scored task: each is a number for every answer.
METRICS: tuple[str, ...] = ("exact_match", "first_token", "log_prob")


@dataclass(frozen=True)
class AnswerTokens:
    """What is known about the answer tokens that logits predict, in the order of ``task.answer_mask.nonzero()``.

    Attributes:
        targets: the right token.
        owner: the row of ``task.answers`` each belongs to.
        answers: how many answers there are.
        first: whether it is the first of its answer.
        foils: for each answer, what its foil has at the first token where the two differ: `logit_diff` compares with
            it.
        foil_places: which of the answer tokens stands at that place.
        alike: the text of an answer that its foil nowhere differs from as far as both go; None if there is none.
        own_foils: whether the foils are the task's own, and not a source's answers.
        source_tokens: the source's answers token by token, if each has as many tokens as the answer it is paired with.
        clean: log-probabilities without intervention, that `kl` compares with.
    """

    targets: Int[Tensor, " answer_token"]
    owner: Int[Tensor, " answer_token"]
    answers: int
    first: Bool[Tensor, " answer_token"]
    foils: Int[Tensor, " answer"] | None = None
    foil_places: Int[Tensor, " answer"] | None = None
    alike: str | None = None
    source_tokens: Int[Tensor, " answer_token"] | None = None
    clean: Float[Tensor, "answer_token d_vocab"] | None = None
    own_foils: bool = False

    @classmethod
    def of(cls, task: Task, source: Task | None = None, device: torch.device | str = "cpu") -> "AnswerTokens":
        """Of a task; its foils are its own, or else the answers of a source with as many answers."""
        where = task.answer_mask.nonzero()
        owner = _owners(task)
        first = torch.ones(len(owner), dtype=torch.bool)
        first[1:] = owner[1:] != owner[:-1]
        foils = places = source_tokens = alike = None
        other = source if task.foils is None else task.foils
        if other is not None and len(other.answers) == len(task.answers):
            foils, places, alike = _foils(task, other)
            foils, places = foils.to(device), places.to(device)
        if source is not None and torch.equal(_owners(source), owner):
            source_tokens = source.tokens[source.answer_mask].to(device)
        targets = task.tokens[where[:, 0], where[:, 1]]
        return cls(
            targets.to(device),
            owner.to(device),
            len(task.answers),
            first.to(device),
            foils,
            places,
            alike,
            source_tokens,
            own_foils=task.foils is not None,
        )

    def check_foils(self) -> None:
        """Raise a `CircuitsError` if there are no foils, or one nowhere differs from its answer."""
        if self.foils is None:
            raise CircuitsError(
                "the metric logit_diff needs a foil for each answer: give the task foils, or a source with other "
                "answers"
            )
        if self.alike is not None:
            mend = "give a source with another answer"
            if self.own_foils:
                mend = "give it another foil, and look whether the tokenizer knows both words"
            raise CircuitsError(
                f"logit_diff cannot tell the answer {self.alike!r} from its foil, which has the same tokens as far as "
                f"both go: {mend}"
            )

    def check_source(self) -> None:
        """Raise a `CircuitsError` if there is no source, or its answers have other numbers of tokens."""
        if self.source_tokens is None:
            raise CircuitsError(
                "the metric source_exact_match needs a source whose answers have as many tokens as the task's"
            )

    def total(self, values: Float[Tensor, "... answer_token"]) -> Float[Tensor, "... answer"]:
        """Sums over each answer's tokens, in double precision."""
        sums = torch.zeros(*values.shape[:-1], self.answers, dtype=torch.float64, device=values.device)
        return sums.index_add_(-1, self.owner, values.double())

    def right(self, logits: Float[Tensor, "... answer_token d_vocab"]) -> Bool[Tensor, "... answer_token"]:
        """Whether the right token has the largest logit."""
        return logits.argmax(-1) == self.targets

    def chosen(
        self, logits: Float[Tensor, "... answer_token d_vocab"], tokens: Int[Tensor, " answer_token"]
    ) -> Float[Tensor, "... answer_token"]:
        """The logit of one token at each place."""
        return logits.gather(-1, tokens.expand(logits.shape[:-1])[..., None])[..., 0]


def exact_match(logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens) -> Float[Tensor, "... answer"]:
    """1 if every token of the answer has the largest logit."""
    return (known.total((~known.right(logits)).float()) == 0).double()


def first_token(logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens) -> Float[Tensor, "... answer"]:
    """1 if the first token of the answer has the largest logit."""
    return known.total((known.right(logits) & known.first).float())


def log_prob(logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens) -> Float[Tensor, "... answer"]:
    """Natural logarithm of the whole answer's probability."""
    logits = logits.float()
    return known.total(known.chosen(logits, known.targets) - logits.logsumexp(-1))


def logit_diff(logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens) -> Float[Tensor, "... answer"]:
    """Logit of the answer's token less that of the foil's, at the first token where the two differ.

    There both are predicted after the same tokens: mostly the first, and for "New York" and "New Delhi" the second.

    Raises:
        CircuitsError: there are no foils, or one is the answer itself, the beginning of it or a continuation.
    """
    known.check_foils()
    assert known.foils is not None
    assert known.foil_places is not None
    told = logits[..., known.foil_places, :].float()
    answers = known.chosen(told, known.targets[known.foil_places])
    return (answers - known.chosen(told, known.foils)).double()


def source_exact_match(
    logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens
) -> Float[Tensor, "... answer"]:
    """1 if every token of the source's answer has the largest logit: it is given.

    Raises:
        CircuitsError: there is no source, or its answers have other numbers of tokens.
    """
    known.check_source()
    assert known.source_tokens is not None
    return (known.total((logits.argmax(-1) != known.source_tokens).float()) == 0).double()


def kl(logits: Float[Tensor, "... answer_token d_vocab"], known: AnswerTokens) -> Float[Tensor, "... answer"]:
    """Kullback-Leibler divergence of the predictions from those without intervention, in nats, summed over tokens.

    Raises:
        CircuitsError: there is no clean run to compare with.
    """
    if known.clean is None:
        raise CircuitsError("the metric kl compares with a clean run: use it with interventions")
    own = logits.float().log_softmax(-1)
    return known.total((known.clean.exp() * (known.clean - own)).sum(-1))


#: A metric: from the logits that predict answer tokens to one number for each answer. Leading axes are kept.
Metric = Callable[[Tensor, AnswerTokens], Tensor]

NAMED_METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "first_token": first_token,
    "log_prob": log_prob,
    "logit_diff": logit_diff,
    "source_exact_match": source_exact_match,
    "kl": kl,
}
#: Those that are 0 or 1; all others are real numbers.
BINARY_METRICS: tuple[Metric, ...] = (exact_match, first_token, source_exact_match)


def metric_of(metric: str | Metric) -> tuple[str, Metric]:
    """Name and function of a metric.

    Raises:
        CircuitsError: there is no metric of that name.
    """
    if callable(metric):
        return str(getattr(metric, "__name__", type(metric).__name__)), metric
    if metric not in NAMED_METRICS:
        raise CircuitsError(f"there is no metric {metric!r}: choose from {', '.join(NAMED_METRICS)}")
    return metric, NAMED_METRICS[metric]


def effect_kind(metric: Metric) -> Kind:
    """What differences of a metric's values are, for intervals and tests of their mean.

    Example:
        >>> effect_kind(exact_match), effect_kind(log_prob)
        ('binary_difference', 'real')
    """
    return "binary_difference" if metric in BINARY_METRICS else "real"


def is_signed(metric: Metric) -> bool:
    """Whether effects on a metric can go up and down: else a mean above zero tells nothing, and is not tested.

    Example:
        >>> is_signed(log_prob), is_signed(kl)
        (True, False)
    """
    return metric is not kl


def score_answers(logits: Float[Tensor, "answer_token d_vocab"], task: Task) -> pandas.DataFrame:
    """Score answer logits, one row for each answer.

    Args:
        logits: as `circuits.models.answer_logits` gives them for the task.
        task: whose answers were predicted.

    Returns:
        ``task.answers`` with ``exact_match`` (every token is the argmax), ``first_token`` (the first one is) and
        ``log_prob`` (natural logarithm of the whole answer's probability), and ``logit_diff`` (logit of the answer's
        token less that of the foil's) if the task has foils.
    """
    return task.answers.assign(**{name: values.numpy() for name, values in answer_scores(logits, task).items()})


def answer_scores(
    logits: Float[Tensor, "answer_token d_vocab"], task: Task, known: AnswerTokens | None = None
) -> dict[str, Shaped[Tensor, " answer"]]:
    """Score answer logits as `score_answers` does, without the table.

    Args:
        logits: as `circuits.models.answer_logits` gives them for the task.
        task: whose answers were predicted.
        known: of the task's answer tokens, where they are scored more than once.

    Returns:
        Each of the `METRICS` for every answer, and ``logit_diff`` if the task has foils, on the CPU.
    """
    known = known or AnswerTokens.of(task, device=logits.device)
    found = {
        "exact_match": exact_match(logits, known).bool().cpu(),
        "first_token": first_token(logits, known).bool().cpu(),
        "log_prob": log_prob(logits, known).cpu(),
    }
    return found if task.foils is None else found | {"logit_diff": logit_diff(logits, known).cpu()}


def _foils(task: Task, source: Task) -> tuple[Int[Tensor, " answer"], Int[Tensor, " answer"], str | None]:
    """For each answer the foil's token where the two first differ, and which answer token that is; an answer alike."""
    foils, places, alike, begun = [], [], None, 0
    for ours, theirs in zip(task.answers.itertuples(), source.answers.itertuples(), strict=True):
        own = task.tokens[ours.example, ours.start : ours.end].tolist()
        other = source.tokens[theirs.example, theirs.start : theirs.end].tolist()
        both = enumerate(zip(own, other, strict=False))
        place = next((place for place, (one, two) in both if one != two), None)
        if place is None and alike is None:
            alike = task.texts[ours.example] if getattr(ours, "value", None) is None else str(ours.value)
        foils.append(other[place or 0])
        places.append(begun + (place or 0))
        begun += len(own)
    return torch.tensor(foils), torch.tensor(places), alike


def _owners(task: Task) -> Int[Tensor, " answer_token"]:
    """The row of ``task.answers`` that each answer token belongs to; a task keeps both in reading order."""
    lengths = torch.as_tensor(task.answers["end"].to_numpy() - task.answers["start"].to_numpy())
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int = 256) -> pandas.DataFrame:
    """Score a model on every answer of a task.

    Args:
        model: a hooked model or a Hugging Face model.
        task: what to predict.
        batch_size: examples in one forward pass.

    Returns:
        One row for each answer: those of ``task.answers`` with ``exact_match``, ``first_token``, ``log_prob``, and if
        the task has foils ``logit_diff``.

    Raises:
        CircuitsError: a foil has the tokens of its answer, or the task was made with another tokenizer.

    Example:
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> tokenizer = word_tokenizer()
        >>> task = dataset.task("qa_ood", tokenizer)
        >>> float(evaluate(new_model("tiny-llama", tokenizer), task).exact_match.mean())
        0.0
    """
    parts, offset = [], 0
    for batch in task.batches(batch_size):
        logits = answer_logits(model, batch)
        scored = score_answers(logits, batch)
        if batch.foils is not None:
            known = AnswerTokens.of(batch, device=logits.device)
            scored["logit_diff"] = logit_diff(logits, known).cpu().numpy()
        parts.append(scored.assign(example=scored["example"] + offset))
        offset += len(batch)
    return pandas.concat(parts, ignore_index=True)
