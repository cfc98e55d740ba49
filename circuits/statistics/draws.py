"""What random draws do to a comparison: a mean over few of them is not what others would give.

1. Where one side of a comparison is the mean over random masks or rankings, the other must lie beyond what single draws
   reach (Student's t), and not only beyond chance over answers. The larger p-value counts.
2. The uncertainties of answers and of draws are independent: half-widths of their intervals add as squares.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pandas

from circuits.statistics.comparisons import Paired

_ROUNDING = 1e-9  # numbers that differ by less are alike


def beyond_draws(found: Paired, draws: Sequence[float], *, answers: int, level: float = 0.95) -> Paired:
    """A comparison with the mean of random draws, now also with what a single draw may be.

    Draws that are all alike show only that they lie no more than about one answer apart: that is then taken as their
    standard deviation. A single draw shows nothing.

    Args:
        found: the comparison of the same answers, means over draws.
        draws: the mean over answers of each draw; where the other side is drawn too (a mask thinned beside its
            control), the mean of each draw's difference, as `of_draws` gives it.
        answers: how many answers each of these means is over.
        level: of the interval.

    Returns:
        The same difference, its interval as wide as both uncertainties make it, and the larger p-value; all but the
        difference NaN for a single draw.

    Source:
        docs/method.md, section 9.

    Example:
        >>> alone = Paired(difference=0.2, low=0.1, high=0.3, p_value=0.001)
        >>> far, near = (beyond_draws(alone, draws, answers=60) for draws in ([0.5, 0.9, 0.1], [0.5, 0.51, 0.49]))
        >>> round(far.p_value, 2), round(near.p_value, 4), round(near.low, 2)
        (0.71, 0.0033, 0.09)
    """
    from scipy import stats

    count = len(draws)
    if count < 2:
        return replace(found, low=math.nan, high=math.nan, p_value=math.nan)
    deviation = float(numpy.std(draws, ddof=1)) if numpy.ptp(draws) > _ROUNDING else 1 / answers
    spread = deviation * math.sqrt(1 + 1 / count)
    p_value = float(2 * stats.t.sf(abs(found.difference) / spread, count - 1))
    drawn = spread * float(stats.t.ppf((1 + level) / 2, count - 1))
    return replace(
        found,
        low=found.difference - math.hypot(found.difference - found.low, drawn),
        high=found.difference + math.hypot(found.high - found.difference, drawn),
        p_value=max(found.p_value, p_value),
    )


def of_draws(table: pandas.DataFrame, value: str) -> tuple[list[float], list[float]]:
    """Means of each draw of random parameters, and of each draw's difference from the mask, thinned as it was then.

    Args:
        table: rows with ``condition`` (``shared``, ``shared_thinned`` where it is thinned, ``random``) and ``draw``.
        value: the column of which there are means.

    Example:
        >>> rows = pandas.DataFrame({"condition": ["shared", "random", "random"], "draw": [0, 0, 1], "x": [1.0, 3, 2]})
        >>> of_draws(rows, "x")
        ([3.0, 2.0], [2.0, 1.0])
    """
    means = table.groupby(["condition", "draw"])[value].mean()
    if "random" not in means:
        return [], []
    random = means["random"]
    mask = means["shared_thinned"] if "shared_thinned" in means else means["shared"].iloc[0]
    return random.tolist(), (random - mask).tolist()
