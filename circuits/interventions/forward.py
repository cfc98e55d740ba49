"""Running many interventions of one model through its layers at once.

1. The clean run computes every node of a `TokenTree` once and keeps the streams, keys, values and heads' outputs.
2. A batch of interventions is a tensor ``[row, active, d_model]``: a row for each intervention, and only the nodes that
   the intervention reaches. A row joins at the lowest layer that it changes, with the clean stream; where only what
   comes after attention is changed, with the clean output of that layer's attention.
3. In each layer the rows' changes are written in at their sites. Attention is the one place where nodes meet
   (``attention.py``).
4. In the last layer only the nodes that predict answer tokens go on after keys and values.
5. Beside the model's sites there are ``o`` and ``down``: what these projections write, before a post-norm.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.interventions.attention import Attention, Queries
from circuits.interventions.tokens import TokenTree
from circuits.models import LeanModel, Norm, Site


class Visitor:
    """Looks at activations as they are computed, or changes them; this one does neither."""

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the activation, ``[row, node, ...]``, changed in place or not.

        Args:
            site: layer and name.
            x: the activation at the queries' nodes, or at all active nodes if ``queries`` is None.
            queries: the nodes, if not all active ones.
            source: what the activation was computed from: the normalised stream, z, or the neurons.
        """
        return x

    def attention(self, layer: int, z: Tensor, attention: Attention) -> Tensor:  # noqa: ARG002
        """Return z, ``[row, query, head, d_head]``, changed in place or not."""
        return z


_NOBODY = Visitor()


@dataclass
class CleanRun:
    """The run of a whole tree without intervention, kept.

    Attributes:
        tree: its nodes.
        streams: the stream before each layer, and after the last, ``[node, d_model]`` each.
        keys: rotated keys of each layer, ``[node, group, d_head]`` each.
        values: values of each layer.
        z: heads' outputs of each layer, ``[node, head, d_head]`` each.
    """

    tree: TokenTree
    streams: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, layers: "Forward", visitor: Visitor = _NOBODY) -> "CleanRun":
        """Run every node of a tree, all of them active, through every layer."""
        run = cls(layers.tree)
        x = layers.lean.embed(layers.tree.tokens, layers.tree.positions)[None]
        if torch.is_grad_enabled():
            x.requires_grad_()
        for layer in range(layers.lean.n_layers):
            run.streams.append(x[0])
            x = visitor((layer, "resid_pre"), x, None, None)
            z, keys, values = layers.attend(layer, x, visitor)
            run.keys.append(keys[0])
            run.values.append(values[0])
            run.z.append(z[0])
            x = layers.after_attention(layer, x, z, visitor)
        run.streams.append(x[0])
        return run

    @property
    def last(self) -> Float[Tensor, "answer_token d_model"]:
        """The stream after the last layer at the nodes that predict answer tokens."""
        return self.streams[-1][self.tree.predicting.to(self.streams[-1].device)]


class Forward:
    """The layers of a lean model over one tree of tokens.

    Args:
        lean: the model.
        tree: the tokens.
        clean: a run of the same prompts, whose activations stand wherever the tree is not active. Without it every
            node is active, and all go on in the last layer.
        length: of the longest prompt, where rotary angles depend on it; that of the tree if not given.
    """

    def __init__(
        self, lean: LeanModel, tree: TokenTree, clean: CleanRun | None = None, *, length: int | None = None
    ) -> None:
        self.lean, self.tree, self._clean = lean, tree, clean
        every = torch.arange(len(tree))
        active = every if clean is None else tree.active
        going_on = every if clean is None else active[torch.isin(active, tree.predicting)]
        in_clean = every if clean is None else _numbers(tree, clean.tree)
        self.active = active.to(lean.device)
        self._active_in_clean = in_clean[active].to(lean.device)
        # whose keys and values stand beside those that are computed
        self._beside = None if len(active) == len(tree) else clean
        # whether an intervention reaches any answer
        self.reaches = len(going_on) > 0
        if not self.reaches:
            return
        self._queries = Queries(lean, tree, active, active, in_clean)
        everyone = torch.equal(going_on, active)
        self._final = self._queries if everyone else Queries(lean, tree, active, going_on, in_clean)
        # answer tokens whose predicting node is reached, and where it stands among the final queries
        reached = torch.isin(tree.predicting, going_on)
        self.answers: Bool[Tensor, " answer_token"] = reached.to(lean.device)
        self._answer_query = torch.searchsorted(going_on, tree.predicting[reached]).to(lean.device)
        self._angles = lean.angles(tree.positions[active], length or int(tree.positions.max()) + 1)

    def run(self, starts: Sequence[tuple[int, bool]], visitor: Visitor) -> Float[Tensor, "row answer_token d_model"]:
        """Run interventions that reach an answer.

        Args:
            starts: for each, the lowest layer that it changes, and whether only after that layer's attention; sorted.
            visitor: writes the changes in.

        Returns:
            the stream after the last layer at the nodes that predict answer tokens.
        """
        clean = self._clean
        assert clean is not None
        where = self._active_in_clean
        x = clean.streams[0].new_zeros(0, len(where), self.lean.d_model)
        for layer in range(starts[0][0], self.lean.n_layers):
            early, late = starts.count((layer, False)), starts.count((layer, True))
            stream = clean.streams[layer][where] if early or late else None
            x = _joined(x, stream, early)
            x = visitor((layer, "resid_pre"), x, None, None)
            queries = self._going_on(layer)
            if len(x):
                z, _, _ = self.attend(layer, x, visitor)
            else:
                z = clean.z[layer].new_zeros(0, len(queries.nodes), *clean.z[layer].shape[1:])
            asking = where if queries.within is None else where[queries.within]
            z = _joined(z, clean.z[layer][asking] if late else None, late)
            x = self.after_attention(layer, _joined(x, stream, late), z, visitor)
        reached = x.index_select(1, self._answer_query)
        if bool(self.answers.all()):
            return reached
        result = clean.last.repeat(len(starts), 1, 1)
        result[:, self.answers] = reached
        return result

    def _going_on(self, layer: int) -> Queries:
        """The nodes that go on after keys and values: in the last layer those that predict answers."""
        return self._final if layer == self.lean.n_layers - 1 else self._queries

    def attend(
        self, layer: int, x: Float[Tensor, "row active d_model"], visitor: Visitor
    ) -> tuple[
        Float[Tensor, "row query head d_head"],
        Float[Tensor, "row active group d_head"],
        Float[Tensor, "row active group d_head"],
    ]:
        """Heads' outputs, rotated keys, and values of one layer."""
        lean, weights, beside = self.lean, self.lean.layers[layer], self._beside
        queries = self._going_on(layer)
        normed = weights.attention_input(x)
        asking = None if queries.within is None else normed.index_select(1, queries.within)
        q, k, v = weights.queries_keys_values(normed, asking)
        q = visitor((layer, "q"), q, queries, normed if asking is None else asking)
        k = visitor((layer, "k"), k, None, normed)
        v = visitor((layer, "v"), v, None, normed)
        angles = self._angles[layer]
        k = lean.rotate(weights.normed_keys(k), angles)
        if angles is not None and queries.within is not None:
            angles = angles[0][queries.within], angles[1][queries.within]
        q = lean.rotate(weights.normed_queries(q), angles)
        attention = Attention(
            queries,
            weights,
            queries.asked(q),
            queries.seen(k, None if beside is None else beside.keys[layer]),
            queries.seen(v, None if beside is None else beside.values[layer]),
        )
        return visitor.attention(layer, attention.z(), attention), k, v

    def after_attention(
        self,
        layer: int,
        x: Float[Tensor, "row active d_model"],
        z: Float[Tensor, "row query head d_head"],
        visitor: Visitor,
    ) -> Float[Tensor, "row query d_model"]:
        """The stream after a layer, given the one before it and its heads' outputs."""
        lean, weights, queries = self.lean, self.lean.layers[layer], self._going_on(layer)
        if queries.within is not None:
            x = x.index_select(1, queries.within)
        z = visitor((layer, "z"), z, queries, None)
        attn_out = _normed(weights.post_norm1, visitor((layer, "o"), weights.o(z.flatten(2)), queries, z))
        middle = x + visitor((layer, "attn_out"), attn_out, queries, None)
        if not lean.parallel:
            middle = visitor((layer, "resid_mid"), middle, queries, None)
        normed = weights.mlp_input(x if lean.parallel else middle)
        neurons = visitor((layer, "post"), weights.hidden(normed), queries, normed)
        mlp_out = _normed(weights.post_norm2, visitor((layer, "down"), weights.down(neurons), queries, neurons))
        return visitor(
            (layer, "resid_post"), middle + visitor((layer, "mlp_out"), mlp_out, queries, None), queries, None
        )


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _numbers(tree: TokenTree, clean: TokenTree) -> Int[Tensor, " node"]:
    """For each node of a tree, the node of a clean run of the same prompts that stands for the same tokens."""
    numbers = torch.zeros(len(tree), dtype=torch.long)
    real = tree.nodes >= 0
    numbers[tree.nodes[real]] = clean.nodes[real]
    return numbers


def _joined(rows: Tensor, clean: Tensor | None, count: int) -> Tensor:
    """Rows, and below them as many copies of a clean activation."""
    if clean is None or not count:
        return rows
    return torch.cat([rows, clean.expand(count, *clean.shape)])


class Recorder(Visitor):
    """Keeps activations of a clean run by site."""

    def __init__(self, sites: Collection[Site]) -> None:
        self._wanted = set(sites)
        self.found: dict[Site, Tensor] = {}

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:  # noqa: ARG002
        """Keep the activation, if it is wanted."""
        if site in self._wanted:
            self.found[site] = x[0]
        return x

    def attention(self, layer: int, z: Tensor, attention: Attention) -> Tensor:
        """Keep the pattern of every head, if it is wanted: ``[node, head, pos]``."""
        if (layer, "pattern") in self._wanted:
            heads = attention.queries.shape[1] * attention.queries.shape[2]
            patterns = [attention.pattern(0, head).flatten(0, 1) for head in range(heads)]
            self.found[layer, "pattern"] = torch.stack(patterns, 1)[attention.queries.back]
        return z
