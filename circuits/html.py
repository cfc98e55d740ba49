"""What results show of themselves in a notebook: small tables, and tokens coloured by their spans."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

#: Light enough for black letters.
_COLOURS = ("#cfe3f7", "#fbd9b5", "#d3edcf", "#f6cfd6", "#e2d6f2", "#f3ecb4")
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "↵"})
_LONGEST = 80


def html_table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table of text and numbers; nothing in it is read as HTML.

    Example:
        >>> html_table([("L2H1", 0.123456)])
        '<table><tbody><tr><td>L2H1</td><td>0.123</td></tr></tbody></table>'
    """
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def html_facts(facts: Mapping[str, Any]) -> str:
    """Facts on one line, without versions and what is nested deeper."""
    plain = {
        name: value
        for name, value in facts.items()
        if isinstance(value, str | int | float) and name not in ("library_version", "git_commit")
    }
    told = "; ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in plain.items())
    return f"<small>{escape(told)}</small>" if told else ""


def html_legend(spans: Sequence[str]) -> str:
    """The names of spans in their colours."""
    return " ".join(
        f'<span style="background:{_colour(place)};color:#000">{escape(name)}</span>'
        for place, name in enumerate(spans)
    )


def html_tokens(tokens: Sequence[tuple[str, Sequence[str]]], spans: Sequence[str]) -> str:
    """Tokens in the colour of their first span, underlined if they lie in several; white space is visible.

    Args:
        tokens: the text of each, and the spans that it lies in.
        spans: all of them, in the order of their colours.
    """
    parts = []
    for text, inside in tokens:
        style = "color:#000;" + (f"background:{_colour(list(spans).index(inside[0]))}" if inside else "background:#eee")
        style += ";text-decoration:underline" if len(inside) > 1 else ""
        named = f' title="{escape(", ".join(inside))}"' if inside else ""
        parts.append(f'<span style="{style}"{named}>{escape(text.translate(_VISIBLE))}</span>')
    return f"<div>{' '.join(parts)}</div>"


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
