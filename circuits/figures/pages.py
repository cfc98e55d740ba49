"""Self-contained pages from templates: one look, light and dark, for every screen and for the keyboard."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from circuits.storage import atomic_file


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Fill a template of the folder ``templates``; text in ``values`` is escaped unless the template says otherwise.

    Args:
        path: the HTML file.
        template: its name.
        values: what the template names; one that it names and that is not given is an error of jinja2.
    """
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(_templates().get_template(template).render(values), encoding="utf-8")
