"""How sure a number is: intervals, paired tests, corrections for many comparisons, and how many answers would tell.

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
5. A paired test asks whether two models could be exchanged. Differences of 0/1 values without groups: McNemar's exact
   test. Otherwise the signs of the groups' differences are flipped, in every way where there are few, else at random.
6. What the values are is said by who made them, and never guessed from the values: a row is the same in any company.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from jaxtyping import Float, Shaped

from circuits.errors import CircuitsError

#: Ways of flipping signs that a test looks at: all there are, or this many at random.
_FLIPS = 9_999
_PART = 1_024  # rows at a time

Groups = Sequence[Any] | Shaped[numpy.ndarray, " answer"]

#: What values are: 0 or 1; −1, 0 or 1; anything within −1 and 1, such as differences of accuracies; any number.
Kind = Literal["share", "binary_difference", "bounded_difference", "real"]


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
    table, inverse = _checked(values, groups, kind)
    find = {"share": _share, "binary_difference": _tango, "bounded_difference": _bounded, "real": _skewed}[kind]
    parts = [find(table[start : start + _PART], inverse, level) for start in range(0, len(table), _PART)]
    shape = numpy.shape(values)[:-1]
    low, high = (numpy.concatenate(ends).reshape(shape) for ends in zip(*parts, strict=True))
    return low, high


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
    table, inverse = _checked(differences, groups, kind)
    if inverse is None and kind == "binary_difference":
        from scipy import stats

        gained, lost = (table > 0).sum(1), (table < 0).sum(1)
        found = numpy.minimum(2 * stats.binom.cdf(numpy.minimum(gained, lost), gained + lost, 0.5), 1)
    else:
        sums = _by_group(table, inverse)
        count = sums.shape[1]
        if 2**count <= _FLIPS + 1:
            signs, seen = 1.0 - 2 * (numpy.arange(2**count) >> numpy.arange(count)[:, None] & 1), 0
        else:
            generator = numpy.random.default_rng(0)
            signs, seen = 1.0 - 2 * generator.integers(0, 2, (count, _FLIPS), dtype=numpy.int8), 1
        found = numpy.empty(len(sums))
        for start in range(0, len(sums), _PART):
            part = sums[start : start + _PART]
            # as large as observed, but for rounding
            least = numpy.abs(part.sum(1, keepdims=True)) - 1e-9 * numpy.abs(part).sum(1, keepdims=True)
            found[start : start + _PART] = (numpy.abs(part @ signs) >= least).sum(1)
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
    groups: Groups | None = None,
    *,
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

    table, inverse = _checked(_differences(one, other), groups, kind)
    spread = table.shape[1] * float(_moments(table, inverse)[1][0])
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


#: Of each kind what its values are, for a reader, and whether a table holds nothing else.
_KINDS: dict[str, tuple[str, Callable[[numpy.ndarray], numpy.ndarray]]] = {
    "share": ("0 and 1", lambda table: numpy.isin(table, (0, 1))),
    "binary_difference": ("−1, 0 and 1", lambda table: numpy.isin(table, (-1, 0, 1))),
    "bounded_difference": ("between −1 and 1", lambda table: numpy.abs(table) <= 1 + 1e-9),
    "real": ("numbers", numpy.ones_like),
}


def _checked(values: Any, groups: Groups | None, kind: str) -> tuple[numpy.ndarray, numpy.ndarray | None]:
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


def _by_group(table: numpy.ndarray, inverse: numpy.ndarray | None) -> numpy.ndarray:
    """Sums over each group, ``[row, group]``."""
    if inverse is None:
        return table
    order = numpy.argsort(inverse, kind="stable")
    starts = numpy.searchsorted(inverse[order], numpy.arange(inverse.max() + 1))
    return numpy.add.reduceat(table[:, order], starts, axis=1)


def _moments(
    table: numpy.ndarray, inverse: numpy.ndarray | None
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, int]:
    """Mean, its variance, the skewness of what groups add to it, and the number of groups."""
    mean = table.mean(1)
    beyond = _by_group(table - mean[:, None], inverse)
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
    _, variance, _, groups = _moments(table, inverse)
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


def _tango(table: numpy.ndarray, inverse: numpy.ndarray | None, level: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    # a value in between stands for a gain or a loss that comes about so often
    gained, lost = table.clip(0).mean(1), (-table).clip(0).mean(1)
    mean = gained - lost
    square = _relative_variance(gained + lost - mean**2, table, inverse, level)

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
    alike = numpy.isnan(low)
    if alike.any():
        low[alike], high[alike] = _tango(table[alike], inverse, level)
    return low, high


def _skewed(table: numpy.ndarray, inverse: numpy.ndarray | None, level: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    from scipy import stats

    mean, variance, skewness, count = _moments(table, inverse)
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
