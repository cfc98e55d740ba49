"""How sure a number is: intervals, paired tests, corrections for many comparisons, and how many answers would tell."""

from circuits.statistics.comparisons import Paired, answers_needed, corrected, paired, paired_p_values
from circuits.statistics.draws import beyond_draws, of_draws
from circuits.statistics.intervals import Groups, Kind, intervals, mean_interval

__all__ = [
    "Groups",
    "Kind",
    "Paired",
    "answers_needed",
    "beyond_draws",
    "corrected",
    "intervals",
    "mean_interval",
    "of_draws",
    "paired",
    "paired_p_values",
]
