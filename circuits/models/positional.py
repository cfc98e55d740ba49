"""Two sets of weights in one forward pass: which of them a token passes through depends on its position.

1. The hookable model runs with its own weights. Other weights for some of its parameters are given.
2. In every layer that has others, the stream before the layer is kept. At the hook points of queries, keys and values
   the same arithmetic runs with the other weights on it, and each position takes one or the other.
3. So it is with what attention writes, given the heads' outputs, with the neurons, given the stream between attention
   and MLP, and with what the MLP writes, given the neurons.
4. So keys and values of a token come from its own weights, whoever attends to it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from circuits.errors import CircuitsError
from circuits.models.arithmetic import SITES, LeanModel
from circuits.models.checkpoint import checkpoint_of, lean_model, rows_of
from circuits.models.hookable import hook_name
from circuits.models.uninterrupted import uninterrupted

#: The hook points of a layer that are read or written, in the order in which they fire.
_SITES = tuple(site for site in SITES if site not in ("pattern", "resid_mid", "resid_post"))


def positional_parameters(model: nn.Module) -> list[str]:
    """The parameters that `positional_weights` can give two values: those of attention, MLP and a layer's norms."""
    return [row.name for row in rows_of(model).values() if row.layer is not None]


@uninterrupted
def positional_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    positions: Callable[[Int[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]],
) -> Iterator[None]:
    """Inside the block, tokens at some positions pass through other weights.

    Args:
        model: loaded with `circuits.load_model`.
        weights: some of the `positional_parameters` → what they are at those positions, in the parameter's shape.
        positions: which positions, given the tokens of a forward pass.

    Raises:
        CircuitsError: weights are given for another parameter, or the model was not run in the block.
    """
    for name in weights.keys() - set(positional_parameters(model)):
        raise CircuitsError(
            f"{name} cannot differ from position to position: only weights and biases of attention, MLP and a "
            "layer's norms can"
        )
    other = _other(model, weights)
    layers = sorted({row.layer for row in rows_of(model).values() if row.name in weights and row.layer is not None})
    hookable: Any = model
    chosen: list[Tensor] = []
    acting: list[Any] = []
    kept: dict[tuple[int, str], Tensor] = {}

    def choose(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else next(iter(kwargs.values()))
        chosen[:] = [positions(tokens)]
        with anew():
            pass

    @uninterrupted
    def anew() -> Iterator[None]:
        # for each pass: other functions in the model come after what is written and before what is read
        for handle in acting:
            handle.remove()
        points = hookable.hook_dict
        acting.clear()
        for layer in layers:
            for site in _SITES:
                point = points[hook_name(model, (layer, site))]
                if site not in ("resid_pre", "z"):
                    acting.append(point.register_forward_hook(write(layer, site), prepend=True))
                acting.append(point.register_forward_hook(keep(layer, site)))
        yield

    def keep(layer: int, site: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, activation: Tensor) -> None:
            kept[layer, site] = activation

        return hook

    def write(layer: int, site: str) -> Callable[..., Tensor]:
        def hook(_: Any, __: Any, activation: Tensor) -> Tensor:
            found = _computed(other, layer, site, kept).reshape(activation.shape)
            at = chosen[0].to(activation.device)
            return torch.where(at.view(*at.shape, *(1,) * (activation.dim() - 2)), found, activation)

        return hook

    handles: list[Any] = []
    try:
        handles.append(hookable.embed.register_forward_pre_hook(choose, with_kwargs=True))
        yield
    finally:
        for handle in [*handles, *acting]:
            handle.remove()
    if not chosen:
        raise CircuitsError("tokens were to pass through other weights, but the model was never run inside the block")


def _other(model: nn.Module, weights: Mapping[str, Tensor]) -> LeanModel:
    """The arithmetic with the other weights; tensors that have none are the model's own."""
    checkpoint, rows = checkpoint_of(model), rows_of(model)
    lean_model(model)  # refuses a model whose parameters were replaced
    tensors = {name: tensor.detach() for name, tensor in checkpoint.tensors.items()}
    for name in {rows[each].tensor for each in weights}:
        tensors[name] = tensors[name].clone()
    for name, value in weights.items():
        rows[name].stored(tensors[rows[name].tensor]).copy_(value)
    return LeanModel(tensors, checkpoint.rows, checkpoint.layout)


def _computed(other: LeanModel, layer: int, site: str, kept: Mapping[tuple[int, str], Tensor]) -> Tensor:
    """An activation of a layer as the other weights compute it from what was kept."""
    weights, stream = other.layers[layer], kept[layer, "resid_pre"]
    if site in ("q", "k", "v"):
        return weights.queries_keys_values(weights.attention_input(stream))["qkv".index(site)]
    if site == "attn_out":
        return weights.attention_out(kept[layer, "z"].flatten(2))
    if site == "post":
        middle = stream if other.parallel else stream + kept[layer, "attn_out"]
        return weights.hidden(weights.mlp_input(middle))
    return weights.mlp_out(kept[layer, "post"])
