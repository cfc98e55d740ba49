"""Where two checkpoints differ: heat maps, and a page of them with the numbers."""

from pathlib import Path

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.report import Section, write_report

_TITLES = {
    "relative": "norm of the change / norm before",
    "norm": "norm of the change",
    "changed": "fraction of entries that changed",
}


def difference_figure(table: DataFrame, value: str = "relative", *, title: str = "") -> go.Figure:
    """Heat maps of a difference: layers × components, layers × heads and, where there are some, layers × groups.

    Args:
        table: from `circuits.models.difference`.
        value: ``relative``, ``norm`` or ``changed``.
        title: of the figure.

    Raises:
        CircuitsError: there is no such value, or the table is another one.
    """
    if value not in _TITLES:
        raise CircuitsError(f"there is no value {value!r}: choose from {', '.join(_TITLES)}")
    missing = {"unit", "kind", "layer", "index", "component", value} - set(table)
    if missing:
        raise CircuitsError(f"the table has no column {min(missing)}: it is no difference of two checkpoints")
    panels = {
        "components": (table[(table["kind"] == "component") & table["layer"].notna()], "component"),
        "heads": (table[table["kind"] == "head"], "index"),
        "key/value groups": (table[table["kind"] == "group"], "index"),
    }
    panels = {name: panel for name, panel in panels.items() if len(panel[0])}
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(panels))
    for column, (rows, across) in enumerate(panels.values(), start=1):
        grid = rows.pivot(index="layer", columns=across, values=value)
        names = rows.pivot(index="layer", columns=across, values="unit")
        figure.add_trace(
            go.Heatmap(
                z=grid.to_numpy(dtype=float),
                x=[str(name) for name in grid.columns],
                y=[int(layer) for layer in grid.index],
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                customdata=names.to_numpy(),
                hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(type="category", row=1, col=column)
    layers = int(table["layer"].max()) + 1
    figure.update_yaxes(autorange="reversed", dtick=1 if layers <= 16 else 4)
    figure.update_yaxes(title="layer", col=1)
    figure.update_layout(
        template="plotly_white",
        title=title or None,
        coloraxis={"colorscale": "Blues", "cmin": 0, "colorbar": {"title": _TITLES[value], "title_side": "right"}},
        height=max(320, 26 * layers + 160) + (40 if title else 0),
        margin={"t": 100 if title else 60, "b": 60},
    )
    return figure


def write_difference(table: DataFrame, path: str | Path, *, title: str = "", largest: int = 12) -> None:
    """Write a difference as one page: the model and its layers, components, heads and the neurons that changed most.

    Args:
        table: from `circuits.models.difference`.
        path: the HTML file.
        title: of the page.
        largest: how many heads, groups and neurons are listed.

    Raises:
        CircuitsError: the table is another one.
    """
    figure = difference_figure(table)
    whole = table[table["kind"] == "model"].iloc[0]
    lead = (
        f"{whole['changed']:.1%} of {whole['parameters']:,} parameters changed; the norm of the change is "
        f"{whole['relative']:.3g} of the norm before."
    )
    layers, components = table[table["kind"] == "layer"], table[table["kind"] == "component"]
    by_layer = go.Figure(go.Bar(x=layers["layer"], y=layers["relative"], marker_color="#1f77b4"))
    by_layer.update_layout(template="plotly_white", height=300, margin={"t": 20, "b": 50})
    by_layer.update_xaxes(title="layer", dtick=1 if len(layers) <= 24 else 4)
    by_layer.update_yaxes(title=_TITLES["relative"], rangemode="tozero")
    outside = components[components["layer"].isna()]
    sections = [
        Section("Layers", table=_numbers(layers), figure=by_layer, see="The taller a bar, the more the layer changed."),
        Section(
            "Components and heads", ["Hover over a cell for its number."], figure=figure, see="Darker changed more."
        ),
        *([Section("Outside the layers", table=_numbers(outside))] if len(outside) else []),
    ]
    for kind, name in {"head": "Heads", "group": "Key/value groups", "neuron": "Neurons"}.items():
        rows = table[table["kind"] == kind].sort_values("relative", ascending=False, kind="stable").head(largest)
        if len(rows):
            sections.append(Section(f"{name} that changed most", table=_numbers(rows)))
    write_report(path, title or "What changed", lead, sections=sections)


def _numbers(rows: DataFrame) -> DataFrame:
    """Rows of a difference as a reader sees them."""
    return DataFrame(
        {
            "unit": rows["unit"],
            "parameters": rows["parameters"].map("{:,}".format),
            "norm of the change": rows["norm"].map("{:.3g}".format),
            "of the norm before": rows["relative"].map("{:.3g}".format, na_action="ignore"),
            "entries changed": rows["changed"].map("{:.1%}".format),
        }
    )
