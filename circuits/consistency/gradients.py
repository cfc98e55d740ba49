"""Gradient consistency (docs/method.md, section 8): how far two formats of one fact pull at the same parameters.

1. One backward pass gives what modules read and the gradients of what they write, for every example of both tasks
   (`circuits.consistency.passes`).
2. From these follow the inner products of the loss gradients of all pairs of examples, over the parameters of each
   part: all, a layer, its attention or MLP, a head, a neuron, inside a mask (`circuits.consistency.products`). Outside
   it is the rest: all less inside.
3. A pair is matched if its examples are of one group (and tell the same attribute, where both tasks name attributes
   and each example has one); the others are what it is judged against.
4. Intervals are by the jackknife over groups: each group is left out, with every pair that it is on either side of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.consistency.passes import sides_by_layer
from circuits.consistency.products import Block, products, products_inside
from circuits.errors import CircuitsError
from circuits.masks import ParameterMask
from circuits.models import LeanModel, Model, checkpoint_of, facts_of, lean_model, load_model, refuse_hooks
from circuits.statistics import intervals
from circuits.storage import provenance
from circuits.tasks import Task
from circuits.units import Head, KVGroup, Neuron

#: The parts that gradients are compared over.
BY: tuple[str, ...] = ("all", "layer", "component", "head", "group", "neuron", "mask")
#: What the two examples of a pair have in common: group and attribute, the attribute, the group, or neither.
KINDS: tuple[str, ...] = ("matched", "same attribute", "same group", "unrelated")

_LARGEST = 1 << 32
_LEAST = 1e-5
_OWNERS = {"head": Head, "group": KVGroup, "neuron": Neuron}


@dataclass(frozen=True)
class GradientConsistency:
    """The cosines between the loss gradients of the examples of two tasks.

    Attributes:
        cosines: what is compared (`BY`) → the cosines over each of its parts; NaN where a gradient is zero.
        parts: for each of these one row for each part: ``unit``, ``layer``, ``index`` (−1 where there is none).
        kinds: which of `KINDS` each pair is.
        groups: of each example of the first task, and of the second.
        provenance: model, tasks and settings.
    """

    cosines: dict[str, Float[Tensor, "part example other"]]
    parts: dict[str, pandas.DataFrame]
    kinds: Int[Tensor, "example other"]
    groups: tuple[list[Any], list[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(found)}" for name, found in self.parts.items())
        return f"GradientConsistency({self.kinds.shape[0]} × {self.kinds.shape[1]} examples; {counts})"

    def pairs(self, by: str = "all", kinds: Sequence[str] = KINDS) -> pandas.DataFrame:
        """One row for each part and pair: ``unit``, ``layer``, ``index``, ``example``, ``other``, ``kind``, ``cosine``.

        Raises:
            CircuitsError: nothing was compared by that, or there is no such kind.
        """
        cosines, parts = self._by(by)
        for kind in kinds:
            if kind not in KINDS:
                raise CircuitsError(f"there is no kind of pairs {kind!r}: choose from {', '.join(KINDS)}")
        wanted = torch.isin(self.kinds, torch.tensor([KINDS.index(kind) for kind in kinds]))
        where = wanted.nonzero()
        count = len(where)
        repeated = parts.loc[parts.index.repeat(count)].reset_index(drop=True)
        names = numpy.array(KINDS)[self.kinds[wanted].numpy()]
        return repeated.assign(
            example=numpy.tile(where[:, 0].numpy(), len(parts)),
            other=numpy.tile(where[:, 1].numpy(), len(parts)),
            kind=numpy.tile(names, len(parts)),
            cosine=cosines[:, wanted].flatten().numpy(),
        )

    def means(self, by: str = "all", *, level: float = 0.95) -> pandas.DataFrame:
        """One row for each part and kind of pairs.

        Returns:
            ``unit``, ``layer``, ``index``, ``kind``, ``pairs``, ``mean``, ``low``, ``high``, the quantiles ``q05``,
            ``median``, ``q95``, and ``matched_above``, ``above_low``, ``above_high``: how far the matched mean lies
            above this one. Pairs whose cosine is NaN are left out.

        Raises:
            CircuitsError: nothing was compared by that.
        """
        cosines, parts = self._by(by)
        rows = []
        for number, part in enumerate(parts.to_dict("records")):
            values, known = cosines[number].double(), ~cosines[number].isnan()
            left_out: dict[str, numpy.ndarray] = {}
            means: dict[str, float] = {}
            for code, kind in enumerate(KINDS):
                chosen = (self.kinds == code) & known
                if not chosen.any():
                    continue
                found, pseudo = values[chosen], self._jackknifed(values, chosen)
                left_out[kind] = pseudo
                means[kind] = float(found.mean())
                some = found[:: max(1, len(found) // 1_000_000)]
                quantiles = torch.quantile(some, torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
                above = [numpy.nan] * 3
                if kind != "matched" and "matched" in means:
                    above = [means["matched"] - means[kind], *_interval(left_out["matched"] - pseudo, level)]
                mean = [means[kind], *_interval(pseudo, level)]
                rows.append(
                    {
                        **part,
                        "kind": kind,
                        "pairs": len(found),
                        **dict(zip(("mean", "low", "high"), mean, strict=True)),
                        **dict(zip(("q05", "median", "q95"), quantiles, strict=True)),
                        **dict(zip(("matched_above", "above_low", "above_high"), above, strict=True)),
                    }
                )
        return pandas.DataFrame(rows)

    def _by(self, by: str) -> tuple[Tensor, pandas.DataFrame]:
        if by not in self.cosines:
            raise CircuitsError(f"gradients were not compared by {by!r}: choose from {', '.join(self.cosines)}")
        return self.cosines[by], self.parts[by]

    def _jackknifed(self, values: Tensor, chosen: Tensor) -> numpy.ndarray:
        """For each group what it adds to the mean, which is the mean of these."""
        names = {name: code for code, name in enumerate(dict.fromkeys([*self.groups[0], *self.groups[1]]))}
        one, two = (torch.tensor([names[name] for name in side]) for side in self.groups)
        own = one[:, None] == two
        sums = []
        for table in (values.nan_to_num() * chosen, chosen.double()):
            touched = torch.zeros(len(names)).double()
            touched.index_add_(0, one, table.sum(1)).index_add_(0, two, table.sum(0))
            touched.index_add_(0, one, -(table * own).sum(1))
            sums.append((float(table.sum()), touched))
        (total, by_group), (count, in_group) = sums
        mean, part = total / count, in_group > 0
        # nothing is left where a group is in every pair: then no spread is known
        left = (total - by_group) / (count - in_group)
        kept = torch.where(part, len(names) * mean - (len(names) - 1) * left, mean)
        pseudo: numpy.ndarray = (kept - kept.mean() + mean).numpy()
        return pseudo


def _interval(values: numpy.ndarray, level: float) -> tuple[float, float]:
    if not numpy.isfinite(values).all():
        return numpy.nan, numpy.nan
    low, high = intervals(values, kind="real", level=level)
    return float(low), float(high)


def pair_kinds(task: Task, other: Task) -> Int[Tensor, "example other"]:
    """Which of `KINDS` each pair of examples is.

    Raises:
        CircuitsError: the tasks' authors gave no groups, or no group is in both.
    """
    for each in (task, other):
        if not each.provenance.get("grouped"):
            raise CircuitsError(
                f"the examples of {each.name} have no groups: say which belong together with groups=[…]"
            )
    named = all("attribute" in each.answers for each in (task, other))
    tables = [each.answers.groupby("example") for each in (task, other)]
    if named:
        named = all(int(table["attribute"].nunique(dropna=False).max()) == 1 for table in tables)
    groups = [table["group"].first().tolist() for table in tables]
    about = [table["attribute"].first().tolist() if named else [0] * len(table) for table in tables]
    same = [torch.tensor([[a == b for b in side[1]] for a in side[0]]) for side in (groups, about)]
    group, attribute = same
    if not named:
        attribute = group
    kinds = torch.full(group.shape, KINDS.index("unrelated"))
    kinds[attribute & ~group], kinds[group & ~attribute], kinds[group & attribute] = 1, 2, 0
    if not (kinds == 0).any():
        raise CircuitsError(
            f"{task.name} and {other.name} have no group in common that tells the same: no pair is matched"
        )
    return kinds


class _Sums:
    """Inner products over the parts of one sort, and squared lengths."""

    def __init__(self, parts: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.products = torch.zeros(parts, *shape, dtype=dtype, device=device)
        self.lengths = [torch.zeros(parts, count, dtype=dtype, device=device) for count in shape]

    def add(self, part: slice, found: tuple[Tensor, Tensor, Tensor]) -> None:
        self.products[part] += found[0]
        for length, more in zip(self.lengths, found[1:], strict=True):
            length[part] += more

    def cosines(self) -> Tensor:
        one, two = (length.clamp(min=0).sqrt() for length in self.lengths)
        found = self.products / (one[:, :, None] * two[:, None])
        found[~found.isfinite()] = torch.nan
        return found.float().cpu()


def gradient_consistency(
    model: Model,
    task: Task,
    other: Task,
    *,
    by: Sequence[str] = ("all", "layer", "component", "head", "group"),
    mask: ParameterMask | None = None,
    loss: str = "answer",
    batch_size: int = 64,
    projection: int | None = None,
    seed: int = 0,
) -> GradientConsistency:
    """The cosines between the loss gradients of all pairs of examples of two tasks, over parts of a model.

    Parameters are those of attention and MLP, biases with them. Keys and values belong to their head, or where heads
    share them to their group, as in `circuits.masks.unit_mask`.

    Args:
        model: loaded with `circuits.load_model`.
        task: examples in one format.
        other: examples in another.
        by: some of `BY`; groups are given only where heads share keys and values.
        mask: compare inside it and outside it too.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass; it changes speed and memory, not the result.
        projection: estimate from so many random numbers of each gradient, which is quicker for thousands of examples.
            With 1,024, on an untrained model of the study's shape, 95 % of the cosines over all parameters lay within
            0.03 of the exact ones, and all of them within 0.08 (``python -m benchmarks.consistency``).
        seed: of these.

    Raises:
        CircuitsError: the tasks have no groups in common, the mask is another model's or holds parameters that are not
            compared, functions are hooked into the model, or the result would be too large.

    Source:
        arXiv 2505.16178, v2; docs/method.md, section 8.

    Example:
        >>> import tempfile
        >>> from circuits import load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> bio, qa = (dataset.task(split, tokenizer) for split in ("bio", "qa_id"))
        >>> found = gradient_consistency(model, qa, bio, by=["all", "layer"])
        >>> found.means()["kind"].tolist()
        ['matched', 'same attribute', 'same group', 'unrelated']
    """
    refuse_hooks(model)
    kinds, task, other = pair_kinds(task, other), task.right_padded(), other.right_padded()
    wanted = [*by, "mask"] if mask is not None and "mask" not in by else list(by)
    for name in wanted:
        if name not in BY:
            raise CircuitsError(f"gradients are not compared by {name!r}: choose from {', '.join(BY)}")
    if "mask" in wanted and mask is None:
        raise CircuitsError("inside and outside of which mask? give one as mask=…")
    if projection is not None and (mask is not None or projection < 1):
        raise CircuitsError(
            "a random projection must have 1 number or more, and cannot tell inside from outside a mask"
        )
    if mask is not None:
        _check_mask(mask, model)
    groups = tuple(each.answers.groupby("example")["group"].first().tolist() for each in (task, other))
    cosines, parts = _compared(
        lean_model(model),
        task,
        other,
        wanted,
        mask=mask,
        loss=loss,
        batch_size=batch_size,
        projection=projection,
        seed=seed,
    )
    facts = provenance(
        **facts_of(model),
        tasks=[each.provenance for each in (task, other)],
        mask=None if mask is None else mask.provenance,
        loss=loss,
        projection=projection,
        seed=seed,
    )
    return GradientConsistency(cosines, parts, kinds, (groups[0], groups[1]), facts)


def _check_mask(mask: ParameterMask, model: Model) -> None:
    mask.check(model)
    compared = {row.name for row in checkpoint_of(model).rows if row.component in ("attention", "mlp")}
    for name, packed in mask.packed.items():
        if packed.count and name not in compared:
            raise CircuitsError(
                f"the mask holds entries of {name}, but gradients are compared in attention and MLP alone"
            )


def _compared(
    lean: LeanModel,
    task: Task,
    other: Task,
    by: Sequence[str],
    *,
    mask: ParameterMask | None,
    loss: str,
    batch_size: int,
    projection: int | None,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, pandas.DataFrame]]:
    shape, layout = (len(task), len(other)), lean.layout
    grouped = lean.n_groups < lean.n_heads
    counts = {"head": lean.n_heads, "group": lean.n_groups, "neuron": layout.d_mlp, "layer": 1, "component": 2}
    by = [name for name in dict.fromkeys(by) if name != "group" or grouped]
    bytes_needed = sum(4 * shape[0] * shape[1] * counts.get(name, 0) * lean.n_layers for name in by)
    if bytes_needed > _LARGEST:
        raise CircuitsError(
            f"the cosines would take {bytes_needed / 1e9:.1f} GB: give fewer examples, or compare by fewer parts"
        )
    whole = {name: _Sums(1, shape, torch.float64, lean.device) for name in ("all", "inside")}
    found: dict[str, list[Tensor]] = {name: [] for name in by if name in counts}
    generator = torch.Generator().manual_seed(seed)

    def signs(size: int) -> Tensor:
        drawn = torch.randint(2, (size, projection or 1), generator=generator)
        return (2.0 * drawn - 1).to(lean.device)

    sides = zip(*(sides_by_layer(lean, each, loss, batch_size) for each in (task, other)), strict=True)
    for (layer, one), (_, two) in sides:
        here = {
            name: _Sums(counts[name], shape, torch.float32 if name == "neuron" else torch.float64, lean.device)
            for name in found
        }
        for row in lean.rows:
            if row.tensor not in one or row.layer != layer:
                continue
            owner = "head" if row.owner is KVGroup and not grouped else _NAMES.get(row.owner)
            block = Block.of(row, lean.tensors[row.tensor].shape, owner in here)
            pair = one[row.tensor], two[row.tensor]
            every = products(*pair, block, None if projection is None else signs)
            if owner in here:
                here[owner].add(slice(None), every)
            summed = (every[0].sum(0), every[1].sum(0), every[2].sum(0))
            whole["all"].add(slice(0, 1), summed)
            if "layer" in here:
                here["layer"].add(slice(0, 1), summed)
            if "component" in here:
                number = ("attention", "mlp").index(row.component)
                here["component"].add(slice(number, number + 1), summed)
            if mask is not None and row.name in mask.masks and mask.packed[row.name].count:
                whole["inside"].add(slice(0, 1), products_inside(*pair, block, mask.masks[row.name]))
        for name, sums in here.items():
            found[name].insert(0, sums.cosines())
    cosines = {name: torch.cat(layers) for name, layers in found.items()}
    if "all" in by:
        cosines["all"] = whole["all"].cosines()
    if "mask" in by:
        cosines["mask"] = torch.cat([whole["inside"].cosines(), _outside(whole["all"], whole["inside"])])
    cosines = {name: cosines[name] for name in by}
    return cosines, {name: _parts(name, lean, counts) for name in by}


_NAMES: dict[Any, str] = {kind: name for name, kind in _OWNERS.items()}


def _outside(every: _Sums, inside: _Sums) -> Tensor:
    """What is left of all; where that is next to nothing it is what rounding left, and NaN."""
    rest = _Sums(1, (every.lengths[0].shape[1], every.lengths[1].shape[1]), torch.float64, every.products.device)
    rest.products = every.products - inside.products
    rest.lengths = [
        torch.where(all_ - in_ > _LEAST * all_, all_ - in_, 0.0)
        for all_, in_ in zip(every.lengths, inside.lengths, strict=True)
    ]
    return rest.cosines()


def _parts(name: str, lean: LeanModel, counts: Mapping[str, int]) -> pandas.DataFrame:
    if name in ("all", "mask"):
        units = ["all"] if name == "all" else ["inside", "outside"]
        return pandas.DataFrame({"unit": units, "layer": -1, "index": -1})
    rows = []
    for layer in range(lean.n_layers):
        for index in range(counts[name]):
            if name in _OWNERS:
                rows.append((str(_OWNERS[name](layer, index)), layer, index))
            elif name == "layer":
                rows.append((f"L{layer}", layer, -1))
            else:
                rows.append((f"L{layer}.{('attention', 'mlp')[index]}", layer, -1))
    return pandas.DataFrame(rows, columns=["unit", "layer", "index"])


def gradient_consistency_along(
    sources: Mapping[int, str | Path | Model] | Sequence[str | Path | Model],
    task: Task,
    other: Task,
    *,
    by: Sequence[str] = ("all",),
    mask: ParameterMask | None = None,
    **settings: Any,
) -> pandas.DataFrame:
    """`GradientConsistency.means` at several checkpoints of one training run.

    Args:
        sources: step → model or folder; a list counts from 0. Folders are loaded one at a time.
        task: examples in one format.
        other: examples in another.
        by: as in `gradient_consistency`.
        mask: its entries are looked at in every checkpoint, whichever it was made for.
        settings: ``loss``, ``batch_size``, ``projection`` and ``seed`` as in `gradient_consistency`.

    Returns:
        The rows of `GradientConsistency.means` with ``step`` and ``by``.

    Raises:
        CircuitsError: as `gradient_consistency`; there are no checkpoints.

    Example:
        >>> import tempfile
        >>> from circuits import load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> models = [load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1)]
        >>> bio, qa = (dataset.task(split, tokenizer) for split in ("bio", "qa_id"))
        >>> gradient_consistency_along({0: models[0], 100: models[1]}, qa, bio)["step"].unique().tolist()
        [0, 100]
    """
    if not sources:
        raise CircuitsError("no checkpoints are given: consistency along training needs one at least")
    steps = sources.items() if isinstance(sources, Mapping) else enumerate(sources)
    tables = []
    for step, source in steps:
        model = source if isinstance(source, nn.Module) else load_model(source)
        moved = None if mask is None else mask.for_model(model)
        found = gradient_consistency(model, task, other, by=by, mask=moved, **settings)
        tables += [found.means(name).assign(by=name, step=step) for name in found.cosines]
    table = pandas.concat(tables, ignore_index=True)
    return table[["step", "by", *(name for name in table if name not in ("step", "by"))]]
