"""From the points of curves to one number for each (docs/method.md, sections 5 and 9).

1. Curves may be joined to one table: every column that is neither a point's nor a measurement says which curve a row is
   of, and curves are never mixed.
2. The area under a curve is taken by trapezes over n, both ends counted as 0 and 1: for each answer, by which rankings
   are compared in pairs, or of the means over answers.
3. The smallest n at which a sufficient curve reaches 95 % of the accuracy of θ_ft, or a critical one falls below half
   of it.
"""

import math

import numpy
import pandas
from jaxtyping import Float
from scipy.integrate import trapezoid

from circuits.errors import CircuitsError
from circuits.masks import NAMES_OF_ANSWERS
from circuits.statistics import mean_interval

_SUFFICIENT, _CRITICAL = 0.95, 0.5
#: Accuracies that are means over as many answers are compared with this much room for rounding.
_ROUNDING = 1e-9
#: What tells points of one curve apart, and what is measured there. All other columns say which curve it is.
_POINT = ("n", "groups", "fraction")
_MEASURED = ("exact_match", "log_prob", "fine_tuned", "pre")


def _described(curves: pandas.DataFrame, *but: str) -> list[str]:
    """The columns that say what was measured: those of a curve, and any that were added to tell curves apart."""
    return [name for name in curves if name not in (*_MEASURED, *NAMES_OF_ANSWERS, *but)]


def _require_single_points(curves: pandas.DataFrame, keys: list[str], whose: str) -> None:
    if curves.duplicated(keys).any():
        raise CircuitsError(
            f"the curves have several rows for one point{whose}: give each model, kind or seed that was joined a "
            "column of its own"
        )


def curve_means(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over answers: the table that a curve gives without ``per_answer``.

    Args:
        answers: from `sufficient_curve` or `critical_curve` with ``per_answer``, or several of them joined, with the
            columns that tell them apart, such as ``model`` and ``kind``.

    Raises:
        CircuitsError: an answer has several rows for one point.
    """
    keys = _described(answers)
    names = [name for name in NAMES_OF_ANSWERS if name in answers]
    _require_single_points(answers, [*keys, *names], " of an answer")
    scores = answers[[*keys, *_MEASURED]].astype(dict.fromkeys(_MEASURED, float))
    return scores.groupby(keys, sort=False, as_index=False, dropna=False).mean()


def curve_areas(answers: pandas.DataFrame) -> pandas.DataFrame:
    """The area under the curve of each answer: one number for each, by which two rankings are compared in pairs.

    Args:
        answers: from `sufficient_curve` or `critical_curve` with ``per_answer``, or several of them joined, with the
            columns that tell them apart, such as ``model`` and ``kind``. Each curve may be measured at counts of its
            own.

    Returns:
        One row for each ``condition``, ``metric``, ``draw``, ``task`` (and what else tells curves apart) and answer:
        what names it, and ``area``. The mean over answers is the area under the curve of the means, `curve_summary`'s
        ``auc``.

    Raises:
        CircuitsError: a curve has a single point, or an answer several rows for one point or none for some.

    Source:
        docs/method.md, sections 5 and 9.

    Example:
        >>> answers = pandas.DataFrame({"condition": "sufficient", "metric": "change", "draw": 0, "n": [0, 1, 2] * 2,
        ...                             "task": "qa", "example": [0, 0, 0, 1, 1, 1], "group": [0, 0, 0, 1, 1, 1],
        ...                             "attribute": "city", "exact_match": [False, True, True, False, False, True]})
        >>> curve_areas(answers)[["example", "area"]].values.tolist()
        [[0.0, 0.75], [1.0, 0.25]]
    """
    keys = _described(answers, *_POINT)
    names = [name for name in NAMES_OF_ANSWERS if name in answers]
    _require_single_points(answers, [*keys, "n", *names], " of an answer")
    tables = []
    for values, curve in answers.groupby(keys, dropna=False):
        of = dict(zip(keys, values, strict=True))
        wide = curve.pivot(index=names, columns="n", values="exact_match").astype(float)
        if wide.isna().any(axis=None):
            raise CircuitsError(f"{_named(of)} has answers that are not there at every n")
        areas = _area(wide.to_numpy(), wide.columns.to_numpy(float), _named(of))
        tables.append(pandas.DataFrame(of | wide.index.to_frame(index=False).to_dict("series") | {"area": areas}))
    return pandas.concat(tables, ignore_index=True)


def _named(of: dict[str, object]) -> str:
    """Which curve this is, for a reader."""
    others = [f"{name} {value}" for name, value in of.items() if name not in ("condition", "metric")]
    return f"the {of['condition']} curve of {of['metric']} ({', '.join(others)})"


def _area(
    accuracies: Float[numpy.ndarray, "*answer point"], counts: Float[numpy.ndarray, " point"], curve: str
) -> Float[numpy.ndarray, "*answer"]:
    """The area under each row by trapezes, over counts scaled to 0 to 1."""
    if len(counts) < 2:
        raise CircuitsError(f"{curve} has a single point: measure two counts or more")
    area: numpy.ndarray = numpy.asarray(trapezoid(accuracies, (counts - counts[0]) / (counts[-1] - counts[0])))
    return area


def curve_summary(curves: pandas.DataFrame) -> pandas.DataFrame:
    """One number for each curve: its area, and the smallest n that is enough, or that breaks the model.

    Args:
        curves: from `sufficient_curve` or `critical_curve`, or several of them joined, with the columns that tell them
            apart, such as ``model`` and ``kind``.

    Returns:
        One row for each ``condition``, ``metric`` and ``task``, and each value of the columns that were added:
        ``draws``; ``auc``, the area under exact match against n, by trapezes, over the measured n scaled to 0 to 1, and
        its 95 % interval over draws ``auc_low`` and ``auc_high`` (NaN for a single one, and where all are alike); for
        sufficient curves ``n95``, the smallest measured n with at least 95 % of the exact match of θ_ft; for critical
        ones ``n50``, the smallest with less than half of it. Over draws it is the median, those that never get there
        counted as the largest; NaN if that is never, or if θ_ft gets nothing right.

    Raises:
        CircuitsError: a column is missing, or a curve has a single point or several rows for one point.

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
    keys = _described(curves, "draw", *_POINT)
    _require_single_points(curves, [*keys, "draw", "n"], "")
    rows = []
    for values, group in curves.groupby(keys, sort=False, dropna=False):
        of = dict(zip(keys, values, strict=True))
        areas, smallest = [], []
        for _, curve in group.groupby("draw"):
            ordered = curve.sort_values("n")
            counts, accuracy = ordered["n"].to_numpy(float), ordered["exact_match"].to_numpy(float)
            areas.append(float(_area(accuracy, counts, _named(of))))
            whole = float(ordered["fine_tuned"].iloc[0])
            enough, broken = accuracy >= _SUFFICIENT * whole - _ROUNDING, accuracy < _CRITICAL * whole - _ROUNDING
            there = enough if of["condition"] == "sufficient" else broken
            smallest.append(counts[there].min() if there.any() and whole > 0 else math.inf)
        middle = float(numpy.median(smallest))
        auc, low, high = mean_interval(areas)
        name = "n95" if of["condition"] == "sufficient" else "n50"
        rows.append(
            {
                **of,
                "draws": len(areas),
                "auc": auc,
                "auc_low": low,
                "auc_high": high,
                name: middle if math.isfinite(middle) else math.nan,
            }
        )
    return pandas.DataFrame(rows)
