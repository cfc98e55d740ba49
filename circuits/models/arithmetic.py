"""The arithmetic of a model: the one forward that all our numbers come from, over the checkpoint's own tensors.

1. Weights are views of the checkpoint's tensors, as the family's rows say; nothing is copied, so that a tensor changed
   in place is seen at once. Parts of a fused tensor are computed by one product and split afterwards. Where another
   number acts than the one stored (Gemma's 1 + w and √d · W_E), the arithmetic says so.
2. A layer is a few matrix products on ``[..., d_model]``, whatever the leading axes mean. Only attention needs to know
   which tokens see which. `LeanModel.run` is the arrangement for whole batches, ``[batch, pos]``, padded on the right:
   a token sees no later one, so that padding needs no mask.
3. Activations are read or changed at sites, in the order in which they are computed, each a layer and a name:
   ``resid_pre``; ``q``, ``k``, ``v``; ``pattern``; ``z``; ``attn_out``; ``resid_mid``, unless the layer is parallel;
   ``post``; ``mlp_out``; ``resid_post``. They mean what TransformerLens' hooks of these names mean: queries and keys
   are those before query/key norms and rotation, what attention and MLP write is that after a post-norm.
4. For the gradients of single examples, each use of a checkpoint tensor can be tapped: what its module read and what it
   wrote. A weight's gradient is Σ over positions of ∂L/∂y ⊗ x, a bias's Σ ∂L/∂y, a norm's scale's Σ ∂L/∂y ⊙ x̂, x̂ the
   normalised input, and the row of a token in the embedding has the sum of ∂L/∂y where it stands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.errors import CircuitsError
from circuits.models.layout import Layout
from circuits.models.rows import Kind, Row

#: Where an activation stands: its layer and its name.
Site = tuple[int, str]

#: The names of the sites of a layer, in the order in which they are computed.
SITES: tuple[str, ...] = tuple("resid_pre q k v pattern z attn_out resid_mid post mlp_out resid_post".split())

#: Site → what is done there: given the activation, and the input of the projection that it comes from (None where there
#: is none), the activation that goes on.
Visits = Mapping[Site, Callable[[Tensor, Tensor | None], Tensor]]


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

#: Cosines and sines of the rotary angles of some tokens; None in a layer without them.
Angles = tuple[Tensor, Tensor] | None

_NOWHERE: Visits = {}
_UNTAPPED: Taps = {}


def _tell(rows: Sequence[Row], taps: Taps, read: Tensor, written: Tensor) -> None:
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

    def __call__(self, x: Float[Tensor, "... inputs"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... outputs"]:
        """The product; heads stand one after the other."""
        weight, bias = self.weight, self.bias
        if weight.dim() > 2:
            weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
        written = functional.linear(x, weight, bias)
        if taps:
            _tell(self.rows, taps, x, written)
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

    def __call__(
        self, x: Float[Tensor, "... inputs"], taps: Taps = _UNTAPPED
    ) -> list[Float[Tensor, "... heads width"]]:
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

    def __call__(self, x: Float[Tensor, "... features"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... features"]:
        """The normalised stream."""
        written = self._apply(x)
        if taps and any(row.tensor in taps for row in self.rows):
            _tell(self.rows, taps, self.normalised(x.detach()), written)
        return written

    def normalised(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """The input as the scale is multiplied with it, in float32 at least."""
        x = x.float() if x.dtype.itemsize < 4 else x
        if self.centred:
            return functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        unit: Tensor = functional.rms_norm(x, x.shape[-1:], eps=self.eps)
        return unit

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

    def attention_input(self, x: Float[Tensor, "... d_model"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What queries, keys and values are computed from."""
        return x if self.norm1 is None else self.norm1(x, taps)

    def queries_keys_values(
        self, normed: Float[Tensor, "... d_model"], asking: Tensor | None = None, taps: Taps = _UNTAPPED
    ) -> tuple[Float[Tensor, "... head d_head"], Float[Tensor, "... group d_head"], Float[Tensor, "... group d_head"]]:
        """Queries and keys before norm and rotation, and values; queries only of the ``asking`` tokens, if given."""
        if self.qkv is not None and asking is None:
            q, k, v = self.qkv(normed, taps)
            return q, k, v
        q, k, v = self.q(normed if asking is None else asking, taps), self.k(normed, taps), self.v(normed, taps)
        width = (-1, self.d_head)
        return q.unflatten(-1, width), k.unflatten(-1, width), v.unflatten(-1, width)

    def normed_queries(self, q: Float[Tensor, "... head d_head"], taps: Taps = _UNTAPPED) -> Tensor:
        """Queries as they are rotated."""
        return self._normed_heads(self.query_norm, q, taps)

    def normed_keys(self, k: Float[Tensor, "... group d_head"], taps: Taps = _UNTAPPED) -> Tensor:
        """Keys as they are rotated."""
        return self._normed_heads(self.key_norm, k, taps)

    def _normed_heads(self, norm: Norm | None, x: Tensor, taps: Taps) -> Tensor:
        if norm is None:
            return x
        return norm(x, taps) if self.heads_apart else norm(x.flatten(-2), taps).unflatten(-1, x.shape[-2:])

    def capped(self, scores: Tensor) -> Tensor:
        """Attention scores, given scaled ones."""
        return scores if self.score_cap is None else (scores / self.score_cap).tanh() * self.score_cap

    def attention_out(self, z: Float[Tensor, "... features"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What attention adds to the stream, given its heads' outputs."""
        written = self.o(z, taps)
        return written if self.post_norm1 is None else self.post_norm1(written, taps)

    def mlp_input(self, x: Float[Tensor, "... d_model"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What neurons are computed from."""
        return x if self.norm2 is None else self.norm2(x, taps)

    def hidden(self, normed: Float[Tensor, "... d_model"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... neuron"]:
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

    def mlp_out(self, neurons: Float[Tensor, "... neuron"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... d_model"]:
        """What the MLP adds to the stream."""
        written = self.down(neurons, taps)
        return written if self.post_norm2 is None else self.post_norm2(written, taps)


class LeanModel:
    """A model's arithmetic.

    Args:
        tensors: the checkpoint's, by name. They are shared; where they require gradients, so does what is computed.
        rows: which of them is which parameter.
        layout: what layers are made of.
        dtype: of the arithmetic; the tensors' own if not given. Other than their own, they are copied.

    Raises:
        CircuitsError: a tensor is missing, left over, or of another shape than the layout says.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], rows: Sequence[Row], layout: Layout, dtype: torch.dtype | None = None
    ) -> None:
        self.layout = layout
        self.n_layers, self.n_heads, self.n_groups = layout.n_layers, layout.n_heads, layout.n_groups
        self.d_model, self.d_head, self.d_vocab = layout.d_model, layout.d_head, layout.d_vocab
        self.parallel = layout.parallel
        self.rows = tuple(rows)
        self._rows = {row.name: row for row in rows}
        wanted = {row.tensor for row in rows}
        for name in sorted(wanted - tensors.keys()):
            raise CircuitsError(f"the checkpoint has no tensor {name}")
        for name in sorted(tensors.keys() - wanted):
            raise CircuitsError(f"the checkpoint has a tensor {name} that its family does not know")
        some = tensors[self._rows["embed.W_E"].tensor]
        self.dtype, self.device = dtype or some.dtype, some.device
        # a tensor that requires gradients is given them through its views, wherever these are made
        with torch.enable_grad():
            self.tensors = {
                name: tensor if tensor.dtype == self.dtype else tensor.detach().to(self.dtype)
                for name, tensor in tensors.items()
            }
            self._check_shapes()
            self.embedding = self._stored("embed.W_E")
            self.positions = self._stored("pos_embed.W_pos") if layout.learned_positions else None
            self._unembedding = self._linear("unembed.W_U", "unembed.b_U")
            self.final_norm = self._norm("ln_final")
            self.layers = [self._layer(layer) for layer in range(layout.n_layers)]
        # as Hugging Face's models round it
        self._embedding_factor = float(torch.tensor(self._rows["embed.W_E"].factor, dtype=self.dtype))
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def _check_shapes(self) -> None:
        layout = self.layout
        d, heads, groups = layout.d_model, (layout.n_heads, layout.d_head), (layout.n_groups, layout.d_head)
        shapes = {
            **{
                "embed.W_E": (layout.d_vocab, d),
                "unembed.W_U": (d, layout.d_vocab),
                "pos_embed.W_pos": (layout.n_ctx, d),
            },
            **{"attn.W_Q": (heads[0], d, heads[1]), "attn.W_O": (*heads, d), "attn.b_Q": heads},
            **{f"attn.W_{letter}": (groups[0], d, groups[1]) for letter in "KV"},
            **{f"attn.b_{letter}": groups for letter in "KV"},
            **{f"mlp.W_{name}": (d, layout.d_mlp) for name in ("in", "gate")},
            "mlp.W_out": (layout.d_mlp, d),
        }
        for row in self._rows.values():
            expected = shapes.get(row.name if row.layer is None else row.name.split(".", 2)[2])
            found = tuple(row.stored(self.tensors[row.tensor]).shape)
            if expected is not None and found != expected:
                raise CircuitsError(
                    f"{row.tensor} does not fit its config: {row.name} has the shape {found}, not {expected}"
                )

    def _stored(self, name: str) -> Tensor:
        row = self._rows[name]
        return row.stored(self.tensors[row.tensor])

    def _linear(self, name: str, bias: str) -> Linear:
        """A projection, its outputs first."""
        rows = tuple(self._rows[each] for each in (name, bias) if each in self._rows)
        for row in rows:
            if not row.acts_as_stored:
                raise CircuitsError(
                    f"{row.name} acts as stored: only scales and the embedding can have factor or offset"
                )
        weight = _outputs_first(name, self._stored(name))
        return Linear(weight, self._stored(bias) if len(rows) > 1 else None, rows)

    def _norm(self, name: str) -> Norm:
        rows = tuple(self._rows[each] for each in (f"{name}.w", f"{name}.b") if each in self._rows)
        weight, bias = (*(self._stored(row.name) for row in rows), None)[:2]
        assert weight is not None
        return Norm(weight, bias, self.layout.eps, self.layout.norm == "LN", rows)

    def _fused(self, names: Sequence[str]) -> Fused | None:
        """Projections whose weights are parts of one tensor; None if they are not."""
        rows = [self._rows[name] for name in names]
        if len({row.tensor for row in rows}) > 1:
            return None
        tensor = self.tensors[rows[0].tensor]
        outputs = tensor.shape[1 if rows[0].inputs_first else 0]
        numbers = torch.arange(outputs)
        numbers = numbers.expand(tensor.shape) if rows[0].inputs_first else numbers[:, None].expand(tensor.shape)
        pieces = []
        for row in rows:
            where = _outputs_first(row.name, row.stored(numbers))[..., 0]
            heads, width = where.shape if where.dim() > 1 else (1, len(where))
            first = where.flatten()
            stride = int(first[width] - first[0]) if heads > 1 else width
            pieces.append((int(first[0]), stride, heads, width))
        found = [rows[0], *(self._rows[bias] for bias in [names[0].replace(".W_", ".b_")] if bias in self._rows)]
        bias = self.tensors[found[1].tensor] if len(found) > 1 else None
        return Fused(Linear(tensor.T if rows[0].inputs_first else tensor, bias, tuple(found)), tuple(pieces))

    def _layer(self, layer: int) -> LeanLayer:
        layout, at = self.layout, f"blocks.{layer}."
        # where norms stand only behind, they have the names of those that stand before
        behind = ("ln1_post", "ln2_post") if layout.pre_norms else ("ln1", "ln2")
        stored = {letter: self._linear(f"{at}attn.W_{letter}", f"{at}attn.b_{letter}") for letter in "QKVO"}
        gate, up, down = ((f"{at}mlp.W_{name}", f"{at}mlp.b_{name}") for name in ("gate", "in", "out"))
        return LeanLayer(
            norm1=self._norm(f"{at}ln1") if layout.pre_norms else None,
            norm2=self._norm(f"{at}ln2") if layout.pre_norms else None,
            post_norm1=self._norm(at + behind[0]) if layout.post_norms else None,
            post_norm2=self._norm(at + behind[1]) if layout.post_norms else None,
            query_norm=self._norm(f"{at}attn.q_norm") if layout.head_norms else None,
            key_norm=self._norm(f"{at}attn.k_norm") if layout.head_norms else None,
            q=stored["Q"],
            k=stored["K"],
            v=stored["V"],
            qkv=self._fused([f"{at}attn.W_{letter}" for letter in "QKV"]),
            o=stored["O"],
            gate=self._linear(*gate) if layout.gated else None,
            up=self._linear(*up),
            gate_up=self._fused([gate[0], up[0]]) if layout.gated else None,
            down=self._linear(*down),
            activation=_activation(layout.activation),
            heads_apart=layout.head_norms == "head",
            d_head=layout.d_head,
            window=layout.windows[layer],
            score_scale=layout.score_scales[layer],
            score_cap=layout.score_cap,
        )

    def embed(
        self, tokens: Int[Tensor, "*batch pos"], positions: Int[Tensor, " pos"] | None = None, taps: Taps = _UNTAPPED
    ) -> Float[Tensor, "*batch pos d_model"]:
        """The stream before the first layer.

        Args:
            tokens: in any arrangement.
            positions: along the last axis; counted from 0 if not given.
            taps: uses of checkpoint tensors that are wanted. If there are any, the graph starts here.

        Raises:
            CircuitsError: the model's positions are learned, and the prompts are longer.
        """
        tokens = tokens.to(self.device)
        stream = self._looked_up("embed.W_E", self.embedding, tokens, taps)
        factor, offset = self._embedding_factor, self._rows["embed.W_E"].offset
        if factor != 1.0 or offset:
            stream = stream * factor + offset if offset else stream * factor
        if self.positions is None:
            return stream
        if positions is None:
            positions = torch.arange(tokens.shape[-1])
        if len(positions) and int(positions.max()) >= self.layout.n_ctx:
            raise CircuitsError(
                f"a prompt has {int(positions.max()) + 1} tokens, the model {self.layout.n_ctx} positions"
            )
        positions = positions.to(self.device).expand(tokens.shape) if taps else positions.to(self.device)
        return stream + self._looked_up("pos_embed.W_pos", self.positions, positions, taps)

    def _looked_up(self, name: str, table: Tensor, which: Tensor, taps: Taps) -> Tensor:
        found = functional.embedding(which, table)
        if taps:
            if torch.is_grad_enabled() and not found.requires_grad:
                found.requires_grad_()
            _tell([self._rows[name]], taps, which, found)
        return found

    def angles(self, positions: Int[Tensor, " token"], length: int | None = None) -> list[Angles]:
        """For each layer cosines and sines of the rotary angles of some tokens, for `rotate`.

        Args:
            positions: of the tokens.
            length: of the longest prompt, where the angles depend on it; up to the last position if not given.
        """
        length = length or int(positions.max()) + 1
        found: dict[int, Angles] = {id(None): None}
        for rotary in self.layout.rotary:
            if rotary is None or id(rotary) in found:
                continue
            kept = self._angles.get(id(rotary))
            if kept is None or len(kept[0]) < length or rotary.by_length:
                cos, sin = rotary.table(length if rotary.by_length else max(length, 64))
                kept = self._angles[id(rotary)] = (cos.to(self.device, self.dtype), sin.to(self.device, self.dtype))
            where = positions.to(self.device)
            found[id(rotary)] = (kept[0][where], kept[1][where])
        return [found[id(rotary)] for rotary in self.layout.rotary]

    def rotate(
        self, x: Float[Tensor, "... token heads d_head"], angles: Angles
    ) -> Float[Tensor, "... token heads d_head"]:
        """Queries or keys with their positions in them."""
        if angles is None:
            return x
        cos, sin = angles[0][:, None], angles[1][:, None]
        whole = cos.shape[-1]
        if whole == x.shape[-1]:
            return torch.addcmul(x * cos, x.roll(whole // 2, -1), sin)
        turning, rest = x[..., :whole], x[..., whole:]
        return torch.cat([torch.addcmul(turning * cos, turning.roll(whole // 2, -1), sin), rest], -1)

    def mask(self, length: int, window: int | None) -> Float[Tensor, "query_pos pos"]:
        """Zero where a token sees another, minus infinity elsewhere."""
        window = None if window is not None and window >= length else window
        if (length, window) not in self._masks:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= (window or length))
            mask = torch.zeros(length, length, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            if len(self._masks) > 64:
                self._masks.clear()
            self._masks[length, window] = mask.to(self.device)
        return self._masks[length, window]

    def _attend(
        self, layer: LeanLayer, q: Tensor, k: Tensor, v: Tensor, look: Callable[[Tensor, Tensor | None], Tensor] | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        length, groups = q.shape[1], k.shape[2]
        if look is None and layer.score_cap is None:
            whole = layer.window is None or layer.window >= length
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            z = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if whole else self.mask(length, layer.window),
                is_causal=whole,
                scale=layer.score_scale,
                enable_gqa=q.shape[1] != groups,
            )
            return z.transpose(1, 2)
        # the heads of a group stand below one another
        asked = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = layer.capped(asked @ k.permute(0, 2, 3, 1) * layer.score_scale)
        scores = scores.unflatten(2, (-1, length)) + self.mask(length, layer.window)
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        pattern = scores.softmax(-1, dtype=wide).to(self.dtype)
        if look is not None:
            pattern = look(pattern.flatten(1, 2), None).unflatten(1, (groups, -1))
        mixed: Tensor = (pattern.flatten(2, 3) @ v.transpose(1, 2)).unflatten(2, (-1, length))
        return mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def layer(
        self,
        layer: int,
        stream: Float[Tensor, "batch pos d_model"],
        *,
        visits: Visits = _NOWHERE,
        taps: Taps = _UNTAPPED,
        angles: Angles = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a layer, given the one before it; ``angles`` of the positions, if they are at hand."""
        weights = self.layers[layer]
        if angles is None:
            angles = self.angles(torch.arange(stream.shape[1]))[layer]

        def visit(name: str, x: Tensor, source: Tensor | None = None) -> Tensor:
            look = visits.get((layer, name))
            return x if look is None else look(x, source)

        stream = visit("resid_pre", stream)
        normed = weights.attention_input(stream, taps)
        q, k, v = weights.queries_keys_values(normed, taps=taps)
        q, k, v = visit("q", q, normed), visit("k", k, normed), visit("v", v, normed)
        q, k = self.rotate(weights.normed_queries(q, taps), angles), self.rotate(weights.normed_keys(k, taps), angles)
        z = visit("z", self._attend(weights, q, k, v, visits.get((layer, "pattern"))))
        flat = z.flatten(2)
        middle = stream + visit("attn_out", weights.attention_out(flat, taps), flat)
        if not self.parallel:
            stream = middle = visit("resid_mid", middle)
        normed = weights.mlp_input(stream, taps)
        neurons = visit("post", weights.hidden(normed, taps), normed)
        return visit("resid_post", middle + visit("mlp_out", weights.mlp_out(neurons, taps), neurons))

    def resume(
        self,
        stream: Float[Tensor, "batch pos d_model"],
        start: int,
        stop: int | None = None,
        *,
        visits: Visits = _NOWHERE,
        taps: Taps = _UNTAPPED,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream before layer ``stop`` (after the last), given the one before layer ``start``."""
        angles = self.angles(torch.arange(stream.shape[1]))
        for layer in range(start, self.n_layers if stop is None else stop):
            stream = self.layer(layer, stream, visits=visits, taps=taps, angles=angles[layer])
        return stream

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        stop: int | None = None,
        *,
        visits: Visits = _NOWHERE,
        taps: Taps = _UNTAPPED,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream that `unembed` reads, or the one before layer ``stop``.

        Args:
            tokens: padded on the right, if at all.
            stop: the first layer that is not computed.
            visits: what is read or changed, and where.
            taps: uses of checkpoint tensors that are wanted; those of the unembedding are told by `unembed`.

        Raises:
            CircuitsError: there is no such site, or no such tensor.
        """
        self._check(visits, taps)
        return self.resume(self.embed(tokens, taps=taps), 0, stop, visits=visits, taps=taps)

    def _check(self, visits: Visits, taps: Taps) -> None:
        for layer, name in visits:
            if name not in SITES or not 0 <= layer < self.n_layers or (name == "resid_mid" and self.parallel):
                raise CircuitsError(f"the model has no activation {name} in layer {layer}")
        for name in taps:
            if name not in self.tensors:
                raise CircuitsError(f"the checkpoint has no tensor {name}")

    def unembed(self, stream: Float[Tensor, "... d_model"], taps: Taps = _UNTAPPED) -> Float[Tensor, "... d_vocab"]:
        """Logits from the stream after the last layer, at any selection of positions."""
        logits = self._unembedding(self.final_norm(stream, taps), taps)
        cap = self.layout.logit_cap
        return logits if cap is None else (logits / cap).tanh() * cap

    def needed(self, tokens: Int[Tensor, "batch pos"], length: int) -> Int[Tensor, "batch shorter"]:
        """The tokens that activations of the first ones depend on: these, or all if angles depend on the length."""
        by_length = any(rotary is not None and rotary.by_length for rotary in self.layout.rotary)
        return tokens if by_length else tokens[:, :length]

    def logits_at(
        self, tokens: Int[Tensor, "batch pos"], where: Int[Tensor, "answer 2"], *, visits: Visits = _NOWHERE
    ) -> Float[Tensor, "answer d_vocab"]:
        """Logits at some positions, given as pairs of example and position; only these are unembedded."""
        stream, where = self.run(tokens, visits=visits), where.to(self.device)
        return self.unembed(stream[where[:, 0], where[:, 1]])


def _outputs_first(name: str, stored: Tensor) -> Tensor:
    """A weight in TransformerLens' layout as ``[out, in]`` or ``[head, d_head, in]``: a view."""
    leaf = name.rpartition(".")[2]
    if leaf in ("W_Q", "W_K", "W_V"):
        return stored.transpose(1, 2)
    if leaf == "W_O":
        return stored.permute(2, 0, 1).flatten(1)
    return stored.T


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    # the same function, written in one kernel
    found: Any = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
    return found if isinstance(found, torch.nn.Module) else found()
