"""What each module of a model reads and writes in one pass: the raw material of per-example gradients.

A weight W that maps an input x to an output y = W x + b has, for one example, the gradient Σ over positions of
∂L/∂y ⊗ x, and b has Σ ∂L/∂y; a norm's scale has Σ ∂L/∂y ⊙ x̂, x̂ its normalised input; and the row of a token in the
embedding has the sum of ∂L/∂y where it stands. So a batch needs one forward and one backward pass over activations.

The pass runs on the Hugging Face model over the same tensors (`huggingface_view`), which does it in about half the
time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuits.models.architectures import ParameterSource
from circuits.models.uninterrupted import uninterrupted
from circuits.units import Head, Neuron

#: The parts of a model, and how the names of their parameters begin inside a block or outside the blocks.
_BEGINNINGS = {"attention": ("attn.",), "mlp": ("mlp.",), "embeddings": ("embed.", "unembed."), "norms": ("ln",)}
COMPONENTS: tuple[str, ...] = tuple(_BEGINNINGS)


def component_of(parameter: str) -> str:
    """Which part of the model a parameter belongs to: ``attention``, ``mlp``, ``embeddings`` or ``norms``.

    Example:
        >>> component_of("blocks.3.attn.b_O"), component_of("unembed.W_U"), component_of("ln_final.w")
        ('attention', 'embeddings', 'norms')
    """
    inside = parameter.split(".", 2)[2] if parameter.startswith("blocks.") else parameter
    return next(name for name, beginnings in _BEGINNINGS.items() if inside.startswith(beginnings))


@dataclass(frozen=True)
class Projection:
    """One tensor of a checkpoint, and how its gradient follows from what its module reads and writes.

    Attributes:
        tensor: its name in the checkpoint.
        module: the name of the module that applies it.
        kind: ``weight``, ``bias``, ``scale``, ``embedding`` or ``unembedding``.
    """

    tensor: str
    module: str
    kind: str


def projections_of(
    model: PreTrainedModel, sources: Sequence[ParameterSource], components: Collection[str]
) -> list[Projection]:
    """The tensors of some components, each once: a fused one is one tensor, and so are tied embeddings.

    Args:
        model: the Hugging Face model.
        sources: which tensor each parameter of the hooked model is.
        components: some of `COMPONENTS`.
    """
    found: dict[str, Projection] = {}
    for source in sources:
        if component_of(source.hooked) not in components:
            continue
        owner, _, leaf = source.checkpoint.rpartition(".")
        module = model.get_submodule(owner)
        kind = "scale"
        if leaf == "bias":
            kind = "bias"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif module is model.get_output_embeddings():
            kind = "unembedding"
        elif isinstance(module, nn.Linear):
            kind = "weight"
        if kind != "unembedding" or not model.config.tie_word_embeddings:
            found[source.checkpoint] = Projection(source.checkpoint, owner, kind)
    return list(found.values())


def unit_readers(sources: Sequence[ParameterSource]) -> dict[str, tuple[type[Head] | type[Neuron], int]]:
    """Module → the kind of unit whose activations it reads, and their layer: heads' z, and neurons' post."""
    found: dict[str, tuple[type[Head] | type[Neuron], int]] = {}
    for source in sources:
        for end, kind in ((".attn.W_O", Head), (".mlp.W_out", Neuron)):
            if source.hooked.endswith(end):
                found[source.checkpoint.rpartition(".")[0]] = (kind, int(source.hooked.split(".")[1]))
    return found


#: Called with a module's name, what it read, and a gradient: of what it wrote, or of what it read.
Receiver = Callable[[str, Tensor, Tensor], None]


@uninterrupted
def watching(
    model: PreTrainedModel, written: Collection[str], wrote: Receiver, readers: Collection[str], read: Receiver
) -> Iterator[list[Tensor]]:
    """Inside the block, a backward pass through a forward pass delivers each gradient as soon as it is known.

    Args:
        model: the Hugging Face model; it needs no gradients of its own.
        written: modules whose output's gradient is wanted. Norms count their normalised input as what they read.
        wrote: receives it.
        readers: modules whose input's gradient is wanted.
        read: receives it.

    Yields:
        Where the graph of the last forward pass starts: the embeddings of the tokens, after which nothing is
        differentiated.
    """
    start: list[Tensor] = []

    def watch(name: str, module: nn.Module) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            replaced = None
            if module is model.get_input_embeddings():
                start[:] = [output.detach().requires_grad_()]
                output = replaced = start[0]
            # a hook that held the input itself, not its values, would keep the graph alive after the pass
            values = args[0].detach()
            if name in written:
                output.register_hook(lambda gradient: wrote(name, _as_read(module, values), gradient))
            if name in readers:
                args[0].register_hook(lambda gradient: read(name, values, gradient))
            return replaced

        return hook

    names = {*written, *readers, *(name for name, m in model.named_modules() if m is model.get_input_embeddings())}
    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(watch(name, module)))
        yield start
    finally:
        for handle in handles:
            handle.remove()


def _as_read(module: nn.Module, values: Tensor) -> Float[Tensor, "*batch features"]:
    """What a module's weight is multiplied with: for a norm, the normalised input."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return values
    values = values.float()
    if isinstance(module, nn.LayerNorm):
        return torch.nn.functional.layer_norm(values, values.shape[-1:], eps=module.eps)
    epsilon: Any = module.variance_epsilon
    return torch.nn.functional.rms_norm(values, values.shape[-1:], eps=epsilon)
