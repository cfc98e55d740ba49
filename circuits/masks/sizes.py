"""Shared Size: how much of a mask each unit holds (arXiv 2505.16178, section 3).

1. The Shared Size of a unit: how many of its parameters lie in the mask.
2. A key/value slice belongs to its group, and each of the group's query heads gets an equal share of it.
3. The units of a mask: those whose Shared Size is above zero, the largest first.
"""

from typing import Any, overload

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.mask import ParameterMask, check_mask
from circuits.units import Head, KVGroup, Neuron, Unit, layer_of, layout_of


def shared_size(mask: ParameterMask, kind: type[Head] | type[KVGroup] | type[Neuron]) -> pandas.DataFrame:
    """Shared Size: how many parameters of each unit lie in a mask. By layer: `ParameterMask.by_layer`.

    Args:
        mask: usually the shared parameters.
        kind: `Head`, `KVGroup` or `Neuron`.

    Returns:
        One row for each unit: ``unit``, ``layer``, ``index``, ``size`` (a head with grouped keys and values gets its
        equal share of the group's, so it may be fractional), ``parameters`` (how many it owns) and ``fraction``; for
        heads also ``query_output`` and ``key_value``, the two parts of ``size``.

    Raises:
        CircuitsError: the mask covers no parameters of such units.

    Source:
        arXiv 2505.16178, section 3 (Shared Size).
    """
    counted = unit_counts(mask, kind)
    if not counted:
        raise CircuitsError(f"the mask covers no parameters of {kind.NOUN}s")
    tables = []
    for layer, (own, part, owned, owned_part) in sorted(counted.items()):
        columns = {
            "unit": [str(kind(layer, index)) for index in range(len(own))],
            "layer": layer,
            "index": range(len(own)),
            "size": (own + part).numpy(),
            "parameters": (owned + owned_part).numpy(),
            "fraction": ((own + part) / (owned + owned_part)).numpy(),
        }
        if kind is Head:
            columns |= {"query_output": own.numpy(), "key_value": part.numpy()}
        tables.append(pandas.DataFrame(columns))
    return pandas.concat(tables, ignore_index=True)


@overload
def units_of(mask: ParameterMask, *, top: int | None = None) -> list[Head]: ...
@overload
def units_of(mask: ParameterMask, kind: type[Unit], *, top: int | None = None) -> list[Unit]: ...
def units_of(mask: ParameterMask, kind: Any = Head, *, top: int | None = None) -> list[Any]:
    """The units that hold most of a mask: those with the largest Shared Size first, equal ones in the model's order.

    Args:
        mask: usually the shared parameters.
        kind: `Head`, `KVGroup` or `Neuron`.
        top: so many of them at most; all that hold any parameter of the mask if not given.

    Raises:
        CircuitsError: ``top`` is below 1, or no such unit holds a parameter of the mask.

    Source:
        arXiv 2505.16178, section 3 (Shared Size).

    Example:
        >>> queries = torch.zeros(3, 4, 2, dtype=torch.bool)
        >>> queries[1, 0, 0] = queries[2] = True
        >>> mask = ParameterMask({"blocks.5.attn.W_Q": queries}, model="a")
        >>> [str(head) for head in units_of(mask)], units_of(mask, top=1)
        (['L5H2', 'L5H1'], [Head(layer=5, index=2)])
    """
    if top is not None and top < 1:
        raise CircuitsError(f"top is {top}: it must be 1 or more")
    table = shared_size(mask, kind)
    # sizes are sums of parts of groups: equal ones may differ in their last bit
    ordered = table.assign(size=table["size"].round(6)).sort_values("size", ascending=False, kind="stable")
    held = ordered[ordered["size"] > 0].head(len(ordered) if top is None else top)
    if held.empty:
        raise CircuitsError(f"no {kind.NOUN} holds a parameter of the mask: take a larger mask or another kind")
    return [kind(layer, index) for layer, index in zip(held["layer"], held["index"], strict=True)]


def unit_counts(
    mask: ParameterMask, kind: type[Head] | type[KVGroup] | type[Neuron]
) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Layer → for each unit: entries in the mask that are its own, its share of its group's, and of how many."""
    groups = owned_counts(mask, KVGroup) if kind is Head else {}
    found = {}
    for layer, (own, owned) in owned_counts(mask, kind).items():
        part, owned_part = torch.zeros_like(own), torch.zeros_like(owned)
        if layer in groups:
            repeats = len(own) // len(groups[layer][0])
            part, owned_part = (value.repeat_interleave(repeats) / repeats for value in groups[layer])
        found[layer] = (own, part, owned, owned_part)
    return found


def owned_counts(
    mask: ParameterMask, kind: type[Head] | type[KVGroup] | type[Neuron]
) -> dict[int, tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]]:
    """Layer → entries of each unit in the mask, and entries it owns."""
    check_mask(mask)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for name in mask.masks:
        layer, layout = layer_of(name), layout_of(name)
        if layout.unit is not kind or layer is None:
            continue
        by_unit = mask.masks[name].movedim(layout.axis, 0)
        sizes = by_unit.reshape(len(by_unit), -1).sum(1).double()
        owned = torch.full_like(sizes, by_unit[0].numel())
        before = found.get(layer, (torch.zeros_like(sizes), torch.zeros_like(owned)))
        found[layer] = (before[0] + sizes, before[1] + owned)
    return found
