"""Where the parts of an attention figure stand, in pixels, and how one map of tokens is drawn.

A `Sheet` has no margins: every part says where it stands, so that none grows into another, whatever the tokens are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import numpy
import plotly.graph_objects as go

#: Characters of a label, and pixels of one.
_LONGEST, CHARACTER = 14, 6.6
#: No label is nearer to the next one than so many pixels.
_APART = 10
#: A cell wider than this has room for the marks around a token that is no word.
_ROOMY = 13


def short(token: str) -> str:
    """A token as it stands on an axis: not too long, and in quotation marks if it is no word.

    Example:
        >>> short("Alice"), short(","), short("antidisestablishmentarianism")
        ('Alice', '“,”', 'antidisestabl…')
    """
    if len(token) > _LONGEST:
        return f"{token[: _LONGEST - 1]}…"
    return token if any(character.isalnum() for character in token) or token.startswith("'") else f"“{token}”"


@dataclass
class Sheet:
    """A figure that is laid out by hand.

    Attributes:
        width: in pixels.
        height: in pixels.
        figure: what is drawn on.
    """

    width: float
    height: float
    figure: go.Figure = field(default_factory=go.Figure)
    _count: int = 0

    def axes(self, left: float, top: float, width: float, height: float) -> tuple[str, str]:
        """The names of new axes that span a box, as traces call them."""
        self._count += 1
        number = "" if self._count == 1 else str(self._count)
        across, down = (left, left + width), (self.height - top - height, self.height - top)
        self.figure.layout[f"xaxis{number}"] = {
            "domain": [edge / self.width for edge in across],
            "anchor": f"y{number}",
            "zeroline": False,
        }
        self.figure.layout[f"yaxis{number}"] = {
            "domain": [max(0, edge / self.height) for edge in down],
            "anchor": f"x{number}",
            "zeroline": False,
        }
        return f"x{number}", f"y{number}"

    def axis(self, name: str) -> Any:
        """The layout of an axis."""
        return self.figure.layout[f"{name[0]}axis{name[1:]}"]

    def write(self, text: str, left: float, top: float, **options: Any) -> None:
        """Text, by its upper left corner unless the options say otherwise."""
        options = {"xanchor": "left", "yanchor": "top", "align": "left"} | options
        place = {"x": left / self.width, "y": 1 - top / self.height, "xref": "paper", "yref": "paper"}
        self.figure.add_annotation(text=text, showarrow=False, **place, **options)


@dataclass(frozen=True)
class Map:
    """What one map shows.

    Attributes:
        values: ``[row, column]``; NaN where there is nothing.
        rows: what attends, as text.
        columns: what is attended to.
        places: the numbers of rows and columns in the prompt; None if they are no tokens.
        colours: row or column → its colour, for those that have one.
        texts: what stands in the cells, if anything.
        notes: what hovering adds, for each cell.
    """

    values: numpy.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    places: Sequence[int] | None = None
    colours: Mapping[int, str] = field(default_factory=dict)
    texts: Sequence[Sequence[str]] | None = None
    notes: Sequence[Sequence[str]] | None = None


def draw_map(
    sheet: Sheet, shown: Map, box: tuple[float, float, float, float], *, coloraxis: str, labelled: bool
) -> tuple[str, str]:
    """Draw a map into a box (left, top, width, height), with its tokens on the axes; the names of its axes."""
    left, top, width, height = box
    x, y = sheet.axes(left, top, width, height)
    rows, columns = len(shown.rows), len(shown.columns)
    cell = width / columns
    # axes are named by place and token, as no two tokens are: what a pointer is told costs nothing in long prompts
    numbered = shown.places is not None
    names = [
        [f"{place} {escape(text)}" if numbered else escape(text) for place, text in zip(places, texts, strict=True)]
        for places, texts in (
            (shown.places or range(rows), shown.rows),
            (shown.places or range(columns), shown.columns),
        )
    ]
    gap = 1 if cell >= 6 else 0
    sheet.figure.add_heatmap(
        z=shown.values.astype(numpy.float32),
        y=names[0],
        x=names[1],
        coloraxis=coloraxis,
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
        text=shown.texts,
        texttemplate="%{text}" if shown.texts else None,
        textfont={"size": 11},
        customdata=shown.notes,
        hovertemplate="%{y} → %{x}: %{z:.3f}" + ("%{customdata}" if shown.notes else "") + "<extra></extra>",
        xaxis=x,
        yaxis=y,
    )
    _label(sheet, x, shown.columns, shown, cell, turned=True)
    _label(sheet, y, shown.rows if labelled else [""] * rows, shown, height / rows, turned=False)
    # as much beyond the cells as half the line of a rectangle is wide
    across, down = 0.5 + 1.5 / cell, 0.5 + 1.5 * rows / height
    sheet.axis(x).update(range=[-across, columns - 1 + across])
    sheet.axis(y).update(range=[rows - 1 + down, -down])
    line = {"type": "line", "line": {"color": "#888", "width": 1, "dash": "dash"}}
    for edge in (last + 0.5 for _, last in _indexed_runs(shown.places or ())[:-1]):
        sheet.figure.add_shape(x0=edge, x1=edge, y0=0, y1=1, xref=x, yref=f"{y} domain", **line)
        sheet.figure.add_shape(x0=0, x1=1, y0=edge, y1=edge, xref=f"{x} domain", yref=y, **line)
    longest = max((len(short(text)) for text in shown.columns if len(text) > 1), default=1)
    sheet.write(
        "attended to",
        left + width / 2,
        top + height + 12 + longest * CHARACTER * (0.82 if cell >= 14 else 1),
        xanchor="center",
        font={"size": 12},
    )
    return x, y


def _label(sheet: Sheet, name: str, texts: Sequence[str], shown: Map, cell: float, *, turned: bool) -> None:
    """Put tokens on an axis: those with a colour first, then as many as have room."""
    order = sorted(range(len(texts)), key=lambda place: (place not in shown.colours, place))
    apart, chosen = max(1, -(-_APART // cell)), numpy.zeros(len(texts), dtype=bool)
    for place in order:
        near = chosen[max(0, int(place - apart + 1)) : int(place + apart)]
        chosen[place] = not near.any()
    places = [int(place) for place in chosen.nonzero()[0]]
    size = max(8, min(12, int(cell * 0.85)))
    labels = {}
    for place in places:
        text = texts[place]
        colour = shown.colours.get(place, "#333")
        # a question mark that is turned is none any more: what has one character stands upright
        if turned and len(text) == 1:
            sheet.figure.add_annotation(
                text=f'<span style="color:{colour}">{escape(short(text) if cell > _ROOMY else text)}</span>',
                x=place,
                y=0,
                xref=name,
                yref=f"y{name[1:]} domain",
                yanchor="top",
                yshift=-3,
                showarrow=False,
                font={"size": size},
            )
            text = ""
        labels[place] = f'<span style="color:{colour}">{escape(short(text))}</span>' if text else ""
    sheet.axis(name).update(
        tickvals=list(labels),
        ticktext=list(labels.values()),
        tickfont={"size": size},
        tickangle=(-55 if cell >= 14 else -90) if turned else 0,
        showgrid=False,
        ticks="",
    )


def draw_strip(
    sheet: Sheet, weights: numpy.ndarray, kept: Sequence[int], box: tuple[float, float, float, float], what: str
) -> None:
    """Draw the whole prompt as one row, and mark what of it a map shows."""
    left, top, width, height = box
    x, y = sheet.axes(left, top, width, height)
    sheet.figure.add_heatmap(
        z=weights[None].astype(numpy.float32),
        coloraxis="coloraxis",
        hovertemplate="token %{x}: %{z:.3f}<extra></extra>",
        xaxis=x,
        yaxis=y,
    )
    sheet.axis(x).update(visible=False, range=[-0.5, len(weights) - 0.5])
    sheet.axis(y).update(visible=False)
    sheet.write(what, left, top - 3, yanchor="bottom", font={"size": 10, "color": "#666"})
    edges = {"x0": 0, "x1": 1, "y0": 0, "y1": 1, "xref": f"{x} domain", "yref": f"{y} domain"}
    sheet.figure.add_shape(type="rect", line={"color": "#bbb", "width": 1}, **edges)
    for first, last in runs(list(kept)):
        sheet.figure.add_shape(
            type="rect",
            x0=first - 0.5,
            x1=last + 0.5,
            y0=-0.15,
            y1=1.15,
            xref=x,
            yref=f"{y} domain",
            line={"color": "#222", "width": 1.5},
        )


def runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring positions joined.

    Example:
        >>> runs([1, 2, 5])
        [(1, 2), (5, 5)]
    """
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and position == found[-1][1] + 1:
            found[-1] = (found[-1][0], position)
        else:
            found.append((position, position))
    return found


def _indexed_runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Where neighbouring places stand among all."""
    ends = [0]
    for first, last in runs(places):
        ends.append(ends[-1] + last - first + 1)
    return [(start, end - 1) for start, end in pairwise(ends)]
