"""Verdicts: does a difference hold, does it not, or can it not be told?

1. Every claim is a difference between two numbers, positive if it is as claimed, and comes with a smallest size below
   which no difference is called one.
2. What was asked of both sides is compared question by question: the interval and the p-value are those of paired
   answers, those of one group kept together (`circuits.statistics`). Where one side is the mean of random draws, the
   other must also lie beyond what single draws reach (Student's t), and the larger p-value counts.
3. Over several seeds every claim is tested on its differences, one for each seed: two models that were trained from the
   same seed are a pair. Interval and p-value are Student's t.
4. The p-values of a page are corrected together (Holm), and its intervals hold together (level 1 − 0.05 / claims).
5. *Holds*: p is below 0.05, the interval lies above zero, and the difference is at least the smallest size. *Does not
   hold*: the interval has no room for a difference of the smallest size. *Cannot be told*: all else, with the number of
   questions or seeds that could tell four times in five. (p alone would not do: Holm's correction finds more than
   intervals that hold together, so p may be below 0.05 beside an interval with zero in it.)
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
import pandas
from scipy import stats

from circuits.errors import CircuitsError
from circuits.statistics import Kind, answers_needed, beyond_draws, corrected, mean_interval, paired

ERROR = 0.05
_POWER = 0.8
#: Smaller differences are not called differences: of accuracies and areas under them, of sizes as a share of their
#: mean, of Gini coefficients, of correlations, and of cosines and shares of a signature.
SMALLEST_ACCURACY, SMALLEST_SIZE, SMALLEST_GINI, SMALLEST_CORRELATION = 0.02, 0.05, 0.02, 0.1
SMALLEST_COSINE = 0.05
_PERMUTATIONS = 20_000
_ROUNDING = 1e-9  # numbers that differ by less are alike
VERDICTS = ("holds", "does not hold", "cannot be told")
#: What the verdicts mean, for a reader.
ABOUT_VERDICTS = (
    "A claim holds if the interval lies where the paper says, p is below 0.05, and the difference is worth the name: "
    f"at least {100 * SMALLEST_ACCURACY:.0f} points of accuracy (or area), {SMALLEST_SIZE:.0%} of a size, "
    f"{SMALLEST_GINI} of a Gini coefficient, {SMALLEST_CORRELATION} of a correlation, or {SMALLEST_COSINE} of a cosine "
    "or of the shares of a signature. It does not hold if the "
    "interval has no room for a difference as large as that. All else cannot be told from "
    f"this many answers or seeds. All p-values are corrected together (Holm), and all intervals hold together at "
    f"{1 - ERROR:.0%}."
)
ONE_RUN = "one run: sizes vary with the seed more than one run can show"


@dataclass(frozen=True)
class Finding:
    """A claim of the paper and what was found of it.

    Attributes:
        figure: of the paper.
        claim: what the paper says.
        here: the numbers.
        control: what they are to be read against.
        difference: how far the numbers lie apart, positive in the paper's direction; NaN if they could not be had.
        low: the lower end of its interval; NaN if one run cannot tell.
        high: the upper end.
        p_value: corrected for all claims of the page; NaN if one run cannot tell.
        smallest: the size from which on a difference is called one.
        most: the largest difference that there can be: the interval ends there.
        form: how to write the difference.
        needed: what could tell.
        by_seed: the differences that ``difference`` is the mean of, in words.
    """

    figure: str
    claim: str
    here: str
    control: str
    difference: float
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    smallest: float = SMALLEST_ACCURACY
    most: float = 1.0
    form: str = "+.1%"
    needed: str = ONE_RUN
    by_seed: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", max(self.low, -self.most))  # which leaves NaN as it is
        object.__setattr__(self, "high", min(self.high, self.most))

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`.

        Example:
            >>> told = [(0.3, 0.2, 0.4, 0.001), (0.05, -0.1, 0.2, 0.4), (0.0, -0.01, 0.01, 1.0)]
            >>> [Finding("1a", "", "", "", *numbers).verdict for numbers in told]
            ['holds', 'cannot be told', 'does not hold']
        """
        if self.p_value < ERROR and self.low > 0 and self.difference >= self.smallest:
            return "holds"
        return "does not hold" if self.high < self.smallest else "cannot be told"


def corrected_together(found: Sequence[Finding]) -> list[Finding]:
    """The findings with the p-values of all that have one corrected together."""
    tested = [number for number, one in enumerate(found) if not math.isnan(one.p_value)]
    p_values = dict(zip(tested, corrected([found[number].p_value for number in tested]), strict=True))
    return [replace(one, p_value=float(p_values.get(number, math.nan))) for number, one in enumerate(found)]


def compare_answers(
    one: "pandas.Series[float]",
    other: "pandas.Series[float]",
    level: float,
    *,
    kind: Kind = "bounded_difference",
    most: float = 1.0,
    smallest: float = SMALLEST_ACCURACY,
    draws: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Difference, interval and p-value of two sides of the same questions, and how many questions could tell.

    Args:
        one: a number for each question.
        other: the same of the other side.
        level: of the interval.
        kind: what their differences are, in units of ``most``.
        most: the largest difference that there can be.
        smallest: the size from which on a difference is called one.
        draws: where one side is the mean over random draws, the means of each, as
            `circuits.statistics.beyond_draws` takes them.

    Raises:
        CircuitsError: the two sides were asked different questions.
    """
    if not one.index.equals(other.index):
        raise CircuitsError("two conditions are compared on the same questions, but these were asked different ones")
    groups = one.index.get_level_values("group").to_numpy()
    sides = one.to_numpy() / most, other.to_numpy() / most
    found = paired(*sides, groups, kind=kind, level=level)
    sought = max(abs(found.difference), smallest / most)
    count = answers_needed(sought, *sides, groups=groups, kind=kind)
    if count is None:
        needed = "the answers show no spread to judge by"
    else:
        # that many tell one difference alone; a page of claims asks for more
        reach, alone = (stats.norm.isf(error / 2) + stats.norm.ppf(_POWER) for error in (1 - level, ERROR))
        needed = f"about {math.ceil(count * (reach / alone) ** 2):,} questions could tell"
    told = replace(found, **{name: most * getattr(found, name) for name in ("difference", "low", "high")})
    if draws is not None:
        alone, told = told.p_value, beyond_draws(told, draws, answers=len(one), level=level)
        if not told.p_value <= alone:
            needed = f"{len(draws)} random draws lie too far apart: more of them could tell"
    return {**asdict(told), "needed": needed}


def spearman(one: Sequence[float], other: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Spearman's correlation with its interval (Fisher's z, Bonett & Wright 2000) and its permutation p-value.

    Where all ranks agree, the interval is that of two neighbours that have changed places, and ends at 1 (or −1). The
    p-value, two-sided, is exact up to eight pairs and otherwise from 20,000 random permutations; it is never 0.

    Returns:
        correlation, lower and upper end, p-value; NaN, NaN, NaN and 1 if one side is all alike.

    Example:
        >>> spearman([1, 2, 3, 4], [1, 2, 3, 4])[3] * 24
        2.0
    """
    ranks = [stats.rankdata(values) for values in (one, other)]
    first, second = (values - values.mean() for values in ranks)
    scale, count = float(numpy.linalg.norm(first) * numpy.linalg.norm(second)), len(first)
    if scale == 0:
        return math.nan, math.nan, math.nan, 1.0
    found = float(first @ second) / scale
    if count <= 8:
        orders = numpy.array(list(itertools.permutations(range(count))))
        extra = 0
    else:
        generator = numpy.random.default_rng(0)
        orders, extra = generator.permuted(numpy.tile(numpy.arange(count), (_PERMUTATIONS, 1)), axis=1), 1
    as_far = int((numpy.abs(first[orders] @ second) >= abs(found) * scale - 1e-9).sum())
    p_value = (as_far + extra) / (len(orders) + extra)
    if count < 4:
        return found, -1.0, 1.0, p_value
    # the nearest to ±1 that so many ranks can have without being it: where two neighbours have changed places
    nearest = 1 - 12 / (count**3 - count)
    middle = math.atanh(min(max(found, -nearest), nearest))
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt((1 + found**2 / 2) / (count - 3))
    return found, min(found, math.tanh(middle - half)), max(found, math.tanh(middle + half)), p_value


def findings_over_seeds(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Each claim of the paper tested on its differences, one for each seed.

    Args:
        found: the `findings` of each seed, the same claims in each.
    """
    level = 1 - ERROR / len(found[0])
    return corrected_together([_over_seeds(one, level) for one in zip(*found, strict=True)])


def _over_seeds(claims: Sequence[Finding], level: float) -> Finding:
    first, differences = claims[0], [one.difference for one in claims]
    known = [value for value in differences if not math.isnan(value)]
    both = replace(
        first,
        here=" · ".join(one.here for one in claims),
        control=" · ".join(dict.fromkeys(one.control for one in claims)),
        by_seed=" · ".join("none" if math.isnan(value) else f"{value:{first.form}}" for value in differences),
        difference=float(numpy.mean(known)) if known else math.nan,
        low=math.nan,
        high=math.nan,
        p_value=math.nan,
    )
    if len(known) < len(claims):
        return replace(both, needed=f"{len(claims) - len(known)} of {len(claims)} seeds have no such number")
    if len(claims) == 1:
        return replace(both, needed="one seed: differences between seeds are not known")
    if numpy.ptp(known) <= _ROUNDING:
        return replace(both, needed="the seeds are all alike and show no spread to judge by: further seeds could tell")
    _, low, high = mean_interval(known, level)
    needed = seeds_needed(float(numpy.std(known, ddof=1)), max(abs(both.difference), first.smallest), 1 - level)
    return replace(
        both,
        low=low,
        high=high,
        p_value=float(stats.ttest_1samp(known, 0).pvalue),
        needed=f"{needed:,} seeds could tell" if needed else "more than 1,000 seeds would have to tell",
    )


def seeds_needed(deviation: float, difference: float, error: float = ERROR) -> int | None:
    """How many seeds a paired t-test needs to find a difference four times in five.

    Args:
        deviation: standard deviation of the difference over seeds.
        difference: what there is to find.
        error: how often a difference may be found that is not there.

    Returns:
        The number; None if 1,000 are too few, or there is no deviation to judge by.

    Example:
        >>> seeds_needed(0.1, 0.05), seeds_needed(0.1, 0.2)
        (34, 5)
    """
    for seeds in range(2, 1001 if deviation else 2):
        apart = math.sqrt(seeds) * difference / deviation
        critical = float(stats.t.isf(error / 2, seeds - 1))
        if float(stats.nct.sf(critical, seeds - 1, apart)) >= _POWER:
            return seeds
    return None
