"""The paper's study end to end."""

from circuits.study.steps import FAMILIES, PRETRAINED_STUDY, StudySettings, report_study, run_studies, run_study

__all__ = ["FAMILIES", "PRETRAINED_STUDY", "StudySettings", "report_study", "run_studies", "run_study"]
