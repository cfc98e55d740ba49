"""The report page: a question, its answer in numbers, then text, tables and figures, in one file that opens offline."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from pandas import DataFrame, isna
from plotly.offline import get_plotlyjs

from circuits.figures.pages import write_page


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: its heading.
        paragraphs: its text.
        table: shown under the text; one with the column ``verdict`` stands as a list of claims on a narrow screen.
        figure: shown under the table.
        see: what there is to see in the figure, in a sentence under it.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: DataFrame | None = None
    figure: go.Figure | None = field(default=None, compare=False)
    see: str = ""


@dataclass(frozen=True)
class Number:
    """A number that answers a report's question.

    Attributes:
        value: as a reader sees it.
        what: of what it is.
        control: what it is to be read against.
    """

    value: str
    what: str
    control: str = ""


def write_report(
    path: str | Path,
    title: str,
    lead: str,
    *,
    sections: Sequence[Section],
    footer: str = "",
    numbers: Sequence[Number] = (),
    setting: Mapping[str, str] | None = None,
) -> None:
    """Write sections as one self-contained page: contents at the side, tables that sort, light and dark.

    Args:
        path: the HTML file.
        title: of the page; of a study, its question.
        lead: the first paragraph, in larger type.
        sections: in order.
        footer: the last line.
        numbers: the answer, in at most a few numbers.
        setting: what it was found with: name → value.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "report.html"
        >>> found = [Number("5 %", "of all")]
        >>> write_report(page, "Is it shared?", "It is.", sections=[Section("How much")], numbers=found)
        >>> "<strong>5 %</strong> of all" in page.read_text()
        True
    """
    shown: list[dict[str, Any]] = []
    anchors: set[str] = set()
    for place, section in enumerate(sections):
        anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or f"section-{place}"
        anchor = anchor if anchor not in anchors else f"{anchor}-{place}"
        anchors.add(anchor)
        shown.append(
            {
                "title": section.title,
                "anchor": anchor,
                "paragraphs": section.paragraphs,
                "see": section.see,
                "table": None if section.table is None else _table(section.table, section.title),
                "figure": None if section.figure is None else _drawn(section.figure, f"figure-{anchor}"),
            }
        )
    write_page(
        path,
        "report.html",
        title=title,
        lead=lead,
        sections=shown,
        footer=footer,
        numbers=numbers,
        setting=setting or {},
        plotly=get_plotlyjs(),
    )


def _table(table: DataFrame, title: str) -> dict[str, Any]:
    """Cells as text, by row; columns of numbers stand to the right, those of words to the left."""
    columns = [str(name) for name in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.itertuples(index=False, name=None)]
    words = [not all(map(_NUMBER.match, column)) for column in zip(*rows, strict=True)] or [True] * len(columns)
    return {
        "title": title,
        "columns": list(zip(columns, words, strict=True)),
        "rows": [
            [
                (name, cell, "words short" if wordy and len(cell) <= _SHORT else "words" * wordy)
                for name, cell, wordy in zip(columns, row, words, strict=True)
            ]
            for row in rows
        ],
        "claims": "verdict" in columns,
    }


#: How a cell of numbers begins; one without a number is empty or a dash.
_NUMBER = re.compile(r"[+−<]?\.?\d|–?$")
#: Letters of a cell that is not broken into lines.
_SHORT = 20


def _cell(cell: Any) -> str:
    """With true minus signs, none before zero, and an interval that is not broken in two."""
    if isna(cell):
        return ""
    text = f"{cell:.6g}" if isinstance(cell, float) else str(cell)
    text = re.sub(r"(?<![\w.,-])-(?=\.?\d)", "−", text)
    text = re.sub(r"−(0(?:\.0+)?%?)(?![\d.,])", r"\1", text)
    return re.sub(r"\([^()]{1,14} to [^()]{1,14}\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _drawn(figure: go.Figure, name: str) -> str:
    """What draws a figure in a page that has plotly.js."""
    drawn: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False, "displayModeBar": False}
    )
    return drawn
