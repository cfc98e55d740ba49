"""How sure a mean is: intervals.

1. Answers of one group (a person) are not independent. A mean over answers is a ratio of sums over groups; its variance
   is G / (G − 1) · Σ u² / n², where u is what a group's answers add up to beyond the mean, and it has G − 1 degrees of
   freedom. Without groups each answer is one.
2. A proportion has Wilson's score interval; with groups, Clopper and Pearson's exact one for as many answers as would
   be as sure if they were independent: p (1 − p) / variance, at most n, and fewer for few groups (Korn and Graubard).
   Where all answers are alike nothing shows how much a group's answers agree: each group counts once.
3. Differences of two 0/1 values are −1, 0 or 1, and may all be 0: they have Tango's score interval for paired
   proportions, for the same number of answers. It has width everywhere and stays within −1 and 1.
4. Other means can be skewed: they have Student's t interval of Hall's monotone transformation of the t statistic, which
   takes the skewness out of it, joined with the plain t interval, which is the wider one for long tails on both sides.
   Where all values are alike there is no such interval; those known to lie within −1 and 1 have Tango's there.
5. What the values are is said by who made them, and never guessed from the values: a row is the same in any company.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy
from jaxtyping import Float, Shaped

from circuits.errors import CircuitsError

PART = 1_024  # rows at a time

Groups = Sequence[Any] | Shaped[numpy.ndarray, " answer"]

#: What values are: 0 or 1; −1, 0 or 1; anything within −1 and 1, such as differences of accuracies; any number.
Kind = Literal["share", "binary_difference", "bounded_difference", "real"]


def mean_interval(values: Sequence[float | int], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent draws and its interval by Student's t.

    Returns:
        mean, lower and upper end; both ends are NaN for a single draw, and where all are alike: such draws show no
        spread to judge by.

    Example:
        >>> [round(value, 2) for value in mean_interval([0.1, 0.2, 0.3])]
        [0.2, -0.05, 0.45]
    """
    from scipy import stats

    sample = numpy.asarray(values, dtype=float)
    mean = float(sample.mean())
    # what is left of equal values by rounding is no spread
    if len(sample) < 2 or numpy.ptp(sample) <= 1e-12 * numpy.abs(sample).max():
        return mean, float("nan"), float("nan")
    half = float(stats.sem(sample) * stats.t.ppf((1 + level) / 2, len(sample) - 1))
    return mean, mean - half, mean + half


def intervals(
    values: Shaped[numpy.ndarray, "*row answer"] | Sequence[float | int],
    groups: Groups | None = None,
    *,
    kind: Kind,
    level: float = 0.95,
) -> tuple[Float[numpy.ndarray, "*row"], Float[numpy.ndarray, "*row"]]:
    """The interval of each row's mean over answers.

    Args:
        values: one row for each quantity, one column for each answer; or one row alone.
        groups: what each answer belongs to, such as a person; answers of one group are not independent.
        kind: what the values are.
        level: how often an interval shall hold the true mean.

    Returns:
        lower and upper ends. All but ``real`` ones have an interval with width also where all values are alike. Real
        ones have NaN there, and for a single group.

    Raises:
        CircuitsError: there are no answers; another number of groups than answers; values that are not of the kind.

    Source:
        Wilson 1927; Korn & Graubard 1998, Confidence intervals for proportions with small expected number of positive
        counts; Tango 1998; Hall 1992, On the removal of skewness by transformation; docs/method.md, section 9.

    Example:
        >>> low, high = intervals(numpy.array([[1, 1, 1, 1], [1, 0, 1, 0]]), kind="share")
        >>> low.round(2).tolist(), high.round(2).tolist()
        ([0.51, 0.15], [1.0, 0.85])
        >>> ends = intervals(numpy.array([1.0, 2.0, 3.0, 8.0]), ["Ada", "Ada", "Bo", "Cy"], kind="real")
        >>> [round(float(end), 2) for end in ends]
        [-4.46, 34.46]
    """
    table, inverse = checked(values, groups, kind)
    find = {"share": _share, "binary_difference": _tango, "bounded_difference": _bounded, "real": _skewed}[kind]
    parts = [find(table[start : start + PART], inverse, level) for start in range(0, len(table), PART)]
    shape = numpy.shape(values)[:-1]
    low, high = (numpy.concatenate(ends).reshape(shape) for ends in zip(*parts, strict=True))
    return low, high


#: Of each kind what its values are, for a reader, and whether a table holds nothing else.
_KINDS: dict[str, tuple[str, Callable[[numpy.ndarray], numpy.ndarray]]] = {
    "share": ("0 and 1", lambda table: numpy.isin(table, (0, 1))),
    "binary_difference": ("−1, 0 and 1", lambda table: numpy.isin(table, (-1, 0, 1))),
    "bounded_difference": ("between −1 and 1", lambda table: numpy.abs(table) <= 1 + 1e-9),
    "real": ("numbers", numpy.ones_like),
}


def checked(values: Any, groups: Groups | None, kind: str) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """Values ``[row, answer]``, and for each answer the number of its group; None if each is a group of its own."""
    table = numpy.atleast_2d(numpy.asarray(values, dtype=float))
    if table.shape[-1] == 0:
        raise CircuitsError("there are no answers to take a mean of")
    table = table.reshape(-1, table.shape[-1])
    if kind not in _KINDS:
        raise CircuitsError(f"there is no kind of values {kind!r}: choose from {', '.join(_KINDS)}")
    named, fits = _KINDS[kind]
    if not fits(table).all():
        raise CircuitsError(f"values of the kind {kind} are {named}, but these are others: say what they are")
    if groups is None:
        return table, None
    if len(groups) != table.shape[1]:
        raise CircuitsError(f"every answer has a group: there are {table.shape[1]} answers and {len(groups)} groups")
    inverse = numpy.unique(numpy.asarray(groups), return_inverse=True)[1].reshape(-1)
    return table, None if inverse.max() + 1 == len(inverse) else inverse


def by_group(table: numpy.ndarray, inverse: numpy.ndarray | None) -> numpy.ndarray:
    """Sums over each group, ``[row, group]``."""
    if inverse is None:
        return table
    order = numpy.argsort(inverse, kind="stable")
    starts = numpy.searchsorted(inverse[order], numpy.arange(inverse.max() + 1))
    return numpy.add.reduceat(table[:, order], starts, axis=1)


def moments(
    table: numpy.ndarray, inverse: numpy.ndarray | None
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, int]:
    """Mean, its variance, the skewness of what groups add to it, and the number of groups."""
    mean = table.mean(1)
    beyond = by_group(table - mean[:, None], inverse)
    count = beyond.shape[1]
    if count == 1:
        unknown = numpy.full(len(table), numpy.nan)
        return mean, unknown, unknown, 1
    squares = beyond * beyond
    square = squares.mean(1)
    # what is left of equal values by rounding is no spread
    square[square <= (1e-12 * numpy.abs(table).max(1)) ** 2] = 0
    skewness = (squares * beyond).mean(1) / numpy.where(square > 0, square, 1) ** 1.5
    if count > 2:
        skewness *= math.sqrt(count * (count - 1)) / (count - 2)
    return mean, square * count**2 / (count - 1) / table.shape[1] ** 2, skewness, count


def _relative_variance(
    spread: numpy.ndarray, table: numpy.ndarray, inverse: numpy.ndarray | None, level: float
) -> numpy.ndarray:
    """Squared half-width of each row's plain interval over the variance of one answer: reach² / effective answers."""
    from scipy import stats

    count = table.shape[1]
    if inverse is None:
        return numpy.full(len(table), float(stats.norm.ppf((1 + level) / 2)) ** 2 / count)
    _, variance, _, groups = moments(table, inverse)
    if groups == 1:  # one group alone says nothing about others
        return numpy.full(len(table), 1e12)
    known = variance > 0
    answers = numpy.where(known, spread / numpy.where(known, variance, 1), groups)
    found: numpy.ndarray = float(stats.t.ppf((1 + level) / 2, groups - 1)) ** 2 / numpy.minimum(answers, count)
    return found


def _share(table: numpy.ndarray, inverse: numpy.ndarray | None, level: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    from scipy import stats

    share = table.mean(1)
    square = _relative_variance(share * (1 - share), table, inverse, level)
    if inverse is None:
        middle = (share + square / 2) / (1 + square)
        half = numpy.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
        low, high = middle - half, middle + half
    else:
        answers, tail = float(stats.norm.ppf((1 + level) / 2)) ** 2 / square, (1 - level) / 2
        right, wrong = share * answers, (1 - share) * answers
        # a beta distribution whose parameter is 0 has no quantiles: there the end is 0 or 1
        low = numpy.nan_to_num(stats.beta.ppf(tail, right, wrong + 1), nan=0.0)
        high = numpy.nan_to_num(stats.beta.ppf(1 - tail, right + 1, wrong), nan=1.0)
    return low.clip(0, share), high.clip(share, 1)


def _tango(
    table: numpy.ndarray, inverse: numpy.ndarray | None, level: float, *, by_group: bool = False
) -> tuple[numpy.ndarray, numpy.ndarray]:
    # a value in between stands for a gain or a loss that comes about so often
    gained, lost = table.clip(0).mean(1), (-table).clip(0).mean(1)
    mean = gained - lost
    spread = gained + lost - mean**2
    # of answers that are all alike each group counts once
    square = _relative_variance(spread, table * (not by_group), inverse, level)

    def inside(value: numpy.ndarray) -> numpy.ndarray:
        """Whether the score test does not refuse a difference; the share lost is its most likely one under that."""
        rest = value * (1 - value)
        linear = (2 - mean) * value - gained - lost
        likely = (numpy.sqrt(numpy.maximum(linear**2 + 8 * lost * rest, 0)) - linear) / 4
        accepted: numpy.ndarray = (mean - value) ** 2 <= square * numpy.maximum(2 * likely + rest, 0)
        return accepted

    ends = []
    for bound in (-1.0, 1.0):
        near, far = mean.copy(), numpy.full_like(mean, bound)
        for _ in range(50):
            between = (near + far) / 2
            good = inside(between)
            near, far = numpy.where(good, between, near), numpy.where(good, far, between)
        ends.append(near)
    return ends[0], ends[1]


def _bounded(table: numpy.ndarray, inverse: numpy.ndarray | None, level: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    low, high = _skewed(table, inverse, level)
    # where at least half of the values are alike, what rare ones could do does not show in how they spread
    alike = (numpy.abs(table - numpy.median(table, axis=1, keepdims=True)) < 1e-12).mean(1) >= 0.5
    alike |= numpy.isnan(low)
    if alike.any():
        rare = _tango(table[alike], inverse, level, by_group=True)
        low[alike], high[alike] = numpy.fmin(low[alike], rare[0]), numpy.fmax(high[alike], rare[1])
    return low.clip(-1, 1), high.clip(-1, 1)


def _skewed(table: numpy.ndarray, inverse: numpy.ndarray | None, level: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    from scipy import stats

    mean, variance, skewness, count = moments(table, inverse)
    error, reach = (
        numpy.sqrt(numpy.where(variance > 0, variance, numpy.nan)),
        float(stats.t.ppf((1 + level) / 2, max(count - 1, 1))),
    )
    skewness = numpy.where(numpy.abs(skewness) < 1e-6, 1e-6, skewness)

    def untransformed(point: float) -> numpy.ndarray:
        """The t statistic that Hall's transformation brings to a point."""
        root = numpy.cbrt(1 + skewness * (point / math.sqrt(count) - skewness / (6 * count)))
        found: numpy.ndarray = 3 * math.sqrt(count) / skewness * (root - 1)
        return found

    low = mean - error * numpy.maximum(untransformed(reach), reach)
    return low, mean - error * numpy.minimum(untransformed(-reach), -reach)
