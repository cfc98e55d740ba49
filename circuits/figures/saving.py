"""Figures to files: interactive pages always, static images when a browser is there."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
import plotly.io

from circuits.errors import CircuitsError
from circuits.storage import atomic_file, check_ending

FORMATS: tuple[str, ...] = (".html", ".png", ".svg", ".pdf")
#: Pixels of an image for each pixel of its layout; what is drawn in lines needs one.
_SCALES = {".png": 2}


def save_figure(figure: go.Figure, path: str | Path, library: Literal["inside", "beside"] = "inside") -> None:
    """Save a figure by the ending of its name.

    Args:
        figure: what to save.
        path: ``.html`` is interactive and opens offline; ``.png``, ``.svg`` and ``.pdf`` need Chrome or Chromium.
        library: plotly.js goes ``inside`` the page (4.5 MB), or ``beside`` it, once for all pages of the folder.

    Raises:
        CircuitsError: the ending is another one, or an image was asked for and no browser was found.
    """
    path = Path(path)
    check_ending(path, FORMATS, "figure")
    if path.suffix != ".html":
        save_images({path: figure})
        return
    with atomic_file(path) as temporary:
        figure.write_html(
            temporary, include_plotlyjs=library == "inside" or "plotly.min.js", config={"displaylogo": False}
        )
    script = path.parent / "plotly.min.js"
    if library == "beside" and not script.exists():
        from plotly.offline import get_plotlyjs

        with atomic_file(script) as text:
            text.write_text(get_plotlyjs(), encoding="utf-8")


def save_images(figures: Mapping[Path, go.Figure]) -> None:
    """Save figures as static images of their own sizes, all of them with one start of the browser.

    A side that a figure's layout leaves open is plotly's 700 or 500 pixels. A ``.png`` has two pixels for each one.

    Args:
        figures: by the path of each, which ends in ``.png``, ``.svg`` or ``.pdf``; at least one.

    Raises:
        CircuitsError: no browser was found.
    """
    for path in figures:
        check_ending(path, FORMATS[1:], "image")
    first = next(iter(figures))
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
                list(figures.values()),
                files,
                scale=[_SCALES.get(path.suffix, 1) for path in figures],
                width=[figure.layout.width for figure in figures.values()],
                height=[figure.layout.height for figure in figures.values()],
            )
        except (ChromeNotFoundError, BrowserFailedError):
            raise _no_browser(first) from None
        except RuntimeError as error:
            # plotly turns kaleido's missing browser into a RuntimeError of several lines
            if "Chrome" in str(error):
                raise _no_browser(first) from None
            raise


def _no_browser(path: Path) -> CircuitsError:
    return CircuitsError(
        f"{path.name} needs Chrome or Chromium, and none could be started: install one, or save as .html"
    )
