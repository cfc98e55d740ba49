"""One model on its tasks, and two models compared: steps that resume, tables, figures and a page."""

from circuits.analysis.analysis import Analysis, Tables, analyse
from circuits.analysis.case import AnalysisSettings
from circuits.analysis.comparison import Comparison, compare
from circuits.analysis.differences import paired_differences
from circuits.analysis.steps import STEPS, check_steps
from circuits.analysis.summary import accuracies, top_table

__all__ = [
    "STEPS",
    "Analysis",
    "AnalysisSettings",
    "Comparison",
    "Tables",
    "accuracies",
    "analyse",
    "check_steps",
    "compare",
    "paired_differences",
    "top_table",
]
