"""A figure of what interventions do, one after the other, with their intervals."""

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.colors import qualitative

from circuits.errors import CircuitsError
from circuits.figures.style import COLOURS, label, need


def effects_figure(table: DataFrame, value: str = "log_prob_effect", *, top: int = 30, by: str = "task") -> go.Figure:
    """The largest effects of a sweep in order, with their 95 % intervals; hollow where zero is within.

    Args:
        table: columns ``unit``, ``value`` and its ends ``<value>_low`` and ``<value>_high``; one row for each unit and
            value of ``by``.
        value: the effect that is shown.
        top: how many units: those whose effect is largest, averaged over ``by``.
        by: the column whose values have a colour each; there may be none.

    Raises:
        CircuitsError: a column is missing, there are no rows, or a unit has several rows for one value of ``by``.

    Example:
        >>> rows = [("L0H1", -2.0, -2.5, -1.5), ("L1H0", 0.1, -0.2, 0.4)]
        >>> ends = ["log_prob_effect", "log_prob_effect_low", "log_prob_effect_high"]
        >>> figure = effects_figure(DataFrame(rows, columns=["unit", *ends]))
        >>> figure.data[0].x, figure.data[0].marker.symbol
        (('L0H1', 'L1H0'), ('circle', 'circle-open'))
    """
    table = table if by in table else table.assign(**{by: ""})
    need(table, "unit", value, f"{value}_low", f"{value}_high", by)
    if table.duplicated(["unit", by]).any():
        raise CircuitsError(f"the table has several rows for one unit and {by}: select one mode and model first")
    means = table.groupby("unit", sort=False)[value].mean()
    order = means.sort_values(key=abs, ascending=False, kind="stable").index[:top]
    figure = go.Figure()
    for place, (name, part) in enumerate(table.groupby(by, sort=False)):
        rows = part.set_index("unit").reindex(order).dropna(subset=value)
        told = (rows[f"{value}_low"] > 0) | (rows[f"{value}_high"] < 0)
        figure.add_scatter(
            x=list(rows.index),
            y=rows[value],
            error_y={
                "array": rows[f"{value}_high"] - rows[value],
                "arrayminus": rows[value] - rows[f"{value}_low"],
                "thickness": 1,
                "width": 2,
            },
            mode="markers",
            marker={"size": 7, "symbol": ["circle" if one else "circle-open" for one in told]},
            marker_color=COLOURS.get(str(name), qualitative.Safe[place % len(qualitative.Safe)]),
            name=label(str(name)),
            hovertemplate="%{x}: %{y:.3f}",
        )
    figure.add_hline(0, line={"width": 1, "color": "#888888"})
    figure.update_layout(
        template="plotly_white",
        width=max(420, 120 + 24 * len(order)),
        height=420,
        margin={"t": 60, "b": 80},
        legend={"orientation": "h", "y": 1.05, "yanchor": "bottom"},
        showlegend=table[by].nunique() > 1,
    )
    figure.update_xaxes(tickangle=-90, categoryorder="array", categoryarray=list(order), title="unit")
    unit = ", nats" if value.startswith("log_prob") else ""
    figure.update_yaxes(title=f"{label(value).replace('_', ' ')}{unit}")
    return figure
