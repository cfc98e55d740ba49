"""How alike two tasks are inside a model: what activations have in common, and what an answer rests on."""

from circuits.consistency.representation import linear_cka, representation_consistency
from circuits.consistency.signature import input_signature, signature_means

__all__ = [
    "input_signature",
    "linear_cka",
    "representation_consistency",
    "signature_means",
]
