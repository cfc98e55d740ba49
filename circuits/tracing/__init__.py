"""Gradient traces: at parameters and at hook points."""

from circuits.tracing.gradients import LOSSES, STATISTICS, GradientTrace, example_losses, trace_gradients

__all__ = ["LOSSES", "STATISTICS", "GradientTrace", "example_losses", "trace_gradients"]
