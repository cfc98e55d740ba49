"""Plotly figures from result tables; the attention study; pages of them."""

from circuits.figures.accuracy import accuracy_figure, curves_figure, rates_figure
from circuits.figures.attention import Rectangle, attention_figure, found_rectangles
from circuits.figures.consistency import (
    consistency_along_figure,
    consistency_figure,
    inside_figure,
    localisation_figure,
    signature_figure,
)
from circuits.figures.difference import difference_figure, write_difference
from circuits.figures.effects import effects_figure
from circuits.figures.gallery import write_gallery
from circuits.figures.heads import heads_figure
from circuits.figures.logits import direct_logits_figure, logit_lens_figure, positions_figure
from circuits.figures.masks import ablation_figure, graft_figure, sharing_figure
from circuits.figures.rankings import agreement_figure, ranking_curves_figure
from circuits.figures.report import Number, Section, write_report
from circuits.figures.saving import FORMATS, save_figure
from circuits.figures.style import LABELS

__all__ = [
    "FORMATS",
    "LABELS",
    "Number",
    "Rectangle",
    "Section",
    "ablation_figure",
    "accuracy_figure",
    "agreement_figure",
    "attention_figure",
    "consistency_along_figure",
    "consistency_figure",
    "curves_figure",
    "difference_figure",
    "direct_logits_figure",
    "effects_figure",
    "found_rectangles",
    "graft_figure",
    "heads_figure",
    "inside_figure",
    "localisation_figure",
    "logit_lens_figure",
    "positions_figure",
    "ranking_curves_figure",
    "rates_figure",
    "save_figure",
    "sharing_figure",
    "signature_figure",
    "write_difference",
    "write_gallery",
    "write_report",
]
