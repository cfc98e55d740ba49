"""Figures of rankings: accuracy against the number of units (Fig. 4a, 4b), and how far rankings agree (Fig. 4c)."""

import math

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.style import label, need, number
from circuits.statistics import mean_interval

#: What rankings are called in figures.
RANKING_LABELS = {
    "shared_size": "Shared Size",
    "shared_size_per_tensor": "Shared Size, per tensor",
    "bio_trace": "BIO trace",
    "qa_trace": "QA trace",
    "change": "change of weights",
    "graft_size": "graft size",
    "gradient_x_activation": "gradient × activation",
    "ablation": "ablation one at a time",
    "random": "random",
}


def ranking_label(metric: str) -> str:
    """What a ranking is called in figures and tables; that by a task's trace has the task's name.

    Example:
        >>> ranking_label("shared_size"), ranking_label("qa_id_trace"), ranking_label("ioi_trace")
        ('Shared Size', 'QA-ID trace', 'ioi trace')
    """
    if metric in RANKING_LABELS:
        return RANKING_LABELS[metric]
    task = metric.removesuffix("_trace")
    return f"{label(task)} trace" if task != metric else metric.replace("_", " ")


_COLOURS = {
    "shared_size": "#d62728",
    "shared_size_per_tensor": "#e377c2",
    "bio_trace": "#17becf",
    "qa_trace": "#2ca02c",
    "change": "#1f77b4",
    "graft_size": "#ff7f0e",
    "gradient_x_activation": "#9467bd",
    "ablation": "#8c564b",
    "random": "#a0a0a0",
}
#: Rankings that often run together: one of each pair is dashed, and Shared Size is broad, so that none hides another.
_DASHED = ("qa_trace", "graft_size", "ablation")
_TITLES = {
    "sufficient": "Only the top n {units} fine-tuned: are they enough?",
    "revert": "The top n {units} back at their weights before fine-tuning: were they needed?",
    "zero": "The outputs of the top n {units} zero: were they needed?",
    "mean": "The outputs of the top n {units} at their mean: were they needed?",
}


def ranking_curves_figure(curves: DataFrame, facet: str = "task", units: str = "units") -> go.Figure:
    """Exact match against the number of units, one line for each ranking, one panel for each value of a column.

    The band around a ranking of several draws is the 95 % interval of their mean. Thin lines are the whole model
    after (dotted) and before (dashed) fine-tuning. The axis of n is linear, so that areas are what they look like.

    Args:
        curves: from `circuits.rankings.sufficient_curve` or `circuits.rankings.critical_curve`.
        facet: the column that makes the panels: ``task``, or one that was added, such as ``model``.
        units: what the units are called: ``heads`` or ``neurons``.

    Raises:
        CircuitsError: a column is missing, there are no rows, or they are of several conditions, or of several tasks or
            models in one panel.

    Source:
        arXiv 2505.16178, Fig. 4a and 4b.
    """
    need(curves, "condition", "metric", "draw", "n", "exact_match", "fine_tuned", "pre", facet)
    if curves["condition"].nunique() > 1:
        raise CircuitsError(f"a figure shows one condition, not {' and '.join(curves['condition'].unique())}")
    if curves.duplicated([facet, "metric", "draw", "n"]).any():
        raise CircuitsError(f"the table has several rows for one point and {facet}: select one task and model first")
    panels = list(curves[facet].unique())
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[label(str(panel)) for panel in panels],
    )
    for column, panel in enumerate(panels, start=1):
        rows = curves[curves[facet] == panel]
        for metric in rows["metric"].unique():
            _draw_curve(figure, rows[rows["metric"] == metric], metric, column)
        for whole, name in (("fine_tuned", "whole model, fine-tuned"), ("pre", "before fine-tuning")):
            level = float(rows[whole].iloc[0])
            if math.isnan(level):
                continue
            ends = [int(rows["n"].min()), int(rows["n"].max())]
            figure.add_scatter(
                x=ends,
                y=[level, level],
                mode="lines",
                name=name,
                legendgroup=whole,
                showlegend=column == 1,
                line={"dash": "dot" if whole == "fine_tuned" else "dash", "color": "#444444", "width": 1.2},
                row=1,
                col=column,
            )
    figure.update_xaxes(title=f"number of {units}, n", tickformat=",d", nticks=5, tickangle=0)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    condition = str(curves["condition"].iloc[0])
    figure.update_layout(
        title={"text": _TITLES.get(condition, condition).format(units=units), "x": 0.02, "font": {"size": 16}},
        template="plotly_white",
        width=max(640, 380 * len(panels) + 260),
        height=440,
        margin={"t": 90, "b": 60, "r": 20},
        # a legend that is taller than the plot hides its last lines
        legend={"x": 1.01, "y": 1, "yanchor": "top", "tracegroupgap": 0},
    )
    return figure


def _draw_curve(figure: go.Figure, rows: DataFrame, metric: str, column: int) -> None:
    """The mean over draws, and a band where there are several."""
    points = []
    for n, draws in rows.groupby("n"):
        mean, low, high = mean_interval(draws["exact_match"].tolist())
        # where draws are all alike, as at no units and at all of them, the band closes
        points.append((int(n), mean, *((mean, mean) if math.isnan(low) else (low, high))))
    colour = _COLOURS.get(metric, "#444444")
    counts = [n for n, *_ in points]
    if rows["draw"].nunique() > 1:
        red, green, blue = hex_to_rgb(colour)
        figure.add_scatter(
            x=[*counts, *reversed(counts)],
            y=[*(min(high, 1) for *_, high in points), *(max(low, 0) for *_, low, _ in reversed(points))],
            fill="toself",
            fillcolor=f"rgba({red}, {green}, {blue}, 0.2)",
            mode="none",
            legendgroup=metric,
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    figure.add_scatter(
        x=counts,
        y=[mean for _, mean, _, _ in points],
        hovertemplate="n = %{x:,d}: %{y:.1%}",
        mode="lines+markers",
        name=ranking_label(metric),
        legendgroup=metric,
        showlegend=column == 1,
        line={
            "color": colour,
            "width": 5 if metric == "shared_size" else 1.8,
            "dash": "dash" if metric in _DASHED else "solid",
        },
        marker={"size": 8 if metric == "shared_size" else 5},
        row=1,
        col=column,
    )


def agreement_figure(agreement: DataFrame, title: str = "") -> go.Figure:
    """How far rankings agree: Spearman's correlation of every two, as a heat map.

    Args:
        agreement: from `circuits.rankings.agreement`: a row and a column for each ranking.
        title: what was ranked, such as ``heads of the mixed model``.

    Raises:
        CircuitsError: rows and columns are not the same rankings, or there are none.

    Source:
        arXiv 2505.16178, Fig. 4c.
    """
    if agreement.empty or list(agreement.index) != list(agreement.columns):
        raise CircuitsError("agreement is a table with the same rankings as rows and columns: make it with agreement")
    labels = [ranking_label(name) for name in agreement.columns]
    values = agreement.to_numpy(dtype=float)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=labels,
            y=labels,
            zmin=-1,
            zmax=1,
            colorscale="RdBu",
            xgap=1,
            ygap=1,
            text=[[number(value, 2) for value in row] for row in values],
            texttemplate="%{text}",
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
            colorbar={"title": "Spearman", "thickness": 14},
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-35)
    side = 62 * len(labels)
    figure.update_layout(
        title={"text": f"How far rankings agree{': ' * bool(title)}{title}", "x": 0.02, "font": {"size": 16}},
        template="plotly_white",
        width=side + 290,
        height=side + 210,
        margin={"l": 170, "t": 60, "b": 140, "r": 110},
    )
    return figure
