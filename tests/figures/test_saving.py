"""Figures in the sizes that papers print, and several files of one figure."""

import re

import plotly.graph_objects as go
import pytest
from choreographer.errors import ChromeNotFoundError
from plotly.subplots import make_subplots

from circuits.errors import CircuitsError
from circuits.figures import attention_figure, save_figure
from circuits.figures.saving import printed, save_images
from tests.figures.test_figures import reading, size_of

#: Millimetres of an inch.
INCH = 25.4


def test_images_have_the_width_of_a_column_or_a_page_and_a_pdf_holds_its_fonts(tmp_path):
    chart = go.Figure(go.Bar(x=["a"], y=[1]), layout={"width": 820, "height": 300, "title": "A title"})
    attention = attention_figure([reading(), reading()], width="column")
    shown = {"bar.png": chart, "bar.svg": chart, "bar.pdf": chart, "attention.pdf": attention}
    try:
        save_images({tmp_path / name: figure for name, figure in shown.items()}, width="column")
    except CircuitsError as error:
        assert "needs Chrome or Chromium" in str(error)
        pytest.skip("no browser here")
    # `size_of` reads a drawing in pixels of 1/96 inch, and halves those of a .png, which has 300 to the inch
    for name, dots in {"bar.png": 150, "bar.svg": 96, "bar.pdf": 96, "attention.pdf": 96}.items():
        assert size_of(tmp_path / name)[0] / dots * INCH == pytest.approx(84, abs=0.3), name
    for name in ("bar.pdf", "attention.pdf"):
        content = (tmp_path / name).read_bytes()
        fonts = set(re.findall(rb"/BaseFont /([A-Z]{6}\+)?", content))
        assert content.count(b"/FontFile2") + content.count(b"/FontFile3") >= 1
        # a font that is there in part has six letters before its name
        assert b"" not in fonts


def test_print_is_laid_out_anew_with_text_of_five_points_and_the_figure_stays_as_it_was():
    figure = go.Figure(layout={"width": 820, "title": "word " * 30, "legend": {"font": {"size": 12}}})
    for name in "ab":
        figure.add_scatter(x=[0], y=[0], name=name)
    narrow, points = printed(figure, "column")
    assert narrow.layout.width * points / 72 * INCH == pytest.approx(84, abs=0.1)
    assert narrow.layout.legend.orientation == "h"
    assert narrow.layout.title.text.count("<br>") >= 2
    assert 10 * points >= 5
    assert (figure.layout.width, figure.layout.legend.orientation) == (820, None)
    wide, points = printed(figure, "page")
    assert wide.layout.width * points / 72 * INCH == pytest.approx(174, abs=0.1)


def test_what_cannot_be_read_in_a_column_is_refused():
    attention = attention_figure([reading(), reading()])
    with pytest.raises(CircuitsError, match=r"in 84 mm its text would be too small: save it with width='page', or dr"):
        printed(attention, "column")
    assert printed(attention, "page")[1] >= 0.5
    with pytest.raises(CircuitsError, match="a column has no room for the maps of two checkpoints"):
        attention_figure([reading()], against=[reading()], width="column")
    panels = make_subplots(cols=4, subplot_titles=["a title of a panel"] * 4)
    with pytest.raises(CircuitsError, match="no room in a column for 'a title of a panel': use width='page'"):
        printed(panels, "column")
    with pytest.raises(CircuitsError, match="no width 'poster': choose from column, page"):
        printed(panels, "poster")


def test_prompts_stand_below_each_other_in_a_column():
    narrow, wide = (attention_figure([reading(), reading()], width=width) for width in ("column", "page"))
    maps = [[trace for trace in figure.data if trace.type == "heatmap"] for figure in (narrow, wide)]
    domains = [
        [figure.layout[f"xaxis{trace.xaxis[1:]}"].domain for trace in traces]
        for figure, traces in zip((narrow, wide), maps, strict=True)
    ]
    assert domains[0][0] == domains[0][1]
    assert domains[1][0][1] < domains[1][1][0]
    assert narrow.layout.width == 476


def test_without_a_browser_the_page_is_written_all_the_same(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ChromeNotFoundError

    monkeypatch.setattr("plotly.io.write_images", fail)
    paths = [tmp_path / name for name in ("figure.pdf", "figure.html", "figure.png")]
    with pytest.raises(CircuitsError, match=r"figure\.pdf needs Chrome .* \(figure\.html is written\)"):
        save_figure(go.Figure(), paths)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.html"]
