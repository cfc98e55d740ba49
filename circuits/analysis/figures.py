"""The figures of an analysis, drawn from its tables."""

from collections.abc import Mapping

import pandas
import plotly.graph_objects as go

from circuits.figures import (
    ablation_figure,
    consistency_figure,
    graft_figure,
    heads_figure,
    inside_figure,
    localisation_figure,
    ranking_curves_figure,
    sharing_figure,
    signature_figure,
)

_CHANGE = {"log_prob_effect": "change of<br>log-prob", "logit_diff_effect": "change of<br>logit diff."}


def effect_of(table: pandas.DataFrame) -> str:
    """The effect that a table of interventions is read by: of the logit difference, where all tasks have foils."""
    full = "logit_diff_effect" in table and table["logit_diff_effect"].notna().all()
    return "logit_diff_effect" if full else "log_prob_effect"


def by_mode(table: pandas.DataFrame) -> pandas.DataFrame:
    """A table of interventions whose ``task`` also says how, where there are several modes."""
    return table if table["mode"].nunique() < 2 else table.assign(task=table["task"] + ", " + table["mode"])


def figures_of(tables: Mapping[str, pandas.DataFrame], model: str = "model") -> dict[str, go.Figure]:
    """The figures by name; those whose tables are not there are left out.

    Args:
        tables: of an analysis.
        model: what to call the model.
    """
    figures: dict[str, go.Figure] = {}
    if "sharing_curve" in tables:
        curves = tables["sharing_curve"]
        figures["sharing"] = sharing_figure(curves[curves["scope"] == "global"].assign(model=model))
    if "shared_heads" in tables:
        heads = tables["shared_heads"]
        named = heads.assign(
            scope=heads["scope"].map({"global": "top of all parameters", "tensor": "top of each tensor"})
        )
        figures["shared_heads"] = heads_figure(named, "size", facet="scope", title="shared<br>parameters", digits=0)
    if "ablation" in tables:
        for scope, part in tables["ablation"].groupby("scope", sort=False):
            figures[f"ablation_{scope}"] = ablation_figure(part.assign(model=model))
    if "grafts" in tables and len(tables["grafts"]):
        for task, part in tables["grafts"].groupby("task", sort=False):
            figures[f"grafts_{task}"] = graft_figure(part.assign(model=model))
    for name in ("sweep", "patches"):
        if name in tables:
            table = tables[name]
            effect = effect_of(table)
            figures[name] = heads_figure(by_mode(table), effect, facet="task", title=_CHANGE[effect])
    if "ranking_curves" in tables:
        for (kind, condition), part in tables["ranking_curves"].groupby(["kind", "condition"], sort=False):
            figures[f"{condition}_{kind}s"] = ranking_curves_figure(part, units=f"{kind}s")
    if "attention" in tables:
        table = tables["attention"]
        named = table.assign(what=table["task"] + ": " + table["behaviour"].str.replace("_", " "))
        figures["attention"] = heads_figure(named, "attention", facet="what", title="attention")
    return figures | consistency_figures(tables, model)


def consistency_figures(tables: Mapping[str, pandas.DataFrame], model: str = "model") -> dict[str, go.Figure]:
    """Those of the steps ``consistency`` and ``signature``; tables of several models have the column ``model``."""

    def of(name: str) -> pandas.DataFrame:
        table = tables[name]
        return table if "model" in table else table.assign(model=model)

    figures: dict[str, go.Figure] = {}
    if "gradient_consistency" in tables:
        gradients, activations = of("gradient_consistency"), of("representation_consistency")
        for (task, other), part in gradients.groupby(["task", "other"], sort=False):
            told = activations[(activations["task"] == task) & (activations["other"] == other)]
            by_layer, at_last = part[part["by"] == "layer"], told[told["span"] == "last"]
            figures[f"consistency_{task}_{other}"] = consistency_figure(by_layer, at_last)
            inside = part[(part["by"] == "mask") & (part["kind"] == "matched")]
            if len(inside):
                figures[f"inside_{task}_{other}"] = inside_figure(inside)
    if "localisation" in tables:
        for (task, other), part in of("localisation").groupby(["task", "other"], sort=False):
            figures[f"localisation_{task}_{other}"] = localisation_figure(part)
    if len(tables.get("signature", ())):
        figures["signature"] = signature_figure(of("signature"))
    return figures
