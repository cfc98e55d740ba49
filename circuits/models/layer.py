"""The arithmetic of one layer: projections, norms and neurons, on ``[..., d_model]``, whatever the leading axes mean.

1. Parts of a fused tensor are computed by one product and split afterwards.
2. Where another number acts than the one stored (Gemma's 1 + w), the norm says so.
3. Attention, where tokens meet, is not here: it has one arrangement for whole batches (``arithmetic.py``), and another
   for many interventions at once (``circuits.interventions``).
4. For the gradients of single examples, each use of a checkpoint tensor can be tapped: what its module read and what it
   wrote. A weight's gradient is Σ over positions of ∂L/∂y ⊗ x, a bias's Σ ∂L/∂y, a norm's scale's Σ ∂L/∂y ⊙ x̂, x̂ the
   normalised input, and the row of a token in the embedding has the sum of ∂L/∂y where it stands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from circuits.models.rows import Kind, Row


class Use(NamedTuple):
    """One use of a checkpoint tensor in a pass.

    Attributes:
        tensor: its name.
        kind: how its gradient follows (see `circuits.models.rows.Row`).
        read: what it was applied to: an input, a normalised input, tokens or positions.
        written: what came out; of a fused tensor, all of it.
        inputs_first: a weight is stored as ``[in, out]``.
    """

    tensor: str
    kind: Kind
    read: Tensor
    written: Tensor
    inputs_first: bool


#: Name of a checkpoint tensor → what to do with each of its uses.
Taps = Mapping[str, Callable[[Use], None]]

#: No use is wanted.
UNTAPPED: Taps = {}


def tell(rows: Sequence[Row], taps: Taps, read: Tensor, written: Tensor) -> None:
    """Give a use of some rows' tensors to the taps that want it."""
    for row in rows:
        if row.tensor in taps:
            taps[row.tensor](Use(row.tensor, row.kind, read, written, row.inputs_first))


@dataclass(frozen=True)
class Linear:
    """A projection.

    Attributes:
        weight: ``[out, in]``, or ``[head, d_head, in]``.
        bias: ``[out]`` or ``[head, d_head]``, if any.
        rows: the rows of both.
    """

    weight: Tensor
    bias: Tensor | None
    rows: tuple[Row, ...] = field(default=(), repr=False)

    def __call__(self, x: Float[Tensor, "... inputs"], taps: Taps = UNTAPPED) -> Float[Tensor, "... outputs"]:
        """The product; heads stand one after the other."""
        weight, bias = self.weight, self.bias
        if weight.dim() > 2:
            weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
        written = functional.linear(x, weight, bias)
        if taps:
            tell(self.rows, taps, x, written)
        return written

    def part(self, which: slice) -> "Linear":
        """The weight that computes only some of the heads or neurons."""
        return Linear(self.weight[which], None if self.bias is None else self.bias[which])


@dataclass(frozen=True)
class Fused:
    """Projections whose weights are parts of one tensor.

    Attributes:
        whole: the tensor, as ``[out, in]``.
        pieces: for each projection where its outputs stand among those of the whole: the first, how many lie between
            one head and the next, how many heads there are, and their width. Neurons are one head.
    """

    whole: Linear
    pieces: tuple[tuple[int, int, int, int], ...]

    def __call__(self, x: Float[Tensor, "... inputs"], taps: Taps = UNTAPPED) -> list[Float[Tensor, "... heads width"]]:
        """One product, and views of its parts."""
        written, found = self.whole(x, taps), []
        for first, stride, count, width in self.pieces:
            if stride == width:
                found.append(written[..., first : first + count * width].unflatten(-1, (count, width)))
            else:
                found.append(written.unflatten(-1, (count, stride))[..., first : first + width])
        return found


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm.

    Attributes:
        weight: its scale, as stored.
        bias: its bias, if it has one.
        eps: what is added to the variance.
        centred: a LayerNorm.
        rows: the rows of scale and bias.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    rows: tuple[Row, ...] = field(repr=False)

    def __call__(self, x: Float[Tensor, "... features"], taps: Taps = UNTAPPED) -> Float[Tensor, "... features"]:
        """The normalised stream."""
        written = self._apply(x)
        if taps and any(row.tensor in taps for row in self.rows):
            tell(self.rows, taps, self.normalised(x.detach()), written)
        return written

    def normalised(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """The input as the scale is multiplied with it, in float32 at least."""
        x = x.float() if x.dtype.itemsize < 4 else x
        if self.centred:
            return functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        unit: Tensor = functional.rms_norm(x, x.shape[-1:], eps=self.eps)
        return unit

    def part(self, part: Float[Tensor, "... features"], whole: Float[Tensor, "... features"]) -> Tensor:
        """What a part of an input adds to the normalised whole, whose length is held; in float32 at least."""
        part, whole = part.float(), whole.float()
        if self.centred:
            part, whole = (x - x.mean(-1, keepdim=True) for x in (part, whole))
        length = (whole.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return part / length * self.rows[0].acting(self.weight.float())

    def _apply(self, x: Tensor) -> Tensor:
        weight, shape, scale = self.weight, self.weight.shape, self.rows[0]
        half = x.dtype.itemsize < 4
        if not scale.acts_as_stored:
            weight = scale.acting(weight.float() if half else weight)
        if self.centred:
            return functional.layer_norm(x, shape, weight.to(x.dtype), self.bias, self.eps)
        if half:
            wide = x if weight.dtype == x.dtype else x.float()
            return functional.rms_norm(wide, shape, weight, self.eps).to(x.dtype)
        if x.device.type != "cpu":
            return functional.rms_norm(x, shape, weight, self.eps)
        # torch's own takes twice as long here
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit: Tensor = x * (length.square() / x.shape[-1] + self.eps).rsqrt()
        return unit * weight if torch.is_grad_enabled() else unit.mul_(weight)


@dataclass(frozen=True)
class LeanLayer:
    """The weights of one layer; None where the family has none.

    Attributes:
        norm1: before attention.
        norm2: before the MLP.
        post_norm1: on what attention writes.
        post_norm2: on what the MLP writes.
        query_norm: on queries, before rotation.
        key_norm: on keys, before rotation.
        q: queries' projection; ``k``, ``v``, ``o`` are those of keys, values and attention's output.
        qkv: all three at once, if they are one tensor.
        gate: of a gated MLP; ``up`` and ``down`` are its other projections.
        gate_up: both at once, if they are one tensor.
        activation: of the MLP.
        heads_apart: query and key norms see each head by itself.
        d_head: width of a head.
        window: how many tokens a token sees, itself included; None for all.
        score_scale: what scores are multiplied with.
        score_cap: scores are cap · tanh(score / cap).
    """

    norm1: Norm | None
    norm2: Norm | None
    post_norm1: Norm | None
    post_norm2: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    q: Linear
    k: Linear
    v: Linear
    qkv: Fused | None
    o: Linear
    gate: Linear | None
    up: Linear
    gate_up: Fused | None
    down: Linear
    activation: Callable[[Tensor], Tensor]
    heads_apart: bool
    d_head: int
    window: int | None
    score_scale: float
    score_cap: float | None

    def attention_input(self, x: Float[Tensor, "... d_model"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What queries, keys and values are computed from."""
        return x if self.norm1 is None else self.norm1(x, taps)

    def queries_keys_values(
        self, normed: Float[Tensor, "... d_model"], asking: Tensor | None = None, taps: Taps = UNTAPPED
    ) -> tuple[Float[Tensor, "... head d_head"], Float[Tensor, "... group d_head"], Float[Tensor, "... group d_head"]]:
        """Queries and keys before norm and rotation, and values; queries only of the ``asking`` tokens, if given."""
        if self.qkv is not None and asking is None:
            q, k, v = self.qkv(normed, taps)
            return q, k, v
        q, k, v = self.q(normed if asking is None else asking, taps), self.k(normed, taps), self.v(normed, taps)
        width = (-1, self.d_head)
        return q.unflatten(-1, width), k.unflatten(-1, width), v.unflatten(-1, width)

    def normed_queries(self, q: Float[Tensor, "... head d_head"], taps: Taps = UNTAPPED) -> Tensor:
        """Queries as they are rotated."""
        return self._normed_heads(self.query_norm, q, taps)

    def normed_keys(self, k: Float[Tensor, "... group d_head"], taps: Taps = UNTAPPED) -> Tensor:
        """Keys as they are rotated."""
        return self._normed_heads(self.key_norm, k, taps)

    def _normed_heads(self, norm: Norm | None, x: Tensor, taps: Taps) -> Tensor:
        if norm is None:
            return x
        return norm(x, taps) if self.heads_apart else norm(x.flatten(-2), taps).unflatten(-1, x.shape[-2:])

    def capped(self, scores: Tensor) -> Tensor:
        """Attention scores, given scaled ones."""
        return scores if self.score_cap is None else (scores / self.score_cap).tanh() * self.score_cap

    def attention_out(self, z: Float[Tensor, "... features"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What attention adds to the stream, given its heads' outputs."""
        written = self.o(z, taps)
        return written if self.post_norm1 is None else self.post_norm1(written, taps)

    def mlp_input(self, x: Float[Tensor, "... d_model"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What neurons are computed from."""
        return x if self.norm2 is None else self.norm2(x, taps)

    def hidden(self, normed: Float[Tensor, "... d_model"], taps: Taps = UNTAPPED) -> Float[Tensor, "... neuron"]:
        """The neurons' activations (``hook_post``)."""
        if self.gate is None:
            return self.activation(self.up(normed, taps))
        if self.gate_up is not None:
            gate, up = (part[..., 0, :] for part in self.gate_up(normed, taps))
        else:
            gate, up = self.gate(normed, taps), self.up(normed, taps)
        return self._gated(gate, up)

    def neurons(self, normed: Float[Tensor, "... d_model"], which: slice) -> Float[Tensor, "... chosen"]:
        """Like `hidden`, for some of the neurons."""
        up = self.up.part(which)(normed)
        return self.activation(up) if self.gate is None else self._gated(self.gate.part(which)(normed), up)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        active = self.activation(gate)
        return active * up if torch.is_grad_enabled() else active.mul_(up)

    def mlp_out(self, neurons: Float[Tensor, "... neuron"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What the MLP adds to the stream."""
        written = self.down(neurons, taps)
        return written if self.post_norm2 is None else self.post_norm2(written, taps)
