"""Writing interventions into the activations of a run.

1. A unit stands for one or more activations, its sites: a head for its output z, a key/value group for its keys and
   values, and for ``revert`` all that the unit's own weights write.
2. A `Context` knows, for one tree of prompts and one mode, which nodes are changed and what goes there (``values.py``);
   ``revert`` computes it from what stands before the unit in the same run.
3. `Changes` visits a run of several interventions, one in each row, and at each site overwrites the units of the rows
   that have some there, at the changed nodes. A pattern is overwritten for the queries there, and z is made anew.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from circuits.errors import CircuitsError
from circuits.interventions.attention import Attention, Queries
from circuits.interventions.forward import Forward, Visitor
from circuits.interventions.intervention import Intervention
from circuits.interventions.values import Matched, Means
from circuits.models import LeanModel, Site
from circuits.units import AnyUnit, Component, Head, KVGroup, Neuron

#: Tables of values kept ready.
_KEPT = 8


def sites_of(intervention: Intervention, grouped: bool) -> list[tuple[Site, AnyUnit]]:
    """Where an intervention acts: layer and activation, for each unit.

    Raises:
        CircuitsError: a head's keys or values belong to its group.
    """
    found: list[tuple[Site, AnyUnit]] = []
    for unit in intervention.units:
        if intervention.mode == "revert":
            names = _reverted(unit, grouped)
        elif isinstance(unit, Component):
            names = (unit.name,)
        elif isinstance(unit, Neuron):
            names = ("post",)
        elif isinstance(unit, KVGroup):
            names = ("k", "v") if intervention.site in (None, "kv") else (str(intervention.site),)
        else:
            names = (intervention.site or "z",)
            if grouped and names[0] in ("k", "v"):
                raise CircuitsError(
                    f"{unit} has no {names[0]} of its own in this model: act on its key/value group instead"
                )
        found += [((unit.layer, name), unit) for name in names]
    return found


def _reverted(unit: AnyUnit, grouped: bool) -> tuple[str, ...]:
    """The activations that a unit's own weights write; what it adds to the stream, before a post-norm."""
    if isinstance(unit, Head):
        return ("q", "o") if grouped else ("q", "k", "v", "o")
    return ("k", "v") if isinstance(unit, KVGroup) else ("post", "down")


class Context:
    """One tree of prompts, and the values that interventions of one mode put in.

    Args:
        forward: of the tree.
        mode: of the interventions.
        means: for the mean modes.
        matched: for ``patch`` and ``resample``.
        pre: for ``revert``: the model before fine-tuning.
    """

    def __init__(
        self,
        forward: Forward,
        mode: str,
        means: Means | None = None,
        matched: Matched | None = None,
        pre: LeanModel | None = None,
    ) -> None:
        self.forward, self.mode = forward, mode
        self._lean, self._means, self._matched, self._pre = forward.lean, means, matched, pre
        self._changed = forward.tree.changed.to(self._lean.device)
        self._matching = None if matched is None else matched.at(forward.tree).to(self._lean.device)
        self._positions = forward.tree.positions.to(self._lean.device)
        self._nodes: Tensor | None = None
        self._where: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[Site, int], Tensor] = {}

    @property
    def changed(self) -> Int[Tensor, " changed"]:
        """The nodes that are changed."""
        if self._nodes is None:
            self._nodes = self._changed.nonzero().flatten()
        return self._nodes

    def where(self, queries: Queries | None) -> tuple[Int[Tensor, " changed"], Int[Tensor, " changed"]]:
        """Where the changed nodes stand among the queries (or all active nodes), and which nodes they are."""
        key = 0 if queries is None else id(queries)
        if key not in self._where:
            nodes = self.forward.active if queries is None else queries.nodes
            chosen = self._changed[nodes].nonzero().flatten()
            self._where[key] = (chosen, nodes[chosen])
        return self._where[key]

    def value(self, site: Site, nodes: Int[Tensor, " changed"], unit: AnyUnit) -> Tensor:
        """What goes to a unit's activation at these nodes: ``[changed or 1, ...]``, or a zero."""
        table = self.table(site, nodes)
        return table if isinstance(unit, Component) or table.dim() == 0 else table[:, unit.index]

    def table(self, site: Site, nodes: Int[Tensor, " changed"]) -> Tensor:
        """What goes to a whole activation at these nodes: ``[changed or 1, ...]``, or a zero."""
        if self.mode == "zero":
            return torch.zeros((), dtype=self._lean.dtype, device=self._lean.device)
        key = (site, id(nodes))
        if key not in self._tables:
            # rows go through a layer together: tables of layers long past are not used again
            if len(self._tables) >= _KEPT:
                self._tables.pop(next(iter(self._tables)))
            if self._matched is not None:
                assert self._matching is not None
                found = self._matched.found[site][self._matching[nodes]]
            else:
                assert self._means is not None
                pooled = self.mode == "mean"
                found = self._means.pooled(site) if pooled else self._means.by_position(site, self._positions[nodes])
            self._tables[key] = found.to(self._lean.dtype)
        return self._tables[key]

    def revert(self, site: Site, x: Tensor, source: Tensor, where: Tensor, unit: AnyUnit) -> None:
        """Let the weights before fine-tuning compute one unit's part of an activation of one row, in place.

        Args:
            site: layer and activation.
            x: the activation of the row, ``[node, ...]``.
            source: what it is computed from: the normalised stream, z, or the neurons.
            where: which of the nodes.
            unit: the unit.
        """
        assert self._pre is not None
        assert not isinstance(unit, Component)
        layer, name = site
        before, now, index = self._pre.layers[layer], self._lean.layers[layer], unit.index
        alone = slice(index, index + 1)
        if name in ("q", "k", "v"):
            weight = {"q": before.q, "k": before.k, "v": before.v}[name]
            x[where, index] = weight.part(alone)(source[where])
        elif name == "o":
            features = slice(index * self._lean.d_head, (index + 1) * self._lean.d_head)
            x[where] += source[where, index] @ (before.o.weight[:, features] - now.o.weight[:, features]).T
        elif name == "post":
            x[where, index] = before.neurons(source[where], alone)[:, 0]
        else:
            x[where] += source[where, index, None] * (before.down.weight[:, index] - now.down.weight[:, index])


class Changes(Visitor):
    """Writes the changes of a batch of interventions into the activations.

    Args:
        rows: the interventions, one for each row of the activations.
        context: the values they put in.
        grouped: whether several heads share keys and values.
    """

    def __init__(self, rows: Sequence[Intervention], context: Context, grouped: bool) -> None:
        self._context = context
        self._at: dict[Site, list[tuple[int, AnyUnit]]] = {}
        for row, intervention in enumerate(rows):
            for site, unit in sites_of(intervention, grouped):
                self._at.setdefault(site, []).append((row, unit))

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:
        """Change the rows whose units write this activation."""
        if site not in self._at:
            return x
        where, nodes = self._context.where(queries)
        if len(nodes) == 0:
            return x
        for row, unit in self._at[site]:
            if self._context.mode == "revert":
                assert source is not None
                self._context.revert(site, x[row], source[row], where, unit)
            elif isinstance(unit, Component):
                x[row, where] = self._context.value(site, nodes, unit)
            else:
                x[row, where, unit.index] = self._context.value(site, nodes, unit)
        return x

    def attention(self, layer: int, z: Tensor, attention: Attention) -> Tensor:
        """Change z of the rows whose heads get another pattern."""
        site = (layer, "pattern")
        where, nodes = self._context.where(attention.queries)
        if site not in self._at or len(nodes) == 0:
            return z
        back = attention.queries.back[where]
        for row, unit in self._at[site]:
            assert isinstance(unit, Head)
            pattern = attention.pattern(row, unit.index)
            flat = pattern.flatten(0, 1)
            value = self._context.value(site, nodes, unit)
            # a reference may be shorter or longer than the prompts; padding by a negative number cuts
            flat[back] = functional.pad(value, (0, flat.shape[-1] - value.shape[-1])) if value.dim() else value
            z[row, :, unit.index] = attention.mixed(row, unit.index, flat.view_as(pattern))
        return z
