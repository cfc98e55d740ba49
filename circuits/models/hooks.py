"""Hook points by name, and activations captured at them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models.loading import HookedTransformer
from circuits.models.uninterrupted import uninterrupted
from circuits.units import Head


class HookPoints:
    """The hook points of one layer, as TransformerLens names them.

    Example:
        >>> HookPoints(3).z
        'blocks.3.attn.hook_z'
    """

    def __init__(self, layer: int) -> None:
        block = f"blocks.{layer}."
        self.q = f"{block}attn.hook_q"
        self.k = f"{block}attn.hook_k"
        self.v = f"{block}attn.hook_v"
        self.pattern = f"{block}attn.hook_pattern"
        self.z = f"{block}attn.hook_z"
        self.attention_out = f"{block}hook_attn_out"
        self.pre = f"{block}mlp.hook_pre"
        self.pre_linear = f"{block}mlp.hook_pre_linear"
        self.post = f"{block}mlp.hook_post"
        self.mlp_out = f"{block}hook_mlp_out"


@uninterrupted
def hooked(model: HookedTransformer, functions: Mapping[str, Callable[[Tensor, Any], Tensor | None]]) -> Iterator[None]:
    """Inside the block, a function acts at each named hook point of every forward pass.

    Args:
        model: the hooked model.
        functions: hook point → function of the activation and the hook; what it returns takes the activation's place.
    """
    with model.hooks(fwd_hooks=list(functions.items())):
        yield


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

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation.detach()

    with hooked(model, dict.fromkeys(wanted, keep)):
        model(tokens.to(model.cfg.device), stop_at_layer=model.cfg.n_layers)
    return kept


@torch.no_grad()
def head_output(model: HookedTransformer, head: Head, z: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_model"]:
    """What one head adds to the residual stream, given its z: z W_O, without the layer's output bias."""
    output: Tensor = z @ model.blocks[head.layer].attn.W_O[head.index]
    return output
