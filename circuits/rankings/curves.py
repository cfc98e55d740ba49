"""Are the top units of a ranking enough, and are they needed (docs/method.md, section 5; Fig. 4)?

1. Sufficient: the units of θ_pre get, the best first, their weights of θ_ft. What belongs to no ranked unit
   (embeddings, norms, output biases, and the neurons where heads are ranked) comes from θ_ft, so that the curve goes
   from a θ_ft whose units are untrained to θ_ft itself; or it stays at θ_pre, which asks more of the units.
2. Critical: the units of θ_ft go, the best first, back to θ_pre; or their outputs are set to zero or to their mean.
3. Accuracy against n, the number of units; the fraction says what share of all parameters these n units own.
4. One number for a curve: the area under it over n, both ends counted as 0 and 1; and the smallest n at which
   a sufficient curve reaches 95 % of the accuracy of θ_ft, or a critical one falls below half of it.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy
import pandas
import torch
from jaxtyping import Bool
from scipy.integrate import trapezoid
from torch import Tensor

from circuits.datasets import Task
from circuits.errors import CircuitsError
from circuits.masks import MODES, ParameterMask, graft
from circuits.metrics import evaluate
from circuits.models import HookedTransformer, fingerprint, parameters_of, shape_of
from circuits.rankings.subsets import (
    Kind,
    Switch,
    ablating,
    count_parameters,
    mean_outputs,
    owned_parameters,
    score_subsets,
    swapping,
)
from circuits.statistics import mean_interval
from circuits.units import TIED, Head, Neuron

#: What belongs to no unit: from which model a sufficient curve takes it.
RESTS: tuple[str, ...] = ("fine_tuned", "pre")
_ALL_COUNTS = 32
_SUFFICIENT, _CRITICAL = 0.95, 0.5


def default_counts(units: int) -> list[int]:
    """The numbers of units a curve is measured at: all up to 32 units; else two for each doubling, and both ends.

    Example:
        >>> default_counts(4), default_counts(100)
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 100])
    """
    if units <= _ALL_COUNTS:
        return list(range(units + 1))
    between = (round(2 ** (half / 2)) for half in range(math.ceil(2 * math.log2(units))))
    return sorted({0, *between, units})


def sufficient_curve(
    rankings: pandas.DataFrame,
    pre: HookedTransformer,
    fine_tuned: HookedTransformer,
    tasks: Sequence[Task],
    counts: Sequence[int] | None = None,
    rest: str = "fine_tuned",
    *,
    per_answer: bool = False,
) -> pandas.DataFrame:
    """Accuracy of θ_pre with only the top n units of each ranking grafted from θ_ft.

    Args:
        rankings: from `rank_units`; or one ranking, a table with the column ``unit``, best first.
        pre: θ_pre, which is changed and restored.
        fine_tuned: θ_ft.
        tasks: what to score.
        counts: the n; `default_counts` if not given.
        rest: where all parameters come from that belong to no head (or no neuron, where neurons are ranked):
            ``fine_tuned`` or ``pre``. A model trained from scratch can do nothing with the embeddings of θ_pre.

    Returns:
        One row for each ``metric``, ``draw``, ``n`` and ``task``: ``condition`` (``sufficient``), ``fraction`` (share
        of all parameters that the n units own; those of a key/value group count with the first of its heads),
        ``exact_match`` and ``log_prob`` (nats), means over answers, and the exact match of whole models,
        ``fine_tuned`` and ``pre``.

    Raises:
        CircuitsError: the rankings or counts do not fit the model, the models are not of one kind, or there is no such
            rest.

    Source:
        arXiv 2505.16178, Fig. 4a.

    Example:
        >>> import tempfile
        >>> from circuits.datasets import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.models import load_model
        >>> from circuits.rankings import Evidence, rank_units
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> task = Task.from_dataset(make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)), "qa_id", tokenizer)
        >>> pre, fine_tuned = (load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1))
        >>> rankings = rank_units(Evidence(fine_tuned, pre), Head, ["change"])
        >>> curve = sufficient_curve(rankings, pre, fine_tuned, [task], counts=[0, 4, 16])
        >>> curve[["metric", "n", "fraction"]].round(3).values.tolist()
        [['change', 0, 0.0], ['change', 4, 0.082], ['change', 16, 0.247]]
    """
    if rest not in RESTS:
        raise CircuitsError(f"there is no rest {rest!r}: choose from {', '.join(RESTS)}")
    plan = _Plan(rankings, fine_tuned, tasks, counts)
    scores = {"fine_tuned": _accuracy(fine_tuned, tasks), "pre": _accuracy(pre, tasks)}
    rest_grafted = graft(pre, _rest(fine_tuned, plan.kind), fine_tuned) if rest == "fine_tuned" else nullcontext()
    with rest_grafted, swapping(pre, fine_tuned, plan.kind) as switch:
        return plan.measure("sufficient", pre, switch, scores, per_answer)


def critical_curve(
    rankings: pandas.DataFrame,
    fine_tuned: HookedTransformer,
    tasks: Sequence[Task],
    pre: HookedTransformer | None = None,
    mode: str = "revert",
    reference: Task | None = None,
    counts: Sequence[int] | None = None,
    *,
    per_answer: bool = False,
) -> pandas.DataFrame:
    """Accuracy of θ_ft, or of a grafted model, without the top n units of each ranking.

    Args:
        rankings: as for `sufficient_curve`.
        fine_tuned: θ_ft, which is changed and restored.
        tasks: what to score.
        pre: θ_pre; needed to revert.
        mode: ``revert`` the units' weights to θ_pre, or set their outputs to ``zero``, or to their ``mean``. To revert
            a head reverts the keys and values of its group with it; an ablated output leaves its neighbours alone.
        reference: the set that mean outputs are taken over; the first task if not given.
        counts: as for `sufficient_curve`.

    Returns:
        As `sufficient_curve`; ``condition`` is the mode, and ``pre`` is NaN if it is not given.

    Raises:
        CircuitsError: as `sufficient_curve`; or there is no such mode, or ``pre`` is missing.

    Source:
        arXiv 2505.16178, Fig. 4b.
    """
    if mode not in MODES:
        raise CircuitsError(f"there is no mode {mode!r}: choose from {', '.join(MODES)}")
    if mode == "revert" and pre is None:
        raise CircuitsError("reverting needs the model before fine-tuning: give pre")
    plan = _Plan(rankings, fine_tuned, tasks, counts)
    scores = {"fine_tuned": _accuracy(fine_tuned, tasks)}
    scores["pre"] = _accuracy(pre, tasks) if pre is not None else dict.fromkeys(scores["fine_tuned"], math.nan)
    if mode == "revert" and pre is not None:
        acting = swapping(fine_tuned, pre, plan.kind)
    else:
        means = mean_outputs(fine_tuned, reference or tasks[0], plan.kind) if mode == "mean" else None
        acting = ablating(fine_tuned, plan.kind, means)
    with acting as switch:
        return plan.measure(mode, fine_tuned, switch, scores, per_answer)


def _accuracy(model: HookedTransformer, tasks: Sequence[Task]) -> dict[str, float]:
    return {task.name: float(evaluate(model, task)["exact_match"].mean()) for task in tasks}


def _rest(model: HookedTransformer, kind: Kind) -> ParameterMask:
    """All parameters that belong to no unit of a kind, nor to a group of heads."""
    owned = {row.name for row in owned_parameters(model, kind)}
    masks = {
        name: torch.full(value.shape, name not in owned, dtype=torch.bool)
        for name, value in parameters_of(model).items()
    }
    return ParameterMask(masks, fingerprint(model))


class _Plan:
    """Which subsets of units the curves of several rankings pass through."""

    def __init__(
        self, rankings: pandas.DataFrame, model: HookedTransformer, tasks: Sequence[Task], counts: Sequence[int] | None
    ) -> None:
        if not tasks:
            raise CircuitsError("a curve needs a task to score: none was given")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise CircuitsError(f"two tasks are called {max(names, key=names.count)}: a curve tells them apart by name")
        if "unit" not in rankings.columns or rankings.empty:
            raise CircuitsError("a ranking is a table with a column unit, best first: make it with rank_units")
        self.tasks = tasks
        named = {"metric": "ranking", "draw": 0} | {name: rankings[name] for name in rankings.columns}
        groups = pandas.DataFrame(named).groupby(["metric", "draw"], sort=False)["unit"]
        orders = {key: list(units) for key, units in groups}
        first = str(rankings["unit"].iloc[0])
        kinds: list[Kind] = [kind for kind in (Head, Neuron) if kind.LETTER in first.upper()]
        if not kinds:
            raise CircuitsError(f"a ranking is of heads or of neurons: it names {first}")
        self.kind = kinds[0]
        shape = shape_of(model)
        length = min(len(units) for units in orders.values())
        self.counts = default_counts(length) if counts is None else sorted(set(counts))
        if not self.counts or self.counts[0] < 0 or self.counts[-1] > length:
            raise CircuitsError(f"the counts must lie between 0 and {length}, the number of units that are ranked")
        self.rows: list[tuple[str, int, int]] = []
        subsets = []
        for (metric, draw), units in orders.items():
            if len(set(units)) < len(units):
                raise CircuitsError(f"the ranking {metric} names {max(units, key=units.count)} twice")
            parsed = [self.kind.parse(unit, shape) for unit in units]
            places = torch.tensor([unit.layer * self.kind.count(shape) + unit.index for unit in parsed])
            for count in self.counts:
                subset = torch.zeros(shape.n_layers, self.kind.count(shape), dtype=torch.bool)
                subset.view(-1)[places[:count]] = True
                subsets.append(subset)
                self.rows.append((metric, draw, count))
        self.subsets: Bool[Tensor, "subset layer unit"] = torch.stack(subsets)
        total = sum(value.numel() for name, value in parameters_of(model).items() if name not in _counted_twice(model))
        self.fractions = (count_parameters(model, self.kind, self.subsets) / total).tolist()

    def measure(
        self,
        condition: str,
        model: HookedTransformer,
        switch: Switch,
        whole: dict[str, dict[str, float]],
        per_answer: bool,
    ) -> pandas.DataFrame:
        """Score every subset."""
        noun = self.kind.NOUN
        scores = score_subsets(model, self.tasks, self.subsets, switch, f"{condition} {noun}s", per_answer=per_answer)
        if per_answer:
            names = pandas.concat(
                [
                    task.answers[["example", "person", "attribute"]].assign(
                        task=task.name, answer=range(len(task.answers))
                    )
                    for task in self.tasks
                ]
            )
            scores = scores.merge(names, on=["task", "answer"], how="left", sort=False).drop(columns="answer")
        which = scores.pop("subset")
        rows = pandas.DataFrame(self.rows, columns=["metric", "draw", "n"]).assign(fraction=self.fractions)
        table = pandas.concat([rows.iloc[which].reset_index(drop=True), scores], axis="columns")
        table.insert(0, "condition", condition)
        return table.assign(**{name: table["task"].map(accuracy) for name, accuracy in whole.items()})


def curve_means(answers: pandas.DataFrame) -> pandas.DataFrame:
    keys = ["condition", "metric", "draw", "n", "fraction", "task", "fine_tuned", "pre"]
    return answers.groupby(keys, sort=False, dropna=False)[["exact_match", "log_prob"]].mean().reset_index()


def curve_areas(answers: pandas.DataFrame) -> pandas.DataFrame:
    """The area under each answer's own curve: one number for each answer, by which curves can be compared in pairs."""
    wide = answers.pivot(
        index=["condition", "metric", "draw", "task", "example", "person", "attribute"],
        columns="n",
        values="exact_match",
    )
    counts = wide.columns.to_numpy(float)
    areas = trapezoid(wide.to_numpy(float), (counts - counts[0]) / (counts[-1] - counts[0]), axis=1)
    return wide.index.to_frame(index=False).assign(area=areas)


def _counted_twice(model: HookedTransformer) -> tuple[str, ...]:
    return TIED[1:] if model.checkpoint.config.tie_word_embeddings else ()


def curve_summary(curves: pandas.DataFrame) -> pandas.DataFrame:
    """One number for each curve: its area, and the smallest n that is enough, or that breaks the model.

    Args:
        curves: from `sufficient_curve` or `critical_curve`, or several of them joined.

    Returns:
        One row for each ``condition``, ``metric`` and ``task``: ``draws``; ``auc``, the area under exact match against
        n, by trapezes, over the measured n scaled to 0 to 1, and its 95 % interval over draws ``auc_low`` and
        ``auc_high`` (NaN for a single one); for sufficient curves ``n95``, the smallest measured n with at least 95 %
        of the exact match of θ_ft; for critical ones ``n50``, the smallest with less than half of it. Over draws it
        is the median, those that never get there counted as the largest; NaN if that is never, or if θ_ft gets
        nothing right.

    Raises:
        CircuitsError: a column is missing, or a curve has a single point.

    Source:
        docs/method.md, section 5.

    Example:
        >>> curve = pandas.DataFrame({"condition": "sufficient", "metric": "change", "draw": 0, "n": [0, 1, 2],
        ...                           "task": "qa", "exact_match": [0.0, 0.5, 1.0], "fine_tuned": 1.0})
        >>> curve_summary(curve)[["auc", "n95"]].values.tolist()
        [[0.5, 2.0]]
    """
    needed = ["condition", "metric", "draw", "n", "task", "exact_match", "fine_tuned"]
    for column in needed:
        if column not in curves.columns:
            raise CircuitsError(f"the curves have no {column}: make them with sufficient_curve or critical_curve")
    rows = []
    for (condition, metric, task), group in curves.groupby(["condition", "metric", "task"], sort=False):
        areas, smallest = [], []
        for _, curve in group.groupby("draw"):
            ordered = curve.sort_values("n")
            counts, accuracy = ordered["n"].to_numpy(float), ordered["exact_match"].to_numpy(float)
            if len(counts) < 2:
                raise CircuitsError(f"the {condition} curve of {metric} has a single point: measure two counts or more")
            areas.append(float(trapezoid(accuracy, (counts - counts[0]) / (counts[-1] - counts[0]))))
            whole = float(ordered["fine_tuned"].iloc[0])
            there = accuracy >= _SUFFICIENT * whole if condition == "sufficient" else accuracy < _CRITICAL * whole
            smallest.append(counts[there].min() if there.any() and whole > 0 else math.inf)
        middle = float(numpy.median(smallest))
        auc, low, high = mean_interval(areas)
        name = "n95" if condition == "sufficient" else "n50"
        rows.append(
            {
                "condition": condition,
                "metric": metric,
                "task": task,
                "draws": len(areas),
                "auc": auc,
                "auc_low": low,
                "auc_high": high,
                name: middle if math.isfinite(middle) else math.nan,
            }
        )
    return pandas.DataFrame(rows)
