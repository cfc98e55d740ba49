"""The mixed and two-stage recipes on `transformers.Trainer`."""

from circuits.training.configurations import CONFIGURATIONS, new_model
from circuits.training.recipes import RECIPES, Optimisation, Stage, stages
from circuits.training.train import Progress, train

__all__ = ["CONFIGURATIONS", "RECIPES", "Optimisation", "Progress", "Stage", "new_model", "stages", "train"]
