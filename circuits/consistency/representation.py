"""Representation consistency: how alike two tasks' activations are where they are about the same fact.

1. A fact is what an answer of each task tells: the same group (a person, say), and the same attribute where both tasks
   have attributes. The first answer that tells it, in each task, makes the pair.
2. Activations are read at one token of each: the one that predicts the answer (``last``), or a span's last token before
   the answer. Each task's are centred: what all of its prompts have in common is taken out.
3. The cosine of a pair is set beside those of mismatched pairs, each mean over all of them: the same attribute of
   another group, and another attribute of the same group. A fact is retrieved if no other fact's activation in the
   other task is as near; among the mismatched of a kind, if none of these is.
4. Linear CKA over the set of pairs is ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms, X and Y centred, ``[pair, width]``. That
   of mismatched pairs, each fact beside another of its attribute or group, is what a set of this size and width and
   these attributes gives by itself: CKA is biased upwards where there are few pairs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.consistency.pairs import KINDS
from circuits.errors import CircuitsError
from circuits.models import Model, capture, check_task, shape_of
from circuits.statistics import intervals
from circuits.tasks import Task, facts_in_common
from circuits.units import Component, Head, KVGroup, ModelShape

#: Where activations are read: whole ones of a layer, and those of its heads.
_SITES: tuple[str, ...] = (*Component.NAMES, "q", "k", "v", "z")
#: Cosines that rounding alone sets apart are the same.
_TIE = 1e-6
#: Pairs at a time, of those that each is compared with all.
_ROWS = 1_024


def linear_cka(x: Float[Tensor, "example width"], y: Float[Tensor, "example other_width"]) -> float:
    """Linear centred kernel alignment of two sets of activations of the same examples, between 0 and 1.

    Args:
        x: one row for each example; it need not be centred.
        y: those of the same examples elsewhere.

    Returns:
        1 for sets that differ by a rotation, a shift and a scale; NaN where all rows of a set are alike.

    Source:
        Kornblith et al. 2019 (arXiv 1905.00414), section 3: HSIC with linear kernels, normalised.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 5), 6), round(linear_cka(x, x[:, :1]), 2)
        (1.0, 0.32)
    """
    x, y = _centred(x), _centred(y)
    return _cross(x, y) / (_cross(x, x) * _cross(y, y)) ** 0.5 if _varies(x) and _varies(y) else float("nan")


def _centred(x: Tensor) -> Tensor:
    """Double precision, without the mean; exactly zero where rounding alone sets rows apart."""
    x = x.double()
    centred = x - x.mean(0)
    noise = 1e-5 * x.square().sum(-1).mean().sqrt()
    return centred if bool(torch.linalg.vector_norm(centred, dim=-1).max() > noise) else torch.zeros_like(x)


def _varies(centred: Tensor) -> bool:
    return bool(centred.any())


def _cross(x: Tensor, y: Tensor) -> float:
    """‖XᵀY‖², by features or by examples, whichever is cheaper."""
    if x.shape[1] * y.shape[1] < len(x) * (x.shape[1] + y.shape[1]):
        return float((x.T @ y).square().sum())
    return float(((x @ x.T) * (y @ y.T)).sum())


@torch.no_grad()
def representation_consistency(
    model: Model,
    task: Task,
    other: Task,
    *,
    sites: Sequence[str] = ("resid_post",),
    spans: Sequence[str] = ("last",),
    per_pair: bool = False,
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> pandas.DataFrame:
    """How alike the activations of two tasks are where they are about the same fact, layer by layer.

    Args:
        model: loaded with `circuits.load_model`.
        task: in which facts are told one way, such as biographies.
        other: in which they are told another way, such as questions; with groups in common.
        sites: which activations: ``resid_pre``, ``attn_out``, ``resid_mid``, ``mlp_out``, ``resid_post``, and of each
            head ``q``, ``k``, ``v``, ``z``.
        spans: at which token: ``last``, the one that predicts the answer, or a span of both tasks, the last token of it
            before the answer.
        per_pair: keep every pair, for paired comparisons of models.
        draws: mismatched sets that a mismatched CKA is the mean of.
        seed: of these.
        batch_size: examples in one pass.

    Returns:
        One row for each ``site``, ``span``, layer (and head) and ``kind``: ``unit``, ``layer``, ``index`` (−1 for whole
        activations); ``cosine``, mean over pairs, with its interval over groups; ``cka``; ``retrieval``, the share of
        the facts of ``task`` that are nearest to themselves in ``other``, with its interval, and what ``chance`` gives;
        the number of ``pairs``. The kinds are ``matched`` (retrieval is among all facts), ``same_attribute`` (of other
        groups; retrieval is among these and the fact itself) and, where tasks have attributes, ``same_group`` (of other
        attributes). NaN where all activations of a task are alike, as embeddings of a last
        token that all prompts share. With ``per_pair`` one row for each of these and each pair, without intervals and
        CKA: ``group``, ``attribute``, ``example`` and ``other_example`` say which.

    Raises:
        CircuitsError: a task names no groups, or there are fewer than three facts in common; there is no such site or
            span, or fewer than three facts have it.

    Source:
        docs/method.md, section 8; the linear CKA of Kornblith et al. 2019.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> bio, questions = (dataset.task(split, tokenizer) for split in ("bio", "qa_id"))
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> table = representation_consistency(model, bio, questions)
        >>> table[["layer", "kind", "pairs"]].head(3).to_numpy().tolist()
        [[0, 'matched', 12], [0, 'same_attribute', 12], [0, 'same_group', 12]]
    """
    for site in sites:
        if site not in _SITES:
            raise CircuitsError(f"there is no site {site!r}: choose from {', '.join(_SITES)}")
    if draws < 1:
        raise CircuitsError(f"the number of draws is {draws}: 1 is the least")
    tasks = tuple(one.right_padded() for one in (task, other))
    facts = _facts(*tasks)
    shape = shape_of(model)
    places = [_places(one, facts[f"answer_{side}"], spans) for side, one in enumerate(tasks)]
    shared = {}
    for span in spans:
        there = (places[0][span] >= 0) & (places[1][span] >= 0)
        if int(there.sum()) < 3:
            raise CircuitsError(
                f"{int(there.sum())} facts have the span {span!r} before their answers in both tasks: 3 are the least"
            )
        shared[span] = there
    read = [
        _read(model, one, where, facts[f"example_{side}"], sites, batch_size, shape.n_layers)
        for side, (one, where) in enumerate(zip(tasks, places, strict=True))
    ]
    pairs_of = {
        span: _Pairs(facts[there.numpy()].reset_index(drop=True), draws, seed) for span, there in shared.items()
    }
    rows: list[dict[str, Any]] = []
    each: list[pandas.DataFrame] = []
    for (site, layer, span), ours in read[0].items():
        there, pairs, theirs = shared[span], pairs_of[span], read[1][site, layer, span]
        for index in range(ours.shape[1]):
            x, y = ours[there, index], theirs[there, index]
            unit = _unit(site, layer, index, shape)
            about = {"site": site, "span": span, "unit": str(unit), "layer": layer, "index": getattr(unit, "index", -1)}
            if per_pair:
                each.append(pairs.about)
                rows.append(about | pairs.each(x, y))
            else:
                rows += [about | row for row in pairs.means(x, y)]
    names = ["site", "span", "unit", "layer", "index", "kind"]
    if not per_pair:
        table = pandas.DataFrame(rows)
        return table[[*names, *(name for name in table if name not in names)]]
    lengths = [len(one) for one in each]
    columns = {name: numpy.repeat([row[name] for row in rows], lengths) for name in names[:-1]}
    measured = {name: numpy.concatenate([row[name] for row in rows]) for name in ("cosine", "retrieved")}
    table = pandas.concat(each, ignore_index=True).assign(**columns, **measured)
    names += [name for name in table if name not in (*names, *measured, "chance")]
    return table[[*names, *measured, "chance"]]


def _unit(site: str, layer: int, index: int, shape: ModelShape) -> Component | Head | KVGroup:
    if site in Component.NAMES:
        return Component(layer, site)
    grouped = site in ("k", "v") and shape.n_key_value_heads < shape.n_heads
    return KVGroup(layer, index) if grouped else Head(layer, index)


def _facts(task: Task, other: Task) -> pandas.DataFrame:
    facts = facts_in_common(task, other)
    if len(facts) < 3:
        raise CircuitsError(
            f"{task.name} and {other.name} have {len(facts)} facts in common: give tasks with 3 or more, in the same "
            "groups"
        )
    return facts


def _places(task: Task, answers: "pandas.Series[Any]", spans: Sequence[str]) -> dict[str, Int[Tensor, " pair"]]:
    """Where each answer's activation is read, for each span; −1 where there is no such token."""
    chosen = task.answers.iloc[answers.to_numpy()]
    example, start = (torch.as_tensor(chosen[name].to_numpy(copy=True)) for name in ("example", "start"))
    positions = torch.arange(task.tokens.shape[1])
    found = {}
    for span in spans:
        if span in ("all", "answer"):
            raise CircuitsError(f"the span {span!r} is no place in a prompt: choose from last and spans of both tasks")
        # an example of several answers has several last tokens: this answer's is just before it
        inside = (positions < start[:, None]) & (task.span(span)[example] | torch.tensor(span == "last"))
        found[span] = (inside * (positions + 1)).amax(1) - 1
    return found


def _read(
    model: Model,
    task: Task,
    places: dict[str, Int[Tensor, " pair"]],
    examples: "pandas.Series[Any]",
    sites: Sequence[str],
    batch_size: int,
    n_layers: int,
) -> dict[tuple[str, int, str], Float[Tensor, "pair unit width"]]:
    """Activations at each pair's place; those of whole activations have one unit."""
    check_task(model, task)
    wanted = [(layer, site) for site in sites for layer in range(n_layers)]
    parts: dict[tuple[str, int, str], list[Tensor]] = {}
    order = examples.to_numpy()
    for start in range(0, len(order), batch_size):
        batch = slice(start, start + batch_size)
        kept = capture(model, task.select(order[batch].tolist()).tokens, wanted)
        for layer, site in wanted:
            activation = kept[layer, site]
            for span, where in places.items():
                at = where[batch].clamp(min=0).to(activation.device)
                read = activation[torch.arange(len(at), device=at.device), at].float().cpu()
                parts.setdefault((site, layer, span), []).append(read if read.dim() == 3 else read[:, None])
    return {key: torch.cat(found) for key, found in parts.items()}


class _Pairs:
    """Facts, and which of them are mismatched with which.

    Attributes:
        kinds: of pairs.
        about: one row for each kind and pair that has anything to be compared with, and ``chance``.
    """

    def __init__(self, facts: pandas.DataFrame, draws: int, seed: int) -> None:
        group = torch.as_tensor(pandas.factorize(facts["group"])[0])
        known = "attribute" in facts
        attribute = torch.as_tensor(pandas.factorize(facts["attribute"])[0]) if known else torch.zeros_like(group)
        self._codes = {"group": group, "attribute": attribute}
        self.kinds = KINDS[: 3 if known else 2]
        generator = torch.Generator().manual_seed(seed)
        self._mismatched = {
            kind: [_mismatched(self._codes[_ALIKE[kind]], generator) for _ in range(draws)] for kind in self.kinds[1:]
        }
        self._parts = [slice(start, start + _ROWS) for start in range(0, len(facts), _ROWS)]
        renamed = facts.rename(columns={"example_0": "example", "example_1": "other_example"})
        about = renamed[[name for name in ("group", "attribute", "example", "other_example") if name in renamed]]
        counts = {kind: torch.cat([self._rivals(kind, rows).sum(1) for rows in self._parts]) for kind in self.kinds}
        # a mean over no rivals is 0 / 0
        self._kept = {kind: (count > 0) | (kind == "matched") for kind, count in counts.items()}
        tables = [
            about.assign(kind=kind, chance=1 / (1 + counts[kind].numpy()))[kept.numpy()]
            for kind, kept in self._kept.items()
        ]
        self.about = pandas.concat(tables, ignore_index=True)
        told = self.about["kind"].to_numpy()
        self._of = {kind: numpy.flatnonzero(told == kind) for kind in self.kinds}

    def _rivals(self, kind: str, rows: slice) -> Bool[Tensor, "pair candidate"]:
        """Which facts each of some is compared with, itself apart."""
        group, attribute = (code[rows, None] == code for code in self._codes.values())
        if kind == "matched":
            return ~(group & attribute)
        return attribute & ~group if kind == "same_attribute" else group & ~attribute

    def each(
        self, x: Float[Tensor, "pair width"], y: Float[Tensor, "pair other_width"]
    ) -> dict[str, Float[numpy.ndarray, " row"]]:
        """``cosine`` and ``retrieved`` of each row of ``about``."""
        x, y = (_centred(one) for one in (x, y))
        if not (_varies(x) and _varies(y)):
            return {name: numpy.full(len(self.about), numpy.nan) for name in ("cosine", "retrieved")}
        x, y = (torch.nn.functional.normalize(one, dim=-1) for one in (x, y))
        cosines, hits = [], []
        for kind in self.kinds:
            for rows in self._parts:
                among, cosine = self._rivals(kind, rows), x[rows] @ y.T
                own, kept = cosine.diagonal(rows.start), self._kept[kind][rows]
                mean = own if kind == "matched" else (cosine * among).sum(1) / among.sum(1)
                cosines.append(mean[kept])
                hits.append((own > cosine.masked_fill(~among, -2).amax(1) + _TIE)[kept])
        return {"cosine": torch.cat(cosines).numpy(), "retrieved": torch.cat(hits).double().numpy()}

    def means(self, x: Float[Tensor, "pair width"], y: Float[Tensor, "pair other_width"]) -> Iterator[dict[str, Any]]:
        """One row for each kind."""
        each = self.each(x, y)
        groups, chance = (self.about[name].to_numpy() for name in ("group", "chance"))
        for kind, rows in self._of.items():
            found: dict[str, Any] = {"kind": kind}
            found |= _mean("cosine", each["cosine"][rows], groups[rows], "bounded_difference")
            found["cka"] = self._cka(kind, x, y)
            found |= _mean("retrieval", each["retrieved"][rows], groups[rows], "share")
            mean = float(chance[rows].mean()) if len(rows) else numpy.nan
            yield found | {"chance": mean, "pairs": len(rows)}

    def _cka(self, kind: str, x: Tensor, y: Tensor) -> float:
        if kind == "matched":
            return linear_cka(x, y)
        found = [linear_cka(x[ours], y[theirs]) for ours, theirs in self._mismatched[kind] if len(ours) > 2]
        return float(numpy.mean(found)) if found else float("nan")


#: What the facts of a mismatched pair have in common.
_ALIKE = {"same_attribute": "attribute", "same_group": "group"}


def _mismatched(
    block: Int[Tensor, " pair"], generator: torch.Generator
) -> tuple[Int[Tensor, " mismatched"], Int[Tensor, " mismatched"]]:
    """Each fact beside another of its block, in a circle drawn at random; facts alone in theirs are left out."""
    ours, theirs = [], []
    for which in block.unique():
        members = (block == which).nonzero().flatten()
        if len(members) > 1:
            circle = members[torch.randperm(len(members), generator=generator)]
            ours.append(circle)
            theirs.append(circle.roll(1))
    empty = [torch.zeros(0, dtype=torch.long)]
    return torch.cat(ours or empty), torch.cat(theirs or empty)


def _mean(name: str, values: numpy.ndarray, groups: numpy.ndarray, kind: Any) -> dict[str, float]:
    """A mean and its interval; NaN without values."""
    if len(values) == 0 or numpy.isnan(values).any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    low, high = intervals(values, groups, kind=kind)
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
