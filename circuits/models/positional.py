"""Two sets of weights in one forward pass: which of them a token passes through depends on its position.

1. Every projection of a layer reads an input x and writes y = x W + b: query, key, value, attention output, and the two
   or three of the MLP. Other weights W' and b' for some of them are given.
2. The forward pass runs with the model's own weights. Where a projection has others, its input is kept, y' = x W' + b'
   is computed beside y, and each position takes one or the other.
3. So keys and values of a token come from its own weights, whoever attends to it, and no copy of the model is made.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, einsum, where

from circuits.errors import CircuitsError
from circuits.models.hooks import HookPoints
from circuits.models.loading import HookedTransformer, parameters_of
from circuits.models.uninterrupted import uninterrupted


@dataclass(frozen=True)
class _Projection:
    reads: str
    writes: str
    weight: str
    bias: str
    pattern: str


def _projections(model: HookedTransformer) -> list[_Projection]:
    rows = []
    under = "_" if model.cfg.n_key_value_heads else ""
    for layer in range(model.cfg.n_layers):
        hooks, block = HookPoints(layer), f"blocks.{layer}."
        attention, mlp = f"{block}attn", f"{block}mlp"
        for letter, writes, grouped in (("Q", hooks.q, ""), ("K", hooks.k, under), ("V", hooks.v, under)):
            weight, bias = f"{attention}.{grouped}W_{letter}", f"{attention}.{grouped}b_{letter}"
            rows.append(_Projection(attention, writes, weight, bias, "b p m, h m d -> b p h d"))
        output = "b p h d, h d m -> b p m"
        rows.append(_Projection(hooks.z, hooks.attention_out, f"{attention}.W_O", f"{attention}.b_O", output))
        if model.cfg.gated_mlp:
            # their biases are TransformerLens' own
            rows.append(_Projection(mlp, hooks.pre, f"{mlp}.W_gate", "", "b p m, m n -> b p n"))
            rows.append(_Projection(mlp, hooks.pre_linear, f"{mlp}.W_in", "", "b p m, m n -> b p n"))
        else:
            rows.append(_Projection(mlp, hooks.pre, f"{mlp}.W_in", f"{mlp}.b_in", "b p m, m n -> b p n"))
        rows.append(_Projection(hooks.post, hooks.mlp_out, f"{mlp}.W_out", f"{mlp}.b_out", "b p n, n m -> b p m"))
    return rows


def positional_parameters(model: HookedTransformer) -> list[str]:
    """The parameters that `positional_weights` can give two values: weights and biases of attention and MLP."""
    present = parameters_of(model)
    return [name for row in _projections(model) for name in (row.weight, row.bias) if name in present]


@uninterrupted
def positional_weights(
    model: HookedTransformer,
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
            f"{name} cannot differ from position to position: only weights and biases of attention and MLP can"
        )
    rows = [row for row in _projections(model) if row.weight in weights or row.bias in weights]
    own = dict(model.named_parameters())
    inputs: dict[str, Tensor] = {}
    chosen: list[Tensor] = []

    def choose(_: Any, args: tuple[Tensor, ...]) -> None:
        chosen[:] = [positions(args[0])]
        with hooked_anew():
            pass

    @uninterrupted
    def hooked_anew() -> Iterator[None]:
        # for each pass: other functions in the model come after what is written and before what is read
        for handle in acting:
            handle.remove()
        points = model.hook_dict
        acting[:] = [points[row.writes].register_forward_hook(mix(row), prepend=True) for row in rows]
        acting.extend(points[name].register_forward_hook(keep(name)) for name in reads if name in points)
        yield

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, activation: Tensor) -> None:
            inputs[name] = activation

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            inputs[name] = args[0] if args else kwargs["query_input"]

        return hook

    def mix(row: _Projection) -> Callable[[Any, Any, Tensor], Tensor]:
        weight, bias = (weights.get(name, own.get(name)) for name in (row.weight, row.bias))

        def write(_: Any, __: Any, output: Tensor) -> Tensor:
            other = einsum(row.pattern, inputs[row.reads], weight)
            other = other if bias is None else other + bias
            at = chosen[0].to(output.device)
            return where(at.view(*at.shape, *(1,) * (output.dim() - 2)), other, output)

        return write

    acting: list[Any] = []
    reads = {row.reads for row in rows}
    handles: list[Any] = []
    modules = dict(model.named_modules())
    try:
        handles.append(model.embed.register_forward_pre_hook(choose))
        for name in reads:
            if name not in model.hook_dict:
                handles.append(modules[name].register_forward_pre_hook(keep_input(name), with_kwargs=True))
        yield
    finally:
        for handle in [*handles, *acting]:
            handle.remove()
    if not chosen:
        raise CircuitsError("tokens were to pass through other weights, but the model was never run inside the block")
