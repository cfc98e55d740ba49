"""Figures of accuracy: of trained models on each split, and along training."""

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from circuits.figures.style import COLOURS, PAGE, label, need


def accuracy_figure(table: DataFrame) -> go.Figure:
    """Exact match of each model on each split.

    Args:
        table: columns ``model``, ``split``, ``exact_match`` (0 to 1).

    Raises:
        CircuitsError: a column is missing or there are no rows.

    Source:
        arXiv 2505.16178, Fig. 1a.
    """
    need(table, "model", "split", "exact_match")
    figure = go.Figure()
    for model in table["model"].unique():
        rows = table[table["model"] == model]
        figure.add_bar(
            name=label(model),
            x=[label(split) for split in rows["split"]],
            y=rows["exact_match"],
            text=[f"{value:.1%}" for value in rows["exact_match"]],
            textposition="outside",
            cliponaxis=False,
            marker_color=COLOURS.get(model),
        )
    figure.update_layout(
        barmode="group",
        template="plotly_white",
        width=760,
        height=420,
        margin={"t": 70, "b": 50},
        legend={"orientation": "h", "y": 1.08, "yanchor": "bottom"},
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
    need(table, "model", "step", "bio", "qa_id", "qa_ood")
    models = list(table["model"].unique())
    figure = make_subplots(cols=len(models), shared_yaxes=True, subplot_titles=[label(model) for model in models])
    for column, model in enumerate(models, start=1):
        rows = table[table["model"] == model]
        for split in ("bio", "qa_id", "qa_ood"):
            figure.add_scatter(
                x=rows["step"],
                y=rows[split],
                name=label(split),
                legendgroup=split,
                showlegend=column == 1,
                line_color=COLOURS[split],
                row=1,
                col=column,
            )
    figure.update_layout(
        template="plotly_white",
        width=min(PAGE, max(560, 230 * len(models) + 160)),
        height=380,
        margin={"t": 90, "b": 60},
        legend={"orientation": "h", "y": 1.32},
    )
    figure.update_annotations(font_size=14)
    figure.update_xaxes(title="step")
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    return figure


def rates_figure(table: DataFrame, accuracy: DataFrame | None = None) -> go.Figure:
    """Exact match after second stages at several peak learning rates, with 95 % intervals.

    Args:
        table: columns ``rate``, ``split``, ``exact_match``, ``exact_match_low``, ``exact_match_high``.
        accuracy: that of the model trained on both formats at once, columns ``split`` and ``exact_match``: dashed.

    Raises:
        CircuitsError: a column is missing or there are no rows.

    Example:
        >>> rows = [(rate, "qa_ood", found, found - 0.1, found + 0.1) for rate, found in [(1e-5, 0.2), (1e-4, 0.7)]]
        >>> ends = ["exact_match_low", "exact_match_high"]
        >>> rates_figure(DataFrame(rows, columns=["rate", "split", "exact_match", *ends])).data[0].name
        'QA-OOD'
    """
    need(table, "rate", "split", "exact_match", "exact_match_low", "exact_match_high")
    figure = go.Figure()
    for split in table["split"].unique():
        rows = table[table["split"] == split]
        figure.add_scatter(
            x=rows["rate"],
            y=rows["exact_match"],
            error_y={
                "array": rows["exact_match_high"] - rows["exact_match"],
                "arrayminus": rows["exact_match"] - rows["exact_match_low"],
                "thickness": 1,
                "width": 3,
            },
            name=label(split),
            mode="lines+markers",
            line_color=COLOURS[split],
            hovertemplate="rate %{x:g}: %{y:.1%}",
        )
        for both in [] if accuracy is None else accuracy.loc[accuracy["split"] == split, "exact_match"]:
            figure.add_hline(both, line={"dash": "dash", "width": 1, "color": COLOURS[split]})
    figure.update_layout(
        template="plotly_white",
        width=760,
        height=420,
        margin={"t": 70, "b": 60},
        legend={"orientation": "h", "y": 1.08, "yanchor": "bottom"},
    )
    rates = sorted(table["rate"].unique())
    figure.update_xaxes(
        title="peak learning rate of the second stage",
        type="log",
        tickvals=rates,
        ticktext=[f"{rate:g}" for rate in rates],
    )
    figure.update_yaxes(title="exact match", tickformat=".0%", range=[-0.03, 1.05])
    return figure
