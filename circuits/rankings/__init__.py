"""Which units matter: rankings and their curves; what heads attend to, and scores to search them by."""

from circuits.rankings.attention import (
    BEHAVIOURS,
    LATER,
    Behaviour,
    HeadReading,
    attention_scores,
    behaviours_of,
    induction_scores,
    prompt_length,
    read_head,
    token_texts,
)
from circuits.rankings.curve_summaries import curve_areas, curve_means, curve_summary
from circuits.rankings.curves import RESTS, critical_curve, default_counts, sufficient_curve
from circuits.rankings.ranking import RANKINGS, Evidence, agreement, rank_units, rankings_of

__all__ = [
    "BEHAVIOURS",
    "LATER",
    "RANKINGS",
    "RESTS",
    "Behaviour",
    "Evidence",
    "HeadReading",
    "agreement",
    "attention_scores",
    "behaviours_of",
    "critical_curve",
    "curve_areas",
    "curve_means",
    "curve_summary",
    "default_counts",
    "induction_scores",
    "prompt_length",
    "rank_units",
    "rankings_of",
    "read_head",
    "sufficient_curve",
    "token_texts",
]
