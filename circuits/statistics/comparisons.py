"""Do two models differ: paired tests, corrections for many comparisons, and how many answers would tell.

1. A paired test asks whether two models could be exchanged. Differences of 0/1 values without groups: McNemar's exact
   test. Otherwise the signs of the groups' differences are flipped, in every way where there are few, else at random.
2. Several p-values are corrected by Holm, or for long lists by Benjamini and Hochberg.
3. What could tell: as many answers as a normal approximation needs for 80 % power at a 5 % threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from jaxtyping import Float, Shaped

from circuits.errors import CircuitsError
from circuits.statistics.intervals import PART, Groups, Kind, by_group, checked, intervals, moments

#: Ways of flipping signs that a test looks at: all there are, or this many at random.
_FLIPS = 9_999


@dataclass(frozen=True)
class Paired:
    """The mean difference of two measurements of the same answers.

    Attributes:
        difference: mean of the first less the second.
        low: lower end of its interval.
        high: upper end.
        p_value: of the hypothesis that there is none.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_p_values(
    differences: Shaped[numpy.ndarray, "*row answer"] | Sequence[float | int],
    groups: Groups | None = None,
    *,
    kind: Kind,
) -> Float[numpy.ndarray, "*row"]:
    """Whether each row's mean could be zero: the p-value of a paired test of differences, two-sided.

    Args:
        differences: one row for each comparison, one column for each answer; or one row alone.
        groups: what each answer belongs to; signs are flipped by group.
        kind: what the differences are.

    Returns:
        McNemar's exact p-value for binary differences without groups; otherwise that of flipping the
        signs of groups, exactly for up to 13 of them, else by 9,999 random flips (the same each time).

    Raises:
        CircuitsError: as `intervals`.

    Source:
        McNemar 1947; Fisher 1935 (sign flips); Phipson & Smyth 2010 (random flips never give 0).

    Example:
        >>> float(paired_p_values(numpy.array([1.0, 2.0, 3.0, 4.0]), kind="real"))
        0.125
    """
    table, inverse = checked(differences, groups, kind)
    if inverse is None and kind == "binary_difference":
        from scipy import stats

        gained, lost = (table > 0).sum(1), (table < 0).sum(1)
        found = numpy.minimum(2 * stats.binom.cdf(numpy.minimum(gained, lost), gained + lost, 0.5), 1)
    else:
        sums = by_group(table, inverse)
        count = sums.shape[1]
        if 2**count <= _FLIPS + 1:
            signs, seen = 1.0 - 2 * (numpy.arange(2**count) >> numpy.arange(count)[:, None] & 1), 0
        else:
            generator = numpy.random.default_rng(0)
            signs, seen = 1.0 - 2 * generator.integers(0, 2, (count, _FLIPS), dtype=numpy.int8), 1
        found = numpy.empty(len(sums))
        for start in range(0, len(sums), PART):
            part = sums[start : start + PART]
            # as large as observed, but for rounding
            least = numpy.abs(part.sum(1, keepdims=True)) - 1e-9 * numpy.abs(part).sum(1, keepdims=True)
            found[start : start + PART] = (numpy.abs(part @ signs) >= least).sum(1)
        found = (found + seen) / (signs.shape[1] + seen)
    shaped: numpy.ndarray = found.reshape(numpy.shape(differences)[:-1])
    return shaped


def paired(
    one: Shaped[numpy.ndarray, " answer"] | Sequence[float | int],
    other: Shaped[numpy.ndarray, " answer"] | Sequence[float | int],
    groups: Groups | None = None,
    *,
    kind: Kind,
    level: float = 0.95,
) -> Paired:
    """Compare two measurements of the same answers, such as two models' exact match.

    Args:
        one: a value for each answer.
        other: the other value of the same answers, in the same order.
        groups: what each answer belongs to, such as a person.
        kind: what their differences are: ``binary_difference`` if both values are 0 or 1.
        level: of the interval.

    Returns:
        The mean difference, its interval as `intervals` finds it, and its p-value as `paired_p_values` does.

    Raises:
        CircuitsError: the two have different numbers of answers, or as `intervals`.

    Source:
        docs/method.md, section 9.

    Example:
        >>> found = paired([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1], kind="binary_difference")
        >>> found.difference, round(found.low, 2), round(found.high, 2), found.p_value
        (0.75, 0.18, 0.93, 0.03125)
    """
    differences = _differences(one, other)
    low, high = intervals(differences, groups, kind=kind, level=level)
    p_value = paired_p_values(differences, groups, kind=kind)
    return Paired(float(differences.mean()), float(low), float(high), float(p_value))


def corrected(
    p_values: Sequence[float | int] | Shaped[numpy.ndarray, " test"], method: str = "holm"
) -> Float[numpy.ndarray, " test"]:
    """p-values corrected for there being several.

    Args:
        p_values: of all the tests; those that are missing (NaN) stay so and are not counted.
        method: ``holm``: the chance of any false finding stays below the threshold; ``bh`` (Benjamini–Hochberg): the
            expected share of false findings among the findings does, for long lists.

    Raises:
        CircuitsError: there is no such method, or a value is no probability.

    Source:
        Holm 1979; Benjamini & Hochberg 1995.

    Example:
        >>> corrected([0.01, 0.04, 0.03]).round(2).tolist(), corrected([0.01, 0.04, 0.03], "bh").round(2).tolist()
        ([0.03, 0.06, 0.06], [0.03, 0.04, 0.04])
    """
    from scipy import stats

    found = numpy.array(p_values, dtype=float)
    known = found[~numpy.isnan(found)]
    if method not in ("holm", "bh"):
        raise CircuitsError(f"there is no correction {method!r}: choose holm or bh")
    if ((known < 0) | (known > 1)).any():
        raise CircuitsError("a p-value is between 0 and 1")
    if method == "bh":
        changed = stats.false_discovery_control(known) if len(known) else known
    else:
        order = numpy.argsort(known)
        changed = numpy.empty_like(known)
        steps = known[order] * numpy.arange(len(known), 0, -1)
        changed[order] = numpy.minimum(numpy.maximum.accumulate(steps), 1)
    found[~numpy.isnan(found)] = changed
    return found


def answers_needed(
    difference: float | int,
    one: Shaped[numpy.ndarray, " answer"] | Sequence[float | int],
    other: Shaped[numpy.ndarray, " answer"] | Sequence[float | int],
    *,
    groups: Groups | None = None,
    kind: Kind,
) -> int | None:
    """About how many answers could tell such a difference: 80 % power at a 5 % threshold.

    Args:
        difference: to be told from none.
        one: a value for each answer, as in `paired`; what is taken from both is the spread of their difference.
        other: the other value of the same answers.
        groups: what each answer belongs to; new answers are taken to come in groups of the same kind.
        kind: what their differences are, as in `paired`.

    Returns:
        The number; None if the difference is 0, or the answers show no spread to judge by.

    Raises:
        CircuitsError: as `paired`.

    Example:
        >>> answers_needed(0.1, [1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0, 1], kind="binary_difference")
        225
    """
    from scipy import stats

    table, inverse = checked(_differences(one, other), groups, kind)
    spread = table.shape[1] * float(moments(table, inverse)[1][0])
    if kind == "binary_difference" or (kind == "bounded_difference" and spread == 0):
        # 0/1 values that differ by so much on average vary at least so much
        spread = max(spread, abs(difference) - difference**2)
    if not (difference and spread > 0 and math.isfinite(difference)):
        return None
    reach = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    return int(max(2, math.ceil(reach**2 * spread / difference**2)))


def _differences(one: Any, other: Any) -> numpy.ndarray:
    first, second = (numpy.asarray(values, dtype=float) for values in (one, other))
    if first.shape != second.shape or first.ndim != 1:
        raise CircuitsError(
            f"pairs are of the same answers: one side has {first.shape[-1:]} and the other {second.shape[-1:]}"
        )
    taken: numpy.ndarray = first - second
    return taken
