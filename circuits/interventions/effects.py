"""From what interventions do to each answer to one row for each intervention, with intervals and tests."""

from typing import Any

import pandas

from circuits.metrics import NAMED_METRICS, effect_kind, is_signed, log_prob
from circuits.statistics import corrected, intervals, paired_p_values

#: What names an intervention in a table.
NAMES_OF_INTERVENTIONS: tuple[str, ...] = ("unit", "layer", "index", "mode", "site", "positions", "task")


def effects_table(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over the answers that each intervention acts on.

    Args:
        answers: from `run_interventions` with ``per_answer``, or several of them joined.

    Returns:
        As `run_interventions` gives it without ``per_answer``, for all rows together: the corrections are for all.

    Source:
        docs/method.md, section 9.

    Example:
        >>> answers = pandas.DataFrame({
        ...     "unit": "L0H1", "mode": "zero", "site": "", "positions": "all", "task": "qa", "group": [0, 1, 2, 3],
        ...     "changed": [True, True, True, False], "log_prob": -2.0, "log_prob_effect": [-1.0, -2.0, -3.0, 0.0]})
        >>> effects_table(answers)[["unit", "answers", "log_prob_effect"]].to_numpy().tolist()
        [['L0H1', 3, -2.0]]
    """
    metrics = [name.removesuffix("_effect") for name in answers if name.endswith("_effect")]
    names = [name for name in NAMES_OF_INTERVENTIONS if name in answers]
    rows = []
    for key, part in answers.groupby(names, sort=False):
        chosen = part[part["changed"]]
        row: dict[str, Any] = dict(zip(names, key, strict=True)) | {"answers": len(chosen)}
        groups = chosen["group"].to_numpy() if "group" in chosen else None
        for name in metrics:
            if len(chosen) == 0 or chosen[f"{name}_effect"].isna().all():
                continue
            effects = chosen[f"{name}_effect"].to_numpy(float)
            metric = NAMED_METRICS.get(name, log_prob)
            kind = effect_kind(metric)
            low, high = intervals(effects, groups, kind=kind)
            row |= {
                name: chosen[name].mean(),
                f"{name}_effect": effects.mean(),
                f"{name}_effect_low": float(low),
                f"{name}_effect_high": float(high),
            }
            if is_signed(metric):
                row[f"{name}_effect_p"] = float(paired_p_values(effects, groups, kind=kind))
        rows.append(row)
    return with_corrections(pandas.DataFrame(rows))


def with_corrections(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table with each ``…_effect_q`` made anew from ``…_effect_p`` over all of its rows."""
    tested = [name for name in table if name.endswith("_effect_p")]
    return table.assign(**{f"{name[:-2]}_q": corrected(table[name].to_numpy(), "bh") for name in tested})
