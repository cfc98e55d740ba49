"""The page of an analysis: what was found, in the order in which one asks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.analysis.fact_sections import consistency_sections, localisation_sections, signature_sections
from circuits.analysis.summary import top_table
from circuits.analysis.words import SCOPE_WORDS, interval, percent, two
from circuits.figures import Number, Section, write_report
from circuits.figures.style import label

#: Figure → what there is to see in it.
_SEE = {
    "sharing": "The wider the gap between the solid line and the dashed control, the more is shared beyond what the "
    "choice of tensors alone explains.",
    "ablation": "Compare the red bars with the grey ones of as many random parameters; where there are light red ones, "
    "compare these.",
    "sweep": "Red: the answer becomes less likely; blue: more likely.",
    "attention": "The darker a head, the more of its attention goes there.",
}


def write_page(
    path: Path, summary: Mapping[str, Any], tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]
) -> None:
    """Write the report of an analysis."""
    sections = [
        *_tasks(summary),
        *_shared(summary, figures),
        *_without(summary, figures),
        *_grafts(summary),
        *_heads(tables, figures),
        *_patched(figures),
        *_rankings(figures),
        *_attention(figures),
        *consistency_sections(tables, figures),
        *localisation_sections(tables, figures),
        *signature_sections(tables, figures),
    ]
    if summary["left_out"]:
        reasons = [f"{name}: {reason}." for name, reason in summary["left_out"].items()]
        sections.append(Section("What was not done", reasons))
    tasks = " · ".join(map(label, summary["tasks"]))
    source = Path(summary["model"]["source"]).name
    seconds = sum(summary["seconds"].values())
    write_report(
        path,
        f"{source}: {tasks}",
        _lead(summary),
        sections=sections,
        footer=f"{seconds / 60:.1f} minutes; circuits analyse",
        numbers=_numbers(summary, tables),
        setting={"model": source, "tasks": tasks, "before fine-tuning": Path(summary["pre"]["source"]).name}
        if summary["pre"]
        else {"model": source, "tasks": tasks},
    )


def _numbers(summary: Mapping[str, Any], tables: Mapping[str, pandas.DataFrame]) -> list[Number]:
    """What is shared, what that does, and which head matters most; those that were measured."""
    found = []
    shared = next((row for row in summary.get("shared", ()) if row["scope"] == "global"), None)
    if shared is not None:
        what = f"parameters that the tasks share, of {shared['total']:,}"
        found.append(Number(f"{shared['size']:,}", what, f"permuted: {percent(shared['permuted_share'])} of the top"))
    dropped = [row for row in summary.get("ablation", ()) if row["scope"] == "global"]
    if dropped:
        row = max(dropped, key=lambda row: row["before"] - row["after"])
        what = f"exact match on {label(row['task'])} without them, from {percent(row['before'])}"
        control = f"without as many random ones it falls by {percent(row['random_drop'])}"
        found.append(Number(percent(row["after"]), what, control))
    top = top_table(tables, 1)
    if top is not None:
        found.append(Number(str(top["head"][0]), "the head that changes answers most", "of all heads, one at a time"))
    return found


def _lead(summary: Mapping[str, Any]) -> str:
    shared = {row["scope"]: row for row in summary.get("shared", ())}
    if "global" not in shared:
        return "What one task needs of the model."
    row = shared["global"]
    return (
        f"The tasks share {row['size']:,} of {row['total']:,} parameters: {row['share']:.0%} of the top "
        f"{row['influenced'] / row['total']:.2%} of each. With one task's gradients shuffled within each tensor it "
        f"would be {row['permuted_share']:.0%}."
    )


def _tasks(summary: Mapping[str, Any]) -> Sequence[Section]:
    scored = summary.get("tasks_scored", ())
    foils = any(row.get("logit_diff") is not None for row in scored)
    rows = [
        {
            "task": label(row["task"]),
            "answers": row["answers"],
            "exact match": interval(row, "exact_match", percent),
            "log-probability (nats)": interval(row, "log_prob", two),
            **(
                {"logit difference": "" if row.get("logit_diff") is None else interval(row, "logit_diff", two)}
                if foils
                else {}
            ),
        }
        for row in scored
    ]
    text = "Means over answers and their 95% intervals."
    if foils:
        text += " The logit difference is that of the answer and its foil."
    return [Section("What the model says", [text], pandas.DataFrame(rows))] if rows else []


def _shared(summary: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    rows = [
        {
            "the top": SCOPE_WORDS[row["scope"]],
            "shared": f"{row['size']:,}",
            "share": percent(row["share"]),
            "permuted": percent(row["permuted_share"]),
            "lift over chance": f"{row['lift']:.1f}",
            "permuted lift": f"{row['permuted_lift']:.1f}",
            "Gini over heads": "–" if row["gini"] is None else f"{row['gini']:.2f}",
            "random": "–" if row["random_gini"] is None else f"{row['random_gini']:.2f}",
        }
        for row in summary.get("shared", ())
    ]
    if not rows:
        return []
    text = (
        "Parameters with a large gradient in every task. The control permutes one task's gradients within each tensor; "
        "random is a set of the same size."
    )
    found = [Section("What the tasks share", [text], pandas.DataFrame(rows), figures.get("sharing"), _SEE["sharing"])]
    if "shared_heads" in figures:
        found.append(
            Section(
                "Where it is",
                ["Shared Size: how many of a head's parameters are shared."],
                None,
                figures["shared_heads"],
                "Each cell is a head; the darker, the more of its parameters are shared.",
            )
        )
    return found


def _random_drop(row: Mapping[str, Any]) -> str:
    """With its interval, unless that holds every drop that there can be."""
    low, high = row["random_drop_low"], row["random_drop_high"]
    if low is not None and low <= row["before"] - 1 and high >= row["before"]:
        return f"{percent(row['random_drop'])} (too few draws to tell)"
    return interval(row, "random_drop", percent)


def _without(summary: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    rows = [
        {
            "the top": SCOPE_WORDS[row["scope"]],
            "task": label(row["task"]),
            "parameters": f"{row['parameters']:,}",
            "before": percent(row["before"]),
            "without them": percent(row["after"]),
            "drop, thinned": percent(row["thinned_drop"]),
            "drop, random": _random_drop(row),
            **{
                f"log-prob, {words}": f"{row[f'log_prob_{name}']:.2f}"
                for name, words in (("before", "before"), ("thinned", "thinned"), ("random", "random"))
            },
        }
        for row in summary.get("ablation", ())
    ]
    if not rows:
        return []
    what = "go back to what they were before fine-tuning" if summary["pre"] else "become zero"
    text = (
        f"Exact match when the shared parameters {what}, beside as many random ones outside them; where a tensor has "
        "too little room for these, both are thinned, and compared as such. The answers' mean log-probability (nats) "
        "tells more where few answers are right to begin with."
    )
    return [
        Section(
            "What happens without it", [text], pandas.DataFrame(rows), figures.get("ablation_global"), _SEE["ablation"]
        )
    ]


def _grafts(summary: Mapping[str, Any]) -> Sequence[Section]:
    rows = [
        {
            "task": label(row["task"]),
            "parameters": f"{row['size']:,}",
            "of all": percent(row["fraction"]),
            "taken by": row["score"].replace("_x_", " × ").replace("_", " "),
            **{f"exact match on {label(task)}": percent(value) for task, value in row["on"].items()},
        }
        for row in summary.get("grafts", ())
    ]
    text = (
        "The fewest fine-tuned parameters that were found to keep a task in the model before fine-tuning, and what "
        "that model then answers."
    )
    return [Section("What is enough of the fine-tuning", [text], pandas.DataFrame(rows))] if rows else []


def _heads(tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    top = top_table(tables)
    if top is None:
        return []
    text = (
        "The heads whose ablation or patching changes most, relative to the largest change of each column: change of "
        "the logit difference where tasks have foils, else of the log-probability (nats), with its 95% interval (of "
        "each head alone, not corrected for their number; the tables have corrected p-values)."
    )
    shown = top.rename(columns=lambda name: ": ".join(map(label, name.split(": "))) if ": " in name else name)
    return [Section("Which heads", [text], shown, figures.get("sweep"), _SEE["sweep"])]


def _patched(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    text = (
        "Change of the answer's log-probability (nats), or of its logit less the foil's, when one head's output is "
        "taken from the run on the changed prompt: below zero where the head carries what was changed."
    )
    return (
        [Section("Which heads carry what was changed", [text], None, figures["patches"], _SEE["sweep"])]
        if "patches" in figures
        else []
    )


def _rankings(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    found = []
    for name, figure in figures.items():
        condition, _, kind = name.rpartition("_")
        if kind in ("heads", "neurons") and condition in ("zero", "revert", "sufficient"):
            if condition == "sufficient":
                see = "The sooner a line rises, the better its ranking finds what is enough."
                title, text = "Are the top ones enough", f"Exact match when only the top {kind} are fine-tuned"
            else:
                see = "The sooner a line falls, the better its ranking finds what is needed."
                become = "zero" if condition == "zero" else "what they were before fine-tuning"
                title, text = "Are the top ones needed", f"Exact match when the top {kind} become {become}"
            found.append(Section(f"{title}? {kind.capitalize()}", [f"{text}, along each ranking."], None, figure, see))
    return found


def _attention(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    text = "Mean attention to each span of a task. The heads that stand out are drawn in the folder figures."
    title = "What heads attend to"
    return [Section(title, [text], None, figures["attention"], _SEE["attention"])] if "attention" in figures else []
