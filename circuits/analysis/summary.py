"""What an analysis comes to, in a few numbers and in one table of heads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from circuits.analysis.figures import by_mode, effect_of
from circuits.analysis.localisation import MEASURES
from circuits.consistency import mismatched_kind
from circuits.masks import ablation_summary
from circuits.metrics import METRICS
from circuits.statistics import Kind, intervals

_TOP = 12


def accuracies(answers: pandas.DataFrame, by: Sequence[str] = ("task",)) -> pandas.DataFrame:
    """Means of every metric over the answers of each task, with their 95 % intervals.

    Args:
        answers: one row for each answer, from `circuits.metrics.evaluate`, or several of these joined, with the columns
            that tell them apart.
        by: those columns.

    Returns:
        One row for each of their values: ``answers``, how many, and for each metric that all of them have its mean and
        the ends of its interval, in which answers of one ``group`` count together.

    Source:
        docs/method.md, section 9.

    Example:
        >>> answers = pandas.DataFrame({"task": "qa", "group": range(8), "exact_match": [True] * 6 + [False] * 2})
        >>> accuracies(answers).round(2).to_dict("records")
        [{'task': 'qa', 'answers': 8, 'exact_match': 0.75, 'exact_match_low': 0.41, 'exact_match_high': 0.93}]
    """
    rows = []
    for key, part in answers.groupby([*by], sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {"answers": len(part)}
        for metric in (*METRICS, "logit_diff"):
            if metric in part and part[metric].notna().all():
                values = part[metric].to_numpy(float)
                kind: Kind = "share" if metric in ("exact_match", "first_token") else "real"
                low, high = intervals(values, part["group"].to_numpy(), kind=kind)
                row |= {metric: values.mean(), f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return pandas.DataFrame(rows)


def summary_of(
    tables: Mapping[str, pandas.DataFrame],
    facts: Mapping[str, Any],
    left_out: Mapping[str, str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        tables: of the analysis.
        facts: what it was made from.
        left_out: steps that were not done, each with the reason.
        seconds: what each step took.
    """
    found: dict[str, Any] = {**facts, "left_out": dict(left_out), "seconds": dict(seconds)}
    if "accuracy" in tables:
        found["tasks_scored"] = records(tables["accuracy"])
    if "shared" in tables:
        found["shared"] = records(tables["shared"])
    if "ablation" in tables:
        parts = tables["ablation"].groupby("scope", sort=False)
        found["ablation"] = [
            row for scope, part in parts for row in records(ablation_summary(part).assign(scope=scope))
        ]
    if "grafts" in tables and len(tables["grafts"]):
        chosen = tables["grafts"][tables["grafts"]["chosen"].astype(bool)]
        best = chosen.sort_values("size", kind="stable").drop_duplicates("task")
        kept = tables["graft_accuracy"].pivot(index=["graft", "score"], columns="task", values="exact_match")
        of = best[["task", "score"]].itertuples(index=False)
        found["grafts"] = [
            row | {"on": kept.loc[key].to_dict()} for row, key in zip(records(best), map(tuple, of), strict=True)
        ]
    for name in ("sweep", "neurons", "patches"):
        if name in tables:
            table = tables[name]
            order = table[effect_of(table)].abs().sort_values(ascending=False, kind="stable").index
            found[f"top_{name}"] = records(table.loc[order].head(_TOP))
    if "ranking_summary" in tables:
        found["rankings"] = records(tables["ranking_summary"])
    if "gradient_consistency" in tables:
        pairs = tables["gradient_consistency"][["task", "other"]].drop_duplicates().to_dict("records")
        found["consistency"] = [pair | consistency_numbers(tables, **pair) for pair in pairs]
    if "localisation" in tables:
        found["localisation"] = localisation_numbers(tables["localisation"])
    if len(tables.get("signature", ())):
        found["signature"] = records(tables["signature"])
    if "integrated_signature" in tables:
        found["integrated_signature"] = records(tables["integrated_signature"])
    return found


def consistency_numbers(tables: Mapping[str, pandas.DataFrame], task: str, other: str) -> dict[str, Any]:
    """What the consistency of two tasks comes to.

    Args:
        tables: ``gradient_consistency`` and ``representation_consistency`` of one model.
        task: one of the tasks.
        other: the other.

    Returns:
        ``gradient``: mean cosines of ``matched`` and ``mismatched`` pairs over all parameters; those of matched pairs
        ``inside`` the shared parameters (thinned, where their controls are) and in random ones ``outside``, and the
        same for the shared parameters of each tensor (``…_per_tensor``). ``representation``: means over layers at the
        token that predicts the answer: cosines of ``matched`` and ``mismatched`` pairs, ``cka`` of both,
        ``retrieval`` and what ``chance`` gives. Mismatched pairs are those of `mismatched_kind`.
    """
    gradients, activations = (
        table[(table["task"] == task) & (table["other"] == other)]
        for table in (tables["gradient_consistency"], tables["representation_consistency"])
    )
    whole = gradients[gradients["by"] == "all"].set_index("kind")["mean"]
    gradient = {"matched": whole["matched"], "mismatched": whole.get(mismatched_kind(whole.index), math.nan)}
    masked = gradients[(gradients["by"] == "mask") & (gradients["kind"] == "matched")]
    for scope, part in masked.groupby("scope", sort=False):
        ending = "" if scope == "global" else f"_per_{scope}"
        means = part.groupby("condition")["mean"].mean()
        gradient[f"inside{ending}"] = means.get("shared_thinned", means.get("shared"))
        gradient[f"outside{ending}"] = means.get("random", math.nan)
    last = activations[activations["span"] == "last"]
    means = last.groupby("kind")[["cosine", "cka", "retrieval", "chance"]].mean()
    one, two = means.loc["matched"], means.loc[mismatched_kind(means.index)]
    representation = {"matched": one["cosine"], "mismatched": two["cosine"], "cka": one["cka"]}
    representation |= {"cka_mismatched": two["cka"], "retrieval": one["retrieval"], "chance": one["chance"]}
    return {
        name: {key: None if value != value else round(float(value), 4) for key, value in numbers.items()}
        for name, numbers in (("gradient", gradient), ("representation", representation))
    }


def localisation_numbers(table: pandas.DataFrame) -> dict[str, Any]:
    """The means of the step ``localise``: pair of tasks → scope → what is done, and to which parameters → measure.

    What is done to all parameters alike, ``none`` and ``all``, stands beside the scopes.
    """
    found: dict[str, Any] = {}
    for row in table.itertuples():
        at = found.setdefault(f"{row.task} and {row.other}", {})
        if row.scope:
            at = at.setdefault(row.scope, {})
        numbers = {name: round(float(getattr(row, name)), 4) for name in MEASURES}
        at[f"{row.act}_{row.condition}" if row.condition else row.act] = numbers
    return found


def records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them, without what is missing."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{key: value.item() if hasattr(value, "item") else value for key, value in row.items()} for row in rows]


def top_table(tables: Mapping[str, pandas.DataFrame], count: int = _TOP) -> pandas.DataFrame | None:
    """The heads that matter most, one row each: Shared Size, what ablating and patching them does, what they attend to.

    Args:
        tables: of an analysis.
        count: of heads.

    Returns:
        ``head``; ``shared``; for each task the change when the head is ablated (``without: TASK``) or patched
        (``patched: TASK``), with its 95 % interval; ``attends``: the span it attends to most. None without a sweep.
    """
    if "sweep" not in tables:
        return None
    columns: dict[str, pandas.Series] = {}
    sizes = []
    for name, label in (("sweep", "without"), ("patches", "patched")):
        if name not in tables:
            continue
        table = tables[name]
        effect = effect_of(table)
        for task, part in by_mode(table).groupby("task", sort=False):
            rows = part.set_index("unit")
            columns[f"{label}: {task}"] = rows.apply(lambda row, effect=effect: _interval(row, effect), axis=1)
            sizes.append(rows[effect].abs() / (rows[effect].abs().max() or 1.0))
    order = pandas.concat(sizes, axis=1).max(axis=1).sort_values(ascending=False, kind="stable").index[:count]
    found = pandas.DataFrame(index=order)
    if "shared_heads" in tables:
        heads = tables["shared_heads"].query("scope == 'global'").set_index("unit")
        found["shared"] = heads["size"].map("{:,.0f}".format)
    for name, column in columns.items():
        found[name] = column
    if "attention" in tables:
        best = tables["attention"].sort_values("excess", ascending=False, kind="stable").drop_duplicates("unit")
        words = best["behaviour"].str.replace("_", " ") + best["attention"].map(lambda value: f", {value:.2f}")
        found["attends"] = words.set_axis(best["unit"])
    return found.rename_axis("head").reset_index()


def _interval(row: pandas.Series, effect: str) -> str:
    return f"{row[effect]:+.2f} ({row[f'{effect}_low']:+.2f} to {row[f'{effect}_high']:+.2f})"
