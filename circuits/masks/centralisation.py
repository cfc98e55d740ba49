"""Centralisation: how unevenly units hold a set of parameters (arXiv 2505.16178, Fig. 2a; docs/method.md, section 2).

1. The Gini coefficient of Shared Size over heads (neurons), and the share that the top tenth of them holds.
2. Both depend on how many parameters there are: few lie unevenly by chance alone. So beside them stands what random
   sets have: as many parameters in heads (neurons), drawn from all that heads (neurons) own.
"""

import math

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.masks.mask import ParameterMask
from circuits.masks.sizes import owned_counts
from circuits.units import Head, KVGroup, Neuron

_DEALT = 10**9


def random_sizes(
    mask: ParameterMask, kind: type[Head] | type[Neuron], generator: numpy.random.Generator
) -> Float[Tensor, " units"]:
    """The sizes of units in a random set with as many parameters of such units, all of them equally likely."""
    counted = [owned_counts(mask, kind), *([owned_counts(mask, KVGroup)] if kind is Head else [])]
    slices = [(number, layer) for number, found in enumerate(counted) for layer in found]
    if not slices:
        return torch.zeros(1)
    inside, owned = (torch.cat([counted[number][layer][which] for number, layer in slices]) for which in (0, 1))
    drawn = torch.from_numpy(_dealt(owned.long().numpy(), int(inside.sum()), generator)).double()
    sizes = dict(zip(slices, drawn.split([len(counted[number][layer][0]) for number, layer in slices]), strict=True))
    parts = []
    for layer in counted[0]:
        own = sizes[0, layer]
        if (1, layer) in sizes:
            repeats = len(own) // len(sizes[1, layer])
            own = own + sizes[1, layer].repeat_interleave(repeats) / repeats
        parts.append(own)
    return torch.cat(parts) if parts else torch.zeros(1)


def _dealt(
    owned: Int[numpy.ndarray, " slice"], count: int, generator: numpy.random.Generator
) -> Int[numpy.ndarray, " slice"]:
    """How many of so many entries, drawn without replacement, fall into slices of these sizes."""
    if owned.sum() < _DEALT:
        return generator.multivariate_hypergeometric(owned, count, method="marginals")
    # numpy draws from no more at once: of so many, each half has its share with the spread of a binomial
    half = len(owned) // 2
    low, high = max(0, count - int(owned[half:].sum())), min(count, int(owned[:half].sum()))
    first = min(high, max(low, int(generator.binomial(count, owned[:half].sum() / owned.sum()))))
    return numpy.concatenate([_dealt(owned[:half], first, generator), _dealt(owned[half:], count - first, generator)])


def gini(values: Float[Tensor, " units"]) -> float:
    """Gini coefficient: 0 if all units have the same, towards 1 if one unit has all; NaN if there is nothing.

    Example:
        >>> gini(torch.tensor([1.0, 1.0, 1.0])), round(gini(torch.tensor([0.0, 0.0, 9.0])), 3)
        (0.0, 0.667)
    """
    ordered = values.double().sort().values
    total, count = float(ordered.sum()), len(ordered)
    if total == 0:
        return math.nan
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    return max(0.0, float(2 * (ranks * ordered).sum() / (count * total) - (count + 1) / count))


def top_share(values: Float[Tensor, " units"], fraction: float) -> float:
    """The share of the sum that the top fraction of units holds; at least one unit counts. NaN if there is nothing.

    Example:
        >>> round(top_share(torch.tensor([1.0, 2.0, 7.0]), 0.1), 2)
        0.7
    """
    total = float(values.sum())
    count = max(1, round(fraction * len(values)))
    return float(values.sort(descending=True).values[:count].sum()) / total if total else math.nan
