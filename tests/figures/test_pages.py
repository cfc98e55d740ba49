"""Pages in a browser: nothing from outside, no error, sorting, the keyboard, the dark, and a narrow screen."""

import shutil
from contextlib import contextmanager

import pandas
import pytest
import torch

from circuits.figures import Number, Section, attention_figure, save_figure, write_gallery, write_report
from circuits.rankings import HeadPatterns
from tests.figures.test_figures import reading
from tests.figures.test_gallery import scores

_TIMEOUT = 30_000  # milliseconds
_NARROW = 390
_REACHABLE = "button, a[href], select, input, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser here: neither chromium nor google-chrome")
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=_TIMEOUT) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    claims = pandas.DataFrame(
        {
            "Fig.": ["1a", "2a"],
            "claim": ["Mixed training recalls more of what was held out than two-stage training", "It shares more"],
            "control": ["as many random parameters outside them in each tensor", "shuffled"],
            "verdict": ["holds", "cannot be told: one run"],
        }
    )
    wide = pandas.DataFrame({f"a column with a long name {place}": ["12", "−3", "–", "100"] for place in range(12)})
    figure = attention_figure([reading()])
    sections = [Section("What holds", ["A text."], claims), Section("Wide", [], wide, figure, "A sentence.")]
    numbers = [Number(f"{place} %", "of the questions", "control: 3 %") for place in range(3)]
    write_report(
        folder / "report.html",
        "Is it so?",
        "It is.",
        sections=sections,
        footer="end",
        numbers=numbers,
        setting={"a": "b"},
    )
    patterns = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).tril()
    write_gallery(scores(), HeadPatterns("example 0", ["<s>", "Ada", "was"], {}, patterns), folder / "gallery.html")
    save_figure(figure, folder / "attention.html")
    return folder


@contextmanager
def opened(browser, path, width=1280):
    """A page, which must ask for nothing from outside and complain of nothing."""
    wrong = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
    try:
        page.set_default_timeout(_TIMEOUT)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: wrong.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
        )
        page.goto(path.as_uri(), timeout=_TIMEOUT)
        yield page
        assert wrong == []
    finally:
        page.close()


def reached(page):
    """How many controls there are, and how many of them the Tab key reaches; each must then be seen to have it."""
    count = page.evaluate(f'[...document.querySelectorAll("{_REACHABLE}")].filter(e => e.checkVisibility()).length')
    found = set()
    for _ in range(count + 3):
        page.keyboard.press("Tab")
        found.add(page.evaluate(f'[...document.querySelectorAll("{_REACHABLE}")].indexOf(document.activeElement)'))
    outline = page.evaluate("getComputedStyle(document.querySelector('#theme')).outlineStyle")
    page.focus("#theme")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != outline
    return count, len(found - {-1})


def test_the_report_sorts_and_holds_in_the_dark_on_a_phone_and_by_keyboard(browser, pages):
    with opened(browser, pages / "report.html") as page:
        column = "#wide tbody td:first-child"
        page.click("#wide thead th:first-child button")
        assert page.locator(column).all_inner_texts() == ["−3", "12", "100", "–"]
        page.click("#wide thead th:first-child button")
        assert page.locator(column).all_inner_texts() == ["100", "12", "−3", "–"]
        assert page.get_attribute("#wide thead th:first-child", "aria-sort") == "descending"
        assert page.locator("figcaption").inner_text() == "A sentence."
        count, found = reached(page)
        assert found == count
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != light
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
        page.set_viewport_size({"width": _NARROW, "height": 800})
        assert page.evaluate("document.scrollingElement.scrollWidth") <= _NARROW
        for verdict in page.locator(".verdict").all():
            box = verdict.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= _NARROW


def test_the_gallery_sorts_filters_and_opens_a_head(browser, pages):
    with opened(browser, pages / "gallery.html", _NARROW) as page:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= _NARROW
        units = "#rows td:nth-child(2)"
        assert page.locator(units).all_inner_texts()[0] == "L1H1"
        page.click("[data-column=unit]")
        assert page.locator(units).all_inner_texts() == ["L0H0", "L0H1", "L1H0", "L1H1"]
        page.fill("#unit", "L1")
        assert page.locator(units).all_inner_texts() == ["L1H0", "L1H1"]
        count, found = reached(page)
        assert found == count
        page.click("#rows button >> nth=0")
        assert page.locator("#map text.token").all_text_contents() == ["<s>", "Ada", "was"]
        page.keyboard.press("Escape")
        assert not page.is_visible("#open")


def test_the_attention_figure_has_the_prompts_tokens_on_its_axes(browser, pages):
    with opened(browser, pages / "attention.html") as page:
        page.wait_for_selector(".heatmaplayer image", state="attached")
        for axis in "xy":
            shown = page.locator(f".{axis}axislayer-above .{axis}tick text").all_text_contents()
            assert shown == reading().tokens
