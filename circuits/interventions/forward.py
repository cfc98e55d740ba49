"""Running many interventions of one model through its layers at once.

1. The clean run computes every node of a `TokenTree` once and keeps the stream before each layer, keys and values.
2. A batch of interventions is a tensor ``[row, active, d_model]``: a row for each intervention, and only the nodes that
   the intervention reaches. It starts at the lowest layer that is changed, from the clean stream; where only what
   comes after attention is changed, from the clean output of that layer's attention.
3. In each layer the rows' changes are written in at their sites. Attention is the one place where nodes meet: queries,
   keys and values are laid out as ``[row, example, pos]``, inactive keys and values taken from the clean run.
4. In the last layer only the nodes that predict answer tokens go on after keys and values.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.interventions.tokens import TokenTree
from circuits.models import LeanModel

#: Where an activation stands: its layer and its name.
Site = tuple[int, str]


@dataclass(frozen=True)
class Queries:
    """Which nodes ask in attention, and what they see.

    Attributes:
        nodes: the nodes that ask, ``[query]``.
        within: where they stand among the active nodes; None if they are all of them.
        grid: for each example and query position, the index of the query; ``[example, query_pos]``.
        keys: for each example and position, the node; ``[example, pos]``.
        bias: zero where a query of the grid sees a position, minus infinity elsewhere; ``[example, query_pos, pos]``.
        back: for each query, where in the flattened grid it stands.
    """

    nodes: Int[Tensor, " query"]
    within: Int[Tensor, " query"] | None
    grid: Int[Tensor, "example query_pos"]
    keys: Int[Tensor, "example pos"]
    bias: Float[Tensor, "example query_pos pos"]
    back: Int[Tensor, " query"]

    @classmethod
    def of(cls, tree: TokenTree, chosen: Int[Tensor, " query"], device: torch.device, dtype: torch.dtype) -> "Queries":
        """Lay out the queries of these nodes; examples without any of them are left out."""
        number = torch.full((len(tree) + 1,), -1)
        number[chosen] = torch.arange(len(chosen))
        asks = number[tree.nodes] >= 0  # node -1 is the last entry: never chosen
        kept = asks.any(1)
        nodes, asks = tree.nodes[kept], asks[kept]
        count = asks.sum(1)
        width = int(count.max())
        # each example's queries, moved to the left
        order = (~asks).int().argsort(dim=1, stable=True)[:, :width]
        real = torch.arange(width)[None] < count[:, None]
        grid = torch.where(real, number[nodes.gather(1, order)], 0)
        positions = torch.arange(nodes.shape[1])
        # a query that only fills the grid sees the first position, so that its softmax is defined
        visible = (positions[None, None] <= torch.where(real, order, 0)[:, :, None]) & (nodes >= 0)[:, None]
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
        back = torch.zeros(len(chosen), dtype=torch.long)
        back[grid[real]] = real.flatten().nonzero().flatten()
        everything = torch.equal(chosen, tree.active)
        within = torch.searchsorted(tree.active, chosen)
        return cls(
            chosen.to(device),
            None if everything else within.to(device),
            grid.to(device),
            nodes.clamp(min=0).to(device),
            bias.to(device),
            back.to(device),
        )

    def gather(self, x: Float[Tensor, "row query heads d_head"]) -> Float[Tensor, "row example query_pos heads d_head"]:
        """Lay values of queries out on the grid."""
        laid_out: Tensor = x.index_select(1, self.grid.flatten()).unflatten(1, self.grid.shape)
        return laid_out


@dataclass
class Attention:
    """What a change inside attention may need: laid out as ``[row, example, pos, heads, d_head]``."""

    queries: Queries
    q: Tensor
    k: Tensor
    v: Tensor

    def z(self) -> Float[Tensor, "row query heads d_head"]:
        """Every head's output."""
        rows, groups, width = len(self.q), self.k.shape[3], self.q.shape[-1]
        # the heads of a group stand below one another: one product serves them all
        q = rearrange(self.q, "row example pos (group head) d -> (row example) group (head pos) d", group=groups)
        scores = q @ rearrange(self.k, "row example pos group d -> (row example) group d pos")
        scores = scores.mul(width**-0.5).unflatten(0, (rows, -1)).unflatten(3, (-1, self.q.shape[2]))
        pattern = (scores + self.queries.bias[:, None, None]).softmax(-1).flatten(0, 1).flatten(2, 3)
        mixed = pattern @ rearrange(self.v, "row example pos group d -> (row example) group pos d")
        z = rearrange(
            mixed,
            "(row example) group (head pos) d -> row (example pos) (group head) d",
            row=rows,
            pos=self.q.shape[2],
        )
        queries: Tensor = z.index_select(1, self.queries.back)
        return queries

    def pattern(self, row: int, head: int) -> Float[Tensor, "example query_pos pos"]:
        """The attention pattern of one head in one row."""
        repeats = self.q.shape[3] // self.k.shape[3]
        q, k = self.q[row, :, :, head], self.k[row, :, :, head // repeats]
        pattern: Tensor = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + self.queries.bias).softmax(-1)
        return pattern

    def mixed(
        self, row: int, head: int, pattern: Float[Tensor, "example query_pos pos"]
    ) -> Float[Tensor, "query d_head"]:
        """The head's z under another pattern."""
        repeats = self.q.shape[3] // self.k.shape[3]
        values = self.v[row, :, :, head // repeats]
        return (pattern.to(values.dtype) @ values).flatten(0, 1)[self.queries.back]


class Visitor:
    """Looks at activations as they are computed, or changes them; this one does neither."""

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the activation, ``[row, node, ...]``, changed or not.

        Args:
            site: layer and name.
            x: the activation at the queries' nodes, or at all active nodes if ``queries`` is None.
            queries: the nodes, if not all active ones.
            source: what the activation was computed from: the normalised stream, z, or the neurons.
        """
        return x

    def attention(self, layer: int, z: Tensor, attention: Attention) -> Tensor:  # noqa: ARG002
        """Return z, ``[row, query, head, d_head]``, changed or not."""
        return z


_NOBODY = Visitor()


@dataclass
class CleanRun:
    """The clean run of a tree, kept.

    Attributes:
        tree: its nodes.
        streams: the stream before each layer, ``[node, d_model]`` each.
        keys: rotated keys of each layer, ``[node, group, d_head]`` each.
        values: values of each layer.
        last: the stream after the last layer at the nodes that predict answer tokens, ``[answer_token, d_model]``.
    """

    tree: TokenTree
    streams: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    last: Tensor = field(default_factory=lambda: torch.zeros(0))


class Forward:
    """The layers of a lean model over one tree of tokens.

    Args:
        lean: the model.
        tree: the tokens.
        everywhere: let all active nodes go on in the last layer too, so that a visitor sees them.
    """

    def __init__(self, lean: LeanModel, tree: TokenTree, everywhere: bool = False) -> None:
        self.lean, self.tree, self._everywhere = lean, tree, everywhere
        device = lean.device
        every = torch.arange(len(tree))
        # the clean run of the whole tree is the same computation with every node active
        self._whole = TokenTree(tree.tokens, tree.positions, tree.changed, every, tree.nodes, tree.predicting)
        self.active = tree.active.to(device)
        self._all_active = len(tree.active) == len(tree)
        self._queries = Queries.of(tree, tree.active, device, lean.dtype) if len(tree.active) else None
        reached = tree.active if everywhere else tree.active[torch.isin(tree.active, tree.predicting)]
        self.final = Queries.of(tree, reached, device, lean.dtype) if len(reached) else None
        # answer tokens whose predicting node is reached, and where it stands among the final queries
        reaches = torch.isin(tree.predicting, reached)
        self.answers = reaches.nonzero().flatten().to(device)
        self._answer_query = torch.searchsorted(reached, tree.predicting[reaches]).to(device)
        cos, sin = lean.rotary(tree.positions)
        self._angles = (cos[self.active], sin[self.active])
        self.clean = CleanRun(tree)
        self._clean_z: tuple[int, Tensor] | None = None

    def run_clean(self, visitor: Visitor = _NOBODY) -> CleanRun:
        """Run every node once, and keep streams, keys and values."""
        whole = self if self._all_active else Forward(self.lean, self._whole, self._everywhere)
        x = self.lean.embed(self.tree.tokens)[None]
        if torch.is_grad_enabled():
            x.requires_grad_()
        for layer in range(self.lean.n_layers):
            self.clean.streams.append(x[0])
            x = whole._layer(layer, x, visitor, keep=self.clean)
        self.clean.last = x[0][whole._answer_query]
        return self.clean

    def run(self, rows: int, start: int, late: bool, visitor: Visitor) -> Float[Tensor, "row answer_token d_model"]:
        """Run interventions from the clean stream before a layer.

        Args:
            rows: how many interventions.
            start: the lowest layer that is changed.
            late: whether that layer is changed only after its attention.
            visitor: writes the changes in.

        Returns:
            the stream after the last layer at the nodes that predict answer tokens.
        """
        result = self.clean.last.expand(rows, -1, -1)
        if self.final is None:
            return result
        x = self.clean.streams[start][self.active].expand(rows, -1, -1)
        z = self._clean_attention(start).expand(rows, -1, -1, -1) if late else None
        for layer in range(start, self.lean.n_layers):
            x = self._layer(layer, x, visitor, z=z if layer == start else None)
        if len(self.answers) == result.shape[1]:
            return x.index_select(1, self._answer_query)
        result = result.clone()
        result[:, self.answers] = x.index_select(1, self._answer_query)
        return result

    def _clean_attention(self, layer: int) -> Float[Tensor, "1 query head d_head"]:
        """Z of the clean run at the nodes that go on in this layer; the last one asked for is kept."""
        if self._clean_z is None or self._clean_z[0] != layer:
            x = self.clean.streams[layer][self.active][None]
            self._clean_z = (layer, self._attend(layer, x, _NOBODY, None))
        return self._clean_z[1]

    def _going_on(self, layer: int) -> Queries:
        """The nodes that go on after keys and values: in the last layer those that predict answers."""
        queries = self.final if layer == self.lean.n_layers - 1 else self._queries
        assert queries is not None  # a tree without active nodes is not run
        return queries

    def _attend(
        self, layer: int, x: Float[Tensor, "row active d_model"], visitor: Visitor, keep: CleanRun | None
    ) -> Float[Tensor, "row query head d_head"]:
        lean, weights = self.lean, self.lean.layers[layer]
        queries = self._going_on(layer)
        normed = weights.norm1(x)
        asking = normed if queries.within is None else normed.index_select(1, queries.within)
        q, k, v = lean.heads(weights.q(asking)), lean.heads(weights.k(normed)), lean.heads(weights.v(normed))
        q = visitor((layer, "q"), q, queries, asking)
        k = visitor((layer, "k"), k, None, normed)
        v = visitor((layer, "v"), v, None, normed)
        angles = self._angles
        k = lean.rotate(k, angles)
        q = lean.rotate(q, angles if queries.within is None else (angles[0][queries.within], angles[1][queries.within]))
        if keep is not None:
            keep.keys.append(k[0])
            keep.values.append(v[0])
        elif not self._all_active:
            k, v = self._beside_clean(k, self.clean.keys[layer]), self._beside_clean(v, self.clean.values[layer])
        where = queries.keys.flatten()
        attention = Attention(
            queries,
            queries.gather(q),
            k.index_select(1, where).unflatten(1, queries.keys.shape),
            v.index_select(1, where).unflatten(1, queries.keys.shape),
        )
        z = attention.z()
        return visitor.attention(layer, z, attention)

    def _beside_clean(
        self, new: Float[Tensor, "row active group d_head"], clean: Float[Tensor, "node group d_head"]
    ) -> Float[Tensor, "row node group d_head"]:
        together = clean.expand(len(new), -1, -1, -1).clone()
        together[:, self.active] = new
        return together

    def _layer(
        self,
        layer: int,
        x: Float[Tensor, "row active d_model"],
        visitor: Visitor,
        keep: CleanRun | None = None,
        z: Float[Tensor, "row query head d_head"] | None = None,
    ) -> Float[Tensor, "row query d_model"]:
        lean, weights, queries = self.lean, self.lean.layers[layer], self._going_on(layer)
        x = visitor((layer, "resid_pre"), x, None, None)
        if z is None:
            z = self._attend(layer, x, visitor, keep)
        if queries.within is not None:
            x = x.index_select(1, queries.within)
        z = visitor((layer, "z"), z, queries, None)
        middle = x + visitor((layer, "attn_out"), weights.o(z.flatten(2)), queries, z)
        if not lean.parallel:
            middle = visitor((layer, "resid_mid"), middle, queries, None)
        normed = weights.norm2(x if lean.parallel else middle)
        neurons = visitor((layer, "post"), weights.hidden(normed), queries, normed)
        mlp_out = visitor((layer, "mlp_out"), weights.down(neurons), queries, neurons)
        return visitor((layer, "resid_post"), middle + mlp_out, queries, None)


class Recorder(Visitor):
    """Keeps activations of a clean run by site; every node's, so the run must be of a whole tree."""

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
            patterns = [attention.pattern(0, head).flatten(0, 1) for head in range(attention.q.shape[3])]
            self.found[layer, "pattern"] = torch.stack(patterns, 1)[attention.queries.back]
        return z
