"""Influenced and shared parameters (arXiv 2505.16178, Definition 3.1 and Fig. 2a; docs/method.md, section 2).

1. The influenced set I of a task: the parameters with the largest trace, the top fraction k of all.
2. The shared parameters of several tasks: S = I₁ ∩ I₂ ∩ …
3. Chance: independent sets of the same sizes would share N · Π |Iₜ| / N; the lift is |S| over that. The control: the
   same intersection with all traces but the first permuted within each tensor, which keeps how much each tensor holds.
4. The Shared Size of a unit: how many of its parameters lie in S. A key/value slice belongs to its group, and each of
   the group's query heads gets an equal share of it.
5. Centralisation: the Gini coefficient of Shared Size over heads, and the share of S held by the top tenth of heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.mask import ParameterMask
from circuits.storage import provenance
from circuits.tracing import GradientTrace
from circuits.units import Head, KVGroup, Neuron, layer_of, layout_of


def influenced_parameters(trace: GradientTrace, fraction: float = 0.01) -> ParameterMask:
    """The influenced set of one task: the top fraction of all traced parameters.

    Args:
        trace: of the task.
        fraction: k, between 0 and 1; the set has exactly ``round(k · N)`` parameters, ties broken by position.

    Raises:
        CircuitsError: the fraction is not between 0 and 1, so many parameters have no gradient at all, or some have one
            that is not finite.

    Source:
        arXiv 2505.16178, Definition 3.1.
    """
    if not 0 < fraction < 1:
        raise CircuitsError(f"the fraction is {fraction}: it must lie between 0 and 1")
    values = torch.cat([gradient.flatten().abs() for gradient in trace.gradients.values()])
    if not values.isfinite().all():
        raise CircuitsError(f"the trace of {trace.task} has gradients that are not finite: trace the model in float32")
    count = max(1, round(fraction * len(values)))
    reached = int((values > 0).sum())
    if reached < count:
        raise CircuitsError(
            f"only {reached} of {len(values)} parameters have a gradient for the task {trace.task}: "
            f"choose a fraction below {reached / len(values):.4g}"
        )
    # all above the threshold, then as many that equal it as there is room for, in their order
    threshold = values.kthvalue(len(values) - count + 1).values
    chosen = values > threshold
    ties = (values == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    sizes = [gradient.numel() for gradient in trace.gradients.values()]
    masks = {
        name: part.view(gradient.shape)
        for (name, gradient), part in zip(trace.gradients.items(), chosen.split(sizes), strict=True)
    }
    return ParameterMask(
        masks,
        trace.provenance["model"],
        provenance(task=trace.task, fraction=fraction, trace=trace.provenance),
    )


def shared_parameters(traces: Sequence[GradientTrace], fraction: float = 0.01) -> ParameterMask:
    """The parameters that are influenced by every one of several tasks.

    Args:
        traces: two or more, of the same model.
        fraction: k of each influenced set.

    Raises:
        CircuitsError: fewer than two traces, traces of different models, or a fraction outside 0 to 1.

    Source:
        arXiv 2505.16178, Definition 3.1.

    Example:
        >>> def trace(task, values):
        ...     return GradientTrace(task, {"w": torch.tensor(values)}, {}, 1, {"model": "a"})
        >>> shared_parameters([trace("bio", [3.0, 2.0, 1.0, 0.5]), trace("qa", [0.1, 9.0, 8.0, 0.2])], 0.5)
        ParameterMask(1 of 4 parameters, 25.000%, model=a)
    """
    if len(traces) < 2:
        raise CircuitsError(f"sharing takes two tasks or more: {len(traces)} trace was given")
    return _intersection([influenced_parameters(trace, fraction) for trace in traces])


def _intersection(sets: Sequence[ParameterMask]) -> ParameterMask:
    shared = sets[0]
    for other in sets[1:]:
        shared = shared & other
    return ParameterMask(shared.masks, shared.model, provenance(shared=[one.provenance for one in sets]))


def sharing(traces: Sequence[GradientTrace], fraction: float = 0.01, draws: int = 5, seed: int = 0) -> dict[str, Any]:
    """How large the shared set is, against chance and against the permuted control.

    Args:
        traces: two or more, of the same model.
        fraction: k of each influenced set.
        draws: permutations of the control.
        seed: of the permutations.

    Returns:
        ``size`` |S|, ``total`` N, ``influenced`` k·N, ``share`` |S|/(k·N), ``jaccard``, ``chance`` (expected size of
        independent sets), ``lift`` = size / chance, ``permuted`` (mean size of the control), ``permuted_lift``, and
        ``gini`` and ``top_tenth`` of Shared Size over heads.

    Raises:
        CircuitsError: as `shared_parameters`.

    Source:
        arXiv 2505.16178, Fig. 2a; docs/method.md, section 2.
    """
    if len(traces) < 2:
        raise CircuitsError(f"sharing takes two tasks or more: {len(traces)} trace was given")
    sets = [influenced_parameters(trace, fraction) for trace in traces]
    shared = _intersection(sets)
    union = sets[0]
    for other in sets[1:]:
        union = union | other
    chance = shared.total * float(numpy.prod([one.size / shared.total for one in sets]))
    controls = [_permuted_size(sets, f"{seed}/{draw}") for draw in range(draws)]
    heads = shared_size(shared, Head)
    sizes = torch.tensor(heads["size"].to_numpy(copy=True))
    return {
        "size": shared.size,
        "total": shared.total,
        "influenced": sets[0].size,
        "share": shared.size / sets[0].size,
        "jaccard": shared.size / union.size,
        "chance": chance,
        "lift": shared.size / chance,
        "permuted": float(numpy.mean(controls)),
        "permuted_lift": float(numpy.mean(controls)) / chance,
        "gini": gini(sizes),
        "top_tenth": top_share(sizes, 0.1),
    }


def _permuted_size(sets: list[ParameterMask], seed: str) -> int:
    """Size of the intersection with all sets but the first permuted within each tensor.

    Permuting a trace within a tensor permutes which of its entries are influenced, and not how many.
    """
    shared = sets[0]
    for number, other in enumerate(sets[1:]):
        shared = shared & other.random(f"{seed}/{number}")
    return shared.size


def gini(values: Float[Tensor, " units"]) -> float:
    """Gini coefficient: 0 if all units have the same, towards 1 if one unit has all; 0 if there is nothing.

    Example:
        >>> gini(torch.tensor([1.0, 1.0, 1.0])), round(gini(torch.tensor([0.0, 0.0, 9.0])), 3)
        (0.0, 0.667)
    """
    ordered = values.double().sort().values
    total, count = float(ordered.sum()), len(ordered)
    if total == 0:
        return 0.0
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    return max(0.0, float(2 * (ranks * ordered).sum() / (count * total) - (count + 1) / count))


def top_share(values: Float[Tensor, " units"], fraction: float) -> float:
    """The share of the sum that the top fraction of units holds; at least one unit counts.

    Example:
        >>> round(top_share(torch.tensor([1.0, 2.0, 7.0]), 0.1), 2)
        0.7
    """
    total = float(values.sum())
    count = max(1, round(fraction * len(values)))
    return float(values.sort(descending=True).values[:count].sum()) / total if total else 0.0


def shared_size(mask: ParameterMask, kind: type[Head] | type[KVGroup] | type[Neuron]) -> pandas.DataFrame:
    """Shared Size: how many parameters of each unit lie in a mask.

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
    own, groups = _counts(mask, kind), _counts(mask, KVGroup)
    if not own:
        raise CircuitsError(f"the mask covers no parameters of {kind.NOUN}s")
    rows = []
    for layer, (sizes, owned) in sorted(own.items()):
        share, share_owned = torch.zeros_like(sizes), torch.zeros_like(owned)
        if kind is Head and layer in groups:
            repeats = len(sizes) // len(groups[layer][0])
            share, share_owned = (value.repeat_interleave(repeats) / repeats for value in groups[layer])
        elif kind is Head:
            share, share_owned = _counts(mask, Head, "KV").get(layer, (share, share_owned))
            sizes, owned = sizes - share, owned - share_owned
        for index in range(len(sizes)):
            parameters = float(owned[index] + share_owned[index])
            row = {
                "unit": str(kind(layer, index)),
                "layer": layer,
                "index": index,
                "size": float(sizes[index] + share[index]),
                "parameters": parameters,
                "fraction": float(sizes[index] + share[index]) / parameters,
            }
            if kind is Head:
                row |= {"query_output": float(sizes[index]), "key_value": float(share[index])}
            rows.append(row)
    return pandas.DataFrame(rows)


def _counts(
    mask: ParameterMask, kind: type[Head] | type[KVGroup] | type[Neuron], letters: str = ""
) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer → entries of each unit in the mask, and entries it owns; only of W and b with these letters, if given."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in mask.masks.items():
        layout, layer = layout_of(name), layer_of(name)
        if layout.unit is not kind or layer is None or (letters and name[-1] not in letters):
            continue
        by_unit = tensor.movedim(layout.axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
        sizes = by_unit.sum(1).double()
        owned = torch.full_like(sizes, by_unit.shape[1])
        before = found.get(layer, (torch.zeros_like(sizes), torch.zeros_like(owned)))
        found[layer] = (before[0] + sizes, before[1] + owned)
    return found
