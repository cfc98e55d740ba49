"""What the documentation site adds to its tools: `docs/_extensions`. The site itself is checked by building it."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import circuits
from tests.test_public_names import PACKAGES

pytest.importorskip("sphinx", reason="the site's tools are not installed")


@pytest.fixture(scope="module", autouse=True)
def extensions():
    folder = str(Path(__file__).parents[1] / "docs" / "_extensions")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_every_public_name_has_a_place_in_the_reference(tmp_path):
    from reference_pages import write_pages

    stale = tmp_path / "reference" / "gone.rst"
    stale.parent.mkdir()
    stale.touch()
    write_pages(SimpleNamespace(confdir=tmp_path))
    assert not stale.exists()
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "reference").glob("*.rst")}
    for package in [name for name in PACKAGES if name.count(".") == 1]:
        for name in getattr(importlib.import_module(package), "__all__", ()):
            assert f":: {package}.{name}\n" in pages[package.split(".")[1]], name
    first = pages.pop("index")
    described = "".join(pages.values())
    for name in circuits.__all__:
        (line,) = [line for line in first.splitlines() if line.startswith(f"   * - :py:obj:`{name} <")]
        assert f":: {line.split('<')[1].removesuffix('>`')}\n" in described, name
    assert "   The fractions k that a sharing curve goes through" in pages["masks"]


def test_a_page_that_would_load_from_outside_is_found(tmp_path):
    from offline import check
    from sphinx.errors import ExtensionError

    app = SimpleNamespace(outdir=tmp_path)
    page, style = tmp_path / "page.html", tmp_path / "page.css"
    page.write_text('<a href="https://example.org">there</a> <img src="figure.png"> <link href="page.css">')
    style.write_text('a { background: url("data:image/png;base64,aa") }')
    check(app, None)
    for path, text, found in [
        (page, '<script async src="https://example.org/a.js">', "example.org/a.js"),
        (page, "<img alt='' src='//example.org/a.png'>", "example.org/a.png"),
        (page, '<link rel="stylesheet" href="http://example.org/a.css">', "example.org/a.css"),
        (style, "@import url('https://example.org/font')", "example.org/font"),
        (style, "a { background: url(https://example.org/a.png) }", "example.org/a.png"),
    ]:
        kept = path.read_text()
        path.write_text(text)
        with pytest.raises(ExtensionError, match=found):
            check(app, None)
        path.write_text(kept)
