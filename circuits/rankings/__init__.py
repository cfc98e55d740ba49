"""Which units matter: rankings and their curves; what heads attend to, and scores to search them by."""

from circuits.rankings.attention import (
    BEHAVIOURS,
    LATER,
    Behaviour,
    attention_scores,
    behaviours_of,
    induction_scores,
    prompt_length,
)
from circuits.rankings.averages import HeadAverage, average_head
from circuits.rankings.curve_summaries import curve_areas, curve_means, curve_summary
from circuits.rankings.curves import RESTS, critical_curve, default_counts, sufficient_curve
from circuits.rankings.gallery import (
    TOKEN_BEHAVIOURS,
    HeadPatterns,
    behaviour_scores,
    head_patterns,
    span_pairs,
)
from circuits.rankings.logits import direct_logits, logit_lens
from circuits.rankings.ranking import RANKINGS, Evidence, agreement, rank_units, rankings_of
from circuits.rankings.reading import HeadReading, read_head, token_texts

__all__ = [
    "BEHAVIOURS",
    "LATER",
    "RANKINGS",
    "RESTS",
    "TOKEN_BEHAVIOURS",
    "Behaviour",
    "Evidence",
    "HeadAverage",
    "HeadPatterns",
    "HeadReading",
    "agreement",
    "attention_scores",
    "average_head",
    "behaviour_scores",
    "behaviours_of",
    "critical_curve",
    "curve_areas",
    "curve_means",
    "curve_summary",
    "default_counts",
    "direct_logits",
    "head_patterns",
    "induction_scores",
    "logit_lens",
    "prompt_length",
    "rank_units",
    "rankings_of",
    "read_head",
    "span_pairs",
    "sufficient_curve",
    "token_texts",
]
