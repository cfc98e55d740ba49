"""Running models: hook points by name, captured activations, and logits at the positions that matter."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from circuits.models.loading import HookedTransformer

if TYPE_CHECKING:
    from circuits.datasets import Task


class HookPoints:
    """The hook points of one layer, as TransformerLens names them.

    Example:
        >>> HookPoints(3).z
        'blocks.3.attn.hook_z'
    """

    def __init__(self, layer: int) -> None:
        block = f"blocks.{layer}."
        self.attention_input = f"{block}ln1.hook_normalized"
        self.q = f"{block}attn.hook_q"
        self.k = f"{block}attn.hook_k"
        self.v = f"{block}attn.hook_v"
        self.pattern = f"{block}attn.hook_pattern"
        self.z = f"{block}attn.hook_z"
        self.attention_out = f"{block}hook_attn_out"
        self.mlp_input = f"{block}ln2.hook_normalized"
        self.pre = f"{block}mlp.hook_pre"
        self.pre_linear = f"{block}mlp.hook_pre_linear"
        self.post = f"{block}mlp.hook_post"
        self.mlp_out = f"{block}hook_mlp_out"
        self.resid_pre = f"{block}hook_resid_pre"
        self.resid_post = f"{block}hook_resid_post"


@torch.no_grad()
def capture(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], names: Iterable[str]
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Run the model's layers and keep the activations at the named hook points.

    Raises:
        KeyError: a name is no hook point of the model.
    """
    kept: dict[str, Tensor] = {}
    wanted = list(names)
    for name in wanted:
        if name not in model.hook_dict:
            raise KeyError(f"the model has no hook point {name}")

    def keep(activation: Tensor, hook: object) -> None:
        kept[hook.name] = activation.detach()  # type: ignore[attr-defined]

    with model.hooks(fwd_hooks=[(name, keep) for name in wanted]):
        model(tokens.to(model.cfg.device), stop_at_layer=model.cfg.n_layers)
    return kept


def final_residual(
    model: HookedTransformer | PreTrainedModel, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The stream that the unembedding reads: before the final norm for a hooked model, after it for Hugging Face's."""
    if isinstance(model, PreTrainedModel):
        hidden: Tensor = model.base_model(tokens.to(model.device), use_cache=False).last_hidden_state
        return hidden
    residual: Tensor = model(tokens.to(model.cfg.device), stop_at_layer=model.cfg.n_layers)
    return residual


def unembed(
    model: HookedTransformer | PreTrainedModel, residual: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... d_vocab"]:
    """Logits from `final_residual`, at any selection of positions."""
    if isinstance(model, PreTrainedModel):
        logits: Tensor = model.get_output_embeddings()(residual)
        return logits
    flat = residual.reshape(1, -1, residual.shape[-1])
    hooked: Tensor = model.unembed(model.ln_final(flat))
    return hooked.reshape(*residual.shape[:-1], -1)


def answer_logits(model: HookedTransformer | PreTrainedModel, task: "Task") -> Float[Tensor, "answer_token d_vocab"]:
    """Logits that predict each answer token: read one position before it; only these positions are unembedded.

    The order is that of ``task.answer_mask.nonzero()``. Padding stands on the right, so that no token sees it.
    """
    where = task.answer_mask.nonzero()
    residual = final_residual(model, task.tokens)
    return unembed(model, residual[where[:, 0].to(residual.device), where[:, 1].to(residual.device) - 1])
