"""Two models' answers side by side: paired differences, and how a person reads them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import pandas

from circuits.errors import CircuitsError
from circuits.statistics import Kind, corrected, paired

#: What the two models are called in tables and folders.
SIDES = ("a", "b")
_ANSWER = ("task", "example", "group", "start")
_METRICS = ("exact_match", "log_prob", "logit_diff")
#: Metrics that are 0 or 1 for each answer.
_BINARY = ("exact_match", "retrieved")
#: What ``q`` is, for a reader.
ABOUT_Q = "q: p-value of a paired test, corrected for the rows of one measure (Benjamini–Hochberg)."
#: What metrics are called, with their units.
_WORDS = {
    "exact_match": "exact match",
    "log_prob": "log-probability (nats)",
    "logit_diff": "logit difference",
    "cosine": "activations: cosine",
    "retrieved": "facts retrieved",
    "effect": "fall (nats)",
    "share": "share of all falls",
}
#: In place of an interval that would hold all that is possible.
UNKNOWN = "too few to tell"


def paired_differences(
    a: pandas.DataFrame,
    b: pandas.DataFrame,
    keys: Sequence[str],
    *,
    ending: str = "",
    metrics: Sequence[str] = _METRICS,
) -> pandas.DataFrame:
    """Compare two tables of the same answers, one row for each combination of keys.

    Args:
        a: one row for each answer (and intervention): ``task``, ``example``, ``group``, ``start``, and metrics.
        b: the same of another model.
        keys: columns that make the rows.
        ending: of the metrics' columns: ``_effect`` for what interventions change, ``_drop`` for what ablation costs.
        metrics: the columns that are compared, those of them that are there.

    Returns:
        ``answers``, and for each metric its mean in both (``log_prob_a``, ``log_prob_b``), their ``…_difference``, b
        less a, the ends of its 95 % interval, and the p-value of a paired test, as it is and corrected by
        Benjamini–Hochberg over the rows.

    Raises:
        CircuitsError: the two have other answers.

    Source:
        docs/method.md, section 9.

    Example:
        >>> a = pandas.DataFrame({"task": "qa", "example": range(8), "group": range(8), "start": 3, "log_prob": -1.0})
        >>> b = a.assign(log_prob=[-0.5] * 7 + [-1.0])
        >>> found = paired_differences(a, b, ["task"])
        >>> found[["answers", "log_prob_difference", "log_prob_p"]].round(3).to_numpy().tolist()
        [[8.0, 0.438, 0.016]]
    """
    names = [*dict.fromkeys([*keys, *_ANSWER])]
    one, other = (table[table["changed"]] if "changed" in table else table for table in (a, b))
    joined = one.merge(other, on=names, suffixes=("_a", "_b"), validate="one_to_one")
    if len(joined) != len(one) or len(joined) != len(other):
        raise CircuitsError("the two models were asked other questions: compare them on the same tasks and examples")
    metrics = [f"{name}{ending}" for name in metrics if f"{name}{ending}_a" in joined]
    # answers differ by −1, 0 or 1; what interventions change of them by up to 2
    share: Kind = "real" if ending else "binary_difference"
    rows = []
    for key, part in joined.groupby(list(keys), sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {"answers": len(part)}
        for metric in metrics:
            kind: Kind = share if metric.startswith(_BINARY) else "real"
            values = [part[f"{metric}_{side}"].to_numpy(float) for side in SIDES]
            if any(numpy.isnan(value).any() for value in values):
                continue  # the task has no such metric
            found = paired(values[1], values[0], part["group"].to_numpy(), kind=kind)
            row |= {f"{metric}_{side}": value.mean() for side, value in zip(SIDES, values, strict=True)}
            row |= {
                f"{metric}_difference": found.difference,
                f"{metric}_difference_low": found.low,
                f"{metric}_difference_high": found.high,
                f"{metric}_p": found.p_value,
            }
        rows.append(row)
    table = pandas.DataFrame(rows)
    for metric in metrics:
        if f"{metric}_p" in table:
            table[f"{metric}_q"] = corrected(table[f"{metric}_p"].to_numpy(), "bh")
    return table


def shown_differences(
    table: pandas.DataFrame,
    keys: Sequence[str],
    names: tuple[str, str],
    *,
    ending: str = "",
    metrics: Sequence[str] | None = None,
    digits: int = 2,
    controls: Mapping[str, Mapping[str, str]] | None = None,
) -> pandas.DataFrame:
    """A table of differences as a person reads it: one row for each measure, also of a control.

    Args:
        table: from `paired_differences`.
        keys: its columns that make the rows.
        names: what to call the models.
        ending: of the metrics' columns.
        metrics: those that are shown; without them, of answers' metrics those that are there.
        digits: after the point of what is no share.
        controls: metric → what a control is called → the columns that hold it, without ``_a`` and ``_b``.
    """
    parts = []
    for metric in metrics or [f"{name}{ending}" for name in _METRICS if f"{name}{ending}_difference" in table]:
        share = metric.startswith((*_BINARY, "share"))
        what = _WORDS.get(metric.removesuffix(ending), metric.removesuffix(ending).replace("_", " "))

        def written(value: float, signed: bool = False, share: bool = share) -> str:
            sign = "+" if signed else ""
            return "–" if value != value else f"{value:{sign}.1%}" if share else f"{value:{sign}.{digits}f}"

        def within(low: float, high: float, most: float = (2.0 if ending else 1.0) if share else math.inf) -> str:
            if low != low:
                return ""
            known = -most < low or high < most
            return f" ({written(low, True)} to {written(high, True)})" if known else f" ({UNKNOWN})"

        columns = (f"{metric}_difference", f"{metric}_difference_low", f"{metric}_difference_high")
        compared = [
            written(middle, True) + within(low, high)
            for middle, low, high in zip(*(table[column] for column in columns), strict=True)
        ]
        shown = table[[*keys]].assign(measure=what, answers=table["answers"])
        shown = shown.assign(**_of_both(table, metric, names, written), difference=compared)
        parts.append(shown.assign(q=[f"{value:.2g}" for value in table[f"{metric}_q"]])[table[columns[0]].notna()])
        for words, column in (controls or {}).get(metric, {}).items():
            shown = table[[*keys]].assign(measure=f"{what}, {words}", answers=table["answers"])
            shown = shown.assign(**_of_both(table, column, names, written), difference="", q="")
            parts.append(shown[table[[f"{column}_{side}" for side in SIDES]].notna().any(axis=1)])
    rows = pandas.concat(parts).sort_index(kind="stable").reset_index(drop=True)
    return rows if rows["measure"].nunique() > 1 else rows.drop(columns="measure")


def _of_both(
    table: pandas.DataFrame, column: str, names: tuple[str, str], written: Callable[[float], str]
) -> dict[str, list[str]]:
    return {
        name: [written(value) for value in table[f"{column}_{side}"]] for side, name in zip(SIDES, names, strict=True)
    }
