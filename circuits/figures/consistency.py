"""Figures of consistency: by layer, inside the shared parameters, and what answers rest on."""

import plotly.graph_objects as go
from pandas import DataFrame, Series
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from circuits.consistency import mismatched_kind
from circuits.figures.style import COLOURS, PAGE, label, need

#: Panels of the profile: column of the table, title, kinds that are drawn.
_PANELS = (
    ("gradient", "gradients: cosine", "mean"),
    ("representation", "activations: cosine", "cosine"),
    ("representation", "activations: CKA", "cka"),
    ("representation", "facts that are retrieved", "retrieval"),
)
_CONDITIONS = {
    "shared": "inside the shared parameters",
    "shared_thinned": "inside, thinned to match random",
    "random": "inside random ones outside",
    "rest": "all outside",
}
SCOPE_TITLES = {"global": "top of all", "tensor": "top of each tensor"}
#: What the step ``localise`` does, for a reader.
ACT_WORDS = {"none": "whole model", "revert": "reverted", "alone": "alone", "all": "all reverted"}
_ACTED = {
    ("none", ""): "whole model",
    ("revert", "shared"): "shared reverted",
    ("revert", "shared_thinned"): "shared reverted, thinned",
    ("revert", "random"): "random reverted",
    ("alone", "shared"): "shared alone",
    ("alone", "shared_thinned"): "shared alone, thinned",
    ("alone", "random"): "random alone",
    ("all", ""): "all reverted",
}
#: Measures of facts, for a reader.
_MEASURED = {
    "cosine": "activations: cosine",
    "retrieved": "facts retrieved",
    "exact_match": "{other} recalled",
    "task_exact_match": "{task} recalled",
}
_CONDITION_COLOURS = {"rest": "#7f7f7f"}
#: Colours of spans in the order in which they are drawn; the context, which is what is left, is grey.
_SPANS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
_CONTEXT = "#c7c7c7"


def _add_band(figure: go.Figure, x: Series, low: Series, high: Series, colour: str, column: int) -> None:
    """The intervals around a line, in a panel of the first row."""
    red, green, blue = hex_to_rgb(colour)
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=f"rgba({red}, {green}, {blue}, 0.15)",
        mode="none",
        showlegend=False,
        hoverinfo="skip",
        row=1,
        col=column,
    )


def _named(model: str, matched: bool) -> str:
    words = "matched" if matched else "mismatched"
    return words if not model else model if matched else f"{model}, {words}"


def consistency_figure(gradients: DataFrame, representations: DataFrame) -> go.Figure:
    """How alike two tasks are layer by layer: cosines of gradients and of activations, CKA, and retrieval.

    Matched pairs are solid lines with their intervals, mismatched pairs (the same attribute of another group, or any
    other group where there are no attributes) dashed; what retrieval gives by chance is dotted.

    Args:
        gradients: rows by layer of `GradientConsistency.means`, with the column ``model``.
        representations: rows of one site and span of `circuits.consistency.representation_consistency`, with ``model``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    need(gradients, "model", "layer", "kind", "mean", "low", "high")
    need(representations, "model", "layer", "kind", "cosine", "cka", "retrieval", "chance")
    figure = make_subplots(
        cols=len(_PANELS), horizontal_spacing=0.05, subplot_titles=[title for _, title, _ in _PANELS]
    )
    ends = {"mean": ("low", "high"), "cosine": ("cosine_low", "cosine_high")}
    ends["retrieval"] = ("retrieval_low", "retrieval_high")
    models = list(gradients["model"].unique())
    colours = {model: COLOURS.get(model, _SPANS[place % len(_SPANS)]) for place, model in enumerate(models)}
    for column, (of, _, value) in enumerate(_PANELS, start=1):
        table = gradients if of == "gradient" else representations
        for model, colour in colours.items():
            for kind in ("matched", "same_attribute", "unrelated"):
                rows = table[(table["model"] == model) & (table["kind"] == kind)].sort_values("layer")
                other = "same_attribute" in set(table["kind"]) and kind == "unrelated"
                if rows.empty or other or (value == "retrieval" and kind != "matched"):
                    continue
                matched = kind == "matched"
                figure.add_scatter(
                    x=rows["layer"],
                    y=rows[value],
                    name=_named(label(model) if len(models) > 1 else "", matched),
                    legendgroup=f"{model} {matched}",
                    showlegend=column == 1,
                    mode="lines+markers",
                    marker={"size": 5},
                    line={"color": colour, "dash": "solid" if matched else "dash"},
                    hovertemplate="layer %{x}: %{y:.3f}",
                    row=1,
                    col=column,
                )
                if matched and value in ends:
                    low, high = ends[value]
                    _add_band(figure, rows["layer"], rows[low], rows[high], colour, column)
    chance = representations[representations["kind"] == "matched"].drop_duplicates("layer").sort_values("layer")
    figure.add_scatter(
        x=chance["layer"],
        y=chance["chance"],
        name="chance",
        mode="lines",
        line={"color": "#444444", "dash": "dot", "width": 1.2},
        row=1,
        col=len(_PANELS),
    )
    figure.update_layout(
        template="plotly_white",
        width=PAGE,
        height=380,
        margin={"t": 110, "b": 60},
        legend={"orientation": "h", "y": 1.2, "yanchor": "bottom"},
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(title="layer", tickformat="d", **({"dtick": 1} if gradients["layer"].max() < 10 else {}))
    figure.update_yaxes(range=[min(-0.05, float(gradients["low"].min())), 1.05])
    figure.update_yaxes(tickformat=".0%", col=len(_PANELS))
    return figure


def consistency_along_figure(table: DataFrame) -> go.Figure:
    """How alike the gradients of a fact's two formats are along training, one panel for each stage.

    Matched pairs are solid lines with their intervals, those of the same attribute of another group dashed.

    Args:
        table: rows of `circuits.consistency.ConsistencyCallback` over all parameters, with the column ``model``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    need(table, "model", "step", "by", "kind", "mean", "low", "high")
    table = table[table["by"] == "all"]
    models = list(table["model"].unique())
    figure = make_subplots(cols=len(models), shared_yaxes=True, subplot_titles=[label(model) for model in models])
    for column, model in enumerate(models, start=1):
        colour = COLOURS.get(model, _SPANS[0])
        for kind, dash in (("matched", "solid"), (mismatched_kind(table["kind"].unique()), "dash")):
            rows = table[(table["model"] == model) & (table["kind"] == kind)].sort_values("step")
            figure.add_scatter(
                x=rows["step"],
                y=rows["mean"],
                name="same fact" if kind == "matched" else "other facts",
                legendgroup=kind,
                showlegend=column == 1,
                mode="lines+markers",
                marker={"size": 5},
                line={"color": colour, "dash": dash},
                hovertemplate="step %{x}: %{y:.3f}",
                row=1,
                col=column,
            )
            if kind == "matched":
                _add_band(figure, rows["step"], rows["low"], rows["high"], colour, column)
    figure.update_layout(
        template="plotly_white",
        width=min(PAGE, max(560, 230 * len(models) + 160)),
        height=380,
        margin={"t": 90, "b": 60},
        legend={"orientation": "h", "y": 1.32},
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="cosine of gradients", col=1)
    return figure


def localisation_figure(table: DataFrame) -> go.Figure:
    """Facts with the shared parameters reverted, or these alone fine-tuned, beside as many random parameters.

    A row of panels for each scope of shared parameters, a column for each measure; dots are means over facts with
    their intervals, from the whole model down to the model without any of the parameters.

    Args:
        table: of the step ``localise`` of an analysis, of one pair of tasks, with the column ``model``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    need(table, "model", "task", "other", "scope", "act", "condition", *_MEASURED)
    scopes = [scope for scope in table["scope"].unique() if scope]
    models = list(table["model"].unique())
    tasks = {side: label(table[side].iloc[0]) for side in ("task", "other")}
    wanted = [title.format(**tasks) for title in _MEASURED.values()]
    titles = [f"{title}<br>{SCOPE_TITLES.get(scope, scope)}" for scope in scopes for title in wanted]
    # between rows there is room for the numbers of one and the titles of the next
    top, bottom, between, panel = 120, 50, 90, 190
    inside = max(1, len(scopes)) * (panel + between) - between
    figure = make_subplots(
        rows=max(1, len(scopes)),
        cols=len(_MEASURED),
        shared_yaxes=True,
        subplot_titles=titles,
        horizontal_spacing=0.03,
        vertical_spacing=between / inside,
    )
    for place, model in enumerate(models):
        colour = COLOURS.get(model, _SPANS[place % len(_SPANS)])
        own = table[table["model"] == model]
        for row, scope in enumerate(scopes, start=1):
            rows = own[own["scope"].isin([scope, ""])]
            named = [
                _ACTED.get((act, condition), "") for act, condition in zip(rows["act"], rows["condition"], strict=True)
            ]
            for column, measure in enumerate(_MEASURED, start=1):
                figure.add_scatter(
                    x=rows[measure],
                    y=named,
                    error_x={
                        "array": rows[f"{measure}_high"] - rows[measure],
                        "arrayminus": rows[measure] - rows[f"{measure}_low"],
                    },
                    name=label(model),
                    legendgroup=model,
                    showlegend=len(models) > 1 and row == column == 1,
                    mode="markers",
                    marker={"color": colour, "size": 8},
                    hovertemplate="%{y}: %{x:.3f}",
                    row=row,
                    col=column,
                )
    figure.update_layout(
        template="plotly_white",
        width=PAGE,
        height=top + inside + bottom,
        margin={"t": top, "b": bottom, "r": 40},
        legend={"orientation": "h", "y": 1 + 50 / inside, "yanchor": "bottom"},
        scattermode="group",
    )
    figure.update_annotations(font_size=13)
    acted = {*zip(table["act"], table["condition"], strict=True)}
    shown = [name for key, name in _ACTED.items() if key in acted]
    figure.update_yaxes(categoryorder="array", categoryarray=shown[::-1])
    for column, measure in enumerate(_MEASURED, start=1):
        share = measure != "cosine"
        figure.update_xaxes(range=[-0.05, 1.05], dtick=0.5, tickformat=".0%" if share else ".1f", col=column)
    return figure


def inside_figure(table: DataFrame) -> go.Figure:
    """Cosines of the gradients of matched pairs inside the shared parameters, and outside them, a panel for each scope.

    Bars over several draws are means, and their lines reach from the lowest draw to the highest; other lines are
    intervals.

    Args:
        table: rows of matched pairs, with ``model``, ``scope``, ``condition``, ``draw``, ``mean``, ``low``, ``high``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    need(table, "model", "scope", "condition", "draw", "mean", "low", "high")
    scopes = list(table["scope"].unique())
    titles = {"global": "top of all parameters", "tensor": "top of each tensor"}
    figure = make_subplots(
        cols=len(scopes), shared_yaxes=True, subplot_titles=[titles.get(scope, scope) for scope in scopes]
    )
    named: set[str] = set()
    for column, scope in enumerate(scopes, start=1):
        for condition in _CONDITIONS:
            rows = table[(table["scope"] == scope) & (table["condition"] == condition)]
            if rows.empty:
                continue
            drawn = condition in ("random", "shared_thinned")
            means = rows.groupby("model", sort=False).agg(
                mean=("mean", "mean"),
                low=("mean" if drawn else "low", "min"),
                high=("mean" if drawn else "high", "max"),
            )
            figure.add_bar(
                name=_CONDITIONS[condition],
                legendgroup=condition,
                showlegend=condition not in named,
                x=[label(model).replace(", ", ",<br>") for model in means.index],
                y=means["mean"],
                error_y={"array": means["high"] - means["mean"], "arrayminus": means["mean"] - means["low"]},
                text=[f"{value:.2f}" for value in means["mean"]],
                textposition="auto",
                insidetextanchor="start",
                textangle=0,
                marker_color=_CONDITION_COLOURS.get(condition, COLOURS.get(condition)),
                row=1,
                col=column,
            )
            named.add(condition)
    figure.update_layout(
        barmode="group",
        bargap=0.15,
        template="plotly_white",
        width=min(PAGE, max(640, 150 * len(scopes) * table["model"].nunique() + 160)),
        height=400,
        margin={"t": 110, "b": 60},
        legend={"orientation": "h", "y": 1.13, "yanchor": "bottom"},
    )
    figure.update_annotations(font_size=14)
    figure.update_yaxes(title="cosine of matched pairs", col=1)
    if table["model"].nunique() == 1:
        figure.update_xaxes(showticklabels=False)
    return figure


def signature_figure(table: DataFrame) -> go.Figure:
    """What answers rest on: the share of each span, stacked, a bar for each model and task.

    Args:
        table: rows of `circuits.consistency.signature_means`, with the columns ``model`` and ``task``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    need(table, "model", "task", "span", "share", "effect")
    bars = table[["task", "model"]].drop_duplicates()
    tasks = list(bars["task"].unique())
    bars = bars.sort_values("task", key=lambda names: names.map(tasks.index), kind="stable").iloc[::-1]
    several = table["model"].nunique() > 1
    names = {
        (row.task, row.model): f"{label(row.task)}, {label(row.model)}" if several else label(row.task)
        for row in bars.itertuples()
    }
    figure = go.Figure()
    spans = sorted(table["span"].unique(), key=lambda span: span == "context")  # what is left comes last
    for place, span in enumerate(spans):
        rows = table[table["span"] == span].set_index(["task", "model"]).reindex(list(names)).dropna(subset="share")
        figure.add_bar(
            name=span.replace("_", " "),
            y=[names[key] for key in rows.index],
            x=rows["share"],
            orientation="h",
            text=[f"{value:.0%}" for value in rows["share"]],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=rows["effect"],
            hovertemplate="%{y}: %{x:.1%}, %{customdata:.2f} nats",
            marker_color=_CONTEXT if span == "context" else _SPANS[place % len(_SPANS)],
        )
    figure.add_vline(x=0, line={"color": "#444444", "width": 1})
    figure.update_layout(
        barmode="relative",
        template="plotly_white",
        uniformtext={"minsize": 9, "mode": "hide"},
        width=820,
        height=170 + 42 * len(names),
        margin={"t": 70, "b": 60, "l": 220},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.update_yaxes(categoryorder="array", categoryarray=list(names.values()))
    figure.update_xaxes(title="share of what the log-probability falls by when the span is replaced", tickformat=".0%")
    return figure
