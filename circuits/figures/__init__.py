"""Plotly figures from result tables; the attention study; the report page."""

from circuits.figures.attention import Rectangle, attention_figure, found_rectangles
from circuits.figures.charts import LABELS, ablation_figure, accuracy_figure, curves_figure, heads_figure
from circuits.figures.report import Section, write_report
from circuits.figures.saving import FORMATS, save_figure
from circuits.figures.study_page import study_figures, write_study_report

__all__ = [
    "FORMATS",
    "LABELS",
    "Rectangle",
    "Section",
    "ablation_figure",
    "accuracy_figure",
    "attention_figure",
    "curves_figure",
    "found_rectangles",
    "heads_figure",
    "save_figure",
    "study_figures",
    "write_report",
    "write_study_report",
]
