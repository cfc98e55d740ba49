"""What a layer is made of: the part of a model family that is not weights.

A `Layout` holds sizes, norms, positions, windows, scales and caps. Rotary angles come from the Hugging Face model's own
module, so that every scaling it knows (linear, llama3, yarn, dynamic, longrope) is the same here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary positions of some layers.

    Attributes:
        module: the rotary embedding class of the Hugging Face model.
        config: the Hugging Face config.
        layer_type: which of its rotary embeddings, where layers have several.
    """

    module: Callable[[Any], Any] = field(repr=False)
    config: Any = field(repr=False)
    layer_type: str | None = None
    _tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def by_length(self) -> bool:
        """Whether the angles of a position depend on the length of the longest prompt."""
        settings = self.config.rope_parameters
        settings = settings if self.layer_type is None else settings[self.layer_type]
        return any(kind in settings["rope_type"] for kind in ("dynamic", "longrope"))

    def table(self, length: int) -> tuple[Float[Tensor, "pos rotary"], Float[Tensor, "pos rotary"]]:
        """Cosines and sines of the first positions; the sines' first half is negative, as `LeanModel.rotate` wants it.

        Args:
            length: how many positions; of the longest prompt, if the angles depend on it.
        """
        kept = length if self.by_length else max([length, *self._tables])
        if kept not in self._tables:
            self._tables.clear()
            chosen = () if self.layer_type is None else (self.layer_type,)
            # a new module each time: the dynamic ones remember the longest prompt they have seen
            cos, sin = self.module(self.config)(torch.zeros(1), torch.arange(kept)[None], *chosen)
            sign = torch.ones(sin.shape[-1])
            sign[: len(sign) // 2] = -1
            self._tables[kept] = (cos[0].float(), sin[0].float() * sign)
        cos, sin = self._tables[kept]
        return cos[:length], sin[:length]


@dataclass(frozen=True)
class Layout:
    """What a model's layers are made of.

    Attributes:
        n_layers: number of layers.
        d_model: width of the residual stream.
        n_heads: query heads in a layer.
        n_groups: key/value groups in a layer; equals ``n_heads`` where heads are not grouped.
        d_head: width of a head.
        d_mlp: neurons in a layer.
        d_vocab: number of tokens.
        n_ctx: positions the model was made for.
        norm: ``RMS`` or ``LN``.
        eps: of every norm.
        activation: of the MLP, by its name in transformers.
        rotary: rotary positions of each layer, if it has them.
        windows: for each layer how many tokens a token sees, itself included, or None for all.
        score_scales: for each layer, what attention scores are multiplied with.
        gated: whether the MLP has a gate.
        parallel: whether attention and MLP read the same stream, each through a norm of its own.
        pre_norms: whether attention and MLP read a normalised stream.
        post_norms: whether what they write is normalised.
        head_norms: whether queries and keys are normalised before rotation: each ``head`` by itself, with one scale for
            all heads, or ``all`` together.
        learned_positions: whether positions are embedded.
        score_cap: attention scores are cap · tanh(score / cap).
        logit_cap: the same for logits.
        tied: whether embedding and unembedding are one tensor.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_groups: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: Literal["RMS", "LN"]
    eps: float
    activation: str
    rotary: Sequence[Rotary | None] = field(repr=False)
    windows: Sequence[int | None]
    score_scales: Sequence[float]
    gated: bool = True
    parallel: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    head_norms: Literal["head", "all"] | None = None
    learned_positions: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    tied: bool = False


def head_width(config: Any) -> int:
    """The width of a head: the config's ``head_dim``, or what follows from the other sizes."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def decoder_layout(config: Any, rotary_class: Callable[[Any], Any], **others: Any) -> Layout:
    """The layout of a model whose config names things as Llama's does.

    Args:
        config: the Hugging Face config.
        rotary_class: the rotary embedding class of the Hugging Face model.
        **others: what is different, or what a `Layout` has besides.
    """
    count = config.num_hidden_layers
    usual: dict[str, Any] = {
        "n_layers": count,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_groups": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "d_head": head_width(config),
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "norm": "RMS",
        "rotary": [Rotary(rotary_class, config)] * count,
        "windows": [None] * count,
        "score_scales": [head_width(config) ** -0.5] * count,
        "tied": config.tie_word_embeddings,
    }
    if "eps" not in others:
        usual["eps"] = config.rms_norm_eps
    if "activation" not in others:
        usual["activation"] = config.hidden_act
    return Layout(**(usual | others))


def windows_by_type(config: Any) -> list[int | None]:
    """The window of each layer, given the config's ``layer_types``.

    Raises:
        CircuitsError: there is another type of layer than full and sliding attention.
    """
    for kind in set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise CircuitsError(
            f"config.json has layers of the type {kind!r}: full_attention and sliding_attention are supported"
        )
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
