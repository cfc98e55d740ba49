"""What to do to which units at which tokens: the description of an intervention, apart from how it is computed.

1. A unit is a head, a key/value group, a neuron, or a whole activation of a layer (a component).
2. A mode says what takes the place of the unit's activation: ``zero``; ``mean`` over all tokens of a reference set, or
   ``mean_by_position``; ``resample``, its value in another example of the reference set, at the same position;
   ``patch``, its value in the source run at the matching position; ``revert``, what the unit computes with its own
   weights from before fine-tuning.
3. Positions say at which tokens: all, one position, or those of a span that the task has a name for.
4. Several units of one intervention are changed together: alone, in pairs, or cumulatively along a ranking.
5. Each activation is overwritten when the run comes to it, in the order of the model: residual stream, q, k and v,
   pattern, z, attention output, middle of the layer, neurons, MLP output, next residual stream. So what stands later
   prevails: a head's z has no effect at tokens where its layer's attention output is changed too, nor queries and keys
   under a pattern of their own. What is put in comes from other runs or from nowhere, never from the changed one; only
   ``revert`` computes from what earlier changes have left.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import Any

from circuits.errors import CircuitsError
from circuits.units import AnyUnit, Component, Head, KVGroup, Neuron

MODES: tuple[str, ...] = ("zero", "mean", "mean_by_position", "resample", "patch", "revert")

#: Where each kind of unit can be changed; the first is the default. ``kv`` is keys and values together.
UNIT_SITES: dict[type, tuple[str, ...]] = {
    Head: ("z", "q", "k", "v", "pattern"),
    KVGroup: ("kv", "k", "v"),
    Neuron: ("post",),
}


@dataclass(frozen=True)
class Intervention:
    """Units that are changed together in one run.

    Attributes:
        units: which.
        mode: one of `MODES`.
        site: where a head (``z``, ``q``, ``k``, ``v``, ``pattern``) or a key/value group (``kv``, ``k``, ``v``) is
            changed; by default a head's output z, and a group's keys and values.
        positions: a position counted from 0, or the name of a span: ``all``, ``answer``, ``last`` (the token that
            predicts an answer's first one), or one that the task has. A pattern is changed for the queries there.

    Raises:
        CircuitsError: there is no unit, one twice, or something that is none; no such mode, site or position.

    Example:
        >>> str(Intervention((Head(2, 1), Head(3, 0)), "mean", positions="subject"))
        'mean L2H1+L3H0 at subject'
    """

    units: tuple[AnyUnit, ...]
    mode: str = "zero"
    site: str | None = None
    positions: int | str = "all"

    def __post_init__(self) -> None:
        units: Any = self.units
        positions: Any = self.positions
        if isinstance(units, str) or not isinstance(units, Sequence):
            raise CircuitsError(f"the units of an intervention are {units!r}: give a tuple, such as (Head(2, 1),)")
        object.__setattr__(self, "units", tuple(units))
        for unit in units:
            if not isinstance(unit, AnyUnit):
                raise CircuitsError(f"{unit!r} is no unit: give one such as Head(2, 1) or parse_unit('L2H1')")
        if isinstance(positions, Integral):
            object.__setattr__(self, "positions", int(positions))
        elif not isinstance(positions, str):
            raise CircuitsError(f"there are no positions {positions!r}: give a number or the name of a span")
        if not self.units:
            raise CircuitsError("an intervention needs a unit to act on: none was given")
        if len(set(self.units)) < len(self.units):
            raise CircuitsError(f"the intervention {'+'.join(map(str, self.units))} names a unit twice")
        if self.mode not in MODES:
            raise CircuitsError(f"there is no mode {self.mode!r}: choose from {', '.join(MODES)}")
        for unit in self.units:
            allowed = UNIT_SITES.get(type(unit), ())
            if self.site is not None and self.site not in allowed:
                choices = f"choose from {', '.join(allowed)}" if allowed else "leave it out"
                raise CircuitsError(f"{unit} has no site {self.site!r}: {choices}")
        if isinstance(self.positions, int) and self.positions < 0:
            raise CircuitsError(f"there is no position {self.positions}: positions count from 0")
        if self.mode == "mean" and self.site == "pattern":
            raise CircuitsError("a pattern has no mean over all tokens: use mean_by_position")
        if self.mode == "revert":
            if self.site is not None:
                raise CircuitsError("reverting acts on a unit's weights, not at a site: leave the site out")
            for unit in self.units:
                if isinstance(unit, Component):
                    raise CircuitsError(f"{unit} has no weights of its own to revert: choose heads, groups or neurons")

    def __str__(self) -> str:
        site = f" {self.site}" if self.site else ""
        where = "" if self.positions == "all" else f" at {self.positions}"
        return f"{self.mode} {'+'.join(map(str, self.units))}{site}{where}"

    @property
    def layer(self) -> int:
        """The lowest layer that is changed."""
        return min(unit.layer for unit in self.units)


def single(
    units: Iterable[AnyUnit], mode: str = "zero", site: str | None = None, *, positions: int | str = "all"
) -> list[Intervention]:
    """Each unit alone.

    Example:
        >>> [str(one) for one in single([Head(0, 0), Head(0, 1)])]
        ['zero L0H0', 'zero L0H1']
    """
    return [Intervention((unit,), mode, site, positions) for unit in units]


def pairs(
    units: Iterable[AnyUnit], mode: str = "zero", site: str | None = None, *, positions: int | str = "all"
) -> list[Intervention]:
    """Every two of the units together.

    Example:
        >>> [str(one) for one in pairs([Head(0, 0), Head(0, 1), Head(1, 0)])]
        ['zero L0H0+L0H1', 'zero L0H0+L1H0', 'zero L0H1+L1H0']
    """
    return [Intervention(pair, mode, site, positions) for pair in combinations(units, 2)]


def cumulative(
    units: Iterable[AnyUnit], mode: str = "zero", site: str | None = None, *, positions: int | str = "all"
) -> list[Intervention]:
    """The first unit, the first two, and so on: along a ranking.

    Example:
        >>> [str(one) for one in cumulative([Head(3, 1), Head(0, 2)])]
        ['zero L3H1', 'zero L3H1+L0H2']
    """
    ranking = tuple(units)
    return [Intervention(ranking[:count], mode, site, positions) for count in range(1, len(ranking) + 1)]
