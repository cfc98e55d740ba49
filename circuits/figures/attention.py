"""The attention figure of one head: its patterns over prompts, side by side (Fig. 5), or beside another checkpoint's.

1. Each prompt gives one map: rows are the tokens that attend, columns the tokens attended to, on one colour scale. Of a
   task (`circuits.rankings.average_head`) rows and columns are its spans. Labels have the colour of the behaviour whose
   span the token is in.
2. Two checkpoints give a row of three maps for each prompt: the one, the other, and the first minus the second, whose
   colours are centred at zero.
3. Rectangles mark behaviours. Found from spans, a rectangle is solid if the head attends there more than uniform
   attention would, and dashed if it does not.
4. Of a long prompt a window or a span with its surroundings can be shown; a strip above the map, the attention of the
   last token to the whole prompt, says where that is.
5. Below each map, the head's own reading: its output at the last token through the final norm and the unembedding, as
   top tokens with logits, the answer's first token in orange where it is among them; and what the head adds directly to
   the logits of answer and foil.
6. For one column of a paper the prompts stand one below the other, and no text is wider than the column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

import numpy
import plotly.graph_objects as go

from circuits.errors import CircuitsError
from circuits.figures.attention_panels import BAR, CAPTION, HEADER, STRIP, Panels
from circuits.figures.attention_sheet import CHARACTER, Sheet, runs, short
from circuits.figures.style import DIVERGING, PALETTE, SEQUENTIAL, Width, printed_pixels
from circuits.rankings import BEHAVIOURS, Behaviour, HeadAverage, HeadReading

_BY_HAND = "#7f3c8d"
_MEANINGS = {
    "subject_linking": "subject linking: attention to the subject's tokens, mean over the tokens after its first",
    "relation_focusing": "relation focusing: attention of the last token to the words that name the relation",
}
#: Pixels: of the page and of the narrowest figure on it, of a cell with room, of the least side of a map, between the
#: maps of two checkpoints, and of the colour scale.
_PAGE, _NARROWEST, _CELL, _LEAST, _BETWEEN, _SCALE = 940, 640, 34, 200, 26, 84
#: Tokens shown before and behind a span, and before the last token, when a span is cropped to.
_AROUND = 6


@dataclass(frozen=True)
class Rectangle:
    """A rectangle drawn on a pattern by hand.

    Attributes:
        panel: which of the readings, from 0.
        queries: first and last query position.
        keys: first and last key position.
        label: what it marks; shown in the legend.
        shown: whether the head does it (solid) or not (dashed).
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
            for first, last in runs(cells.any(0).nonzero().flatten().tolist()):
                found.append(Rectangle(panel, (queries[0], queries[-1]), (first, last), name, score > uniform))
    return found


def _behaviours(readings: Sequence[HeadReading]) -> list[Behaviour]:
    """Those of all readings, the study's first."""
    found = list(dict.fromkeys(behaviour for reading in readings for behaviour in reading.behaviours))
    return sorted(found, key=lambda behaviour: behaviour not in BEHAVIOURS)


def _colours(readings: Sequence[HeadReading]) -> dict[str, str]:
    """Behaviour → colour."""
    others = [behaviour for behaviour in _behaviours(readings) if behaviour not in BEHAVIOURS]
    return {behaviour.name: PALETTE[place % len(PALETTE)] for place, behaviour in enumerate([*BEHAVIOURS, *others])}


def attention_figure(
    readings: HeadReading | HeadAverage | Sequence[HeadReading | HeadAverage],
    rectangles: Sequence[Rectangle] | None = None,
    subtitle: str = "",
    *,
    against: HeadReading | HeadAverage | Sequence[HeadReading | HeadAverage] | None = None,
    models: tuple[str, str] = ("model", "other"),
    weighted: bool = False,
    window: tuple[int, int] | None = None,
    span: str | None = None,
    width: Width = "page",
) -> go.Figure:
    """Draw what one head attends to.

    Args:
        readings: one or several of the same head: for each prompt one, from `circuits.read_head`; or for each task one,
            from `circuits.rankings.average_head`.
        rectangles: by hand; found from the prompts' spans if not given.
        subtitle: a line under the title, such as the model's name.
        against: the same of another checkpoint, in the same order.
        models: names of the two checkpoints.
        weighted: draw the value-weighted pattern, ‖α v W_O‖, instead of the weights α.
        window: the first and the last position to show, of every prompt.
        span: show this span with the tokens around it, and the end of the prompt.
        width: what it is laid out for: ``page``, or one ``column`` of a paper, which has no room for two checkpoints.

    Raises:
        CircuitsError: there is nothing to draw, the readings are of different heads or prompts, a rectangle or the
            window lies outside, a prompt has no such span, or two checkpoints are to stand in a column.

    Source:
        arXiv 2505.16178, Fig. 5; Kobayashi et al. 2020 (arXiv 2004.10102) for the value-weighted pattern.
    """
    readings = [readings] if isinstance(readings, HeadReading | HeadAverage) else readings
    against = [against] if isinstance(against, HeadReading | HeadAverage) else against
    _check(readings, against, weighted, window, span)
    if against is not None and width == "column":
        raise CircuitsError("a column has no room for the maps of two checkpoints: draw them for a page")
    others: Sequence[Any] = against or ()
    prompts = [one for one in readings if isinstance(one, HeadReading)]
    kept = [_kept(one, window, span) for one in prompts]
    sets = [readings, others] if others else [readings]
    if rectangles is None:
        drawn = [found_rectangles([one for one in each if isinstance(one, HeadReading)]) for each in sets]
    else:
        _check_rectangles(rectangles, readings)
        drawn = [list(rectangles)] * len(sets)
    colours = _colours(prompts)
    room = 40 + CHARACTER * max(len(short(text)) for one in readings for text in _labels(one)[0])
    # the maps of two checkpoints have the same tokens, which stand at the first one
    stacked = bool(others) or width == "column"
    columns, between = (3, _BETWEEN) if others else (1 if stacked else len(readings), room + 10)
    page, narrowest = (printed_pixels(width),) * 2 if width == "column" else (_PAGE, _NARROWEST)
    longest = max(len(_labels(one)[1]) if not kept else len(kept[place]) for place, one in enumerate(readings))
    most = (page - room - between * (columns - 1) - _SCALE) / columns
    side = max(_LEAST, min(longest * (_CELL if prompts else 2 * _CELL), most))
    pixels = max(narrowest, room + columns * side + between * (columns - 1) + _SCALE)
    strip = STRIP if any(len(places) < len(one.tokens) for places, one in zip(kept, prompts, strict=True)) else 0
    tall = side if prompts else side * max(len(_labels(one)[0]) / len(_labels(one)[1]) for one in readings)
    ticks = 40 + CHARACTER * max(len(short(text)) for one in readings for text in _labels(one)[1])
    bars = BAR * max((len(one.top_tokens) for one in prompts), default=0)
    told, legend = _explanation(drawn, prompts, weighted, bool(others), kept), _legend(drawn, pixels)
    lines = [line for text in told for line in wrap(text, int((pixels - 32) / 5.4))]
    under = [escape(line) for line in wrap(subtitle, int((pixels - 32) / 6))]
    top = 44 + 17 * len(under) + 22 * len(legend)
    block = HEADER + strip + tall + ticks + (bars + CAPTION if prompts else 0) + 14
    sheet = Sheet(pixels, top + block * (len(readings) if stacked else 1) + 15 * len(lines) + 20)
    sheet.write(f"<b>{readings[0].head}</b>", 16, 10, font={"size": 17})
    sheet.write("<br>".join(under), 16, 34, font={"size": 12})
    for row, entries in enumerate(legend):
        _write_legend(sheet, entries, top - 22 * (len(legend) - row), colours)
    panels = Panels(sheet, side, tall, strip, ticks, bars, models if others else None, weighted, colours)
    for place, one in enumerate(readings):
        places = kept[place] if kept else None
        left, above = (room, top + place * block) if stacked else (room + place * (side + between), top)
        for which, reading in enumerate((one, others[place]) if others else (one,)):
            axes = panels.draw(reading, places, left + which * (side + between), above, which=which)
            for rectangle in drawn[which]:
                if rectangle.panel == place:
                    _draw_rectangle(sheet, rectangle, places, axes, colours)
        if others:
            axes = panels.draw_difference((one, others[place]), places, left + 2 * (side + between), above)
            for rectangle in drawn[0]:
                if rectangle.panel == place:
                    _draw_rectangle(sheet, rectangle, places, axes, colours, thin=True)
    for line, text in enumerate(lines):
        sheet.write(text, 16, sheet.height - 12 - 15 * (len(lines) - line), font={"size": 11, "color": "#666"})
    _finish(sheet, top + HEADER + strip, tall, bool(others), weighted)
    return sheet.figure


def _labels(one: HeadReading | HeadAverage) -> tuple[list[str], list[str]]:
    return (one.tokens, one.tokens) if isinstance(one, HeadReading) else (one.rows, one.columns)


def _check(
    readings: Sequence[Any], against: Sequence[Any] | None, weighted: bool, window: Any, span: str | None
) -> None:
    """Refuse what cannot be drawn together."""
    if not readings:
        raise CircuitsError("an attention figure needs at least one reading")
    everyone = [*readings, *(against or ())]
    if len({reading.head for reading in everyone}) > 1:
        raise CircuitsError(
            f"an attention figure shows one head, not {' and '.join(str(reading.head) for reading in everyone)}"
        )
    if len({type(reading) for reading in everyone}) > 1:
        raise CircuitsError("an attention figure shows readings of prompts or averages over tasks, not both")
    if against is not None and [_labels(one) for one in readings] != [_labels(one) for one in against]:
        raise CircuitsError("two checkpoints are compared on the same prompts: these are others, or other tokens")
    averages = isinstance(readings[0], HeadAverage)
    if averages and (weighted or window is not None or span is not None):
        raise CircuitsError("an average over a task has no tokens: it takes no window, span or value-weighted pattern")
    if weighted and any(one.weighted is None for one in everyone):
        raise CircuitsError("a reading has no value-weighted pattern: make it with read_head")
    if window is not None and span is not None:
        raise CircuitsError("a window and a span were given: show one of them")


def _kept(reading: HeadReading, window: tuple[int, int] | None, span: str | None) -> list[int]:
    """The positions that are shown."""
    length = len(reading.tokens)
    if window is not None:
        if not 0 <= window[0] <= window[1] < length:
            raise CircuitsError(
                f"there is no window {window[0]} to {window[1]}: {reading.title} has the tokens 0 to {length - 1}"
            )
        return list(range(window[0], window[1] + 1))
    if span is None:
        return list(range(length))
    if span not in reading.spans:
        known = ", ".join(reading.spans) or "none"
        raise CircuitsError(f"the prompt of {reading.title} has no span {span!r}: it has {known}")
    near = {position + step for position in reading.spans[span] for step in range(-_AROUND, _AROUND + 1)} | set(
        range(length - _AROUND, length)
    )
    return sorted(position for position in near if 0 <= position < length)


def _check_rectangles(rectangles: Sequence[Rectangle], readings: Sequence[HeadReading | HeadAverage]) -> None:
    for rectangle in rectangles:
        if not 0 <= rectangle.panel < len(readings):
            raise CircuitsError(
                f"the rectangle {rectangle.label!r} is for panel {rectangle.panel}: there is no such panel"
            )
        rows, columns = _labels(readings[rectangle.panel])
        across, down = ([*ends] for ends in (rectangle.keys, rectangle.queries))
        if min(across + down) < 0 or max(across) >= len(columns) or max(down) >= len(rows):
            raise CircuitsError(
                f"the rectangle {rectangle.label!r} lies outside the {len(columns)} tokens of its panel"
            )


def _draw_rectangle(
    sheet: Sheet,
    rectangle: Rectangle,
    kept: Sequence[int] | None,
    axes: tuple[str, str],
    colours: dict[str, str],
    *,
    thin: bool = False,
) -> None:
    """Around what of its cells is shown."""
    edges: dict[str, float] = {}
    for letter, (first, last) in (("x", rectangle.keys), ("y", rectangle.queries)):
        inside = [place for place, at in enumerate(kept) if first <= at <= last] if kept is not None else [first, last]
        if not inside:
            return
        edges |= {f"{letter}0": inside[0] - 0.5, f"{letter}1": inside[-1] + 0.5}
    solid = rectangle.shown and not thin
    line = {"color": colours.get(rectangle.label, _BY_HAND), "width": 2.5 if solid else 1.5}
    line["dash"] = "solid" if rectangle.shown or thin else "dash"
    sheet.figure.add_shape(type="rect", line=line, xref=axes[0], yref=axes[1], **edges)


def _legend(drawn: Sequence[Sequence[Rectangle]], width: float) -> list[list[tuple[float, str]]]:
    """Rows of labels of rectangles, each with where it begins; none wider than the figure."""
    rows: list[list[tuple[float, str]]] = []
    left = width
    for label in dict.fromkeys(rectangle.label for each in drawn for rectangle in each):
        needed = 34 + CHARACTER * len(label)
        if left + needed > width - 16:
            rows.append([])
            left = 16
        rows[-1].append((left, label))
        left += needed
    return rows


def _write_legend(sheet: Sheet, entries: list[tuple[float, str]], top: float, colours: dict[str, str]) -> None:
    for left, label in entries:
        across = {"x0": left / sheet.width, "x1": (left + 12) / sheet.width}
        down = {"y0": 1 - (top + 14) / sheet.height, "y1": 1 - (top + 2) / sheet.height}
        line = {"color": colours.get(label, _BY_HAND), "width": 2.5}
        sheet.figure.add_shape(type="rect", xref="paper", yref="paper", line=line, **across, **down)
        sheet.write(escape(label.replace("_", " ")), left + 16, top, font={"size": 12})


def _explanation(
    drawn: Sequence[Sequence[Rectangle]],
    prompts: Sequence[HeadReading],
    weighted: bool,
    compared: bool,
    kept: Sequence[Sequence[int]],
) -> list[str]:
    """What the figure's words mean, one line each."""
    rectangles = [rectangle for each in drawn for rectangle in each]
    labels = {rectangle.label for rectangle in rectangles}
    lines = []
    if weighted:
        lines.append("value-weighted: attention × the length of what the head would write of that token, ‖α v W_O‖")
    lines += [_MEANINGS[one.name] for one in _behaviours(prompts) if one.name in labels and one.name in _MEANINGS]
    others = [one.keys for one in _behaviours(prompts) if one.name in labels and one.name not in _MEANINGS]
    if others:
        lines.append(f"last to …: attention of the last token to {', '.join(others)}")
    if any(not rectangle.shown for rectangle in rectangles):
        lines.append("dashed: no more than uniform attention, which is the same for all earlier tokens, would give")
    if any(len(places) < len(one.tokens) for places, one in zip(kept, prompts, strict=True)):
        lines.append("attention adds up to 1 over the whole prompt, not over the part that is shown")
    if prompts:
        bars = "bars: the head's output at the last token through final norm and unembedding"
        lines.append(bars + "; orange: the answer" * any(one.answer[2] <= len(one.top_tokens) for one in prompts))
        lines.append("direct: what the head adds to a logit, the final norm dividing by the whole stream's length")
    else:
        lines.append("attention between spans, mean over examples; hovering shows 95 % intervals and uniform attention")
    if compared and not prompts:
        lines.append("bold: the paired interval of the difference leaves out zero (not corrected for many cells)")
    return lines


def _finish(sheet: Sheet, top: float, tall: float, compared: bool, weighted: bool) -> None:
    """The colour scales, one for all maps of a kind, and what the whole figure has."""
    largest = {
        axis: max(
            (float(numpy.nanmax(numpy.abs(trace.z))) for trace in sheet.figure.select_traces({"coloraxis": axis})),
            default=0,
        )
        or 1.0
        for axis in ("coloraxis", "coloraxis2")
    }
    long = (tall - 60) / 2 if compared else min(tall, 260) - 20
    for place, (axis, title, scale) in enumerate(
        (
            ("coloraxis", "‖α v W_O‖" if weighted else "attention", SEQUENTIAL),
            ("coloraxis2", "difference", DIVERGING),
        )
    ):
        high = largest[axis] if weighted or axis == "coloraxis2" else 1
        sheet.figure.layout[axis] = {
            "colorscale": scale,
            "cmin": -high if axis == "coloraxis2" else 0,
            "cmax": high,
            "showscale": axis == "coloraxis" or compared,
            "colorbar": {
                "title": {"text": title, "font": {"size": 12}},
                "tickfont": {"size": 11},
                "x": 1 - (_SCALE - 16) / sheet.width,
                "xanchor": "left",
                "y": 1 - (top + place * (long + 60) - 4) / sheet.height,
                "yanchor": "top",
                "lenmode": "pixels",
                "len": long + 44,
                "thickness": 12,
                "xpad": 0,
                "ypad": 4,
                "nticks": 5,
            },
        }
    sheet.figure.update_layout(
        width=round(sheet.width),
        height=round(sheet.height),
        margin={"l": 0, "r": 0, "t": 0, "b": 0, "autoexpand": False},
        template="plotly_white",
        showlegend=False,
        bargap=0.15,
    )
