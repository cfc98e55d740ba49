"""A figure of a number for every head: a map of layers × heads."""

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.style import PAGE, label, need, number


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
    need(table, "layer", "index", value, facet)
    if table.duplicated([facet, "layer", "index"]).any():
        raise CircuitsError(f"the table has several rows for one head and {facet}: select one mode and task first")
    panels = list(table[facet].unique())
    largest = float(table[value].abs().max()) or 1.0
    signed = bool((table[value] < 0).any())
    layers, heads = int(table["layer"].max()) + 1, int(table["index"].max()) + 1
    # wide enough for a number in each cell and a title over each panel, if the page has room
    left, right, between = 70, 130, 40
    room = PAGE - left - right - between * (len(panels) - 1)
    cell = min(60, room / (heads * len(panels)))
    inside = max(180, heads * cell) * len(panels) + between * (len(panels) - 1)
    readable = layers <= 12 and cell >= 34
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=between / inside if len(panels) > 1 else 0,
        subplot_titles=[label(str(panel)) for panel in panels],
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
                colorbar={"title": title or label(value).replace("_", " "), "thickness": 14},
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
