"""The report page: text, tables and figures in one file that opens offline."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.offline import get_plotlyjs

from circuits.storage import atomic_file

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { padding: .3em .8em; border-bottom: 1px solid #e5e5e5; text-align: right; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.figure, .wide { overflow-x: auto; } .lead { font-size: 18px; }
footer { color: #777; font-size: 13px; margin-top: 3em; }
"""


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: its heading.
        paragraphs: its text.
        table: shown under the text.
        figure: shown under the table.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: DataFrame | None = None
    figure: go.Figure | None = field(default=None, compare=False)


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section], footer: str = "") -> None:
    """Write sections as one self-contained page.

    Args:
        path: the HTML file.
        title: of the page.
        lead: the first paragraph, in larger type.
        sections: in order.
        footer: the last line.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.table is not None:
            # numbers stand to the right, sentences to the left
            wordy = section.table.map(lambda cell: isinstance(cell, str) and len(cell) > 40).to_numpy().any()
            kind = "words" if wordy else None
            table = section.table.to_html(index=False, border=0, na_rep="", escape=True, classes=kind)
            parts.append(f"<div class='wide'>{table}</div>")  # what is wider than the page scrolls alone
        if section.figure is not None:
            drawn = section.figure.to_html(
                full_html=False, include_plotlyjs=False, config={"displaylogo": False, "displayModeBar": False}
            )
            parts.append(f"<div class='figure'>{drawn}</div>")
    parts.append(f"<footer>{escape(footer)}</footer></body></html>")
    with atomic_file(Path(path)) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
