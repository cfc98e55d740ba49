"""Are the top units of a ranking enough, and are they needed (docs/method.md, section 5; Fig. 4)?

1. Sufficient: the units of θ_pre get, the best first, their weights of θ_ft. What belongs to no ranked unit
   (embeddings, norms, output biases, and the neurons where heads are ranked) comes from θ_ft, so that the curve goes
   from a θ_ft whose units are untrained to θ_ft itself; or it stays at θ_pre, which asks more of the units.
2. Critical: the units of θ_ft go, the best first, back to θ_pre; or their outputs are set to zero or to their mean.
3. Under grouped-query attention keys and values belong to a group of heads, and not to a head. A head that changes its
   weights brings those of its group along, for queries are of no use without their keys; or it does not, if so asked.
   Each n says how many groups it touches so.
4. Accuracy against n, the number of units; the fraction says what share of all parameters these n units own.
"""

import math
from collections.abc import Sequence

import pandas
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.heads import mean_outputs
from circuits.masks import MASK_MODES, NAMES_OF_ANSWERS, ParameterMask, covered_parameters, graft
from circuits.metrics import evaluate
from circuits.models import Model, identity, parameters_of, require_start, shape_of
from circuits.rankings.curve_summaries import curve_means
from circuits.rankings.subsets import (
    Kind,
    Switch,
    ablating,
    count_groups,
    count_parameters,
    owned_parameters,
    score_subsets,
    swapping,
)
from circuits.tasks import Task
from circuits.units import Head, Neuron

#: What belongs to no unit: from which model a sufficient curve takes it.
RESTS: tuple[str, ...] = ("fine_tuned", "pre")
_ALL_COUNTS, _SEGMENTS = 32, 10


def default_counts(units: int, *, halvings: int | None = None, tenths: bool = True) -> list[int]:
    """The numbers of units a curve is measured at: all up to 32 units; else every tenth, and doublings below the first.

    So no piece of the axis between two points is longer than a tenth of it, and the first units, which a good ranking
    should need alone, are told apart.

    Args:
        units: how many are ranked.
        halvings: in place of the doublings from 1, so many halvings of all units, those below a tenth: fewer points.
        tenths: without them all doublings or halvings are there: still fewer points, and most of them near 0.

    Example:
        >>> default_counts(4), default_counts(100)
        ([0, 1, 2, 3, 4], [0, 1, 2, 4, 8, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100])
        >>> default_counts(270, halvings=5)
        [0, 8, 17, 27, 54, 81, 108, 135, 162, 189, 216, 243, 270]
        >>> default_counts(270, halvings=3, tenths=False)
        [0, 34, 68, 135, 270]
    """
    if units <= _ALL_COUNTS:
        return list(range(units + 1))
    first = [2**power for power in range(units.bit_length())]
    if halvings is not None:
        first = [round(units / 2**power) for power in range(1, halvings + 1)]
    if not tenths:
        return sorted({0, *first, units})
    parts = [round(units * part / _SEGMENTS) for part in range(_SEGMENTS + 1)]
    return sorted({*parts, *(count for count in first if count < parts[1])})


def sufficient_curve(
    rankings: pandas.DataFrame,
    pre: Model,
    fine_tuned: Model,
    *,
    tasks: Sequence[Task],
    counts: Sequence[int] | None = None,
    rest: str = "fine_tuned",
    groups: bool = True,
    per_answer: bool = False,
    check_start: bool = True,
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
        groups: heads bring the keys and values of their key/value groups; else these come from where the rest does.
        per_answer: keep every answer, for paired comparisons; `curve_means` gives the other table.
        check_start: refuse a ``pre`` if the checkpoint of ``fine_tuned`` says that it was trained from another model.

    Returns:
        One row for each ``metric``, ``draw``, ``n`` and ``task``: ``condition`` (``sufficient``), ``groups`` (how many
        key/value groups the n heads bring along; 0 where keys and values are not grouped), ``fraction`` (share of all
        parameters that the n units own; those of a key/value group count with the first of its heads),
        ``exact_match`` and ``log_prob`` (nats), means over answers, and the exact match of whole models,
        ``fine_tuned`` and ``pre``.

        With ``per_answer`` one row for each of these and each answer, in the order of the task's: also ``example``,
        ``group`` and ``attribute``; ``fine_tuned`` and ``pre`` say whether the whole models give this answer.

    Raises:
        CircuitsError: the rankings or counts do not fit the model, the models are not of one kind, ``pre`` is not the
            start, or there is no such rest.

    Source:
        arXiv 2505.16178, Fig. 4a.

    Example:
        >>> import tempfile
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.models import load_model
        >>> from circuits.rankings import Evidence, rank_units
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> pre, fine_tuned = (load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1))
        >>> rankings = rank_units(Evidence(fine_tuned, pre), Head, ["change"])
        >>> curve = sufficient_curve(rankings, pre, fine_tuned, tasks=[task], counts=[0, 4, 16])
        >>> curve[["metric", "n", "groups", "fraction"]].round(3).values.tolist()
        [['change', 0, 0, 0.0], ['change', 4, 4, 0.082], ['change', 16, 8, 0.247]]
    """
    if rest not in RESTS:
        raise CircuitsError(f"there is no rest {rest!r}: choose from {', '.join(RESTS)}")
    plan = _Plan(rankings, fine_tuned, tasks, counts, groups)
    if check_start:
        require_start(fine_tuned, pre)
    whole = {"fine_tuned": _answered(fine_tuned, tasks), "pre": _answered(pre, tasks)}
    others = _rest(fine_tuned, plan.kind, groups, rest == "fine_tuned")
    with (
        graft(pre, others, fine_tuned, check_start=False),
        swapping(pre, fine_tuned, plan.kind, groups) as switch,
    ):
        answers = plan.measure("sufficient", pre, switch, whole)
    return answers if per_answer else curve_means(answers)


def critical_curve(
    rankings: pandas.DataFrame,
    fine_tuned: Model,
    tasks: Sequence[Task],
    *,
    pre: Model | None = None,
    mode: str = "revert",
    reference: Task | None = None,
    counts: Sequence[int] | None = None,
    groups: bool = True,
    per_answer: bool = False,
    check_start: bool = True,
) -> pandas.DataFrame:
    """Accuracy of θ_ft, or of a grafted model, without the top n units of each ranking.

    Args:
        rankings: as for `sufficient_curve`.
        fine_tuned: θ_ft, which is changed and restored.
        tasks: what to score.
        pre: θ_pre; needed to revert.
        mode: ``revert`` the units' weights to θ_pre, or set their outputs to ``zero``, or to their ``mean``.
        reference: the set that mean outputs are taken over; the first task if not given.
        counts: as for `sufficient_curve`.
        groups: to revert a head reverts the keys and values of its key/value group with it; else its own weights
            alone. An ablated output leaves keys and values alone in any case.
        per_answer: as for `sufficient_curve`.
        check_start: as for `sufficient_curve`; of no account where nothing is reverted.

    Returns:
        As `sufficient_curve`; ``condition`` is the mode, and ``pre`` is NaN if it is not given.

    Raises:
        CircuitsError: as `sufficient_curve`; or there is no such mode, or ``pre`` is missing.

    Source:
        arXiv 2505.16178, Fig. 4b.
    """
    if mode not in MASK_MODES:
        raise CircuitsError(f"there is no mode {mode!r}: choose from {', '.join(MASK_MODES)}")
    if mode == "revert" and pre is None:
        raise CircuitsError("reverting needs the model before fine-tuning: give pre")
    groups = groups and mode == "revert"
    plan = _Plan(rankings, fine_tuned, tasks, counts, groups)
    whole = {"fine_tuned": _answered(fine_tuned, tasks)}
    if pre is not None:
        whole["pre"] = _answered(pre, tasks)
    if mode == "revert" and pre is not None:
        if check_start:
            require_start(fine_tuned, pre)
        acting = swapping(fine_tuned, pre, plan.kind, groups)
    else:
        means = mean_outputs(fine_tuned, reference or tasks[0], plan.kind) if mode == "mean" else None
        acting = ablating(fine_tuned, plan.kind, means)
    with acting as switch:
        answers = plan.measure(mode, fine_tuned, switch, whole)
    return answers if per_answer else curve_means(answers)


def _answered(model: Model, tasks: Sequence[Task]) -> list[pandas.Series]:
    """Which answers of each task a model gives."""
    return [evaluate(model, task)["exact_match"] for task in tasks]


def _rest(model: Model, kind: Kind, groups: bool, wanted: bool) -> ParameterMask:
    """All parameters that belong to no unit of a kind, nor with ``groups`` to a group of heads; none if not wanted."""
    owned = {row.name for row in owned_parameters(model, kind, groups)}
    masks = {
        name: torch.full(value.shape, wanted and name not in owned, dtype=torch.bool)
        for name, value in parameters_of(model).items()
    }
    return ParameterMask(masks, identity(model))


class _Plan:
    """Which subsets of units the curves of several rankings pass through."""

    def __init__(
        self,
        rankings: pandas.DataFrame,
        model: Model,
        tasks: Sequence[Task],
        counts: Sequence[int] | None,
        groups: bool,
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
        by_ranking = pandas.DataFrame(named).groupby(["metric", "draw"], sort=False)["unit"]
        orders = {key: list(units) for key, units in by_ranking}
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
        total = sum(value.numel() for value in covered_parameters(model).values())
        self.fractions = (count_parameters(model, self.kind, self.subsets, groups) / total).tolist()
        grouped = groups and self.kind is Head
        self.groups = (count_groups(model, self.subsets) if grouped else torch.zeros(len(subsets)).long()).tolist()

    def measure(
        self, condition: str, model: Model, switch: Switch, whole: dict[str, list[pandas.Series]]
    ) -> pandas.DataFrame:
        """Score every subset on every answer; beside it which answers whole models give."""
        about = f"{condition} {self.kind.NOUN}s"
        scores = score_subsets(model, self.tasks, self.subsets, switch, about, per_answer=True)
        rows = pandas.DataFrame(self.rows, columns=["metric", "draw", "n"])
        rows = rows.assign(condition=condition, groups=self.groups, fraction=self.fractions)
        rows = rows.iloc[scores["subset"]].reset_index(drop=True)
        tables = []
        for number, task in enumerate(self.tasks):
            here = (scores["task"] == task.name).to_numpy()
            answer = scores.loc[here, "answer"].to_numpy()
            named = task.answers[[name for name in NAMES_OF_ANSWERS if name in task.answers]].iloc[answer]
            given = {name: answers[number].to_numpy()[answer] for name, answers in whole.items()}
            table = rows[here].assign(
                task=task.name,
                **{name: named[name].to_numpy() for name in named},
                **{name: scores.loc[here, name].to_numpy() for name in ("exact_match", "log_prob")},
                fine_tuned=given["fine_tuned"],
                pre=given.get("pre", math.nan),
            )
            tables.append(table.assign(exact_match=table["exact_match"].astype(bool)))
        table = pandas.concat(tables, ignore_index=True)
        return table[["condition", *(name for name in table if name != "condition")]]
