"""The mixed and two-stage recipes on `transformers.Trainer`."""

from circuits.training.configurations import CONFIGURATIONS, new_model
from circuits.training.curve import Progress
from circuits.training.parallel import Job, train_side_by_side
from circuits.training.recipes import PRETRAINED, RECIPES, Optimisation, Stage, stages
from circuits.training.train import train

__all__ = [
    "CONFIGURATIONS",
    "PRETRAINED",
    "RECIPES",
    "Job",
    "Optimisation",
    "Progress",
    "Stage",
    "new_model",
    "stages",
    "train",
    "train_side_by_side",
]
