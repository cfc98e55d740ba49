"""What stands on an attention sheet for one prompt: its map, the strip, the tokens that the head writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import shorten

import numpy

from circuits.figures.attention_sheet import CHARACTER, Map, Sheet, draw_map, draw_strip, runs, short
from circuits.figures.style import number
from circuits.rankings import HeadAverage, HeadReading
from circuits.statistics import intervals

#: Pixels: of the text above a map, of the strip, of a bar and of the text below bars.
HEADER, STRIP, BAR, CAPTION = 40, 40, 20, 66
_BARS, _ANSWER = "#c6d8ec", "#f5b57a"
#: Of the two checkpoints.
_FIRST, _SECOND = "#1f77b4", "#e69f00"


@dataclass(frozen=True)
class Panels:
    """The panels of a sheet.

    Attributes:
        sheet: what they are drawn on.
        side: of a map, in pixels.
        tall: its height.
        strip: the height of the strip above it; 0 for none.
        ticks: the height of the tokens below it.
        bars: the height of the bars below it.
        models: names of the two checkpoints, if there are two.
        weighted: whether maps show value-weighted patterns.
        colours: behaviour → colour.
    """

    sheet: Sheet
    side: float
    tall: float
    strip: float
    ticks: float
    bars: float
    models: tuple[str, str] | None
    weighted: bool
    colours: Mapping[str, str]

    def draw(
        self, reading: HeadReading | HeadAverage, kept: Sequence[int] | None, left: float, top: float, *, which: int = 0
    ) -> tuple[str, str]:
        """The map of one reading with all that belongs to it; the names of the map's axes."""
        model = f"<b>{escape(self.models[which])}</b>  " if self.models else ""
        prompt = isinstance(reading, HeadReading)
        room = int(self.side / CHARACTER) - len(reading.title) - (len(self.models[which]) if self.models else 0) - 2
        text = reading.text if isinstance(reading, HeadReading) else f"{len(reading.values)} examples"
        above = f"{model}<b>{escape(reading.title)}</b>  " + (
            escape(shorten(text, room, placeholder=" …")) if room > 8 else ""
        )
        self._head(above, self._scores(reading) if isinstance(reading, HeadReading) else "", left, top)
        below = top + HEADER
        if isinstance(reading, HeadReading) and kept is not None and self.strip:
            what = f"of {len(reading.tokens)} tokens: " + ", ".join(f"{first}–{last}" for first, last in runs(kept))
            draw_strip(self.sheet, reading.pattern[-1].numpy(), kept, (left, below + 16, self.side, 10), what)
        below += self.strip
        shown = self._map(reading, kept)
        labelled = which == 0 or not self.models
        axes = draw_map(
            self.sheet, shown, (left, below, self.side, self.tall), coloraxis="coloraxis", labelled=labelled
        )
        if prompt or labelled:
            self.sheet.axis(axes[1]).title = {"text": "attends" if labelled else "", "font": {"size": 12}}
        if isinstance(reading, HeadReading):
            self._tokens(reading, left, below + self.tall + self.ticks)
        return axes

    def draw_difference(
        self, readings: Sequence[HeadReading | HeadAverage], kept: Sequence[int] | None, left: float, top: float
    ) -> tuple[str, str]:
        """The first map minus the second, and what each model's head adds to the logits."""
        first, second = (self._map(reading, kept) for reading in readings)
        texts = notes = None
        one, other = readings
        if isinstance(one, HeadAverage) and isinstance(other, HeadAverage):
            texts, notes = _paired(one, other)
        shown = Map(first.values - second.values, first.rows, first.columns, first.places, first.colours, texts, notes)
        assert self.models is not None
        self._head("<b>difference</b>", escape(f"{self.models[0]} − {self.models[1]}"), left, top)
        below = top + HEADER + self.strip
        axes = draw_map(self.sheet, shown, (left, below, self.side, self.tall), coloraxis="coloraxis2", labelled=False)
        if isinstance(one, HeadReading) and isinstance(other, HeadReading) and one.direct and other.direct:
            self._direct(one, other, left, below + self.tall + self.ticks)
        return axes

    def _head(self, first: str, second: str, left: float, top: float) -> None:
        self.sheet.write(first, left, top, font={"size": 12})
        self.sheet.write(second, left, top + 18, font={"size": 10, "color": "#444"})

    def _scores(self, reading: HeadReading) -> str:
        """As many as have room, the highest above uniform first."""
        ordered = sorted(reading.scores.items(), key=lambda item: item[1][1] - item[1][0])
        parts: list[str] = []
        for name, (score, uniform) in ordered:
            part = f"{name.replace('_', ' ')} {score:.2f} (uniform {uniform:.2f})"
            if 5.4 * len(" · ".join([*parts, part])) > self.side + 20 and parts:
                break
            parts.append(part)
        return escape(" · ".join(parts))

    def _map(self, reading: HeadReading | HeadAverage, kept: Sequence[int] | None) -> Map:
        if isinstance(reading, HeadAverage):
            low, high = _interval(reading.values.numpy(), reading.groups)
            means, uniform = reading.pattern.numpy(), reading.uniform.numpy()
            cells = [[(row, column) for column in range(means.shape[1])] for row in range(means.shape[0])]
            texts = [["" if numpy.isnan(means[at]) else number(float(means[at]), 2) for at in row] for row in cells]
            notes = [[f" ({low[at]:.3f} to {high[at]:.3f}), uniform {uniform[at]:.3f}" for at in row] for row in cells]
            return Map(means, reading.rows, reading.columns, texts=texts, notes=notes)
        places = list(range(len(reading.tokens))) if kept is None else list(kept)
        pattern = reading.weighted if self.weighted else reading.pattern
        assert pattern is not None
        values = pattern.numpy()[numpy.ix_(places, places)].astype(float)
        values[numpy.triu_indices(len(places), 1)] = numpy.nan
        keys = {behaviour.name: behaviour.keys for behaviour in reading.behaviours}
        at = {
            position: colour
            for name, colour in reversed(list(self.colours.items()))
            for position in reading.spans.get(keys.get(name, ""), ())
        }
        tokens = [reading.tokens[place] for place in places]
        coloured = {index: at[place] for index, place in enumerate(places) if place in at}
        return Map(values, tokens, tokens, places, coloured)

    def _tokens(self, reading: HeadReading, left: float, top: float) -> None:
        """The tokens that the head writes, as bars with their names in them, and what it adds to the answer."""
        x, y = self.sheet.axes(left, top, self.side, self.bars)
        tokens, logits = zip(*reversed(reading.top_tokens), strict=True)
        answer, answer_logit, rank = reading.answer
        self.sheet.figure.add_bar(
            x=logits,
            y=list(range(len(tokens))),
            orientation="h",
            marker_color=[_ANSWER if place == rank else _BARS for place in range(len(tokens), 0, -1)],
            text=[f"{escape(short(token))}  {number(logit, 2)}" for token, logit in zip(tokens, logits, strict=True)],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            textfont={"size": 12, "color": "#222"},
            constraintext="none",
            cliponaxis=False,
            showlegend=False,
            hovertext=[escape(token) for token in tokens],
            hovertemplate="%{hovertext}: %{x:.3f}<extra></extra>",
            xaxis=x,
            yaxis=y,
        )
        self.sheet.axis(y).update(visible=False)
        span = [min(0.0, min(logits) * 1.05), max(logits) * 1.05 if max(logits) > 0 else 0.0]
        self.sheet.axis(x).update(range=span, nticks=4, tickfont={"size": 10}, tickangle=0)
        lines = [
            f"logit of the head's output at “{escape(short(reading.tokens[-1]).strip('“”'))}”",
            f"the answer “{escape(answer)}” has {number(answer_logit, 2)}, rank {rank:,}",
        ]
        if reading.direct:
            found = [f"{name} “{escape(token)}” {_signed(value)}" for name, (token, value) in reading.direct.items()]
            lines.append(f"direct: {', '.join(found)}")
        self.sheet.write("<br>".join(lines), left, top + self.bars + 18, font={"size": 11})

    def _direct(self, one: HeadReading, other: HeadReading, left: float, top: float) -> None:
        """Bars of what each model's head adds to the logits of answer and foil, and to their difference."""
        x, y = self.sheet.axes(left + 30, top, self.side - 30, self.bars - 16)
        assert self.models is not None
        for reading, name, colour in zip((one, other), self.models, (_FIRST, _SECOND), strict=True):
            found = {f"“{token}”": value for token, value in reading.direct.values()}
            if len(found) > 1:
                found["difference"] = reading.direct["answer"][1] - reading.direct["foil"][1]
            self.sheet.figure.add_bar(
                x=[escape(text) for text in found],
                y=list(found.values()),
                name=name,
                marker_color=colour,
                showlegend=False,
                hovertemplate=f"{escape(name)}, %{{x}}: %{{y:+.3f}}<extra></extra>",
                xaxis=x,
                yaxis=y,
            )
        self.sheet.axis(x).update(tickfont={"size": 11}, tickangle=0)
        self.sheet.axis(y).update(tickfont={"size": 10}, zeroline=True, zerolinecolor="#888", nticks=5)
        named = [
            f"<span style='color:{colour}'>■</span> {escape(name)}"
            for name, colour in zip(self.models, (_FIRST, _SECOND), strict=True)
        ]
        self.sheet.write(
            "<br>".join(["added to the logit (direct)", *named]), left, top + self.bars + 6, font={"size": 11}
        )


def _signed(value: float) -> str:
    return ("+" if value >= 0.005 else "") + number(value, 2)


def _interval(values: numpy.ndarray, groups: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of each cell over the examples that have it."""
    low, high = (numpy.full(values.shape[1:], numpy.nan) for _ in range(2))
    for cell in numpy.ndindex(*values.shape[1:]):
        there = ~numpy.isnan(values[:, *cell])
        if there.sum() > 1:
            chosen = [group for group, found in zip(groups, there, strict=True) if found]
            low[cell], high[cell] = intervals(values[there][:, *cell], chosen, kind="bounded_difference")
    return low, high


def _paired(one: HeadAverage, other: HeadAverage) -> tuple[list[list[str]], list[list[str]]]:
    """The differences as text, bold where their interval leaves out zero, and the intervals."""
    values = (one.values - other.values).numpy()
    low, high = _interval(values, one.groups)
    means = (one.pattern - other.pattern).numpy()
    texts: list[list[str]] = []
    notes: list[list[str]] = []
    for row in range(means.shape[0]):
        texts.append([])
        notes.append([])
        for column in range(means.shape[1]):
            at = row, column
            text = "" if numpy.isnan(means[at]) else _signed(float(means[at]))
            texts[-1].append(f"<b>{text}</b>" if text and (low[at] > 0 or high[at] < 0) else text)
            notes[-1].append(f" ({low[at]:+.3f} to {high[at]:+.3f})")
    return texts, notes
