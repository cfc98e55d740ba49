"""The layers of a hooked model without the hooks: the arithmetic alone, on tokens in any arrangement.

`HookedTransformer` computes every head's pattern, keeps hook points and copies W_O for each layer it runs. Here a layer
is what its checkpoint stores: a few matrix products on ``[..., d_model]``, whatever the leading axes mean; only
attention needs to know which tokens see which, and the caller says so. The weights are views of the model's parameters
where their layout allows it. The same numbers as the hooked model up to rounding (there is a test for each family).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.models.forward import refuse_hooks
from circuits.models.loading import HookedTransformer, checkpoint_of


@dataclass(frozen=True)
class Linear:
    """A weight as ``[out, in]`` and its bias."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The product."""
        return functional.linear(x, self.weight, self.bias)

    def part(self, rows: slice) -> "Linear":
        """The weight that computes only some of the outputs."""
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm if it has a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The normalised stream."""
        if self.bias is None:
            if x.device.type == "cpu" and x.dtype == torch.float32:
                # torch's own takes twice as long here
                length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
                scale: Tensor = (length.square() / x.shape[-1] + self.eps).rsqrt()
                return (x * scale).mul_(self.weight)
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class LeanLayer:
    """The weights of one layer, and its activation function; ``gate`` is None in a plain MLP."""

    norm1: Norm
    norm2: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear | None
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def hidden(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... neuron"]:
        """The neurons' activations (``hook_post``), given the normalised stream."""
        return self.neurons(x, slice(None))

    def neurons(self, x: Float[Tensor, "... d_model"], which: slice) -> Float[Tensor, "... chosen"]:
        """Like `hidden`, for some of the neurons."""
        up = self.up.part(which)(x)
        if self.gate is None:
            return self.activation(up)
        return self.activation(self.gate.part(which)(x)).mul_(up)


class LeanModel:
    """The weights of a hooked model, to be run layer by layer.

    Args:
        model: loaded with `circuits.load_model`.
        dtype: of the arithmetic; the model's own if not given. Other than the model's own, the weights are copied.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`, or functions are hooked into it, which would
            not be run.
    """

    def __init__(self, model: HookedTransformer, dtype: torch.dtype | None = None) -> None:
        checkpoint_of(model)
        refuse_hooks(model)
        cfg: Any = model.cfg
        self.dtype: torch.dtype = dtype or cfg.dtype
        self.device = torch.device(cfg.device)
        self.n_layers, self.n_heads, self.d_head = int(cfg.n_layers), int(cfg.n_heads), int(cfg.d_head)
        self.d_model, self.d_vocab = int(cfg.d_model), int(cfg.d_vocab)
        self.n_groups = int(cfg.n_key_value_heads or cfg.n_heads)
        self.parallel = bool(cfg.parallel_attn_mlp)
        self._rotary_dim = int(cfg.rotary_dim)
        self._attention: Any = model.blocks[0].attn
        self._embedding = model.embed.W_E.detach()
        self._unembedding = Linear(self._to(model.unembed.W_U.T), self._bias(model.unembed.b_U))
        self._cos_sin = (torch.zeros(0), torch.zeros(0))
        self.final_norm = self._norm(model.ln_final, cfg.eps)
        self.layers = [self._layer(block, cfg) for block in model.blocks]

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype)

    def _norm(self, norm: Any, eps: float) -> Norm:
        bias = getattr(norm, "b", None)
        return Norm(self._to(norm.w), None if bias is None else self._to(bias), eps)

    def _projection(self, weight: Tensor, bias: Tensor) -> Linear:
        return Linear(self._to(rearrange(weight, "head m d -> (head d) m")), self._bias(bias.flatten()))

    def _bias(self, bias: Tensor) -> Tensor | None:
        # a bias that TransformerLens invents is zero
        return self._to(bias) if bool(bias.any()) else None

    def _layer(self, block: Any, cfg: Any) -> LeanLayer:
        attention, mlp = block.attn, block.mlp
        under = "_" if self.n_groups != self.n_heads else ""
        return LeanLayer(
            norm1=self._norm(block.ln1, cfg.eps),
            norm2=self._norm(block.ln2, cfg.eps),
            q=self._projection(attention.W_Q, attention.b_Q),
            k=self._projection(getattr(attention, f"{under}W_K"), getattr(attention, f"{under}b_K")),
            v=self._projection(getattr(attention, f"{under}W_V"), getattr(attention, f"{under}b_V")),
            o=Linear(self._to(rearrange(attention.W_O, "head d m -> m (head d)")), self._bias(attention.b_O)),
            gate=Linear(self._to(mlp.W_gate.T), None) if cfg.gated_mlp else None,
            up=Linear(self._to(mlp.W_in.T), self._bias(mlp.b_in)),
            down=Linear(self._to(mlp.W_out.T), self._bias(mlp.b_out)),
            activation=mlp.act_fn,
        )

    def embed(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """The stream before the first layer."""
        return self._to(self._embedding[tokens.to(self.device)])

    def rotary(self, positions: Int[Tensor, " token"]) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token d"]]:
        """Cosines and sines of the rotary angles of each token, for `rotate`."""
        length = int(positions.max()) + 1
        if len(self._cos_sin[0]) < length:
            sin, cos = self._attention.calculate_sin_cos_rotary(
                self._rotary_dim, length, base=self._attention._rotary_base(), dtype=torch.float32
            )
            # the half-rotation's minus sign belongs to the sine
            sign = torch.ones(self._rotary_dim)
            sign[: self._rotary_dim // 2] = -1
            self._cos_sin = (cos.to(self.device, self.dtype), (sin.cpu() * sign).to(self.device, self.dtype))
        where = positions.to(self.device)
        return self._cos_sin[0][where], self._cos_sin[1][where]

    def rotate(
        self,
        x: Float[Tensor, "... token heads d_head"],
        angles: tuple[Float[Tensor, "token d"], Float[Tensor, "token d"]],
    ) -> Float[Tensor, "... token heads d_head"]:
        """Queries or keys with their positions in them."""
        cos, sin = (angle[:, None] for angle in angles)
        half, whole = self._rotary_dim // 2, self._rotary_dim
        turned = x * cos if whole == self.d_head else torch.cat([x[..., :whole] * cos, x[..., whole:]], -1)
        turned[..., :half].addcmul_(x[..., half:whole], sin[..., :half])
        turned[..., half:whole].addcmul_(x[..., :half], sin[..., half:])
        return turned

    def heads(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... heads d_head"]:
        """Split the features of a projection into heads or groups."""
        split: Tensor = x.unflatten(-1, (-1, self.d_head))
        return split

    def streams(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d_model"]]:
        """The stream before each layer, and after the last, of whole prompts without padding."""
        batch, length = tokens.shape
        angles = self.rotary(torch.arange(length))
        x = self.embed(tokens.flatten()).unflatten(0, (batch, length))
        streams = [x]
        for layer in self.layers:
            normed = layer.norm1(x)
            q, k = (self.rotate(self.heads(weight(normed)), angles) for weight in (layer.q, layer.k))
            q, k, v = (part.transpose(1, 2) for part in (q, k, self.heads(layer.v(normed))))
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            middle = x + layer.o(z.transpose(1, 2).flatten(2))
            x = middle + layer.down(layer.hidden(layer.norm2(x if self.parallel else middle)))
            streams.append(x)
        return streams

    def unembed(self, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits from the stream after the last layer."""
        return self._unembedding(self.final_norm(stream))
