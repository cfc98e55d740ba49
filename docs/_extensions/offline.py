"""A site that needs no network: formulas as MathML, and a build that fails if a page would load from outside."""

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

#: What a browser fetches by itself, unlike a link that a reader follows.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*"""
    r"""|<link\b[^>]*\bhref=["'](?:https?:)?//[^"']*|<object\b[^>]*\bdata=["'](?:https?:)?//[^"']*"""
)
_LOADED_BY_STYLE = re.compile(r"""(?:@import|url\()\s*(?:url\()?["']?(?:https?:)?//[^"')]*""")


def inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None:
        return
    outside = []
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            found = _LOADED.findall(text) + (_LOADED_BY_STYLE.findall(text) if path.suffix == ".css" else [])
            outside += [f"{path.relative_to(app.outdir)}: {one}" for one in found]
    if outside:
        raise ExtensionError("the site would load from outside:\n" + "\n".join(outside))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(display, None))
    app.config.html_math_renderer = "mathml"
    app.connect("build-finished", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
