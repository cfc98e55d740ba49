"""What figures of result tables share: names, colours, numbers, the width of a page, and what a table must have."""

import math
from typing import Literal

from pandas import DataFrame

from circuits.errors import CircuitsError

#: Names of what is compared.
LABELS = {
    "mixed": "mixed",
    "two_stage": "two-stage",
    "two_stage_gentle": "two-stage, small second rate",
    "stage_1": "after stage 1 (BIO only)",
    "bio": "BIO",
    "qa_id": "QA-ID",
    "qa_ood": "QA-OOD",
    "qa_id_unseen": "QA-ID, unseen wording",
    "qa_ood_unseen": "QA-OOD, unseen wording",
    "pre": "before training",
    "none": "whole model",
    "shared": "shared parameters ablated",
    "shared_thinned": "shared, thinned to match random",
    "random": "random parameters ablated",
    "change": "by |change|",
    "gradient_x_change": "by |gradient × change|",
}
#: Colours of what is compared.
COLOURS = {
    "mixed": "#1f77b4",
    "two_stage": "#bbbbbb",
    "two_stage_gentle": "#ff7f0e",
    "bio": "#7f7f7f",
    "qa_id": "#2ca02c",
    "qa_ood": "#9467bd",
    "none": "#1f77b4",
    "shared": "#d62728",
    "shared_thinned": "#f4a6a7",
    "random": "#c7c7c7",
}

#: Colours that people with any colour vision tell apart (Okabe & Ito 2008), without the blues of a pattern.
PALETTE = ("#d55e00", "#009e73", "#e69f00", "#cc79a7", "#7f3c8d", "#5b5b5b", "#8c6d31")
#: From no attention to all of it; and from below zero to above.
SEQUENTIAL, DIVERGING = "Blues", "RdBu"

#: Pixels between the margins of a report's page, which the widest figures fill.
PAGE = 1080

Width = Literal["column", "page"]
#: Millimetres of one column and of the whole page of a paper in two columns.
PRINTED: dict[str, float] = {"column": 84.0, "page": 174.0}


def printed_pixels(width: str) -> int:
    """Pixels of the layout of a figure that is printed so wide: a pixel is half a point there.

    Example:
        >>> printed_pixels("column"), printed_pixels("page")
        (476, 986)
    """
    return round(PRINTED[width] / 25.4 * 72 * 2)


def label(name: str) -> str:
    """The name of what is compared, for a reader; as it is if it has no other.

    Example:
        >>> label("qa_ood"), label("qa_ood from bio"), label("ioi, zero")
        ('QA-OOD', 'QA-OOD from BIO', 'ioi, zero')
    """
    if name in LABELS:
        return LABELS[name]
    for between in (", ", " from "):
        if between in name:
            return between.join(LABELS.get(part, part) for part in name.split(between))
    return name


def number(value: float, digits: int) -> str:
    """A number for a person to read, with a true minus sign; a dash where there is none.

    Example:
        >>> number(-1234.5, 1), number(-0.001, 2), number(math.nan, 2)
        ('−1,234.5', '0.00', '–')
    """
    if math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def need(table: DataFrame, *columns: str) -> None:
    """Refuse a table without rows, or without one of these columns.

    Raises:
        CircuitsError: it is such a table.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        raise CircuitsError(f"the table has no {missing[0] if missing else 'rows'}: it has {', '.join(table.columns)}")
