"""What each weight of a layer reads and writes in one forward pass: the raw material of per-example gradients.

A weight W that maps an input x to an output y = x W + b has, for one example, the gradient Σ over positions of
x ⊗ ∂L/∂y, and b has Σ ∂L/∂y. So a batch needs one forward and one backward pass that stop at the activations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from circuits.models.hooks import HookPoints
from circuits.models.loading import HookedTransformer, parameters_of


@dataclass(frozen=True)
class Projection:
    """One parameter, and where its input and output are found.

    Attributes:
        parameter: its name.
        reads: name of the recorded input activation; None for a bias.
        writes: name of the recorded output activation.
        arrange: from the gradient as ``[inputs, outputs]`` (or ``[outputs]``) to the parameter's own layout.
    """

    parameter: str
    reads: str | None
    writes: str
    arrange: Callable[[Tensor], Tensor]


@dataclass
class Recording:
    """Activations of one forward pass by name, in the graph, so that they can be differentiated to.

    ``[example, pos, features]`` after `flat`.
    """

    activations: dict[str, Tensor] = field(default_factory=dict)

    def flat(self, name: str, values: Tensor | None = None) -> Tensor:
        """An activation (or its gradient) with heads joined: ``[example, pos, features]``."""
        tensor = self.activations[name] if values is None else values
        return tensor.flatten(2)


def unit_projections(model: HookedTransformer) -> list[Projection]:
    """The projections of all parameters that belong to heads and neurons."""
    present = parameters_of(model)
    rows: list[Projection] = []
    d_head = int(model.cfg.d_head)
    for layer in range(model.cfg.n_layers):
        hooks, block = HookPoints(layer), f"blocks.{layer}."
        attention_in, mlp_in = _inputs(layer)
        for letter, output in (("Q", hooks.q), ("K", hooks.k), ("V", hooks.v)):
            for under in ("", "_"):
                rows.append(
                    Projection(
                        f"{block}attn.{under}W_{letter}",
                        attention_in,
                        output,
                        lambda grad: rearrange(grad, "m (head d) -> head m d", d=d_head),
                    )
                )
                rows.append(
                    Projection(
                        f"{block}attn.{under}b_{letter}",
                        None,
                        output,
                        lambda grad: rearrange(grad, "(head d) -> head d", d=d_head),
                    )
                )
        rows.append(
            Projection(
                f"{block}attn.W_O",
                hooks.z,
                hooks.attention_out,
                lambda grad: rearrange(grad, "(head d) m -> head d m", d=d_head),
            )
        )
        into = hooks.pre_linear if model.cfg.gated_mlp else hooks.pre
        rows.append(Projection(f"{block}mlp.W_in", mlp_in, into, _as_is))
        rows.append(Projection(f"{block}mlp.W_gate", mlp_in, hooks.pre, _as_is))
        rows.append(Projection(f"{block}mlp.b_in", None, into, _as_is))
        rows.append(Projection(f"{block}mlp.W_out", hooks.post, hooks.mlp_out, _as_is))
    return [row for row in rows if row.parameter in present]


def _as_is(grad: Tensor) -> Tensor:
    return grad


def _inputs(layer: int) -> tuple[str, str]:
    return f"blocks.{layer}.attn.input", f"blocks.{layer}.mlp.input"


@contextmanager
def recording(model: HookedTransformer) -> Iterator[Recording]:
    """Record, in the graph, every activation that `unit_projections` names, during a forward pass in the block."""
    record = Recording()
    names = {row.writes for row in unit_projections(model)}
    names |= {name for layer in range(model.cfg.n_layers) for name in (HookPoints(layer).z, HookPoints(layer).post)}

    def keep(activation: Tensor, hook: Any) -> None:
        record.activations[hook.name] = activation

    def start_graph(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return activation.detach().requires_grad_()

    handles = []
    for layer, block in enumerate(model.blocks):
        attention_in, mlp_in = _inputs(layer)

        def keep_attention(_: Any, args: Any, kwargs: Any, name: str = attention_in) -> None:
            record.activations[name] = kwargs["query_input"] if "query_input" in kwargs else args[0]

        def keep_mlp(_: Any, args: Any, name: str = mlp_in) -> None:
            record.activations[name] = args[0]

        handles.append(block.attn.register_forward_pre_hook(keep_attention, with_kwargs=True))
        handles.append(block.mlp.register_forward_pre_hook(keep_mlp))
    try:
        with model.hooks(fwd_hooks=[("hook_embed", start_graph), *((name, keep) for name in sorted(names))]):
            yield record
    finally:
        for handle in handles:
            handle.remove()
