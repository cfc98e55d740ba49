"""A figure of a number for every head: a map of layers × heads."""

from textwrap import wrap

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
    layers, heads = int(table["layer"].max() - table["layer"].min()) + 1, int(table["index"].max()) + 1
    # wide enough for a number in each cell and a title over each panel, if the page has room; what is too many for one
    # row goes on in the next
    left, right, top, bottom, between, narrowest = 70, 130, 60, 60, 40, 180
    columns = min(len(panels), (PAGE - left - right + between) // (narrowest + between))
    rows = -(-len(panels) // columns)
    room = PAGE - left - right - between * (columns - 1)
    cell = min(60, room / (heads * columns))
    inside = max(narrowest, heads * cell) * columns + between * (columns - 1)
    height = max(320, 26 * layers + 160)
    readable = layers <= 12 and cell >= 34
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=between / inside if columns > 1 else 0,
        vertical_spacing=(top + bottom) / (rows * height - top - bottom) if rows > 1 else 0,
        subplot_titles=[label(str(panel)) for panel in panels],
    )
    for place, panel in enumerate(panels):
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
                showscale=place == len(panels) - 1,
                colorbar={"title": _broken(title or label(value).replace("_", " ")), "thickness": 14},
                text=[[number(one, digits) for one in row] for row in grid.to_numpy(dtype=float)],
                texttemplate="%{text}" if readable else None,
                customdata=[[f"L{layer}H{head}" for head in grid.columns] for layer in grid.index],
                hovertemplate="%{customdata}: %{z:.4f}<extra></extra>",
            ),
            row=place // columns + 1,
            col=place % columns + 1,
        )
    figure.update_xaxes(title="head", dtick=1 if cell >= 20 else 4, tickangle=0)
    figure.update_yaxes(autorange="reversed", dtick=1 if layers <= 16 else 4)
    figure.update_yaxes(title="layer", col=1)
    figure.update_annotations(font_size=14)
    figure.update_layout(
        template="plotly_white",
        width=round(left + inside + right),
        height=rows * height,
        margin={"l": left, "r": right, "t": top, "b": bottom},
    )
    return figure


def _broken(title: str) -> str:
    """In lines that the margin beside the maps has room for."""
    return "<br>".join(line for part in title.split("<br>") for line in wrap(part, 16))
