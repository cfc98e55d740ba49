"""Rankings of heads and neurons: Shared Size and its rivals (docs/method.md, section 5).

1. Every ranking is a function of the same evidence and a kind of unit, and gives a table of all units, best first.
2. ``shared_size``: how many of the unit's parameters are shared; ``graft_size``: how many are in the graft.
   ``bio_trace``, ``qa_trace``: the sum of the task's gradient trace over the unit's parameters. ``change``: the sum of
   |θ_ft − θ_pre|. In each, a head gets its equal share of its key/value group.
3. ``ablation``: how far the task's log-probability falls when the unit alone puts out zero.
   ``gradient_x_activation``: its first-order estimate, how much the loss would change.
4. ``random``: numbers drawn from the seed, the control for all of them.
5. Units with equal scores stand in an order drawn from the seed, and such a ranking is made several times: one that
   scores all units alike, as Shared Size does where nothing is shared, is then no better than ``random``.
6. Two rankings agree as far as their scores correlate by rank (Spearman), ties at their mean rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions import run_interventions, single
from circuits.masks import ParameterMask
from circuits.masks.mask import check_mask
from circuits.models import (
    Model,
    checkpoint_of,
    identity,
    parameters_of,
    refuse_hooks,
    require_start,
    same_parameters,
    shape_of,
)
from circuits.rankings.subsets import Kind, unit_sums
from circuits.storage import digest
from circuits.tasks import Task
from circuits.tracing import GradientTrace
from circuits.units import Head


@dataclass(frozen=True)
class Evidence:
    """What is known of a fine-tuned model; each ranking needs a part of it.

    Attributes:
        fine_tuned: θ_ft, whose units are ranked.
        pre: θ_pre; for ``change``.
        traces: task → gradient trace of θ_ft; each is a ranking, such as ``bio_trace`` of ``bio``, and the last one
            gives ``gradient_x_activation``.
        shared: the shared parameters; for ``shared_size``.
        grafted: the parameters of a graft; for ``graft_size``.
        task: what ablation is scored on; for ``ablation``.
        seed: of ``random``.
        check_start: refuse a ``pre`` if the checkpoint of ``fine_tuned`` says that it was trained from another model.
    """

    fine_tuned: Model
    pre: Model | None = None
    traces: Mapping[str, GradientTrace] = field(default_factory=dict)
    shared: ParameterMask | None = None
    grafted: ParameterMask | None = None
    task: Task | None = None
    seed: int | str = 0
    check_start: bool = True


def _ranked(kind: Kind, scores: Float[Tensor, "layer unit"]) -> pandas.DataFrame:
    """All units with their scores, best first; ties in the order of the units, until `rank_units` breaks them."""
    if not scores.isfinite().all():
        raise CircuitsError(f"some {kind.NOUN}s have a score that is not finite: trace the model in float32")
    best = scores.flatten().argsort(descending=True, stable=True)
    units = [kind(*divmod(place, scores.shape[1])) for place in best.tolist()]
    return pandas.DataFrame(
        {
            "unit": [str(unit) for unit in units],
            "layer": [unit.layer for unit in units],
            "index": [unit.index for unit in units],
            "score": scores.flatten()[best].double().numpy(),
        }
    )


def rank_by_shared_size(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """How many of the unit's parameters are shared.

    Source:
        arXiv 2505.16178, section 3 (Shared Size).
    """
    return _ranked(kind, _size(evidence, kind, "shared", "shared_size"))


def rank_by_graft_size(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """How many of the unit's parameters are in the graft."""
    return _ranked(kind, _size(evidence, kind, "grafted", "graft_size"))


def _size(evidence: Evidence, kind: Kind, name: str, metric: str) -> Float[Tensor, "layer unit"]:
    mask = getattr(evidence, name)
    if mask is None:
        raise _missing(metric, f"a mask of parameters as {name}")
    check_mask(mask, evidence.fine_tuned)
    return unit_sums(evidence.fine_tuned, kind, mask.masks.get)


def rank_by_trace(evidence: Evidence, kind: Kind, task: str) -> pandas.DataFrame:
    """The sum of one task's gradient trace over the unit's parameters.

    Source:
        arXiv 2505.16178, Fig. 4.
    """
    return _ranked(kind, _trace_sum(evidence, kind, task))


def _trace_sum(evidence: Evidence, kind: Kind, name: str) -> Float[Tensor, "layer unit"]:
    gradients = _trace(evidence, name, f"{name}{_TRACE}").gradients

    def sizes(parameter: str) -> Tensor | None:
        return gradients[parameter].abs() if parameter in gradients else None

    return unit_sums(evidence.fine_tuned, kind, sizes)


def _trace(evidence: Evidence, name: str, metric: str) -> GradientTrace:
    if name not in evidence.traces:
        raise _missing(metric, f"a gradient trace as traces[{name!r}]")
    trace, found = evidence.traces[name], identity(evidence.fine_tuned)
    if trace.provenance.get("model") != found:
        raise CircuitsError(
            f"the trace of {trace.task} was made for model {trace.provenance.get('model')}, not for {found} "
            f"({checkpoint_of(evidence.fine_tuned).source}): trace that model"
        )
    return trace


def rank_by_change(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """The sum of |θ_ft − θ_pre| over the unit's parameters."""
    if evidence.pre is None:
        raise _missing("change", "the model before fine-tuning as pre")
    refuse_hooks(evidence.fine_tuned, "a change is one of weights")
    before, after = same_parameters(evidence.fine_tuned, evidence.pre), parameters_of(evidence.fine_tuned)

    def changes(parameter: str) -> Tensor:
        return (after[parameter] - before[parameter].to(after[parameter])).abs()

    if evidence.check_start:
        require_start(evidence.fine_tuned, evidence.pre)
    with torch.no_grad():
        return _ranked(kind, unit_sums(evidence.fine_tuned, kind, changes))


def rank_by_gradient_x_activation(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """How much the loss of the last task that was traced would change, to first order, if the unit put out zero.

    That is |gradient × activation|.

    The size counts and not the sign: a trained model lies where the loss is flat, and over the heads of trained tiny
    models the signed estimate runs against the effect of ablation more often than with it.

    Source:
        Attribution patching with a zero baseline; docs/method.md, section 5.
    """
    if not evidence.traces:
        raise _missing("gradient_x_activation", "a gradient trace as traces[...]")
    trace = _trace(evidence, list(evidence.traces)[-1], "gradient_x_activation")
    return _ranked(kind, trace.hook_points[f"{kind.NOUN}.gradient_x_activation"].double().abs())


def rank_by_ablation(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """How far the log-probability of the task's answers falls (nats, mean) when the unit alone puts out zero.

    Each unit is run alone, from its layer on.
    """
    if evidence.task is None:
        raise _missing("ablation", "a task to score as task")
    model, shape = evidence.fine_tuned, shape_of(evidence.fine_tuned)
    units = [kind(layer, index) for layer in range(shape.n_layers) for index in range(kind.count(shape))]
    effects = run_interventions(model, evidence.task, single(units), metrics=["log_prob"])["log_prob_effect"]
    return _ranked(kind, -torch.tensor(effects.to_numpy(copy=True)).view(shape.n_layers, -1))


def rank_at_random(evidence: Evidence, kind: Kind) -> pandas.DataFrame:
    """Numbers between 0 and 1 drawn from the seed."""
    generator = torch.Generator().manual_seed(int(digest("ranking", str(evidence.seed)), 16) >> 1)
    shape = shape_of(evidence.fine_tuned)
    return _ranked(kind, torch.rand(shape.n_layers, kind.count(shape), generator=generator, dtype=torch.float64))


def _missing(metric: str, what: str) -> CircuitsError:
    return CircuitsError(f"the ranking by {metric} needs {what}: give it in the Evidence")


#: Every ranking by the name it has in result tables, beside those by the traces of tasks.
RANKINGS: dict[str, Callable[[Evidence, Kind], pandas.DataFrame]] = {
    "shared_size": rank_by_shared_size,
    "change": rank_by_change,
    "graft_size": rank_by_graft_size,
    "gradient_x_activation": rank_by_gradient_x_activation,
    "ablation": rank_by_ablation,
    "random": rank_at_random,
}


_TRACE = "_trace"


def rankings_of(evidence: Evidence) -> dict[str, Callable[[Evidence, Kind], pandas.DataFrame]]:
    """Every ranking by its name, with those by the traces that the evidence has."""
    traces = {f"{task}{_TRACE}": partial(rank_by_trace, task=task) for task in evidence.traces}
    return {"shared_size": rank_by_shared_size, **traces, **RANKINGS}


def rank_units(
    evidence: Evidence, kind: Kind, metrics: Sequence[str] | None = None, *, draws: int = 5
) -> pandas.DataFrame:
    """Rank all heads or neurons by several metrics.

    Args:
        evidence: what the metrics need.
        kind: `Head` or `Neuron`.
        metrics: names of `RANKINGS`, and ``bio_trace`` for each trace that the evidence has, of ``bio`` say. If not
            given all of them, but for neurons without ``ablation``, which runs each alone: ask for it by name.
        draws: rankings at random, and of a metric that gives several units the same score: these stand in a random
            order.

    Returns:
        One row for each ``metric``, ``draw`` (0 alone where there are no ties) and unit, best first: ``unit``,
        ``layer``, ``index``, ``score``.

    Raises:
        CircuitsError: there is no such metric, its evidence is missing or of another model, or there are no draws.

    Source:
        arXiv 2505.16178, Fig. 4; docs/method.md, section 5.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.models import load_model
        >>> from circuits.training import new_model
        >>> pre, fine_tuned = (load_model(new_model("tiny-llama", word_tokenizer(), seed)) for seed in (0, 1))
        >>> ranking = rank_units(Evidence(fine_tuned, pre), Head, ["change", "random"], draws=5)
        >>> list(ranking.columns), len(ranking)
        (['metric', 'draw', 'unit', 'layer', 'index', 'score'], 96)
    """
    known = rankings_of(evidence)
    if metrics is None:
        metrics = [name for name in known if kind is Head or name != "ablation"]
    for name in metrics:
        if name.endswith(_TRACE) and name not in known:
            _trace(evidence, name.removesuffix(_TRACE), name)
        if name not in known:
            raise CircuitsError(f"there is no ranking {name!r}: choose from {', '.join(known)}")
    if not metrics or draws < 1:
        raise CircuitsError("a ranking takes at least one metric and one draw")
    if len(set(metrics)) < len(metrics):
        raise CircuitsError(f"the ranking {max(metrics, key=list(metrics).count)} is asked for twice")
    tables = []
    for name in metrics:
        if name == "random":
            drawn = [rank_at_random(replace(evidence, seed=f"{evidence.seed}/{draw}"), kind) for draw in range(draws)]
        else:
            table = known[name](evidence, kind)
            tied = table["score"].duplicated().any()
            drawn = [_break_ties(table, f"{evidence.seed}/{draw}") for draw in range(draws)] if tied else [table]
        tables += [one.assign(metric=name, draw=draw) for draw, one in enumerate(drawn)]
    return pandas.concat(tables, ignore_index=True)[["metric", "draw", "unit", "layer", "index", "score"]]


def _break_ties(table: pandas.DataFrame, seed: str) -> pandas.DataFrame:
    """The ranking with units of equal scores in random order."""
    generator = torch.Generator().manual_seed(int(digest("ties", seed), 16) >> 1)
    mixed = table.iloc[torch.randperm(len(table), generator=generator).numpy()]
    return mixed.sort_values("score", ascending=False, kind="stable")


def agreement(rankings: pandas.DataFrame) -> pandas.DataFrame:
    """Spearman's correlation between every two rankings, ties at their mean rank.

    Args:
        rankings: from `rank_units`.

    Returns:
        One row and one column for each metric. With several draws the mean over draws. NaN where a
        ranking scores all units alike.

    Raises:
        CircuitsError: the rankings are not of the same units.

    Example:
        >>> table = pandas.DataFrame({"metric": ["a"] * 3 + ["b"] * 3, "draw": 0, "score": [3, 2, 1, 30, 10, 20],
        ...                           "unit": ["L0H0", "L0H1", "L0H2"] * 2})
        >>> agreement(table).loc["a", "b"].item()
        0.5
    """
    wide = rankings.pivot(index="unit", columns=["metric", "draw"], values="score")
    if wide.isna().to_numpy().any():
        raise CircuitsError("rankings agree about the same units: one of these lacks some units of the others")
    pairs = wide.corr(method="spearman")
    metrics = list(dict.fromkeys(rankings["metric"]))
    return pandas.DataFrame(
        {one: {other: _mean_pair(pairs.loc[other, one]) for other in metrics} for one in metrics},
    ).loc[metrics]


def _mean_pair(pairs: pandas.DataFrame) -> float:
    """The mean over draws; of a metric with itself its own agreement, not that between draws."""
    values = pairs.to_numpy()
    return float(values.diagonal().mean() if pairs.index.equals(pairs.columns) else values.mean())
