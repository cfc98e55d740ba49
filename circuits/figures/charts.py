"""Charts of result tables: accuracy, training curves, sharing, ablations, grafts, and maps over layers and heads."""

import math

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError

#: Names and colours of what is compared.
LABELS = {
    "mixed": "mixed",
    "two_stage": "two-stage",
    "two_stage_gentle": "two-stage, small second rate",
    "stage_1": "after stage 1 (BIO only)",
    "bio": "BIO",
    "qa_id": "QA-ID",
    "qa_ood": "QA-OOD",
    "qa_id_unseen": "QA-ID, unseen wording",
    "qa_ood_unseen": "QA-OOD, unseen wording",
    "pre": "before training",
    "none": "whole model",
    "shared": "shared parameters ablated",
    "shared_thinned": "shared, thinned to match random",
    "random": "random parameters ablated",
    "change": "by |change|",
    "gradient_x_change": "by |gradient × change|",
}
_COLOURS = {
    "mixed": "#1f77b4",
    "two_stage": "#ff7f0e",
    "two_stage_gentle": "#bbbbbb",
    "bio": "#7f7f7f",
    "qa_id": "#2ca02c",
    "qa_ood": "#9467bd",
    "none": "#1f77b4",
    "shared": "#d62728",
    "shared_thinned": "#f4a6a7",
    "random": "#c7c7c7",
}


#: Pixels between the margins of a report's page, which the widest figures fill.
_PAGE = 1080


def _label(name: str) -> str:
    return LABELS.get(name, name)


def number(value: float, digits: int) -> str:
    """A number for a person to read, with a true minus sign; a dash where there is none.

    Example:
        >>> number(-1234.5, 1), number(-0.001, 2), number(math.nan, 2)
        ('−1,234.5', '0.00', '–')
    """
    if math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def _need(table: DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        raise CircuitsError(f"the table has no {missing[0] if missing else 'rows'}: it has {', '.join(table.columns)}")


def accuracy_figure(table: DataFrame) -> go.Figure:
    """Exact match of each model on each split.

    Args:
        table: columns ``model``, ``split``, ``exact_match`` (0 to 1).

    Raises:
        CircuitsError: a column is missing or there are no rows.

    Source:
        arXiv 2505.16178, Fig. 1a.
    """
    _need(table, "model", "split", "exact_match")
    figure = go.Figure()
    for model in table["model"].unique():
        rows = table[table["model"] == model]
        figure.add_bar(
            name=_label(model),
            x=[_label(split) for split in rows["split"]],
            y=rows["exact_match"],
            text=[f"{value:.1%}" for value in rows["exact_match"]],
            textposition="outside",
            cliponaxis=False,
            marker_color=_COLOURS.get(model),
        )
    figure.update_layout(
        barmode="group",
        template="plotly_white",
        width=760,
        height=420,
        margin={"t": 70, "b": 50},
        legend={"orientation": "h", "y": 1.18},
    )
    figure.update_yaxes(title="exact match", tickformat=".0%", range=[0, 1.05])
    return figure


def curves_figure(table: DataFrame) -> go.Figure:
    """Exact match along training, one panel for each arm.

    Args:
        table: columns ``model``, ``step`` and the splits ``bio``, ``qa_id``, ``qa_ood``.

    Raises:
        CircuitsError: a column is missing or there are no rows.
    """
    _need(table, "model", "step", "bio", "qa_id", "qa_ood")
    models = list(table["model"].unique())
    figure = make_subplots(cols=len(models), shared_yaxes=True, subplot_titles=[_label(model) for model in models])
    for column, model in enumerate(models, start=1):
        rows = table[table["model"] == model]
        for split in ("bio", "qa_id", "qa_ood"):
            figure.add_scatter(
                x=rows["step"],
                y=rows[split],
                name=_label(split),
                legendgroup=split,
                showlegend=column == 1,
                line_color=_COLOURS[split],
                row=1,
                col=column,
            )
    figure.update_layout(
        template="plotly_white",
        width=min(_PAGE, max(560, 230 * len(models) + 160)),
        height=380,
        margin={"t": 90, "b": 60},
        legend={"orientation": "h", "y": 1.32},
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(title="step")
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    return figure


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
    _need(table, "model", "condition", "draw", "task", "exact_match")
    if table.duplicated(["model", "condition", "draw", "task"]).any():
        raise CircuitsError(
            "the table has several rows for one model, condition, draw and task: select one scope first"
        )
    models = list(table["model"].unique())
    figure = make_subplots(
        cols=len(models),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[_label(model) for model in models],
    )
    conditions = [name for name in ("none", "shared", "shared_thinned", "random") if name in set(table["condition"])]
    named: set[str] = set()
    groups = len(models) * table["task"].nunique()
    width = min(_PAGE, max(640, 130 * groups + 160))
    room = (width - 120) / (groups * (len(conditions) + 0.5))  # for the number in a bar
    for column, model in enumerate(models, start=1):
        for condition in conditions:
            rows = table[(table["model"] == model) & (table["condition"] == condition)]
            if rows.empty:
                continue
            by_task = rows.groupby("task", sort=False)["exact_match"].agg(["mean", "min", "max"])
            figure.add_bar(
                name=_label(condition),
                legendgroup=condition,
                showlegend=condition not in named,
                x=[_label(task).replace(", ", ",<br>") for task in by_task.index],
                y=by_task["mean"],
                error_y={
                    "array": by_task["max"] - by_task["mean"],
                    "arrayminus": by_task["mean"] - by_task["min"],
                    "visible": condition in ("shared_thinned", "random"),
                },
                text=[f"{value:.0%}" for value in by_task["mean"]],
                textposition="auto",
                insidetextanchor="start",
                textangle=0 if room > 25 else -90,
                marker_color=_COLOURS[condition],
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
    _need(table, "model", "fraction", "share", *control)
    figure = go.Figure()
    for model in table["model"].unique():
        rows = table[table["model"] == model].sort_values("fraction")
        colour = _COLOURS.get(model, "#444444")
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
            (rows["share"], _label(model), "solid"),
            (middle, f"{_label(model)}, permuted", "dash"),
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
    _need(table, "model", "score", "size", "fraction", "exact_match", "chosen")
    scores = list(table["score"].unique())
    figure = make_subplots(
        cols=len(scores),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[_label(score) for score in scores],
    )
    for column, score in enumerate(scores, start=1):
        for place, model in enumerate(table["model"].unique()):
            rows = table[(table["model"] == model) & (table["score"] == score) & (table["size"] > 0)]
            curve, chosen = rows.sort_values("size"), rows[rows["chosen"].astype(bool)]
            colour = _COLOURS.get(model, "#444444")
            figure.add_scatter(
                x=curve["size"],
                y=curve["exact_match"],
                name=_label(model),
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
                name=f"{_label(model)}: the graft that was chosen",
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
                    text=f"{_label(model)}: {size:,} ({fraction:.1%})",
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


def heads_figure(
    table: DataFrame, value: str, facet: str | None = None, *, title: str = "", digits: int = 2
) -> go.Figure:
    """A number for every head as heat maps of layers × heads, one panel for each value of a column.

    Args:
        table: columns ``layer``, ``index`` and ``value``; one row for each head and panel.
        value: the column that is shown.
        facet: the column that makes the panels; if not given, the one of ``model``, ``task`` and ``mode`` that tells
            rows apart, or else the first of them that is there.
        title: what the colour means; the name of the column if not given.
        digits: digits after the point in the cells.

    Raises:
        CircuitsError: a column is missing, there are no rows, or a head has several rows in one panel.
    """
    if facet is None:
        there = [name for name in ("model", "task", "mode") if name in table]
        facet = next((name for name in there if table[name].nunique() > 1), next(iter(there), None))
    if facet is None:
        table, facet = table.assign(model=""), "model"
    _need(table, "layer", "index", value, facet)
    if table.duplicated([facet, "layer", "index"]).any():
        raise CircuitsError(f"the table has several rows for one head and {facet}: select one mode and task first")
    panels = list(table[facet].unique())
    largest = float(table[value].abs().max()) or 1.0
    signed = bool((table[value] < 0).any())
    layers, heads = int(table["layer"].max()) + 1, int(table["index"].max()) + 1
    # wide enough for a number in each cell and a title over each panel, if the page has room
    left, right, between = 70, 130, 40
    room = _PAGE - left - right - between * (len(panels) - 1)
    cell = min(60, room / (heads * len(panels)))
    inside = max(180, heads * cell) * len(panels) + between * (len(panels) - 1)
    readable = layers <= 12 and cell >= 34
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=between / inside if len(panels) > 1 else 0,
        subplot_titles=[_label(str(panel)) for panel in panels],
    )
    for column, panel in enumerate(panels, start=1):
        grid = table[table[facet] == panel].pivot(index="layer", columns="index", values=value)
        figure.add_trace(
            go.Heatmap(
                z=grid.to_numpy(),
                x=grid.columns,
                y=grid.index,
                zmin=-largest if signed else 0,
                zmax=largest,
                colorscale="RdBu" if signed else "Blues",
                xgap=1,
                ygap=1,
                showscale=column == len(panels),
                colorbar={"title": title or _label(value).replace("_", " "), "thickness": 14},
                text=[[number(one, digits) for one in row] for row in grid.to_numpy(dtype=float)],
                texttemplate="%{text}" if readable else None,
                customdata=[[f"L{layer}H{head}" for head in grid.columns] for layer in grid.index],
                hovertemplate="%{customdata}: %{z:.4f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title="head", dtick=1 if cell >= 20 else 4, tickangle=0)
    figure.update_yaxes(autorange="reversed", dtick=1 if layers <= 16 else 4)
    figure.update_yaxes(title="layer", col=1)
    figure.update_annotations(font_size=14)
    figure.update_layout(
        template="plotly_white",
        width=round(left + inside + right),
        height=max(320, 26 * layers + 160),
        margin={"l": left, "r": right, "t": 60, "b": 60},
    )
    return figure
