"""The arithmetic of a model: the one forward that all our numbers come from, over the checkpoint's own tensors.

1. Weights are views of the checkpoint's tensors, as the family's rows say (``weights.py``). Where another number acts
   than the one stored (Gemma's 1 + w and √d · W_E), the arithmetic says so.
2. A layer is a few matrix products on ``[..., d_model]``, whatever the leading axes mean (``layer.py``). Only attention
   needs to know which tokens see which. `LeanModel.run` is the arrangement for whole batches, ``[batch, pos]``, padded
   on the right: a token sees no later one, so that padding needs no mask.
3. Activations are read or changed at sites, in the order in which they are computed, each a layer and a name:
   ``resid_pre``; ``q``, ``k``, ``v``; ``pattern``; ``z``; ``attn_out``; ``resid_mid``, unless the layer is parallel;
   ``post``; ``mlp_out``; ``resid_post``. They mean what TransformerLens' hooks of these names mean: queries and keys
   are those before query/key norms and rotation, what attention and MLP write is that after a post-norm.
4. For the gradients of single examples, uses of checkpoint tensors can be tapped (``layer.py``), the rows looked up for
   tokens and positions among them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.errors import CircuitsError
from circuits.models.layer import UNTAPPED, LeanLayer, Taps, tell
from circuits.models.layout import Layout
from circuits.models.rows import Row
from circuits.models.weights import Weights

#: Where an activation stands: its layer and its name.
Site = tuple[int, str]

#: The names of the sites of a layer, in the order in which they are computed.
SITES: tuple[str, ...] = tuple("resid_pre q k v pattern z attn_out resid_mid post mlp_out resid_post".split())

#: Site → what is done there: given the activation, and the input of the projection that it comes from (None where there
#: is none), the activation that goes on.
Visits = Mapping[Site, Callable[[Tensor, Tensor | None], Tensor]]


#: Cosines and sines of the rotary angles of some tokens; None in a layer without them.
Angles = tuple[Tensor, Tensor] | None

_NOWHERE: Visits = {}


def check_tokens(tokens: Tensor, d_vocab: int) -> None:
    """Refuse tokens that a model does not embed.

    Example:
        >>> check_tokens(torch.tensor([[5, 300]]), 256)
        Traceback (most recent call last):
        circuits.errors.CircuitsError: there is a token 300, but the model embeds tokens 0 to 255: make the task with \
the model's own tokenizer
    """
    for token in (int(end) for end in tokens.aminmax()) if tokens.numel() else ():
        if not 0 <= token < d_vocab:
            raise CircuitsError(
                f"there is a token {token}, but the model embeds tokens 0 to {d_vocab - 1}: make the task with the "
                "model's own tokenizer"
            )


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
        self, tensors: Mapping[str, Tensor], rows: Sequence[Row], layout: Layout, *, dtype: torch.dtype | None = None
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
            weights = Weights(self.tensors, self._rows, layout)
            self.embedding = weights.stored("embed.W_E")
            self.positions = weights.stored("pos_embed.W_pos") if layout.learned_positions else None
            self._unembedding = weights.linear("unembed.W_U", "unembed.b_U")
            self.final_norm = weights.norm("ln_final")
            self.layers = [weights.layer(layer) for layer in range(layout.n_layers)]
        # as Hugging Face's models round it
        self._embedding_factor = float(torch.tensor(self._rows["embed.W_E"].factor, dtype=self.dtype))
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def embed(
        self, tokens: Int[Tensor, "*batch pos"], positions: Int[Tensor, " pos"] | None = None, taps: Taps = UNTAPPED
    ) -> Float[Tensor, "*batch pos d_model"]:
        """The stream before the first layer.

        Args:
            tokens: in any arrangement.
            positions: along the last axis; counted from 0 if not given.
            taps: uses of checkpoint tensors that are wanted. If there are any, the graph starts here.

        Raises:
            CircuitsError: there is no such token, or the model's positions are learned, and the prompts are longer.
        """
        if tokens.device.type == "cpu":  # a GPU would have to be waited for; `needed` has seen what is there already
            check_tokens(tokens, self.d_vocab)
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
            tell([self._rows[name]], taps, which, found)
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
        taps: Taps = UNTAPPED,
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
        taps: Taps = UNTAPPED,
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
        taps: Taps = UNTAPPED,
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

    def unembed(self, stream: Float[Tensor, "... d_model"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_vocab"]:
        """Logits from the stream after the last layer, at any selection of positions."""
        logits, cap = self.uncapped(stream, taps), self.layout.logit_cap
        return logits if cap is None else (logits / cap).tanh() * cap

    def uncapped(self, stream: Float[Tensor, "... d_model"], taps: Taps = UNTAPPED) -> Float[Tensor, "... d_vocab"]:
        """The logits before a cap on them."""
        return self._unembedding(self.final_norm(stream, taps), taps)

    def added_logits(
        self, part: Float[Tensor, "... d_model"], stream: Float[Tensor, "... d_model"], tokens: Int[Tensor, " token"]
    ) -> Float[Tensor, "... token"]:
        """What a part of the stream after the last layer adds to some logits, in float32.

        The final norm divides by the whole stream's length, so that all parts and the unembedding's bias add up to the
        logits, before a cap on them.
        """
        rows = self._unembedding.weight[tokens.to(self.device)].float()
        return self.final_norm.part(part, stream) @ rows.T

    def needed(self, tokens: Int[Tensor, "batch pos"], length: int) -> Int[Tensor, "batch shorter"]:
        """The tokens that activations of the first ones depend on: these, or all if angles depend on the length."""
        check_tokens(tokens, self.d_vocab)
        by_length = any(rotary is not None and rotary.by_length for rotary in self.layout.rotary)
        return tokens if by_length else tokens[:, :length]

    def logits_at(
        self, tokens: Int[Tensor, "batch pos"], where: Int[Tensor, "answer 2"], *, visits: Visits = _NOWHERE
    ) -> Float[Tensor, "answer d_vocab"]:
        """Logits at some positions, given as pairs of example and position; only these are unembedded."""
        stream, where = self.run(tokens, visits=visits), where.to(self.device)
        return self.unembed(stream[where[:, 0], where[:, 1]])
