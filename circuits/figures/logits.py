"""Figures by position and of direct contributions: what a number is at each token, and what adds up to a logit."""

from html import escape

import numpy
import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.attention_sheet import short
from circuits.figures.style import DIVERGING, PAGE, SEQUENTIAL, need

_LENS = {
    "probability": "Logit lens: the likeliest next token after each layer",
    "answer_probability": "Logit lens: the probability of the answer “{}” after each layer",
}
_ADDED = {"logit": "the answer's logit", "logit_diff": "the answer's logit less its foil's"}


def positions_figure(table: DataFrame, value: str, *, title: str = "", row: str = "unit") -> go.Figure:
    """A number for every unit at every token, as a map of units × tokens.

    Args:
        table: columns ``position``, ``token``, ``value`` and ``row``; one row for each cell.
        value: the column that is shown.
        title: of the figure.
        row: the column that makes the rows: ``unit``, or ``layer``.

    Raises:
        CircuitsError: a column is missing, there are no rows, or a cell has several.

    Example:
        >>> table = DataFrame({"unit": ["L0H1"] * 2, "position": [0, 1], "token": ["a", "b"], "effect": [0.1, -0.2]})
        >>> positions_figure(table, "effect").data[0].z.tolist()
        [[0.1, -0.2]]
    """
    need(table, row, "position", "token", value)
    if table.duplicated([row, "position"]).any():
        raise CircuitsError(f"the table has several rows for one {row} and position: select one task and mode first")
    places, rows = sorted(table["position"].unique()), list(table[row].unique())
    tokens = table.drop_duplicates("position").set_index("position")["token"].loc[places]
    grid = table.pivot(index=row, columns="position", values=value).loc[rows, places].to_numpy(dtype=float)
    signed = bool((grid < 0).any())
    largest = float(numpy.nanmax(numpy.abs(grid))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=places,
            y=[str(name) for name in rows],
            zmin=-largest if signed else 0,
            zmax=largest,
            colorscale=DIVERGING if signed else SEQUENTIAL,
            xgap=1,
            ygap=1,
            customdata=[[escape(str(token)) for token in tokens]] * len(rows),
            hovertemplate="%{y}, “%{customdata}”: %{z:.4f}<extra></extra>",
            colorbar={"title": {"text": value.replace("_", " ")}, "thickness": 14},
        )
    )
    cell = max(14, min(64, (PAGE - 240) / len(places)))
    every = -(-14 // max(1, int((PAGE - 240) / len(places))))
    figure.update_xaxes(
        title="token",
        tickvals=places[::every],
        ticktext=[escape(short(str(token))) for token in tokens.iloc[::every]],
        tickangle=-55,
    )
    figure.update_yaxes(title=row, autorange="reversed", type="category")
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.02, "font": {"size": 16}},
        width=round(min(PAGE, max(420, cell * len(places) + 240))),
        height=24 * len(rows) + 190,
        margin={"l": 90, "r": 110, "t": 60, "b": 110},
    )
    return figure


def logit_lens_figure(table: DataFrame, value: str = "probability") -> go.Figure:
    """What the stream says of the next token after each layer, with the likeliest token in each cell.

    Args:
        table: from `circuits.rankings.logit_lens`.
        value: the colour: ``probability`` of the likeliest token, or ``answer_probability``.

    Raises:
        CircuitsError: there is no such value, or the table is another one.

    Source:
        nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    if value not in _LENS:
        raise CircuitsError(f"there is no value {value!r}: choose from {', '.join(_LENS)}")
    need(table, "layer", "position", "token", "top", "answer", value)
    title = _LENS[value].format(table["answer"].iloc[0])
    figure = positions_figure(table, value, title=title, row="layer")
    heat = figure.data[0]
    told = table.pivot(index="layer", columns="position", values="top").loc[[int(name) for name in heat.y], heat.x]
    room = (figure.layout.width - 200) / len(heat.x)
    if room >= 34:
        letters = max(2, int(room / 6.2))
        cut = told.map(lambda token: escape(token if len(token) <= letters else f"{token[: letters - 1]}…"))
        heat.update(text=cut.to_numpy(), texttemplate="%{text}", textfont={"size": 10})
    heat.update(
        zmax=1,
        customdata=told.map(escape).to_numpy(),
        hovertemplate="after layer %{y}: “%{customdata}”, %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "probability"}, "tickformat": ".0%", "thickness": 14},
    )
    figure.update_yaxes(title="layers passed", autorange=True)
    return figure


def direct_logits_figure(table: DataFrame, value: str | None = None, *, largest: int = 20) -> go.Figure:
    """What parts of the model add to the answer's logit: a map of heads, and bars of the largest other parts.

    Args:
        table: from `circuits.rankings.direct_logits`.
        value: ``logit`` or ``logit_diff``; ``logit_diff`` if it is there and none is given.
        largest: how many other parts have bars, the largest of either sign.

    Raises:
        CircuitsError: there is no such value, or the table is another one.

    Source:
        Elhage et al. 2021, "A mathematical framework for transformer circuits".
    """
    value = value or ("logit_diff" if "logit_diff" in table else "logit")
    if value not in _ADDED:
        raise CircuitsError(f"there is no value {value!r}: choose from {', '.join(_ADDED)}")
    need(table, "unit", "kind", "layer", "index", value, f"{value}_low", f"{value}_high")
    heads, rest = table[table["kind"] == "head"], table[table["kind"] != "head"]
    rest = rest.loc[rest[value].abs().sort_values(kind="stable").index[-largest:]]
    grid = heads.pivot(index="layer", columns="index", values=value)
    most = float(grid.abs().to_numpy().max()) or 1.0
    figure = make_subplots(
        cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.24, subplot_titles=["heads", "other parts"]
    )
    figure.add_heatmap(
        z=grid.to_numpy(dtype=float),
        x=[int(name) for name in grid.columns],
        y=[int(name) for name in grid.index],
        zmin=-most,
        zmax=most,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        customdata=[[f"L{layer}H{head}" for head in grid.columns] for layer in grid.index],
        hovertemplate="%{customdata}: %{z:+.3f}<extra></extra>",
        colorbar={"x": 0.47, "thickness": 12, "title": {"text": "logits"}},
        row=1,
        col=1,
    )
    figure.add_bar(
        x=rest[value],
        y=rest["unit"],
        orientation="h",
        marker_color=["#2166ac" if one >= 0 else "#b2182b" for one in rest[value]],
        error_x={
            "array": (rest[f"{value}_high"] - rest[value]).fillna(0),
            "arrayminus": (rest[value] - rest[f"{value}_low"]).fillna(0),
            "color": "#444",
            "thickness": 1,
        },
        showlegend=False,
        hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_xaxes(title="head", dtick=1 if len(grid.columns) <= 16 else 4, row=1, col=1)
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1 if len(grid) <= 16 else 4, row=1, col=1)
    figure.update_xaxes(title="logits added", zeroline=True, zerolinecolor="#888", row=1, col=2)
    figure.update_layout(
        template="plotly_white",
        title={"text": f"What is added directly to {_ADDED[value]}", "x": 0.02, "font": {"size": 16}},
        width=920,
        height=max(380, 20 * len(grid) + 170, 20 * len(rest) + 170),
        margin={"t": 90, "b": 60, "r": 30},
    )
    return figure
