"""Plotly figures from result tables; the attention study; the report page."""

from circuits.figures.attention import Rectangle, attention_figure, found_rectangles
from circuits.figures.charts import (
    LABELS,
    ablation_figure,
    accuracy_figure,
    curves_figure,
    graft_figure,
    heads_figure,
    sharing_figure,
)
from circuits.figures.claims import Finding, findings
from circuits.figures.difference import difference_figure
from circuits.figures.rankings import agreement_figure, ranking_curves_figure
from circuits.figures.report import Section, write_report
from circuits.figures.results_page import write_results_page
from circuits.figures.saving import FORMATS, save_figure
from circuits.figures.study_page import study_figures, write_seeds_report, write_study_report

__all__ = [
    "FORMATS",
    "LABELS",
    "Finding",
    "Rectangle",
    "Section",
    "ablation_figure",
    "accuracy_figure",
    "agreement_figure",
    "attention_figure",
    "curves_figure",
    "difference_figure",
    "findings",
    "found_rectangles",
    "graft_figure",
    "heads_figure",
    "ranking_curves_figure",
    "save_figure",
    "sharing_figure",
    "study_figures",
    "write_report",
    "write_results_page",
    "write_seeds_report",
    "write_study_report",
]
