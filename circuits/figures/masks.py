"""Figures of sets of parameters: ablated (Fig. 2b), shared (Fig. 2a) and grafted (Fig. 3b)."""

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.style import COLOURS, PAGE, label, need


def ablation_figure(table: DataFrame) -> go.Figure:
    """Exact match with shared parameters ablated against random ones, one panel for each model.

    Where random parameters had too little room outside the shared ones, the shared ones thinned to as many are beside
    them: these two are to be compared. Bars over several draws are means, and their lines reach from the lowest draw
    to the highest.

    Args:
        table: columns ``model``, ``condition``, ``draw``, ``task``, ``exact_match``.

    Raises:
        CircuitsError: a column is missing, there are no rows, or several are of one bar, as in a table of two scopes.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    need(table, "model", "condition", "draw", "task", "exact_match")
    if table.duplicated(["model", "condition", "draw", "task"]).any():
        raise CircuitsError(
            "the table has several rows for one model, condition, draw and task: select one scope first"
        )
    models = list(table["model"].unique())
    figure = make_subplots(
        cols=len(models),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[label(model) for model in models] if len(models) > 1 else None,
    )
    conditions = [name for name in ("none", "shared", "shared_thinned", "random") if name in set(table["condition"])]
    named: set[str] = set()
    groups = len(models) * table["task"].nunique()
    width = min(PAGE, max(640, 130 * groups + 160))
    room = (width - 120) / (groups * (len(conditions) + 0.5))  # for the number in a bar
    for column, model in enumerate(models, start=1):
        for condition in conditions:
            rows = table[(table["model"] == model) & (table["condition"] == condition)]
            if rows.empty:
                continue
            by_task = rows.groupby("task", sort=False)["exact_match"].agg(["mean", "min", "max"])
            figure.add_bar(
                name=label(condition),
                legendgroup=condition,
                showlegend=condition not in named,
                x=[label(task).replace(", ", ",<br>") for task in by_task.index],
                y=by_task["mean"],
                error_y={
                    "array": by_task["max"] - by_task["mean"],
                    "arrayminus": by_task["mean"] - by_task["min"],
                    "visible": condition in ("shared_thinned", "random"),
                },
                text=[f"{value:.0%}" for value in by_task["mean"]],
                textposition="auto",
                insidetextanchor="start",
                textangle=0 if room > 37 else -90,
                marker_color=COLOURS[condition],
                row=1,
                col=column,
            )
            named.add(condition)
    figure.update_layout(
        barmode="group",
        bargap=0.12,
        template="plotly_white",
        uniformtext={"minsize": 8, "mode": "hide"},
        width=width,
        height=420,
        margin={"t": 100, "b": 60, "r": 40},
        legend={"orientation": "h", "y": 1.13, "yanchor": "bottom"},
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(tickangle=0)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    return figure


def sharing_figure(table: DataFrame) -> go.Figure:
    """The share of the influenced parameters that are shared, against their fraction k, with the permuted control.

    The band around the control is the 95 % interval of its mean over draws; the dotted line is chance: independent
    sets share k of theirs.

    Args:
        table: from `circuits.masks.sharing_curve`, with the column ``model``.

    Raises:
        CircuitsError: a column is missing or there are no rows.

    Source:
        arXiv 2505.16178, Fig. 2a.
    """
    control = ("permuted_share", "permuted_share_low", "permuted_share_high")
    need(table, "model", "fraction", "share", *control)
    figure = go.Figure()
    for model in table["model"].unique():
        rows = table[table["model"] == model].sort_values("fraction")
        colour = COLOURS.get(model, "#444444")
        middle, low, high = (rows[name] for name in control)
        red, green, blue = hex_to_rgb(colour)
        figure.add_scatter(
            x=[*rows["fraction"], *rows["fraction"][::-1]],
            y=[*high.clip(upper=1), *low.clip(lower=0)[::-1]],
            fill="toself",
            fillcolor=f"rgba({red}, {green}, {blue}, 0.2)",
            mode="none",
            showlegend=False,
            hoverinfo="skip",
        )
        for values, name, dash in (
            (rows["share"], label(model), "solid"),
            (middle, f"{label(model)}, permuted", "dash"),
        ):
            figure.add_scatter(
                x=rows["fraction"],
                y=values,
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                hovertemplate="k = %{x}: %{y:.1%}",
            )
    fractions = sorted(table["fraction"].unique())
    figure.add_scatter(
        x=fractions, y=fractions, name="chance", mode="lines", line={"color": "#444444", "dash": "dot", "width": 1.2}
    )
    figure.update_xaxes(title="k: top fraction of parameters in each influenced set", type="log", tickformat=".4~%")
    figure.update_xaxes(tickvals=[value for value in (1e-4, 1e-3, 0.01, 0.1) if value >= fractions[0]])
    figure.update_yaxes(title="share of them that is shared", tickformat=".0%", range=[-0.03, 1.05])
    figure.update_layout(template="plotly_white", height=420, width=820, margin={"t": 50, "b": 60})
    return figure


def graft_figure(table: DataFrame, keep: float | None = None) -> go.Figure:
    """Accuracy of grafts against their size, a panel for each score and a line for each model.

    The graft that was chosen has a star and its size beside it. A graft of nothing has no place on the logarithmic
    axis and is left out.

    Args:
        table: the curves of `circuits.masks.Graft`, with the column ``model``.
        keep: the share of the accuracy of the whole that had to be kept, named in the title.

    Raises:
        CircuitsError: a column is missing or there are no rows.

    Source:
        arXiv 2505.16178, Fig. 3b.
    """
    need(table, "model", "score", "size", "fraction", "exact_match", "chosen")
    scores = list(table["score"].unique())
    figure = make_subplots(
        cols=len(scores),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[label(score) for score in scores],
    )
    for column, score in enumerate(scores, start=1):
        for place, model in enumerate(table["model"].unique()):
            rows = table[(table["model"] == model) & (table["score"] == score) & (table["size"] > 0)]
            curve, chosen = rows.sort_values("size"), rows[rows["chosen"].astype(bool)]
            colour = COLOURS.get(model, "#444444")
            figure.add_scatter(
                x=curve["size"],
                y=curve["exact_match"],
                name=label(model),
                legendgroup=model,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour},
                marker={"size": 4},
                hovertemplate="%{x:,} parameters: %{y:.1%}",
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=chosen["size"],
                y=chosen["exact_match"],
                name=f"{label(model)}: the graft that was chosen",
                legendgroup=model,
                showlegend=False,
                mode="markers",
                marker={"symbol": "star", "size": 15, "color": colour, "line": {"color": "white", "width": 1}},
                hovertemplate="%{x:,} parameters: %{y:.1%}",
                row=1,
                col=column,
            )
            for size, fraction in zip(chosen["size"], chosen["fraction"], strict=True):
                figure.add_annotation(
                    text=f"{size:,} ({fraction:.1%})",  # the colour says whose
                    xref=f"x{column if column > 1 else ''} domain",
                    yref="y domain",
                    x=0.04,
                    y=0.97 - 0.07 * place,
                    showarrow=False,
                    xanchor="left",
                    font={"color": colour, "size": 10},
                )
    figure.update_xaxes(title="grafted parameters |γ|₀", type="log", dtick=1, exponentformat="power")
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match, QA-ID", col=1)
    title = "" if keep is None else f"The smallest graft found that keeps {keep:.0%} of the accuracy (stars)"
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.02, "font": {"size": 16}},
        height=420,
        width=max(560, 400 * len(scores) + 120),
        margin={"t": 90, "b": 60},
    )
    return figure
