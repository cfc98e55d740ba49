"""The attention study of one head: its pattern over the same fact in two formats, side by side (Fig. 5).

1. Each prompt gives one heat map: rows are the tokens that attend, columns the tokens attended to. Axis labels carry
   the colour of the behaviour whose span the token is in.
2. Rectangles mark behaviours: subject linking (later tokens attend to the subject), relation focusing (the last token
   attends to the words that name the relation), or the last token to any other span. Found from spans, a rectangle is
   solid if the head attends there more than uniform attention would, and dotted if it does not; a behaviour is present
   in both formats if it is solid in both.
3. Below, the head's own reading: its output at the last token through the final norm and the unembedding, as top
   tokens with logits; the answer's first token is orange where it is among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import shorten

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures.style import number
from circuits.rankings import BEHAVIOURS, Behaviour, HeadReading

#: Of behaviours, in the order of the spans of a task.
_COLOURS = ("#d62728", "#2ca02c", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22", "#7f7f7f")
_BY_HAND = "#9467bd"
_MEANINGS = {
    "subject_linking": "subject linking: attention to the subject's tokens, mean over the tokens after its first",
    "relation_focusing": "relation focusing: attention of the last token to the words that name the relation",
}
#: Pixels of a token's cell, and of a character above a panel.
_CELL, _CHARACTER = 34, 7


@dataclass(frozen=True)
class Rectangle:
    """A rectangle drawn on a pattern by hand.

    Attributes:
        panel: which of the readings, from 0.
        queries: first and last query position.
        keys: first and last key position.
        label: what it marks; shown in the legend.
        shown: whether the head does it (solid) or not (dotted).
    """

    panel: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    label: str
    shown: bool = True


def found_rectangles(readings: Sequence[HeadReading]) -> list[Rectangle]:
    """Where the behaviours lie on each pattern, found from the prompts' spans.

    A behaviour counts as shown on a pattern if its attention exceeds what uniform attention would give there.
    """
    found = []
    for behaviour in _behaviours(readings):
        name = behaviour.name
        for panel, reading in enumerate(readings):
            cells = behaviour.cells(reading.spans, len(reading.tokens))
            if cells is None:
                continue
            score, uniform = reading.scores[name]
            queries = cells.any(1).nonzero().flatten().tolist()
            for first, last in _runs(cells.any(0).nonzero().flatten().tolist()):
                found.append(Rectangle(panel, (queries[0], queries[-1]), (first, last), name, score > uniform))
    return found


def _behaviours(readings: Sequence[HeadReading]) -> list[Behaviour]:
    """Those of all readings, the study's first."""
    found = list(dict.fromkeys(behaviour for reading in readings for behaviour in reading.behaviours))
    return sorted(found, key=lambda behaviour: behaviour not in BEHAVIOURS)


def _colours(readings: Sequence[HeadReading]) -> dict[str, str]:
    """Behaviour → colour."""
    others = [behaviour for behaviour in _behaviours(readings) if behaviour not in BEHAVIOURS]
    return {behaviour.name: _COLOURS[place % len(_COLOURS)] for place, behaviour in enumerate([*BEHAVIOURS, *others])}


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Neighbouring positions joined: ``[1, 2, 5]`` is ``(1, 2)`` and ``(5, 5)``."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return runs


def attention_figure(
    readings: Sequence[HeadReading], rectangles: Sequence[Rectangle] | None = None, subtitle: str = ""
) -> go.Figure:
    """Draw the attention study of one head.

    Args:
        readings: of the same head, usually over a BIO and a QA prompt of one person, from `circuits.read_head`.
        rectangles: by hand; found from the prompts' spans if not given.
        subtitle: a line under the title, such as the model's name.

    Raises:
        CircuitsError: there is nothing to draw, the readings are of different heads, or a rectangle lies outside.

    Source:
        arXiv 2505.16178, Fig. 5.
    """
    if not readings:
        raise CircuitsError("an attention figure needs at least one reading")
    if len({reading.head for reading in readings}) > 1:
        raise CircuitsError(
            f"an attention figure shows one head, not {' and '.join(str(reading.head) for reading in readings)}"
        )
    drawn = found_rectangles(readings) if rectangles is None else list(rectangles)
    columns = len(readings)
    longest = max(len(reading.tokens) for reading in readings)
    side = max(300, _CELL * longest)
    bars, between = 220, 150
    above, below = 150, 165
    height = side + bars + between + above + below
    figure = make_subplots(
        rows=2,
        cols=columns,
        row_heights=[side, bars],
        vertical_spacing=between / (side + bars + between),
        horizontal_spacing=0.16 if columns > 1 else 0,
    )
    for column, reading in enumerate(readings, start=1):
        _draw_pattern(figure, reading, column, columns, _colours(readings), side)
        _draw_reading(figure, reading, column)
    _draw_rectangles(figure, drawn, readings)
    _explain(figure, drawn, readings)
    figure.update_layout(
        title={
            "text": f"<b>{readings[0].head}</b>" + (f"<br><sup>{escape(subtitle)}</sup>" if subtitle else ""),
            "x": 0.02,
            "y": 1 - 24 / height,
            "yref": "container",
            "yanchor": "top",
        },
        width=max(640, columns * (side + 150) + 70),
        height=height,
        margin={"l": 120, "r": 90, "t": above, "b": below},
        template="plotly_white",
        legend={
            "orientation": "h",
            "x": 0.01,
            "xref": "container",
            "xanchor": "left",
            "y": 1 - 66 / height,
            "yref": "container",
            "yanchor": "top",
        },
        font={"size": 13},
    )
    return figure


def _explain(figure: go.Figure, rectangles: list[Rectangle], readings: Sequence[HeadReading]) -> None:
    """Say under the figure what its words mean."""
    labels = {rectangle.label for rectangle in rectangles}
    lines = [
        _MEANINGS.get(
            behaviour.name, f"{behaviour.name.replace('_', ' ')}: attention of the last token to {behaviour.keys}"
        )
        for behaviour in _behaviours(readings)
        if behaviour.name in labels
    ]
    if any(not rectangle.shown for rectangle in rectangles):
        lines.append("dotted: no more than uniform attention, which is the same for all earlier tokens, would give")
    lines.append("bars: the head's output at the last token through final norm and unembedding; orange: the answer")
    figure.add_annotation(
        text="<br>".join(lines),
        x=0,
        y=0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        xshift=-90,
        yshift=-72,
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#666"},
    )


def _axis(number: int, letter: str) -> str:
    return letter if number == 1 else f"{letter}{number}"


def _draw_pattern(
    figure: go.Figure, reading: HeadReading, column: int, columns: int, colours: Mapping[str, str], side: int
) -> None:
    length = len(reading.tokens)
    behaviours = {behaviour.name: behaviour.keys for behaviour in reading.behaviours}
    at = {
        position: colour
        for name, colour in reversed(list(colours.items()))
        for position in reading.spans.get(behaviours.get(name, ""), ())
    }
    labels = [
        f'<span style="color:{at.get(position, "#444")}">{escape(token)}</span>'
        for position, token in enumerate(reading.tokens)
    ]
    weights = [
        [float(reading.pattern[query, key]) if key <= query else None for key in range(length)]
        for query in range(length)
    ]
    figure.add_trace(
        go.Heatmap(
            z=weights,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            xgap=1,
            ygap=1,
            showscale=column == columns,
            colorbar={"title": {"text": "attention", "font": {"size": 13}}, "len": 0.45, "y": 0.77, "thickness": 14},
            customdata=[[(query, key) for key in reading.tokens] for query in reading.tokens],
            hovertemplate="%{customdata[0]} → %{customdata[1]}: %{z:.3f}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    ticks = {"tickvals": list(range(length)), "showgrid": False, "zeroline": False}
    # a question mark that is turned is none any more: what has one character stands upright
    short = [len(token) == 1 for token in reading.tokens]
    for position, label in enumerate(labels):
        if short[position]:
            figure.add_annotation(
                text=label,
                x=position,
                y=0,
                xref=_axis(column, "x"),
                yref=f"{_axis(column, 'y')} domain",
                yanchor="top",
                yshift=-2,
                showarrow=False,
            )
    figure.update_xaxes(
        **ticks,
        ticktext=["" if alone else label for label, alone in zip(labels, short, strict=True)],
        tickangle=-55,
        title={"text": "attended to", "font": {"size": 13}, "standoff": 8},
        constrain="domain",
        range=[-0.56, length - 0.44],
        row=1,
        col=column,
    )
    figure.update_yaxes(
        **ticks,
        ticktext=labels,
        range=[length - 0.44, -0.56],
        title={"text": "attends" if column == 1 else "", "font": {"size": 13}},
        scaleanchor=_axis(column, "x"),
        constrain="domain",
        row=1,
        col=column,
    )
    scores = " · ".join(
        f"{name.replace('_', ' ')} {score:.2f} (uniform {uniform:.2f})"
        for name, (score, uniform) in reading.scores.items()
    )
    # no wider than the panel; all tokens stand at its axes
    characters = side // _CHARACTER
    figure.add_annotation(
        text=f"<b>{escape(reading.title)}</b>  {escape(shorten(reading.text, characters, placeholder=' …'))}"
        f"<br><span style='font-size:11px'>{scores or '&nbsp;'}</span>",
        x=0.5,
        y=1,
        xref=f"{_axis(column, 'x')} domain",
        yref=f"{_axis(column, 'y')} domain",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
        font={"size": 13},
    )


def _draw_reading(figure: go.Figure, reading: HeadReading, column: int) -> None:
    tokens, logits = zip(*reversed(reading.top_tokens), strict=True)
    answer, answer_logit, rank = reading.answer
    figure.add_trace(
        go.Bar(
            x=logits,
            y=list(range(len(tokens))),
            orientation="h",
            marker_color=["#f58518" if place == rank else "#4c78a8" for place in range(len(tokens), 0, -1)],
            text=[number(logit, 2) for logit in logits],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertext=list(tokens),
            hovertemplate="%{hovertext}: %{x:.3f}<extra></extra>",
        ),
        row=2,
        col=column,
    )
    last = escape(reading.tokens[-1])
    figure.update_yaxes(
        tickvals=list(range(len(tokens))), ticktext=[escape(token) for token in tokens], row=2, col=column
    )
    figure.update_xaxes(
        title={
            "text": f"logit of the head's output at “{last}”, top {len(tokens)} tokens"
            f"<br>the answer “{escape(answer)}” has {number(answer_logit, 2)}, rank {rank:,}",
            "font": {"size": 13},
        },
        range=[min(0.0, min(logits) * 1.2), max(logits) * 1.2 if max(logits) > 0 else 0.0],
        row=2,
        col=column,
    )


def _draw_rectangles(figure: go.Figure, rectangles: list[Rectangle], readings: Sequence[HeadReading]) -> None:
    colours = _colours(readings)
    for rectangle in rectangles:
        if not 0 <= rectangle.panel < len(readings):
            raise CircuitsError(
                f"the rectangle {rectangle.label!r} is for panel {rectangle.panel}: there is no such panel"
            )
        length = len(readings[rectangle.panel].tokens)
        if not all(0 <= position < length for position in (*rectangle.queries, *rectangle.keys)):
            raise CircuitsError(f"the rectangle {rectangle.label!r} lies outside the {length} tokens of its panel")
        colour = colours.get(rectangle.label, _BY_HAND)
        figure.add_shape(
            type="rect",
            x0=rectangle.keys[0] - 0.5,
            x1=rectangle.keys[1] + 0.5,
            y0=rectangle.queries[0] - 0.5,
            y1=rectangle.queries[1] + 0.5,
            line={"color": colour, "width": 3 if rectangle.shown else 2, "dash": "solid" if rectangle.shown else "dot"},
            row=1,
            col=rectangle.panel + 1,
        )
    for label in dict.fromkeys(rectangle.label for rectangle in rectangles):
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                marker={
                    "symbol": "square-open",
                    "size": 13,
                    "color": colours.get(label, _BY_HAND),
                    "line": {"width": 3},
                },
                name=label.replace("_", " "),
            ),
            row=1,
            col=1,
        )
