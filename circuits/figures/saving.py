"""Figures to files: interactive pages always, static images when a browser is there, in sizes that papers print."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import wrap
from typing import Literal

import plotly.graph_objects as go
import plotly.io

from circuits.errors import CircuitsError
from circuits.figures.style import PRINTED, Width, printed_pixels
from circuits.storage import atomic_file, check_ending

FORMATS: tuple[str, ...] = (".html", ".png", ".svg", ".pdf")
#: Pixels of an image for each pixel of its layout; what is drawn in lines needs one.
_SCALES = {".png": 2.0}
#: In print a pixel of the layout is half a point: text of 12 pixels is 6 points high.
_POINTS = 0.5
#: Pixels to the inch: of an image in print, and of a drawing in lines as browsers read it.
_PRINT, _SCREEN, _INCH = 300, 96, 72
#: How wide a letter is for its height.
_LETTER = 0.52


def save_figure(
    figure: go.Figure,
    path: str | Path | Sequence[str | Path],
    library: Literal["inside", "beside"] = "inside",
    *,
    width: Width | None = None,
) -> None:
    """Save a figure by the ending of its name.

    Args:
        figure: what to save.
        path: ``.html`` is interactive and opens offline; ``.png``, ``.svg`` and ``.pdf`` need Chrome or Chromium. Of
            several paths those of pages are written first, whether or not there is a browser.
        library: plotly.js goes ``inside`` the page (4.5 MB), or ``beside`` it, once for all pages of the folder.
        width: of images in print: a ``column`` of 84 mm or a ``page`` of 174 mm. The figure is laid out anew for that
            width, with text of at least 5 points; a ``.png`` has 300 pixels to the inch, and a ``.pdf`` holds its
            fonts. If not given, an image has its figure's own size.

    Raises:
        CircuitsError: the ending is another one, an image was asked for and no browser was found, or the figure cannot
            be printed so narrow: its parts stand where they do and the text would be too small, or its panels are too
            many.

    Example:
        >>> save_figure(go.Figure(), "figure.gif")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: a figure cannot be saved as figure.gif: end the name in .html, .png, .svg, .pdf
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    for one in paths:
        check_ending(one, FORMATS, "figure")
    if width is not None:
        printed(figure, width)  # refuses what would be too small before anything is written
    pages, images = ([one for one in paths if (one.suffix == ".html") is html] for html in (True, False))
    for page in pages:
        _save_page(figure, page, library)
    if not images:
        return
    try:
        save_images(dict.fromkeys(images, figure), width=width)
    except CircuitsError as error:
        if pages:
            raise CircuitsError(f"{error} ({', '.join(page.name for page in pages)} is written)") from None
        raise


def _save_page(figure: go.Figure, path: Path, library: Literal["inside", "beside"]) -> None:
    with atomic_file(path) as temporary:
        figure.write_html(
            temporary, include_plotlyjs=library == "inside" or "plotly.min.js", config={"displaylogo": False}
        )
    script = path.parent / "plotly.min.js"
    if library == "beside" and not script.exists():
        from plotly.offline import get_plotlyjs

        with atomic_file(script) as text:
            text.write_text(get_plotlyjs(), encoding="utf-8")


def save_images(figures: Mapping[Path, go.Figure], *, width: Width | None = None) -> None:
    """Save figures as static images, all of them with one start of the browser.

    Without a width each image has its figure's own size; a side that a figure's layout leaves open is plotly's 700 or
    500 pixels, and a ``.png`` has two pixels for each one.

    Args:
        figures: by the path of each, which ends in ``.png``, ``.svg`` or ``.pdf``; at least one.
        width: in print, as in `save_figure`.

    Raises:
        CircuitsError: no browser was found, or a figure cannot be printed so narrow.
    """
    for path in figures:
        check_ending(path, FORMATS[1:], "image")
    first = next(iter(figures))
    drawn = [(figure, 1.0) if width is None else printed(figure, width) for figure in figures.values()]
    if width is None:
        scales = [_SCALES.get(path.suffix, 1.0) for path in figures]
    else:
        dots = [_PRINT if path.suffix == ".png" else _SCREEN for path in figures]
        scales = [points * dot / _INCH for dot, (_, points) in zip(dots, drawn, strict=True)]
    try:
        import kaleido  # noqa: F401
        from choreographer.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise CircuitsError(
            f"{first.name} needs the package kaleido: install fact-circuits[figures], or save as .html"
        ) from None
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(path)) for path in figures]
        try:
            # given many figures at once, plotly looks at no layout for its size
            plotly.io.write_images(
                [figure for figure, _ in drawn],
                files,
                scale=scales,
                width=[figure.layout.width for figure, _ in drawn],
                height=[figure.layout.height for figure, _ in drawn],
            )
        except (ChromeNotFoundError, BrowserFailedError):
            raise _no_browser(first) from None
        except RuntimeError as error:
            # plotly turns kaleido's missing browser into a RuntimeError of several lines
            if "Chrome" in str(error):
                raise _no_browser(first) from None
            raise


def printed(figure: go.Figure, width: Width) -> tuple[go.Figure, float]:
    """A figure laid out for print, and the points that a pixel of its layout has there.

    Args:
        figure: as it is on a page; it stays so.
        width: in print.

    Raises:
        CircuitsError: there is no such width, the figure's parts stand where they do and its text would be too small,
            or a panel is too narrow for what is written above it.
    """
    if width not in PRINTED:
        raise CircuitsError(f"there is no width {width!r}: choose from {', '.join(PRINTED)}")
    pixels = printed_pixels(width)
    if figure.layout.margin.autoexpand is False:  # laid out by hand, as attention is
        own = figure.layout.width
        # what is a little wider than a page loses a little of its text's height
        if own > 1.05 * pixels:
            raise CircuitsError(
                f"this figure is laid out by hand for {own * _POINTS / _INCH * 25.4:.0f} mm, and in "
                f"{PRINTED[width]:.0f} mm its text would be too small: "
                + ("save it with width='page', or draw it" if width == "column" else "draw fewer prompts")
                + (" with attention_figure(…, width='column')" if width == "column" else "")
            )
        return figure, _POINTS * pixels / own
    figure, own = go.Figure(figure), figure.layout.width or 700
    figure.layout.width = pixels
    if width == "column":
        _narrow(figure, own)
    return figure, _POINTS


def _narrow(figure: go.Figure, own: float) -> None:
    """Put what stands beside the plot below it, and break what is written above and below, for a column has no room.

    Raises:
        CircuitsError: a text is wider than its panel all the same.
    """
    layout, pixels = figure.layout, figure.layout.width
    if layout.title.text:
        layout.title.text, layout.title.font.size = _broken(layout.title.text, pixels - 40, 14), 14
    height = layout.height or 500
    layout.height = max(min(height, 440), height * pixels / own)
    if layout.margin.l is not None:
        layout.margin.l = min(layout.margin.l, 110)
    beside = layout.legend.orientation != "h"
    if beside and sum(trace.showlegend is not False and trace.type != "heatmap" for trace in figure.data) > 1:
        layout.legend = {"orientation": "h", "x": 0, "y": -70 / layout.height, "yanchor": "top", "font": {"size": 11}}
        layout.margin.r = 20
        layout.height += 60
    panels = [axis.domain or (0, 1) for axis in figure.select_xaxes()]
    room = (pixels - (layout.margin.l or 80) - (layout.margin.r or 80)) * min(end - start for start, end in panels)
    for axis in figure.select_xaxes():
        if axis.title.text:
            axis.title.text = _broken(axis.title.text, room, 12)
            axis.title.font.size = 12
    for note in layout.annotations:
        note.font.size = min(note.font.size or 12, 11)
        longest = max(note.text.split("<br>"), key=len)
        if len(longest) * note.font.size * _LETTER > room:
            raise CircuitsError(f"a panel of this figure has no room in a column for {longest!r}: use width='page'")


def _broken(text: str, room: float, size: float) -> str:
    """A text in lines that fit."""
    lines = text.split("<br>")
    return "<br>".join(part for line in lines for part in wrap(line, max(12, int(room / (size * _LETTER)))))


def _no_browser(path: Path) -> CircuitsError:
    return CircuitsError(
        f"{path.name} needs Chrome or Chromium, and none could be started: install one, or save as .html"
    )
