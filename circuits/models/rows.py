"""The table of a model family: which tensor of a checkpoint is which parameter, and whose it is.

1. Every parameter, under TransformerLens' name, is a rearrangement of a checkpoint tensor or of one part of a fused
   one: a view of it. One `Row` says which, as an einops pattern.
2. Where the checkpoint stores something else than what acts, the row says what acts: factor · stored + offset.
3. The row also says the kind of its gradient. The component it is counted by, and the units that own slices of it,
   follow from its name, which is the same in every family (`circuits.units`).
4. What families have in common is written once, below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from circuits.units import Head, KVGroup, Neuron, component_of, layer_of, layout_of

#: How the gradient of a tensor follows from what its module reads and writes.
Kind = Literal["weight", "bias", "scale", "embedding", "unembedding", "position"]

#: A kind of unit that parameters belong to.
Owner = type[Head] | type[KVGroup] | type[Neuron]


@dataclass(frozen=True)
class Row:
    """Where one parameter comes from, and what it is.

    Attributes:
        name: TransformerLens' name of the parameter; grouped keys and values are ``W_K`` and ``W_V`` too.
        tensor: its tensor's name in the checkpoint.
        pattern: einops pattern from the checkpoint's layout to TransformerLens'.
        kind: what its module does with it.
        sizes: einops axis sizes.
        part: which part of a fused tensor, counted along the first axis of the pattern's result.
        rows: the range of the tensor's first axis that is the parameter's, for parts of unequal size.
        inputs_first: the tensor of a weight is stored as ``[in, out]``.
        factor: what acts is factor · stored + offset.
        offset: see ``factor``.

    Example:
        >>> import torch
        >>> row = Row("blocks.3.mlp.W_in", "h.3.up", "n m -> m n", "weight")
        >>> row.layer, row.component, row.owner.__name__, row.axis, tuple(row.stored(torch.zeros(8, 2)).shape)
        (3, 'mlp', 'Neuron', 1, (2, 8))
    """

    name: str
    tensor: str
    pattern: str
    kind: Kind
    sizes: tuple[tuple[str, int], ...] = ()
    part: int | None = None
    rows: tuple[int, int] | None = None
    inputs_first: bool = False
    factor: float = 1.0
    offset: float = 0.0

    @property
    def layer(self) -> int | None:
        """The layer it lies in, or None for embeddings and the final norm."""
        return layer_of(self.name)

    @property
    def component(self) -> str:
        """What it is counted by: ``attention``, ``mlp``, ``norms`` or ``embeddings``."""
        return component_of(self.name)

    @property
    def owner(self) -> Owner | None:
        """The kind of unit that owns slices of it, if any."""
        return layout_of(self.name).unit

    @property
    def axis(self) -> int:
        """The axis of the parameter that counts these units."""
        return layout_of(self.name).axis

    @property
    def acts_as_stored(self) -> bool:
        """Whether what acts is what is stored."""
        return self.factor == 1.0 and self.offset == 0.0

    def stored(self, tensor: Tensor) -> Tensor:
        """The parameter as it is stored: a view of the checkpoint's tensor."""
        chosen = tensor if self.rows is None else tensor[slice(*self.rows)]
        result: Tensor = rearrange(chosen, self.pattern, **dict(self.sizes))
        return result if self.part is None else result[self.part]

    def acting(self, stored: Tensor) -> Tensor:
        """What acts, given what is stored, in whatever layout."""
        return stored if self.acts_as_stored else stored * self.factor + self.offset


def norm_rows(name: str, tensor: str, *, bias: bool = False, offset: float = 0.0) -> list[Row]:
    """The scale of a norm, and its bias if it has one."""
    rows = [Row(f"{name}.w", f"{tensor}.weight", "m -> m", "scale", offset=offset)]
    return [*rows, Row(f"{name}.b", f"{tensor}.bias", "m -> m", "bias")] if bias else rows


def embedding_rows(embedding: str, unembedding: str, *, tied: bool, factor: float = 1.0) -> list[Row]:
    """The embedding and the unembedding, which are one tensor if they are tied."""
    unembedding = embedding if tied else unembedding
    return [
        Row("embed.W_E", embedding, "v m -> v m", "embedding", factor=factor),
        Row("unembed.W_U", unembedding, "v m -> m v", "unembedding"),
    ]


def linear_rows(
    name: str,
    module: str,
    weight: str,
    bias: str | None,
    *,
    sizes: tuple[tuple[str, int], ...] = (),
    part: int | None = None,
    inputs_first: bool = False,
) -> list[Row]:
    """The weight of a projection, and its bias if a pattern for it is given."""
    rows = [Row(name, f"{module}.weight", weight, "weight", sizes=sizes, part=part, inputs_first=inputs_first)]
    if bias is not None:
        # only axes that the pattern has may be given sizes
        sizes = tuple(size for size in sizes if size[0] in bias)
        rows.append(Row(name.replace(".W_", ".b_"), f"{module}.bias", bias, "bias", sizes=sizes, part=part))
    return rows


def attention_rows(
    layer: int, modules: Mapping[str, str], *, heads: int, groups: int, bias: bool = False, output_bias: bool = False
) -> list[Row]:
    """Attention's projections, each a tensor ``[out, in]``; ``modules`` are those of some of Q, K, V and O."""
    rows = []
    for letter, module in modules.items():
        name, sizes = f"blocks.{layer}.attn.W_{letter}", (("head", groups if letter in "KV" else heads),)
        if letter == "O":
            vector = "m -> m" if output_bias else None
            rows += linear_rows(name, module, "m (head d) -> head d m", vector, sizes=sizes)
        else:
            vector = "(head d) -> head d" if bias else None
            rows += linear_rows(name, module, "(head d) m -> head m d", vector, sizes=sizes)
    return rows


def mlp_rows(layer: int, modules: Mapping[str, str], *, bias: bool = False, inputs_first: bool = False) -> list[Row]:
    """An MLP's projections; ``modules`` are those of ``in``, ``out`` and, if it is a gated one, ``gate``."""
    inward, outward = ("m n -> m n", "n m -> n m") if inputs_first else ("n m -> m n", "m n -> n m")
    rows = []
    for part, module in modules.items():
        weight, vector = outward if part == "out" else inward, "n -> n" if bias else None
        rows += linear_rows(f"blocks.{layer}.mlp.W_{part}", module, weight, vector, inputs_first=inputs_first)
    return rows


#: The norms of a layer as Llama has them: before attention and before the MLP.
PRE_NORMS: Mapping[str, str] = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}


def decoder_rows(
    config: Any,
    *,
    bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    norms: Mapping[str, str] = PRE_NORMS,
    norm_bias: bool = False,
    offset: float = 0.0,
    factor: float = 1.0,
) -> list[Row]:
    """The table of a model whose modules are named and laid out as Llama's.

    Args:
        config: the Hugging Face config.
        bias: whether queries, keys and values have biases.
        output_bias: whether attention's output has one.
        mlp_bias: whether the MLP has them.
        norms: TransformerLens' name of a layer's norm → its module.
        norm_bias: whether norms have biases.
        offset: of the norms' scales.
        factor: of the embedding.
    """
    tied = config.tie_word_embeddings
    embedding, unembedding = embedding_rows("model.embed_tokens.weight", "lm_head.weight", tied=tied, factor=factor)
    rows = [embedding]
    for layer in range(config.num_hidden_layers):
        module, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        rows += attention_rows(
            layer,
            {letter: f"{attention}{letter.lower()}_proj" for letter in "QKVO"},
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            bias=bias,
            output_bias=output_bias,
        )
        mlp = {"in": "up", "gate": "gate", "out": "down"}
        rows += mlp_rows(layer, {part: f"{module}mlp.{name}_proj" for part, name in mlp.items()}, bias=mlp_bias)
        for name, tensor in norms.items():
            rows += norm_rows(f"blocks.{layer}.{name}", f"{module}{tensor}", bias=norm_bias, offset=offset)
    return [*rows, *norm_rows("ln_final", "model.norm", bias=norm_bias, offset=offset), unembedding]
