"""Gradient traces at parameters and at hook points: at a checkpoint, over several, and during training."""

from circuits.tracing.accumulation import STATISTICS
from circuits.tracing.during_training import TraceCallback
from circuits.tracing.gradients import (
    LOSSES,
    PER,
    GradientTrace,
    example_losses,
    loss_gradients,
    trace_checkpoints,
    trace_gradients,
)

__all__ = [
    "LOSSES",
    "PER",
    "STATISTICS",
    "GradientTrace",
    "TraceCallback",
    "example_losses",
    "loss_gradients",
    "trace_checkpoints",
    "trace_gradients",
]
