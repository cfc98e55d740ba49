"""Running many interventions of one model through its layers at once.

1. The clean run computes every node of a `TokenTree` once and keeps the streams, keys, values and heads' outputs.
2. A batch of interventions is a tensor ``[row, active, d_model]``: a row for each intervention, and only the nodes that
   the intervention reaches. A row joins at the lowest layer that it changes, with the clean stream; where only what
   comes after attention is changed, with the clean output of that layer's attention.
3. In each layer the rows' changes are written in at their sites. Attention is the one place where nodes meet: queries,
   keys and values are laid out by example and position, inactive keys and values taken from the clean run.
4. In the last layer only the nodes that predict answer tokens go on after keys and values.
5. Beside the model's sites there are ``o`` and ``down``: what these projections write, before a post-norm.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.interventions.tokens import TokenTree
from circuits.models import LeanLayer, LeanModel, Norm, Site


class Queries:
    """Which nodes ask in attention, what they see, and where all of it lies in memory.

    Args:
        lean: the model.
        tree: the nodes.
        active: the nodes whose keys and values are computed; those of all others come from the clean run.
        chosen: the nodes that ask; among the active ones.
        clean: for each node of the tree, its number in the clean run.

    Attributes:
        nodes: the nodes that ask, ``[query]``.
        within: where they stand among the active nodes; None if they are all of them.
        back: for each query, where in the grid of examples and query positions it stands.
        shape: examples, groups, heads of a group, positions and query positions: the axes of scores.
    """

    def __init__(
        self,
        lean: LeanModel,
        tree: TokenTree,
        active: Int[Tensor, " active"],
        chosen: Int[Tensor, " query"],
        clean: Int[Tensor, " node"],
    ) -> None:
        device = lean.device
        number = torch.full((len(tree) + 1,), -1)
        number[chosen] = torch.arange(len(chosen))
        asks = number[tree.nodes] >= 0  # node -1 is the last entry: never chosen
        kept = asks.any(1)  # examples where nothing asks are left out
        nodes, asks = tree.nodes[kept], asks[kept]
        count = asks.sum(1)
        width = int(count.max())
        # each example's queries, moved to the left
        order = (~asks).int().argsort(dim=1, stable=True)[:, :width]
        real = torch.arange(width)[None] < count[:, None]
        grid = torch.where(real, number[nodes.gather(1, order)], 0)
        positions = torch.arange(nodes.shape[1])
        # a query that only fills the grid sees the first position, so that its softmax is defined
        self._distance = torch.where(real, order, 0)[:, :, None] - positions[None, None]
        self._there = (nodes >= 0)[:, None]
        back = torch.zeros(len(chosen), dtype=torch.long)
        back[grid[real]] = real.flatten().nonzero().flatten()
        self.nodes = chosen.to(device)
        self.within = None if torch.equal(chosen, active) else torch.searchsorted(active, chosen).to(device)
        self._dtype, self._bias = lean.dtype, dict[int | None, Tensor]()
        self._flat_bias: dict[int | None, Tensor] = {}
        self.back = back.to(device)
        self._heads, self._groups, self._queries, self._active = lean.n_heads, lean.n_groups, len(chosen), len(active)
        heads = torch.arange(lean.n_heads).view(lean.n_groups, -1)
        # scores are laid out as example, group, pos, head of the group, query position
        shape = (len(nodes), *heads.shape, nodes.shape[1], width)
        # vectors of one head: the queries as example, group, head of the group, query position, and back again
        self._asked = (grid[:, None, None] * lean.n_heads + heads[None, :, :, None]).flatten()
        example, place = back // width, back % width
        self._answered = (
            (example[:, None] * lean.n_heads + torch.arange(lean.n_heads)) * width + place[:, None]
        ).flatten()
        # keys and values as example, group, pos: of active nodes as computed, of others from the clean run
        where = torch.full((len(tree),), -1)
        where[active] = torch.arange(len(active))
        groups = torch.arange(lean.n_groups)[:, None]
        seen = nodes.clamp(min=0)[:, None]
        self._seen = (where[seen] * lean.n_groups + groups).flatten()
        self._from_clean = (where[seen] < 0).expand(-1, lean.n_groups, -1).flatten()
        self._seen_clean = (clean[seen] * lean.n_groups + groups).flatten()
        self.shape = shape
        self._rows: dict[tuple[str, int], Int[Tensor, " vector"]] = {}

    def bias(self, window: int | None) -> Float[Tensor, "example query_pos pos"]:
        """Zero where a query sees a position, minus infinity elsewhere; ``window`` is the layer's."""
        window = None if window is not None and window >= self.shape[3] else window
        if window not in self._bias:
            visible = (self._distance >= 0) & self._there
            if window is not None:
                visible = visible & (self._distance < window)
            bias = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(~visible, -torch.inf)
            self._bias[window] = bias.to(self.nodes.device)
        return self._bias[window]

    def flat_bias(self, window: int | None) -> Float[Tensor, " score"]:
        """The bias as scores lie in memory: example, group, position, head of the group, query position."""
        window = None if window is not None and window >= self.shape[3] else window
        if window not in self._flat_bias:
            laid_out = self.bias(window).transpose(1, 2)[:, None, None].expand(self.shape).transpose(2, 3)
            self._flat_bias[window] = laid_out.reshape(-1)
        return self._flat_bias[window]

    def _of_rows(self, name: str, rows: int, clean: int = 0) -> Int[Tensor, " vector"]:
        """The numbers of the vectors to take, for as many rows."""
        if (name, rows) not in self._rows:
            row = torch.arange(rows)[:, None]
            if name == "asked":
                found = self._asked + row * (self._queries * self._heads)
            elif name == "answered":
                found = self._answered + row * (len(self._asked))
            else:
                found = self._seen + row * (self._active * self._groups) + clean
                found = torch.where(self._from_clean, self._seen_clean, found)
            self._rows[name, rows] = found.flatten().to(self.nodes.device)
        return self._rows[name, rows]

    def asked(self, q: Float[Tensor, "row query head d_head"]) -> Float[Tensor, "row example group asked d_head"]:
        """Queries laid out; the heads of a group stand below one another."""
        examples, groups, heads, _, width = self.shape
        vectors = q.reshape(-1, q.shape[-1]).index_select(0, self._of_rows("asked", len(q)))
        return vectors.view(len(q), examples, groups, heads * width, -1)

    def seen(
        self, new: Float[Tensor, "row active group d_head"], clean: Float[Tensor, "node group d_head"] | None
    ) -> Float[Tensor, "row example group pos d_head"]:
        """Keys or values laid out; the clean run's may be left out if every node is active."""
        examples, groups, _, length, _ = self.shape
        vectors, before = new.reshape(-1, new.shape[-1]), 0
        if clean is not None:
            before = clean.shape[0] * groups
            vectors = torch.cat([clean.flatten(0, 1), vectors])
        found = vectors.index_select(0, self._of_rows("seen", len(new), before))
        return found.view(len(new), examples, groups, length, -1)

    def answered(self, z: Tensor, rows: int) -> Float[Tensor, "row query head d_head"]:
        """Heads' outputs, laid out as `asked`, back in the order of the queries."""
        vectors = z.reshape(-1, z.shape[-1]).index_select(0, self._of_rows("answered", rows))
        return vectors.view(rows, self._queries, self._heads, -1)


@dataclass
class Attention:
    """What a change inside attention may need.

    Attributes:
        queries: how it is laid out.
        weights: of the layer.
        q: ``[row, example, group, asked, d_head]``.
        k: ``[row, example, group, pos, d_head]``.
        v: like the keys.
    """

    queries: Queries
    weights: LeanLayer
    q: Tensor
    k: Tensor
    v: Tensor

    def z(self) -> Float[Tensor, "row query head d_head"]:
        """Every head's output."""
        rows = len(self.q)
        q, k, v = (x.flatten(0, 2) for x in (self.q, self.k, self.v))
        # keys come first, so that the softmax runs down columns: down short rows it is four times slower
        room = q.new_empty(len(q), k.shape[1], q.shape[1])
        scores = torch.baddbmm(room, k, q.transpose(1, 2), beta=0, alpha=self.weights.score_scale)
        scores = self.weights.capped(scores)
        scores = scores.view(rows, -1).add_(self.queries.flat_bias(self.weights.window)).view_as(room)
        return self.queries.answered(scores.softmax(1).transpose(1, 2) @ v, rows)

    def pattern(self, row: int, head: int) -> Float[Tensor, "example query_pos pos"]:
        """The attention pattern of one head in one row."""
        group, within = divmod(head, self.queries.shape[2])
        width = self.queries.shape[4]
        q = self.q[row, :, group, within * width : (within + 1) * width]
        scores = self.weights.capped(q @ self.k[row, :, group].transpose(1, 2) * self.weights.score_scale)
        pattern: Tensor = (scores + self.queries.bias(self.weights.window)).softmax(-1)
        return pattern

    def mixed(
        self, row: int, head: int, pattern: Float[Tensor, "example query_pos pos"]
    ) -> Float[Tensor, "query d_head"]:
        """The head's z under another pattern."""
        values = self.v[row, :, head // self.queries.shape[2]]
        return (pattern.to(values.dtype) @ values).flatten(0, 1)[self.queries.back]


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
