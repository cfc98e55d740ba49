"""How alike two tasks are inside a model: their gradients, their activations, and what an answer rests on."""

from circuits.consistency.during_training import ConsistencyCallback
from circuits.consistency.gradients import BY, gradient_consistency, gradient_consistency_along
from circuits.consistency.pairs import KINDS, GradientConsistency, mismatched_kind
from circuits.consistency.representation import linear_cka, representation_consistency
from circuits.consistency.signature import answer_shares, input_signature, signature_means

__all__ = [
    "BY",
    "KINDS",
    "ConsistencyCallback",
    "GradientConsistency",
    "answer_shares",
    "gradient_consistency",
    "gradient_consistency_along",
    "input_signature",
    "linear_cka",
    "mismatched_kind",
    "representation_consistency",
    "signature_means",
]
