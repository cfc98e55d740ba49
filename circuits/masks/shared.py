"""Influenced and shared parameters (arXiv 2505.16178, Definition 3.1 and Fig. 2a; docs/method.md, section 2).

1. The influenced set I of a task: the parameters with the largest trace: the top fraction k of all, or of each tensor,
   or all above a threshold τ.
2. The shared parameters of several tasks: S = I₁ ∩ I₂ ∩ …
3. Chance: independent sets of the same sizes would share N · Π |Iₜ| / N; the lift is |S| over that. The control: the
   same intersection with all traces but the first permuted within each tensor, which keeps how much each tensor holds.
   Everything that is said of S is also said of several such draws, with an interval.
4. The Shared Size of a unit: how many of its parameters lie in S (`circuits.masks.sizes`).
5. How unevenly units hold S: `circuits.masks.centralisation`.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.centralisation import gini, random_sizes, top_share
from circuits.masks.mask import ParameterMask
from circuits.masks.packing import PackedTensor, PackedTensors, pack
from circuits.masks.selection import all_finite, largest
from circuits.masks.sizes import unit_counts
from circuits.progress import track
from circuits.statistics import mean_interval
from circuits.storage import digest, provenance
from circuits.tracing import GradientTrace
from circuits.units import Head, Neuron

SCOPES: tuple[str, ...] = ("global", "tensor")
#: The fractions k that a sharing curve goes through: four for each factor of ten from 0.01 % to 10 %, and 20 %.
FRACTIONS: tuple[float, ...] = (*(round(10 ** (power / 4 - 4), 6) for power in range(13)), 0.2)


def influenced_parameters(
    trace: GradientTrace, fraction: float | None = None, scope: str = "global", *, threshold: float | None = None
) -> ParameterMask:
    """The influenced set of one task: the parameters with the largest trace.

    Args:
        trace: of the task.
        fraction: k, between 0 and 1; 0.01 if no threshold is given.
        scope: ``global``: the top k of all parameters, exactly ``round(k · N)``; or ``tensor``: the top k of each
            tensor, ``round(k · n)`` of its n entries, fewer where fewer have a gradient at all. Ties are broken by
            position.
        threshold: τ, in place of a fraction: all parameters whose trace is larger in absolute value.

    Raises:
        CircuitsError: both a fraction and a threshold are given, the fraction is not between 0 and 1, there is no such
            scope, so many parameters have no gradient at all or none exceeds the threshold, or some gradients are not
            finite.

    Source:
        arXiv 2505.16178, Definition 3.1.

    Example:
        >>> trace = GradientTrace("qa", {"w": torch.tensor([0.1, 9.0, -8.0, 0.2])}, {}, 1, {"model": "a"})
        >>> influenced_parameters(trace, 0.5).masks["w"]
        tensor([False,  True,  True, False])
        >>> influenced_parameters(trace, threshold=8.5).size
        1
    """
    if scope not in SCOPES:
        raise CircuitsError(f"there is no scope {scope!r}: choose from {', '.join(SCOPES)}")
    if threshold is not None and (fraction is not None or scope != "global"):
        raise CircuitsError("a threshold takes the place of fraction and scope: give one or the other")
    fraction = 0.01 if fraction is None else fraction
    if threshold is None and not 0 < fraction < 1:
        raise CircuitsError(f"the fraction is {fraction}: it must lie between 0 and 1, and 0.01 is one percent")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise CircuitsError(f"the threshold is {threshold}: it must be zero or more, and finite")
    if "model" not in trace.provenance:
        raise CircuitsError(f"the trace of {trace.task} does not say of which model it is: its provenance has no model")
    if not all_finite(trace.gradients):
        raise CircuitsError(f"the trace of {trace.task} has gradients that are not finite: trace the model in float32")
    if threshold is not None:
        chosen = _above(trace, threshold)
        facts: dict[str, Any] = {"threshold": threshold}
    elif scope == "global":
        chosen = _top(trace, fraction)
        facts = {"fraction": fraction, "scope": scope}
    else:
        chosen = _top_of_each(trace, fraction)
        facts = {"fraction": fraction, "scope": scope}
    return ParameterMask(
        chosen, trace.provenance["model"], provenance(task=trace.task, trace=trace.provenance, **facts)
    )


def _top(trace: GradientTrace, fraction: float) -> PackedTensors:
    total = sum(gradient.numel() for gradient in trace.gradients.values())
    count = max(1, round(fraction * total))
    reached = sum(int(gradient.count_nonzero()) for gradient in trace.gradients.values())
    if reached < count:
        raise CircuitsError(
            f"only {reached} of {total} parameters have a gradient for the task {trace.task}: "
            f"choose a fraction below {reached / total:.4g}"
        )
    return largest(trace.gradients, count)


def _top_of_each(trace: GradientTrace, fraction: float) -> PackedTensors:
    packed: dict[str, PackedTensor] = {}
    for name, gradient in trace.gradients.items():
        count = min(round(fraction * gradient.numel()), int(gradient.count_nonzero()))
        packed |= largest({name: gradient}, count).packed
    chosen = PackedTensors(packed)
    if not any(tensor.count for tensor in packed.values()):
        raise CircuitsError(
            f"no tensor has a gradient for the task {trace.task} in {fraction:g} of its entries: take a larger fraction"
        )
    return chosen


def _above(trace: GradientTrace, threshold: float) -> PackedTensors:
    chosen = PackedTensors({name: pack(gradient.abs() > threshold) for name, gradient in trace.gradients.items()})
    if not any(tensor.count for tensor in chosen.packed.values()):
        most = max(float(gradient.abs().max()) for gradient in trace.gradients.values())
        raise CircuitsError(
            f"no parameter's trace of the task {trace.task} exceeds {threshold:g}: the largest is {most:.4g}"
        )
    return chosen


def shared_parameters(
    traces: Sequence[GradientTrace | ParameterMask],
    fraction: float | None = None,
    scope: str = "global",
    *,
    threshold: float | None = None,
) -> ParameterMask:
    """The parameters that are influenced by every one of several tasks.

    Other combinations are written with the influenced sets themselves: ``a | b``, ``a - b``, ``~a``.

    Args:
        traces: two or more, of the same model; or the influenced sets of as many, made by `influenced_parameters` from
            one trace after another where memory does not hold all of them.
        fraction: as in `influenced_parameters`; not given with influenced sets.
        scope: as in `influenced_parameters`; of no account with influenced sets.
        threshold: as in `influenced_parameters`; not given with influenced sets.

    Raises:
        CircuitsError: fewer than two traces, one given twice, traces of different models or made in different ways, a
            fraction or threshold beside influenced sets, or as `influenced_parameters`.

    Source:
        arXiv 2505.16178, Definition 3.1.

    Example:
        >>> def trace(task, values):
        ...     return GradientTrace(task, {"w": torch.tensor(values)}, {}, 1, {"model": "a"})
        >>> shared_parameters([trace("bio", [3.0, 2.0, 1.0, 0.5]), trace("qa", [0.1, 9.0, 8.0, 0.2])], 0.5)
        ParameterMask(1 of 4 parameters, 25.000%, model=a)
    """
    return _intersection(_influenced(traces, fraction, scope, threshold))


def _influenced(
    traces: Sequence[GradientTrace | ParameterMask], fraction: float | None, scope: str, threshold: float | None
) -> list[ParameterMask]:
    if len(traces) < 2:
        raise CircuitsError(f"sharing takes two tasks or more: {len(traces)} trace was given")
    models = [_made(trace).get("model") for trace in traces]
    if len(set(models)) > 1:
        raise CircuitsError(f"the traces are of different models, {', '.join(map(str, models))}: trace one model")
    for place, trace in enumerate(traces):
        for other in traces[:place]:
            _check_pair(other, trace)
    given = [trace for trace in traces if isinstance(trace, ParameterMask)]
    if given and (len(given) < len(traces) or fraction is not None or threshold is not None):
        raise CircuitsError("influenced sets were chosen by a fraction already: give them alone, or give traces")
    return given or [
        influenced_parameters(trace, fraction, scope, threshold=threshold)
        for trace in traces
        if isinstance(trace, GradientTrace)
    ]


def _made(trace: GradientTrace | ParameterMask) -> dict[str, Any]:
    """How a trace was made, or the one that an influenced set was chosen from."""
    made: dict[str, Any] = trace.provenance
    return made.get("trace", {"model": trace.model}) if isinstance(trace, ParameterMask) else made


def _intersection(sets: Sequence[ParameterMask]) -> ParameterMask:
    shared = functools.reduce(operator.and_, sets)
    return ParameterMask(shared.masks, shared.model, provenance(shared=[one.provenance for one in sets]))


#: What the provenance of a trace says of how it was made.
_SETTINGS = ("statistic", "loss", "per", "batch_size", "components", "checkpoints", "steps")


def _check_pair(one: GradientTrace | ParameterMask, other: GradientTrace | ParameterMask) -> None:
    """Refuse two traces of the same examples, or made in different ways, as far as their provenance says."""
    (ours, first, covered), (theirs, second, others) = (
        (_made(trace), trace.provenance.get("task"), trace.packed)
        if isinstance(trace, ParameterMask)
        else (_made(trace), trace.task, trace.gradients)
        for trace in (one, other)
    )
    if one is other or (ours.get("examples") is not None and ours.get("examples") == theirs.get("examples")):
        names = " and ".join(dict.fromkeys((str(first), str(second))))
        raise CircuitsError(f"two of the traces are of the same examples, of {names}: sharing takes different tasks")
    for name in _SETTINGS:
        if ours.get(name) != theirs.get(name):
            raise CircuitsError(
                f"the traces of {first} and {second} were made with different {name}, {ours.get(name)} and "
                f"{theirs.get(name)}: trace both alike"
            )
    if covered.keys() != others.keys():
        only = sorted(covered.keys() ^ others.keys())[0]
        raise CircuitsError(f"of the traces of {first} and {second} only one covers {only}: trace both alike")


def sharing(
    traces: Sequence[GradientTrace | ParameterMask],
    fraction: float | None = None,
    draws: int = 5,
    *,
    seed: int = 0,
    scope: str = "global",
    threshold: float | None = None,
) -> dict[str, Any]:
    """How large and how centralised the shared set is, against chance and against the permuted control.

    Args:
        traces: two or more, of the same model, or their influenced sets, as in `shared_parameters`.
        fraction: as in `influenced_parameters`.
        draws: permutations of the control, and random sets.
        seed: of both.
        scope: as in `influenced_parameters`.
        threshold: as in `influenced_parameters`.

    Returns:
        ``size`` (``|S|``), ``total`` N, ``influenced`` (parameters in the smallest influenced set: k·N), ``share`` of
        it that is shared, ``jaccard``, ``chance`` (expected size of independent sets), ``lift`` = size / chance;
        ``gini`` and ``top_tenth`` of Shared Size over heads, ``neuron_gini`` and ``neuron_top_tenth`` over neurons,
        NaN if the traces have none. Beside each of them the control: ``permuted`` is its mean size, ``permuted_low``
        and ``permuted_high`` the ends of that mean's 95 % interval; likewise ``permuted_lift``,
        ``permuted_lift_low``, ``permuted_lift_high`` and so on. Beside the measures of centralisation also those of
        random sets of the same size over the same kind of unit: ``random_gini``, ``random_gini_low``,
        ``random_gini_high``, ``random_top_tenth``, ``random_neuron_gini``, ``random_neuron_top_tenth`` and so on. All
        of these are NaN where nothing is shared in such units; the mean is over the draws that have a number.

    Raises:
        CircuitsError: as `shared_parameters`.

    Source:
        arXiv 2505.16178, Fig. 2a; docs/method.md, section 2.
    """
    return _sharing(_influenced(traces, fraction, scope, threshold), draws, seed)


def sharing_curve(
    traces: Sequence[GradientTrace],
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    *,
    seed: int = 0,
    scope: str = "global",
) -> pandas.DataFrame:
    """How sharing depends on the fraction k of the influenced sets.

    Args:
        traces: two or more, of the same model.
        fractions: the values of k.
        draws: permutations of the control at each k.
        seed: of the permutations.
        scope: as in `influenced_parameters`.

    Returns:
        One row for each ``fraction``: the numbers of `sharing`.

    Raises:
        CircuitsError: as `shared_parameters`, for one of the fractions.

    Source:
        docs/method.md, section 2.
    """
    rows = [
        {"fraction": fraction, **sharing(traces, fraction, draws, seed=seed, scope=scope)}
        for fraction in track(fractions, "sharing curve", len(fractions), "fraction")
    ]
    return pandas.DataFrame(rows)


def _sharing(sets: list[ParameterMask], draws: int, seed: int) -> dict[str, Any]:
    if draws < 1:
        raise CircuitsError(f"the number of permutations is {draws}: the control needs one at least")
    total = sets[0].total
    chance = total * math.prod(one.size / total for one in sets)
    smallest = min(one.size for one in sets)
    found = _measures(sets, chance, smallest)
    # permuting a trace within a tensor permutes which of its entries are influenced, and not how many
    controls = [
        _measures(
            [sets[0], *(other.permuted(f"{seed}/{draw}/{number}") for number, other in enumerate(sets[1:]))],
            chance,
            smallest,
        )
        for draw in range(draws)
    ]
    report: dict[str, Any] = {"total": total, "influenced": smallest, "chance": chance, **found}
    for name in found:
        control = "permuted" if name == "size" else f"permuted_{name}"
        report |= _interval(control, [measured[name] for measured in controls])
    shared, generator = functools.reduce(operator.and_, sets), numpy.random.default_rng(int(digest(str(seed)), 16))
    for kind, prefix in _CENTRALISED:
        spread = [_centralisation(random_sizes(shared, kind, generator)) for _ in range(draws)]
        for name in spread[0]:
            report |= _interval(f"random_{prefix}{name}", [one[name] for one in spread])
    return report


def _interval(name: str, values: Sequence[float | int]) -> dict[str, float]:
    """Mean and interval of the values that are numbers."""
    numbers = [float(value) for value in values if not math.isnan(value)]
    ends = mean_interval(numbers) if numbers else (math.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _measures(sets: list[ParameterMask], chance: float, smallest: int) -> dict[str, Any]:
    shared = functools.reduce(operator.and_, sets)
    found = {
        "size": shared.size,
        "share": shared.size / smallest,
        "jaccard": shared.size / functools.reduce(operator.or_, sets).size,
        "lift": shared.size / chance,
    }
    for kind, prefix in _CENTRALISED:
        counted = unit_counts(shared, kind)
        sizes = torch.cat([own + part for own, part, _, _ in counted.values()]) if counted else torch.zeros(1)
        found |= {f"{prefix}{name}": value for name, value in _centralisation(sizes).items()}
    return found


#: The units that sharing may be centralised in, and how the names of what is said of them begin.
_CENTRALISED: tuple[tuple[type[Head] | type[Neuron], str], ...] = ((Head, ""), (Neuron, "neuron_"))


def _centralisation(sizes: Float[Tensor, " units"]) -> dict[str, float]:
    return {"gini": gini(sizes), "top_tenth": top_share(sizes, 0.1)}
