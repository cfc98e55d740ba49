"""A page of the reference for each package, with every name of its `__all__`."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.typing import ExtensionMetadata

import circuits

FOLDER = "reference"
INTRODUCTION = """\
Reference
=========

Every public name, from its docstring. Most of what a notebook needs is in ``circuits`` itself:
"""


def write_pages(app: Sphinx) -> None:
    folder = Path(app.confdir) / FOLDER
    folder.mkdir(exist_ok=True)
    found = [importlib.import_module(one.name) for one in pkgutil.iter_modules(circuits.__path__, "circuits.")]
    # the command line is described by its own help, and most modules by the package that offers what they have
    packages = [one for one in found if _names(one)]
    pages = {"index.rst": _first_page(packages)} | {f"{_short(one)}.rst": _page(one) for one in packages}
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # what did not change is not built again
            path.write_text(text, encoding="utf-8")


def _first_page(packages: list[ModuleType]) -> str:
    home = {id(getattr(package, name)): package for package in packages for name in _names(package)}
    here = [(name, getattr(circuits, name)) for name in circuits.__all__]
    top = _table((_link(home.get(id(thing)), name), _sentence(thing)) for name, thing in here)
    rest = _table((f":doc:`{one.__name__} <{_short(one)}>`", _sentence(one)) for one in packages)
    contents = [".. toctree::", "   :hidden:", "", *[f"   {_short(package)}" for package in packages], ""]
    return "\n".join([INTRODUCTION, *top, "The rest is in its packages:", "", *rest, *contents])


def _page(package: ModuleType) -> str:
    title = package.__name__
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", "   :no-members:", ""]
    comments = _comments(package)
    said = {name: comments.get(name) or _sentence(getattr(package, name)) for name in _names(package)}
    lines += _table((_link(package, name), sentence) for name, sentence in said.items())
    for name in said:
        thing = getattr(package, name)
        if _kind(thing) == "data":
            lines += [f".. py:data:: {title}.{name}", f"   :value: {_short_value(thing)}", "", f"   {said[name]}", ""]
        else:
            lines += [f".. auto{_kind(thing)}:: {title}.{name}", ""]
    return "\n".join(lines)


def _names(module: ModuleType) -> list[str]:
    """A package says itself what it offers; a module beside the packages does if `circuits` offers some of it."""
    if hasattr(module, "__path__"):
        return list(getattr(module, "__all__", ()))
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")] if set(own) & set(circuits.__all__) else []


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = [".. list-table::", "   :widths: auto", ""]
    for left, right in rows:
        lines += [f"   * - {left}", f"     - {right}"]
    return [*lines, ""]


def _link(package: ModuleType | None, name: str) -> str:
    return f":py:obj:`{name} <{package.__name__}.{name}>`" if package else f"``{name}``"


def _kind(thing: object) -> str:
    if inspect.isclass(thing):
        return "exception" if issubclass(thing, Exception) else "class"
    return "function" if inspect.isroutine(thing) else "data"


def _short_value(thing: object) -> str:
    if isinstance(thing, dict):
        thing = [*thing]
    text = repr(thing)
    return text if len(text) < 400 and " at 0x" not in text else type(thing).__name__


def _short(package: ModuleType) -> str:
    return package.__name__.removeprefix("circuits.")


def _sentence(thing: object) -> str:
    """The first paragraph of a docstring; a constant has none of its own."""
    if not (inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing)):
        return ""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _comments(package: ModuleType) -> dict[str, str]:
    """Constant → the comment above it, in whichever module of the package it is."""
    names = [one.name for one in pkgutil.iter_modules(getattr(package, "__path__", ()), package.__name__ + ".")]
    found: dict[str, str] = {}
    for name in [package.__name__, *names]:
        documented = ModuleAnalyzer.for_module(name).find_attr_docs()
        found |= {where[1]: " ".join(lines).strip() for where, lines in documented.items() if where[0] == ""}
    return found


def find_at_home(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> nodes.Node | None:
    """`circuits.load_model` is described where it lives, in `circuits.models`."""
    name = node.get("reftarget", "").removeprefix("circuits.")
    if node.get("refdomain") != "py" or name not in circuits.__all__:
        return None
    package = ".".join(getattr(circuits, name).__module__.split(".")[:2])
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"{package}.{name}", node, shown)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", find_at_home)
    return {"version": "1", "parallel_read_safe": True}
