"""Input signature: how much of an answer's log-probability rests on which tokens before it.

1. The tokens before an answer are parted by span: subject, relation, whatever is named, and ``context``, which is every
   other token but those that all prompts begin with, such as a tokenizer's first one. Of spans that belong to one
   answer alone (``local``: the relation) only those since the answer before count; earlier ones are context.
2. By replacement, which is causal and the one to report: a span's tokens are replaced by those of a donor, an answer
   of another group with another value and, where the task tells several attributes, of another attribute, that has
   as many tokens there and not the same. Where no answer of another attribute has, as in biographies that all tell
   their facts in one order, spans that are not local take those of the same attribute. The effect is the drop of the
   answer's log-probability, mean over donors drawn at random. A span without tokens has none, nor has a context that
   is the same before all answers; a span without donor is not known, and counted.
3. By integrated gradients: the path goes from a prompt of mean embeddings (of the task's own tokens) to the prompt; a
   token's attribution is Σ over the embedding's features of change × mean gradient along the path, and a span's effect
   is the sum over its tokens. They add up to the log-probability less that at the baseline, but for ``delta``. Zero is
   no baseline here: behind a norm that knows no length, all of the path would lie in its first step.
4. A span's share is its mean effect among the sum of all; its interval is that of a ratio of means, by the delta
   method, over groups. Answers of which a span is not known are left out of all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.metrics import evaluate
from circuits.models import LeanModel, Model, lean_model, refuse_hooks
from circuits.progress import track
from circuits.statistics import intervals
from circuits.tasks import Task, one_answer_each

METHODS: tuple[str, ...] = ("replacement", "integrated_gradients")
#: The tokens of no span.
CONTEXT = "context"


def input_signature(
    model: Model,
    task: Task,
    spans: Sequence[str] = ("subject", "relation"),
    *,
    local: Sequence[str] = ("relation",),
    method: str = "replacement",
    by: Sequence[str] = (),
    per_answer: bool = False,
    draws: int = 5,
    seed: int = 0,
    steps: int = 64,
    batch_size: int = 64,
) -> pandas.DataFrame:
    """How much of the answers' log-probability rests on each span of their prompts.

    Args:
        model: loaded with `circuits.load_model`.
        task: whose answers; with several in an example, each is asked after all that stands before it.
        spans: named spans of the task. All other tokens before an answer are ``context``.
        local: those of them that count only since the answer before.
        method: ``replacement`` or ``integrated_gradients``, which needs the package captum.
        by: rows apart for each ``attribute``, for each ``place`` (the answer's order in its example), or both.
        per_answer: keep every answer, for paired comparisons of models; `signature_means` gives the other table.
        draws: donors of each answer and span, fewer where there are not as many.
        seed: of their choice.
        steps: of the path of integrated gradients.
        batch_size: prompts in one pass.

    Returns:
        As `signature_means` gives it. With ``per_answer`` one row for each answer and span: what ``task.answers`` says
        of it, ``place``, its ``log_prob``, ``span``, the span's number of ``tokens``, its ``effect`` in nats, NaN where
        it is not known; its number of ``donors``; of integrated gradients the answer's ``delta``, what attributions
        add up to less what they should.

    Raises:
        CircuitsError: there is no such method or span; no answer has a donor; captum is missing, or a function is
            hooked into the model, which integrated gradients would not see.

    Source:
        docs/method.md, section 8; Sundararajan et al. 2017 (arXiv 1703.01365), by captum, along Gauss and Legendre's
        steps.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> bio = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("bio", tokenizer)
        >>> table = input_signature(load_model(new_model("tiny-llama", tokenizer)), bio)
        >>> table["span"].tolist(), round(float(table["share"].sum()), 6)
        (['subject', 'relation', 'context'], 1.0)
    """
    if method not in METHODS:
        raise CircuitsError(f"there is no method {method!r}: choose from {', '.join(METHODS)}")
    for name, value in (("draws", draws), ("steps", steps)):
        if value < 1:
            raise CircuitsError(f"the number of {name} is {value}: 1 is the least")
    _check_columns(by, [*task.answers, "place"])
    integrate = None if method == "replacement" else _captum(model)
    asked = one_answer_each(task)
    parts = _parts(asked, task, list(dict.fromkeys(spans)), local)
    log_prob = evaluate(model, asked, batch_size)["log_prob"].to_numpy()
    columns: dict[str, Any]
    if integrate is None:
        found, donors = _replaced(
            model, asked, parts, log_prob, local=local, draws=draws, seed=seed, batch_size=batch_size
        )
        columns = {"effect": found, "donors": donors}
    else:
        found, delta = _integrated(integrate, lean_model(model), asked, parts, steps=steps, batch_size=batch_size)
        columns = {"effect": found, "delta": numpy.broadcast_to(delta, found.shape)}
    answers = asked.answers.assign(example=task.answers["example"].to_numpy(), log_prob=log_prob)
    if "place" not in answers:
        answers["place"] = answers.groupby("example")["start"].rank().astype(int) - 1
    table = pandas.concat(
        [
            answers.assign(
                span=span,
                tokens=parts[span].sum(1).numpy(),
                **{name: values[row] for name, values in columns.items()},
            )
            for row, span in enumerate(parts)
        ],
        ignore_index=True,
    )
    return table if per_answer else signature_means(table, by=by)


def signature_means(answers: pandas.DataFrame, by: Sequence[str] = ()) -> pandas.DataFrame:
    """Means over answers: the table that `input_signature` gives without ``per_answer``.

    Args:
        answers: from `input_signature` with ``per_answer``, or several of them joined, with the columns that tell them
            apart, such as ``model``.
        by: rows apart for each value of these columns.

    Returns:
        One row for each span, of each value of ``by``: mean ``effect`` in nats, ``share`` of the sum of all spans'
        effects (negative where a span speaks against the answers; NaN where they add up to nothing), both with
        intervals over groups; the number of ``answers`` of which all spans are known, of those ``left_out``, and of
        answers ``without_donor`` for this span; of integrated gradients the mean size of ``delta``.

    Raises:
        CircuitsError: there is no such column, an answer has several rows for one span, or of no answer all spans are
            known.

    Example:
        >>> answers = pandas.DataFrame({
        ...     "example": [0, 1, 0, 1], "start": 5, "group": [0, 1, 0, 1],
        ...     "span": ["subject", "subject", "context", "context"], "effect": [4.0, 2.0, 1.0, 1.0]})
        >>> signature_means(answers)[["span", "effect", "share"]].to_numpy().tolist()
        [['subject', 3.0, 0.75], ['context', 1.0, 0.25]]
    """
    _check_columns(by, answers)
    tables = [part for _, part in answers.groupby(list(by), sort=False, dropna=False)] if by else [answers]
    found = pandas.concat([_means(part, list(by)) for part in tables], ignore_index=True)
    if not found["answers"].any():
        known = answers.groupby("span", sort=False)["effect"].count()
        missing = ", ".join(known.index[known == 0]) or "one span or another"
        raise CircuitsError(f"no answer has donors for all spans, not for {missing}: give more examples")
    return found


def _check_columns(by: Sequence[str], columns: Iterable[str]) -> None:
    for name in by:
        if name not in columns:
            raise CircuitsError(f"the answers say no {name!r}: take rows apart by columns of theirs")


def _means(answers: pandas.DataFrame, by: list[str]) -> pandas.DataFrame:
    spans = list(answers["span"].unique())
    keys = ["example", "start"]
    parts = [answers[answers["span"] == span].sort_values(keys) for span in spans]
    same = [part[keys].to_numpy().tolist() == parts[0][keys].to_numpy().tolist() for part in parts]
    if not all(same) or parts[0].duplicated(keys).any():
        raise CircuitsError(
            "an answer has several rows for one span, or none: give each model that was joined a column of its own, "
            "and name it in by"
        )
    effects = numpy.stack([part["effect"].to_numpy() for part in parts])
    known = ~numpy.isnan(effects).any(0)
    about = dict(zip(by, parts[0][by].iloc[0], strict=True)) if by else {}
    columns = dict.fromkeys(_MEASURED, numpy.full(len(spans), numpy.nan))
    if known.any():
        columns |= _measured(effects[:, known], parts[0]["group"].to_numpy()[known])
    rows = []
    for row, (span, part) in enumerate(zip(spans, parts, strict=True)):
        found = about | {
            "span": span,
            **{name: values[row] for name, values in columns.items()},
            "answers": int(known.sum()),
            "left_out": int((~known).sum()),
        }
        if "delta" in part:
            found["delta"] = part["delta"].abs().mean()
        else:
            found["without_donor"] = int(numpy.isnan(effects[row]).sum())
        rows.append(found)
    return pandas.DataFrame(rows)


_MEASURED = ("effect", "effect_low", "effect_high", "share", "share_low", "share_high")


def _measured(
    effects: Float[numpy.ndarray, "span answer"], groups: Shaped[numpy.ndarray, " answer"]
) -> dict[str, Float[numpy.ndarray, " span"]]:
    """Of each span mean and share, with their intervals."""
    mean, total = effects.mean(1), effects.sum(0)
    found = [mean, *intervals(effects, groups, kind="real")]
    if total.mean() != 0:
        shares = _shares(effects)
        found += [mean / total.mean(), *intervals(shares, groups, kind="real")]
    return dict(zip(_MEASURED, found, strict=False))


def _shares(effects: Float[numpy.ndarray, "span answer"]) -> Float[numpy.ndarray, "span answer"]:
    """Numbers whose means are the spans' shares, and vary as these do, to first order."""
    total = effects.sum(0)
    share = effects.mean(1, keepdims=True) / total.mean()
    found: numpy.ndarray = share + (effects - share * total) / total.mean()
    return found


def answer_shares(answers: pandas.DataFrame) -> pandas.DataFrame:
    """What each answer says of the spans' shares, for paired comparisons: a ratio of means has no value for one answer.

    Args:
        answers: from `input_signature` with ``per_answer``, of one model and task.

    Returns:
        The rows of answers of which all spans are known, with the column ``share``: its mean over answers is the
        span's share, and its spread that of the share, to first order (the delta method).

    Example:
        >>> answers = pandas.DataFrame({
        ...     "example": [0, 1, 0, 1], "start": 5, "group": [0, 1, 0, 1],
        ...     "span": ["subject", "subject", "context", "context"], "effect": [4.0, 2.0, 1.0, 1.0]})
        >>> answer_shares(answers).groupby("span")["share"].mean().to_dict()
        {'context': 0.25, 'subject': 0.75}
    """
    table = answers.pivot(index=["example", "start"], columns="span", values="effect").dropna()
    effects = table.to_numpy().T
    if effects.shape[1] and effects.sum(0).mean() != 0:
        effects = _shares(effects)
    else:
        effects = numpy.full_like(effects, numpy.nan)
    keys = ["example", "start", "span"]
    shares = pandas.DataFrame(effects.T, table.index, table.columns).reset_index().melt(keys[:2], value_name="share")
    return answers.merge(shares, on=keys)


def _parts(
    asked: Task, task: Task, spans: Sequence[str], local: Sequence[str]
) -> dict[str, Bool[Tensor, "answer pos"]]:
    """Where the tokens of each span are before each answer, and those of none."""
    if CONTEXT in spans:
        raise CircuitsError(f"the span {CONTEXT!r} is that of all other tokens: give this one another name")
    positions = torch.arange(asked.tokens.shape[1])
    start = torch.as_tensor(asked.answers["start"].to_numpy(copy=True))[:, None]
    before = positions < start
    begun = before.all(0) & (asked.tokens == asked.tokens[0]).all(0)
    opening = begun.cumprod(0).bool()  # what all prompts begin with
    ends = task.right_padded().answers
    previous = ends.sort_values(["example", "start"]).groupby("example")["end"].shift(fill_value=0).loc[ends.index]
    since = positions >= torch.as_tensor(previous.to_numpy(copy=True))[:, None]
    parts = {span: before & asked.span(span) & (since if span in local else True) for span in spans}
    named = torch.stack([opening.expand_as(before), *parts.values()]).any(0)
    return parts | {CONTEXT: before & ~named}


def _replaced(
    model: Model,
    asked: Task,
    parts: dict[str, Bool[Tensor, "answer pos"]],
    log_prob: Float[numpy.ndarray, " answer"],
    *,
    local: Sequence[str],
    draws: int,
    seed: int,
    batch_size: int,
) -> tuple[Float[numpy.ndarray, "span answer"], Int[numpy.ndarray, "span answer"]]:
    """The mean drop of each answer's log-probability over its donors, and how many it has."""
    generator = torch.Generator().manual_seed(seed)
    effects, counts = [], []
    for span, inside in track(parts.items(), f"replace spans of {asked.name}", len(parts), "span"):
        donors = _donors(asked, inside, draws, generator, alike=span == CONTEXT, local=span in local)
        pairs = torch.tensor(list(donors), dtype=torch.long)
        ours, theirs = pairs.view(-1, 2).T
        count, lost = torch.bincount(ours, minlength=len(asked)), torch.zeros(len(asked)).double()
        if len(pairs):
            tokens, replaced = asked.tokens[ours], asked.select(ours)
            # both have as many tokens there, in the order of the text
            tokens[inside[ours]] = asked.tokens[theirs][inside[theirs]]
            replaced = replace(replaced, tokens=tokens[:, : replaced.tokens.shape[1]])
            after = evaluate(model, replaced, batch_size)["log_prob"].to_numpy()
            lost.index_add_(0, ours, torch.as_tensor(log_prob[ours.numpy()] - after))
        # nothing rests on no tokens; what has no donor is 0 / 0
        effects.append(torch.where(inside.any(1), lost / count, 0.0))
        counts.append(count)
    return torch.stack(effects).numpy(), torch.stack(counts).numpy()


def _donors(
    asked: Task,
    inside: Bool[Tensor, "answer pos"],
    draws: int,
    generator: torch.Generator,
    *,
    alike: bool,
    local: bool,
) -> Iterator[tuple[int, int]]:
    """Pairs of an answer and one whose tokens replace its own; if ``alike`` the same ones, for want of others."""
    answers = asked.answers
    several = "attribute" in answers and answers["attribute"].nunique() > 1
    names = ["group", "value", *(["attribute"] if several else [])]
    codes = [torch.as_tensor(pandas.factorize(answers[name])[0]) for name in names]
    lengths = inside.sum(1)
    for length in lengths[lengths > 0].unique():
        members = (lengths == length).nonzero().flatten()
        tokens = asked.tokens[members][inside[members]].view(len(members), -1)
        for answer, own in zip(members.tolist(), tokens, strict=True):
            differs = torch.stack([code[members] != code[answer] for code in codes])
            about_others, changed = differs.all(0), (tokens != own).any(1)
            candidates = members[about_others & changed]
            if len(candidates) == 0 and not local:
                candidates = members[differs[:2].all(0) & changed]
            if alike and len(candidates) == 0:
                candidates = members[about_others][:1]
            for donor in candidates[torch.randperm(len(candidates), generator=generator)[:draws]].tolist():
                yield answer, donor


def _captum(model: Model) -> Any:
    """Captum's class, for a model that it can be applied to."""
    refuse_hooks(model, "integrated gradients are taken past it")
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise CircuitsError(
            "integrated gradients need the package captum: install fact-circuits[attributions]"
        ) from None
    return IntegratedGradients


def _integrated(
    integrated_gradients: Any,
    lean: LeanModel,
    asked: Task,
    parts: dict[str, Bool[Tensor, "answer pos"]],
    *,
    steps: int,
    batch_size: int,
) -> tuple[Float[numpy.ndarray, "span answer"], Float[numpy.ndarray, " answer"]]:
    """The attributions of each span to each answer's log-probability, and what they miss of adding up."""
    every = torch.stack(list(parts.values())).any(0)
    nowhere = torch.zeros(asked.tokens.shape[1], dtype=torch.long)
    with torch.no_grad():
        mean = lean.embed(asked.tokens[every][None], nowhere[:1].expand(int(every.sum())))[0].mean(0)
    effects, deltas = [], []
    for start in track(range(0, len(asked), batch_size), f"integrate {asked.name}", -(-len(asked) // batch_size)):
        rows = torch.arange(start, min(start + batch_size, len(asked)))
        batch, inside = asked.select(rows), every[rows]
        width = batch.tokens.shape[1]
        with torch.no_grad():
            stream = lean.embed(batch.tokens)
            # learned positions stay, and so do the tokens of no span
            change = mean - lean.embed(batch.tokens, nowhere[:width])
            baseline = stream + change * inside[:, :width, None].to(change)
        attribution, delta = integrated_gradients(_Scorer(lean, batch)).attribute(
            stream,
            baseline,
            additional_forward_args=torch.arange(len(batch), device=lean.device),
            n_steps=steps,
            internal_batch_size=len(batch),
            return_convergence_delta=True,
        )
        tokens = attribution.detach().double().sum(-1).cpu()
        effects.append(torch.stack([(tokens * at[rows, :width]).sum(1) for at in parts.values()]))
        deltas.append(delta.detach().double().cpu())
    return torch.cat(effects, 1).numpy(), torch.cat(deltas).numpy()


class _Scorer:
    """Log-probabilities of a task's answers, one of each example, from the stream before the first layer."""

    def __init__(self, lean: LeanModel, task: Task) -> None:
        self._lean = lean
        self._mask, self._tokens = task.answer_mask.to(lean.device), task.tokens.to(lean.device)

    def __call__(
        self, stream: Float[Tensor, "row pos d_model"], examples: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """That of each row's example."""
        stream = self._lean.resume(stream, 0)
        row, position = self._mask[examples].nonzero().T
        logits = self._lean.unembed(stream[row, position - 1]).float()
        targets = self._tokens[examples[row], position]
        of_tokens = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return torch.zeros(len(stream), device=stream.device).index_add(0, row, of_tokens)
