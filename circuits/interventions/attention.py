"""Attention of many interventions at once, among the nodes of a `TokenTree`.

1. Vectors come as ``[row, node, head, d_head]``, a row for each intervention. `Queries` lays them out by example and
   position, and what heads put out back by node: which vector goes where is worked out once for a tree.
2. Only some nodes ask. Keys and values of nodes that no intervention reaches are taken from the clean run.
3. Heads of a group that share keys and values stand below one another, so that a layer's scores are one product.
4. A query sees the positions up to its own, within the layer's window. One that only fills the grid sees the first.
5. The pattern of one head in one row can be asked for by itself, and its z be made under another pattern.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.interventions.tokens import TokenTree
from circuits.models import LeanLayer, LeanModel


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
