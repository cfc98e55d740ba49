"""Gradient traces at parameters and at hook points: at a checkpoint, over several, and during training."""

from circuits.tracing.accumulation import STATISTICS
from circuits.tracing.along_training import AlongTraining
from circuits.tracing.during_training import TraceCallback
from circuits.tracing.gradients import trace_checkpoints, trace_gradients
from circuits.tracing.losses import LOSSES, example_losses, loss_gradients
from circuits.tracing.settings import PER
from circuits.tracing.trace import GradientTrace

__all__ = [
    "LOSSES",
    "PER",
    "STATISTICS",
    "AlongTraining",
    "GradientTrace",
    "TraceCallback",
    "example_losses",
    "loss_gradients",
    "trace_checkpoints",
    "trace_gradients",
]
