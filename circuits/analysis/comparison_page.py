"""The page and figures of a comparison: every number of one model beside the other's, in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from circuits.analysis.compared_consistency import sections_of_both
from circuits.analysis.differences import ABOUT_Q, SIDES, UNKNOWN, shown_differences
from circuits.analysis.figures import by_mode
from circuits.analysis.words import SCOPE_WORDS, named_tasks
from circuits.figures import Number, Section, heads_figure, write_report
from circuits.figures.rankings import ranking_label
from circuits.figures.style import label

if TYPE_CHECKING:
    import plotly.graph_objects as go


def largest(table: pandas.DataFrame) -> str:
    """The difference that rows are ordered by: of the logit difference where all have foils."""
    full = "logit_diff_effect_difference" in table and table["logit_diff_effect_difference"].notna().all()
    return "logit_diff_effect_difference" if full else "log_prob_effect_difference"


def figures_of(tables: Mapping[str, pandas.DataFrame], names: tuple[str, str]) -> "dict[str, go.Figure]":
    """Maps of the heads of a comparison, by name."""
    figures = {}
    names = (label(names[0]), label(names[1]))
    less = f"{names[1]} less<br>{names[0]}"
    for name in ("sweep", "patches"):
        if name in tables:
            table = by_mode(tables[name]).sort_values("task", kind="stable")
            figures[name] = heads_figure(table, largest(table), facet="task", title=less)
    if "heads" in tables:
        heads = tables["heads"]
        panels = [
            heads[heads["scope"] == "global"].assign(model=label, shown=heads[column])
            for label, column in zip(
                (*names, less.replace("<br>", " ")), ("size_a", "size_b", "difference"), strict=True
            )
        ]
        figures["heads"] = heads_figure(pandas.concat(panels), "shown", title="shared<br>parameters", digits=0)
    return figures


def write_comparison_page(
    path: Path, tables: Mapping[str, pandas.DataFrame], figures: "Mapping[str, go.Figure]", names: tuple[str, str]
) -> None:
    """Write the report of a comparison."""
    one, other = names = (label(names[0]), label(names[1]))
    inside = sections_of_both(tables, figures, names)
    tables = {name: named_tasks(table) for name, table in tables.items()}
    sections = []
    if "accuracy" in tables:
        text = f"Means over the same answers; the difference is that of {other} less {one}, with its 95% interval. "
        text += ABOUT_Q
        sections.append(Section("What both say", [text], shown_differences(tables["accuracy"], ["task"], names)))
    if "masks" in tables:
        text = (
            "Parameters that the tasks share in each model, and how many of them are the same; chance is what "
            "independent sets with as many in each tensor would have in common, and lift how many times as many there "
            "are. One pair of models does not tell how sizes vary."
        )
        see = f"Each cell is a head; the last panel is the difference: blue where {other} shares more of it."
        shared = _overlaps(tables["masks"], names)
        sections.append(Section("What the tasks share", [text], shared, figures.get("heads"), see))
    if "ablation" in tables:
        text = (
            "How far exact match and log-probability fall without each model's own shared parameters, and the "
            "difference of the two falls. Below each: without as many random parameters outside them, and, where "
            "there is too little room for these, without its shared ones thinned to as few."
        )
        controls = {
            "exact_match_drop": {
                f"without {words}": f"exact_match_{name}_drop"
                for words, name in (("the thinned ones", "thinned"), ("random ones", "random"))
            }
        }
        table = tables["ablation"].assign(**{"the top": tables["ablation"]["scope"].map(SCOPE_WORDS)})
        for side in SIDES:  # where nothing was thinned
            own, thinned = (table[f"exact_match_{name}_{side}"] for name in ("drop", "thinned_drop"))
            table[f"exact_match_thinned_drop_{side}"] = thinned.where((own - thinned).abs() > 1e-9)
        shown = shown_differences(table, ["the top", "task"], names, ending="_drop", controls=controls)
        shown = shown.rename(columns={"measure": "fall of"})
        if shown.astype(str).apply(lambda column: column.str.contains(UNKNOWN, regex=False)).to_numpy().any():
            text += " Where an interval would hold every possible difference, there are too few answers to tell."
        sections.append(Section("What happens without it", [text], shown))
    if "grafts" in tables:
        text = (
            "The fewest fine-tuned parameters that were found to keep each task in the model before fine-tuning, and "
            "what that model then answers of it. A better search may find fewer."
        )
        sections.append(Section("What is enough of the fine-tuning", [text], _grafts(tables["grafts"], names)))
    for name, title in (("sweep", "Which heads differ when ablated"), ("patches", "Which heads differ when patched")):
        if name in tables:
            table = tables[name]
            metric = largest(table).removesuffix("_difference")
            told = int((table[f"{metric}_q"] < 0.05).sum())
            what = "logit difference" if metric.startswith("logit") else "answer's log-probability (nats)"
            text = (
                f"How each head changes the {what} in {one} and in {other}, and the difference: the "
                f"{min(12, len(table))} largest of {len(table)}. {told} of these differ from zero (q below 0.05, "
                "Benjamini–Hochberg)."
            )
            shown = shown_differences(
                by_mode(table.head(12)), ["task", "unit"], names, ending="_effect", metrics=[metric]
            )
            see = f"Red: the answer suffers more in {other} than in {one}; blue: less."
            sections.append(Section(title, [text], shown, figures.get(name), see))
    if "areas" in tables:
        text = (
            "Areas under the curves of exact match along each ranking, from 0 to 1, means over tasks. Where the top "
            "units are taken away a good ranking has a small area; where only they are fine-tuned (sufficient), a "
            "large one. The table of areas has every task, and how many units are enough, or break it."
        )
        sections.append(Section("Which rankings find the circuit", [text], _areas(tables["areas"], names)))
    sections += inside
    lead = f"{one} (a/report.html) and {other} (b/report.html) on the same tasks."
    numbers, setting = _numbers(tables, names), {"models": f"{one} and {other}"}
    if "accuracy" in tables:
        setting["tasks"] = " · ".join(tables["accuracy"]["task"])
    title = f"{one} and {other}"
    write_report(path, title, lead, sections=sections, footer="circuits compare", numbers=numbers, setting=setting)


def _numbers(tables: Mapping[str, pandas.DataFrame], names: tuple[str, str]) -> list[Number]:
    """How far the answers of both lie apart, on at most three tasks: the largest differences first."""
    if "accuracy" not in tables or "exact_match_difference" not in tables["accuracy"]:
        return []
    rows = tables["accuracy"].sort_values("exact_match_difference", key=abs, ascending=False, kind="stable").head(3)
    return [
        Number(
            f"{row.exact_match_difference:+.1%}".replace("-", "−"),
            f"exact match on {row.task}, {names[1]} less {names[0]}",
            f"{names[0]} {row.exact_match_a:.1%}, {names[1]} {row.exact_match_b:.1%}",
        )
        for row in rows.itertuples()
    ]


def _overlaps(masks: pandas.DataFrame, names: tuple[str, str]) -> pandas.DataFrame:
    """Sizes of both shared sets and of what they have in common, if the models are of one shape."""
    forms = {"size_a": (names[0], ",.0f"), "size_b": (names[1], ",.0f"), "both": ("in both", ",.0f")}
    forms |= {"chance": ("by chance", ",.1f"), "lift": ("lift", ".1f"), "jaccard": ("Jaccard", ".2f")}
    shown = {"the top": masks["scope"].map(SCOPE_WORDS)}
    for column, (words, form) in forms.items():
        if column in masks:
            shown[words] = ["–" if value != value else f"{value:{form}}" for value in masks[column]]
    return pandas.DataFrame(shown)


def _grafts(grafts: pandas.DataFrame, names: tuple[str, str]) -> pandas.DataFrame:
    """The smallest graft of each model and task, one row each."""
    return pandas.DataFrame(
        [
            {
                "task": row["task"],
                "model": name,
                "taken by": row[f"score_{side}"].replace("_x_", " × ").replace("_", " "),
                "parameters": f"{row[f'size_{side}']:,.0f}",
                "of all": f"{row[f'fraction_{side}']:.1%}",
                "exact match": f"{row[f'exact_match_{side}']:.1%}",
            }
            for row in grafts.to_dict("records")
            for side, name in zip(SIDES, names, strict=True)
            if row[f"size_{side}"] == row[f"size_{side}"]
        ]
    )


def _areas(areas: pandas.DataFrame, names: tuple[str, str]) -> pandas.DataFrame:
    """Areas as a person reads them: one row for each ranking, means over tasks."""
    means = areas.groupby(["kind", "condition", "metric"], sort=False)[["auc_a", "auc_b"]].mean().reset_index()
    shown = means[["kind", "condition"]].assign(metric=means["metric"].map(ranking_label))
    for side, name in zip(SIDES, names, strict=True):
        shown[name] = means[f"auc_{side}"].map("{:.2f}".format)
    return shown.rename(columns={"kind": "units", "metric": "ranking"})
