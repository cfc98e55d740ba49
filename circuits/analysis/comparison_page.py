"""The page and figures of a comparison: every number of one model beside the other's, in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from circuits.analysis.compared_consistency import sections_of_both
from circuits.analysis.differences import SIDES, UNKNOWN, shown_differences
from circuits.analysis.figures import by_mode
from circuits.analysis.page import SCOPE_WORDS
from circuits.figures import Number, Section, heads_figure, write_report

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SEE = "Each cell is a head; the last panel is the difference: blue where the second model shares more of it."


def largest(table: pandas.DataFrame) -> str:
    """The difference that rows are ordered by: of the logit difference where all have foils."""
    full = "logit_diff_effect_difference" in table and table["logit_diff_effect_difference"].notna().all()
    return "logit_diff_effect_difference" if full else "log_prob_effect_difference"


def figures_of(tables: Mapping[str, pandas.DataFrame], names: tuple[str, str]) -> "dict[str, go.Figure]":
    """Maps of the heads of a comparison, by name."""
    figures = {}
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
    one, other = names
    sections = []
    if "accuracy" in tables:
        text = f"Means over the same answers; the difference is that of {other} less {one}, with its 95 % interval."
        sections.append(Section("What both say", [text], shown_differences(tables["accuracy"], ["task"], names)))
    if "masks" in tables:
        text = (
            "Parameters that the tasks share in each model, and how many of them are the same; chance is what "
            "independent sets with as many in each tensor would have in common. One pair of models does not tell how "
            "sizes vary."
        )
        shared = _readable(tables["masks"].round(3), names)
        sections.append(Section("What the tasks share", [text], shared, figures.get("heads"), _SEE))
    if "ablation" in tables:
        text = (
            "How far each falls without its own shared parameters, and the difference of the two drops; beside it, how "
            "far each falls without as many random parameters outside them (thinned: without its own ones, as few as "
            "there is room for random ones)."
        )
        shown = shown_differences(tables["ablation"], ["scope", "task"], names, ending="_drop", label="drop of ")
        for side, name in zip(SIDES, names, strict=True):
            for control in ("thinned", "random"):
                values = tables["ablation"][f"exact_match_{control}_drop_{side}"]
                shown[f"drop of exact match, {control}, {name}"] = values.map("{:.1%}".format)
        if shown.astype(str).apply(lambda column: column.str.contains(UNKNOWN, regex=False)).to_numpy().any():
            text += " Where an interval would hold every possible difference, there are too few answers to tell."
        sections.append(Section("What happens without it", [text], _readable(shown, names)))
    if "grafts" in tables:
        sections.append(Section("What is enough of the fine-tuning", [], _readable(tables["grafts"].round(4), names)))
    for name, title in (("sweep", "Which heads differ when ablated"), ("patches", "Which heads differ when patched")):
        if name in tables:
            table = tables[name]
            metric = largest(table).removesuffix("_difference")
            told = int((table[f"{metric}_q"] < 0.05).sum())
            text = (
                f"The change that each head makes in {one}, in {other}, and the difference, the largest first. "
                f"{told} of {len(table)} differences are told from none (5 %, Benjamini–Hochberg)."
            )
            shown = shown_differences(
                by_mode(table.head(12)), ["task", "unit"], names, ending="_effect", metrics=[metric]
            )
            see = f"Red: the answer suffers more in {other} than in {one}; blue: less."
            sections.append(Section(title, [text], shown, figures.get(name), see))
    if "areas" in tables:
        text = (
            "Areas under the curves of exact match along each ranking, means over tasks. Where the top units are "
            "taken away a good ranking has a small area; where only they are fine-tuned (sufficient), a large one. The "
            "table of areas has every task, and how many units are enough, or break it."
        )
        sections.append(Section("Which rankings find the circuit", [text], _areas(tables["areas"], names)))
    sections += sections_of_both(tables, figures, names)
    lead = f"{one} (a/report.html) and {other} (b/report.html) on the same tasks."
    numbers, setting = _numbers(tables, names), {"models": f"{one} and {other}"}
    if "accuracy" in tables:
        setting["tasks"] = ", ".join(tables["accuracy"]["task"])
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


def _readable(table: pandas.DataFrame, names: tuple[str, str]) -> pandas.DataFrame:
    """A table with the models' names in place of a and b, and words in place of its own."""
    words = {"scope": SCOPE_WORDS.get, "score": lambda score: score.replace("_", " ")}

    def named(column: str) -> str:
        for side, name in zip(SIDES, names, strict=True):
            if column.endswith(f"_{side}"):
                return f"{column[:-2].replace('_', ' ')}, {name}"
        return "the top" if column == "scope" else column

    worded = {
        column: table[column].map(words[column.removesuffix("_a").removesuffix("_b")], na_action="ignore")
        for column in table
        if column.removesuffix("_a").removesuffix("_b") in words
    }
    return table.assign(**worded).rename(columns=named)


def _areas(areas: pandas.DataFrame, names: tuple[str, str]) -> pandas.DataFrame:
    """Areas as a person reads them: one row for each ranking, means over tasks."""
    means = areas.groupby(["kind", "condition", "metric"], sort=False)[["auc_a", "auc_b"]].mean().reset_index()
    shown = means[["kind", "condition", "metric"]].map(lambda cell: cell.replace("_", " "))
    for side, name in zip(SIDES, names, strict=True):
        shown[name] = means[f"auc_{side}"].map("{:.2f}".format)
    return shown.rename(columns={"kind": "units", "metric": "ranking"})
