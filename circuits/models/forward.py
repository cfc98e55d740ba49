"""Running a hooked or a Hugging Face model: logits at the positions that matter."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuits.datasets import Task


def final_residual(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The stream that the unembedding reads: before the final norm for a hooked model, after it for Hugging Face's."""
    if isinstance(model, PreTrainedModel):
        hidden: Tensor = model.base_model(tokens.to(model.device), use_cache=False).last_hidden_state
        return hidden
    hooked: Any = model
    residual: Tensor = hooked(tokens.to(hooked.cfg.device), stop_at_layer=hooked.cfg.n_layers)
    return residual


def unembed(model: nn.Module, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
    """Logits from `final_residual`, at any selection of positions."""
    if isinstance(model, PreTrainedModel):
        logits: Tensor = model.get_output_embeddings()(residual)
        return logits
    hooked: Any = model
    flat = residual.reshape(1, -1, residual.shape[-1])
    rows: Tensor = hooked.unembed(hooked.ln_final(flat))
    return rows.reshape(*residual.shape[:-1], -1)


def answer_logits(model: nn.Module, task: Task) -> Float[Tensor, "answer_token d_vocab"]:
    """Logits that predict each answer token: read one position before it; only these positions are unembedded.

    The order is that of ``task.answer_mask.nonzero()``. Padding is moved to the right, so that no token sees it.
    """
    task = task.right_padded()
    where = task.answer_mask.nonzero()
    residual = final_residual(model, task.tokens)
    return unembed(model, residual[where[:, 0].to(residual.device), where[:, 1].to(residual.device) - 1])
