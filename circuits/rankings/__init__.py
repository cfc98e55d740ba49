"""Which units matter: what heads attend to, and scores to rank and search them by."""

from circuits.rankings.attention import (
    BEHAVIOURS,
    HeadReading,
    attention_scores,
    behaviour_masks,
    induction_scores,
    prompt_length,
    read_head,
    token_texts,
)

__all__ = [
    "BEHAVIOURS",
    "HeadReading",
    "attention_scores",
    "behaviour_masks",
    "induction_scores",
    "prompt_length",
    "read_head",
    "token_texts",
]
