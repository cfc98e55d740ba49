"""What a model does without a mask's parameters, beside random ones.

1. The mask is ablated (`circuits.masks.acting`), in all tokens or only at those of a span
   (`circuits.masks.at_positions`), and tasks are evaluated before and after.
2. An ablation is compared with random masks drawn outside the mask, with the same count in each tensor, at the same
   tokens. Where a tensor has too little room outside, the mask is thinned like its control and is ablated so too, once
   for each draw.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy
import pandas
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.acting import new_value, replaced
from circuits.masks.at_positions import ablate_at
from circuits.masks.mask import ParameterMask, check_mask
from circuits.metrics import evaluate
from circuits.models import Model, editing
from circuits.progress import track
from circuits.statistics import beyond_draws, mean_interval, of_draws, paired
from circuits.tasks import Task


def ablate_mask(
    model: Model,
    mask: ParameterMask,
    tasks: Task | Sequence[Task],
    *,
    pre: Model | None = None,
    mode: str = "revert",
    draws: int = 5,
    seed: int = 0,
    span: str = "all",
    per_answer: bool = False,
    check_start: bool = True,
) -> pandas.DataFrame:
    """Accuracy before and after ablating a mask, and after ablating random masks of the same size outside it.

    Args:
        model: θ_ft.
        mask: made for ``model``.
        tasks: what to evaluate, one or several.
        pre: θ_pre, needed to revert.
        mode: ``revert``, ``zero`` or ``mean``.
        draws: random masks.
        seed: of the random masks.
        span: ablate at its tokens alone, as `ablate_at` does; at ``all`` the weights themselves.
        per_answer: keep every answer, for paired comparisons; `ablation_means` gives the other table.
        check_start: as in `revert`.

    Returns:
        One row for each ``condition``, ``draw`` and ``task``: ``mode``, ``span``, ``parameters`` ablated, their
        ``overlap`` with the mask, ``exact_match`` and ``log_prob``, means over answers. Conditions are ``none``,
        ``shared`` (the mask), ``random`` (outside the mask) and, if some tensor has too little room for that,
        ``shared_thinned``: the mask, for each draw thinned to what its random mask has in each tensor.

        With ``per_answer`` one row for each of these and each answer: also ``example``, ``group`` and ``attribute``.

    Raises:
        CircuitsError: the mask was made for another model or holds what cannot be ablated at a span, there is no such
            mode, a task has no such span, or ``pre`` is missing or not the start.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    check_mask(mask, model)
    value = new_value(model, mode, pre, check_start=check_start)
    # a span that is not there is refused before anything runs
    tasks = [task.right_padded() for task in ([tasks] if isinstance(tasks, Task) else tasks)]
    where = [task.span(span) for task in tasks]

    def without(chosen: ParameterMask | None, task: Task, positions: Tensor) -> AbstractContextManager[None]:
        if chosen is None or span == "all":
            return nullcontext()
        return ablate_at(model, chosen, task, positions=positions, mode=mode, pre=pre, check_start=False)

    tables = []
    with editing(model):
        conditions = _conditions(mask, draws, seed)
        for condition, draw, chosen in track(conditions, f"{mode} masks", 2 + draws, "mask"):
            scored = []
            with replaced(model, chosen, value) if chosen is not None and span == "all" else nullcontext():
                for task, positions in zip(tasks, where, strict=True):
                    with without(chosen, task, positions):
                        scored.append(evaluate(model, task).assign(task=task.name))
            facts = {
                "condition": condition,
                "draw": draw,
                "mode": mode,
                "span": span,
                "parameters": 0 if chosen is None else chosen.size,
                "overlap": 0 if chosen is None else (chosen & mask).size,
            }
            tables += [one.assign(**facts) for one in scored]
    if not tables:
        raise CircuitsError("an ablation needs a task to evaluate: none was given")
    answers = pandas.concat(tables, ignore_index=True)
    answers = answers[[*_ABLATED, *(name for name in NAMES_OF_ANSWERS if name in answers), *_SCORES]]
    return answers if per_answer else ablation_means(answers)


#: What names a row of an ablation, and what is measured.
_ABLATED = ("condition", "draw", "mode", "span", "task", "parameters", "overlap")
_SCORES = ("exact_match", "log_prob")
#: What tells answers of one task apart, and which of them belong together.
NAMES_OF_ANSWERS: tuple[str, ...] = ("example", "group", "attribute")


def _conditions(mask: ParameterMask, draws: int, seed: int) -> Iterator[tuple[str, int, ParameterMask | None]]:
    yield "none", 0, None
    yield "shared", 0, mask
    for draw in range(draws):
        thinned, random = mask.control(f"{seed}/{draw}")
        if thinned is not mask:
            yield "shared_thinned", draw, thinned
        yield "random", draw, random


def ablation_means(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over answers: the table that `ablate_mask` gives without ``per_answer``.

    Args:
        answers: from `ablate_mask` with ``per_answer``, or several of them joined, with the columns that tell them
            apart, such as ``model``.
    """
    keys = [name for name in answers if name not in (*NAMES_OF_ANSWERS, *_SCORES)]
    scores = answers[[*keys, *_SCORES]].astype(dict.fromkeys(_SCORES, float))
    return scores.groupby(keys, sort=False, as_index=False, dropna=False).mean()


def ablation_summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """What an ablation costs, beside what random masks of the same size cost.

    Args:
        table: from `ablate_mask`, or several of them joined, with the columns that tell them apart, such as ``model``.
            With ``per_answer`` it is also told whether the mask costs more than the random ones.

    Returns:
        One row for each ``task``, ``mode`` and ``span``, and each value of the columns that were added: ``before`` and
        ``after`` (exact match), ``drop`` and how many ``parameters`` were ablated. ``thinned_drop``, the mean drop of
        the mask thinned to as many as its random masks, ``thinned_parameters``, is what compares with them: ``drop``
        itself where nothing had to be thinned. For the random masks the mean ``random_drop``, the ends
        ``random_drop_low`` and ``random_drop_high`` of its 95 % interval (within what accuracies allow; NaN where all
        draws are alike), and how many ``draws`` there were. Where there is one, the mean ``log_prob`` of the answers
        (nats) before, and without the mask, the (thinned) mask and its random masks: ``log_prob_before``, ``…_after``,
        ``…_thinned``, ``…_random``.

        Of every answer also the ends ``drop_low`` and ``drop_high`` of the drop's 95 % interval, and ``excess``: what
        the (thinned) mask costs beyond the mean of its random masks, with ``excess_low`` and ``excess_high``, and
        ``excess_p``, the p-value of there being no excess (NaN for a single draw). Both are paired by answer, and
        answers of one group are taken together; the excess must also lie beyond what single draws reach.

    Raises:
        CircuitsError: a condition has several rows for one draw, or for one draw and answer.

    Source:
        docs/method.md, section 9.

    Example:
        >>> rows = [("none", 0, 0, 1.0), ("shared", 0, 9, 0.25), ("random", 0, 9, 0.9), ("random", 1, 9, 0.8)]
        >>> table = pandas.DataFrame(rows, columns=["condition", "draw", "parameters", "exact_match"])
        >>> ablation_summary(table.assign(task="qa_id"))[["before", "after", "drop", "draws"]].to_dict("records")
        [{'before': 1.0, 'after': 0.25, 'drop': 0.75, 'draws': 2}]
    """
    measured = ("condition", "draw", "parameters", "overlap", *NAMES_OF_ANSWERS, *_SCORES)
    keys = [name for name in table if name not in measured]
    by_answer = None
    if "example" in table:
        by_answer = dict(list(table.groupby(keys, sort=False, dropna=False)))
        # a task's answers stand in the order of its examples
        examples = table.groupby([*keys, "condition", "draw"], dropna=False)["example"]
        repeated = not examples.agg(lambda one: one.is_monotonic_increasing).all()
        table = ablation_means(table)
    else:
        repeated = bool(table.duplicated([*keys, "condition", "draw"]).any())
    if repeated:
        raise CircuitsError(
            "the table has several rows for one condition and draw: give each model or mask that was joined a column "
            "of its own"
        )
    rows = []
    for values, part in table.groupby(keys, sort=False, dropna=False):
        by_condition = {str(condition): rows for condition, rows in part.groupby("condition")}
        scores = {condition: rows["exact_match"].tolist() for condition, rows in by_condition.items()}
        before, after = scores["none"][0], scores["shared"][0]
        randoms = scores.get("random", [])
        middle, low, high = mean_interval(randoms) if randoms else (math.nan,) * 3
        alike = by_condition.get("shared_thinned", by_condition["shared"])
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "before": before,
                "after": after,
                "drop": before - after,
                "parameters": int(by_condition["shared"]["parameters"].iloc[0]),
                "thinned_drop": before - float(alike["exact_match"].mean()),
                "thinned_parameters": int(alike["parameters"].iloc[0]),
                "random_drop": before - middle,
                "random_drop_low": before - (min(1.0, high) if high == high else math.nan),
                "random_drop_high": before - (max(0.0, low) if low == low else math.nan),
                "draws": len(randoms),
                **_log_probs(by_condition, alike),
                **({} if by_answer is None else _paired_drops(by_answer[values])),
            }
        )
    return pandas.DataFrame(rows)


def _log_probs(by_condition: dict[str, pandas.DataFrame], alike: pandas.DataFrame) -> dict[str, float]:
    """Mean log-probability under each condition: it falls also where no answer was right to begin with."""
    told = {"before": by_condition["none"], "after": by_condition["shared"], "thinned": alike}
    told["random"] = by_condition.get("random", alike.iloc[:0])
    return {f"log_prob_{name}": float(rows["log_prob"].mean()) for name, rows in told.items() if "log_prob" in rows}


def _paired_drops(answers: pandas.DataFrame) -> dict[str, float]:
    """The drop's interval, and what the mask costs beyond its random masks, paired by answer."""
    by_condition = {
        str(condition): numpy.mean([one["exact_match"].to_numpy(float) for _, one in part.groupby("draw")], axis=0)
        for condition, part in answers.groupby("condition")
    }
    first = answers[answers["condition"] == "none"]
    groups = first["group"].to_numpy() if "group" in first else None
    drop = paired(by_condition["none"], by_condition["shared"], groups, kind="binary_difference")
    found = {"drop_low": drop.low, "drop_high": drop.high}
    if "random" in by_condition:
        alike = by_condition.get("shared_thinned", by_condition["shared"])
        # means over draws lie between 0 and 1
        excess = paired(by_condition["random"], alike, groups, kind="bounded_difference")
        excess = beyond_draws(excess, of_draws(answers, "exact_match")[1], answers=len(first))
        found |= {
            "excess": excess.difference,
            "excess_low": excess.low,
            "excess_high": excess.high,
            "excess_p": excess.p_value,
        }
    return found
