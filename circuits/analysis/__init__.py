"""One model on its tasks, and two models compared: steps that resume, tables, figures and a page."""

from circuits.analysis.analysis import Analysis, analyse
from circuits.analysis.case import AnalysisSettings
from circuits.analysis.steps import STEPS

__all__ = ["STEPS", "Analysis", "AnalysisSettings", "analyse"]
