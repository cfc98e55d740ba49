"""A page of all heads: their scores for every behaviour, and thumbnails of their patterns that open."""

import base64
import json
import math
from pathlib import Path

import numpy
from pandas import DataFrame

from circuits.errors import CircuitsError
from circuits.figures.pages import write_page
from circuits.figures.style import need
from circuits.rankings import HeadPatterns
from circuits.storage import check_ending


def write_gallery(
    table: DataFrame, patterns: HeadPatterns, path: str | Path, *, title: str = "Attention heads"
) -> None:
    """Write the scores of all heads as one self-contained page that sorts, filters, and opens each head's pattern.

    Args:
        table: from `circuits.rankings.behaviour_scores`.
        patterns: of the same model, from `circuits.rankings.head_patterns`; a pattern keeps 256 shades.
        path: the HTML file.
        title: of the page.

    Raises:
        CircuitsError: the table lacks a column or speaks of a head that has no pattern, or the file is no HTML file.
    """
    path = Path(path)
    check_ending(path, (".html",), "page")
    need(
        table,
        "unit",
        "layer",
        "index",
        "behaviour",
        "score",
        "uniform",
        "excess",
        "excess_low",
        "excess_high",
        "examples",
    )
    layers, heads = patterns.patterns.shape[:2]
    outside = table[(table["layer"] >= layers) | (table["index"] >= heads)]
    if len(outside):
        raise CircuitsError(f"{outside['unit'].iloc[0]} has no pattern: scores and patterns are of different models")
    rows = [
        {
            "unit": row.unit,
            "head": int(row.layer * heads + row.index),
            "behaviour": row.behaviour,
            "examples": int(row.examples),
            **{name: _number(getattr(row, name)) for name in ("score", "uniform", "excess")},
            "low": _number(row.excess_low),
            "high": _number(row.excess_high),
        }
        for row in table.itertuples()
    ]
    shades = (patterns.patterns.numpy() * 255).round().clip(0, 255).astype(numpy.uint8)
    data = {
        "rows": rows,
        "behaviours": list(table["behaviour"].unique()),
        "tokens": patterns.tokens,
        "prompt": patterns.title,
        "patterns": base64.b64encode(shades.tobytes()).decode(),
    }
    lead = (
        f"{layers * heads} heads. Attention is the mean over examples of what falls into a behaviour's cells; excess "
        f"is attention less what uniform attention would give. The patterns are those of {patterns.title}."
    )
    write_page(
        path,
        "gallery.html",
        title=title,
        lead=lead,
        footer="Intervals are over examples, and not corrected for the number of heads.",
        # a token may hold what would end the script
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 5)
