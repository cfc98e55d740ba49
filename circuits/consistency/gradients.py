"""Gradient consistency (docs/method.md, section 8): how far two formats of one fact pull at the same parameters.

1. One backward pass gives what modules read and the gradients of what they write, for every example of both tasks
   (`circuits.consistency.passes`).
2. From these follow the inner products of the loss gradients of all pairs of examples, over the parameters of each
   part: all, a layer, its attention or MLP, a head, a neuron, inside a mask (`circuits.consistency.products`). Outside
   it is the rest: all less inside.
3. Which pairs are matched, and their means with intervals: `circuits.consistency.pairs`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from circuits.consistency.pairs import GradientConsistency, groups_of, pair_kinds
from circuits.consistency.passes import sides_by_layer
from circuits.consistency.products import Block, products, products_inside
from circuits.errors import CircuitsError
from circuits.masks import ParameterMask
from circuits.masks.mask import check_mask
from circuits.models import LeanModel, Model, check_task, checkpoint_of, facts_of, lean_model, load_model, refuse_hooks
from circuits.storage import provenance
from circuits.tasks import Task
from circuits.units import Head, KVGroup, Neuron

#: The parts that gradients are compared over.
BY: tuple[str, ...] = ("all", "layer", "component", "head", "group", "neuron", "mask")
#: Bytes of cosines that are refused.
_LARGEST = 1 << 32
#: What is left of a squared length, as a share, and is more than rounding.
_LEAST = 1e-5
_OWNERS = {"head": Head, "group": KVGroup, "neuron": Neuron}
_NAMES: dict[Any, str] = {kind: name for name, kind in _OWNERS.items()}


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
    mask: ParameterMask | Mapping[str, ParameterMask] | None = None,
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
        mask: compare inside it and outside it too; of several, by name, the parts are ``inside NAME`` and
            ``outside NAME``.
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
        ['matched', 'same_attribute', 'same_group', 'unrelated']
    """
    refuse_hooks(model)
    for asked in (task, other):
        check_task(model, asked)
    kinds, task, other = pair_kinds(task, other), task.right_padded(), other.right_padded()
    masks = by_name(mask)
    if projection is not None and (masks or projection < 1):
        raise CircuitsError(
            "a random projection must have 1 number or more, and cannot tell inside from outside a mask"
        )
    wanted = wanted_parts(by, masks)
    for one in masks.values():
        _check_mask(one, model)
    cosines, parts = compared(
        lean_model(model),
        task,
        other,
        wanted,
        masks=masks,
        loss=loss,
        batch_size=batch_size,
        projection=projection,
        seed=seed,
    )
    facts = provenance(
        **facts_of(model),
        tasks=[each.provenance for each in (task, other)],
        masks={name: one.provenance for name, one in masks.items()},
        loss=loss,
        projection=projection,
        seed=seed,
    )
    return GradientConsistency(cosines, parts, kinds, groups_of(task, other), facts)


def by_name(mask: ParameterMask | Mapping[str, ParameterMask] | None) -> dict[str, ParameterMask]:
    """Masks by what is added to the names of their parts."""
    if mask is None:
        return {}
    return {f" {name}": one for name, one in mask.items()} if isinstance(mask, Mapping) else {"": mask}


def wanted_parts(by: Sequence[str], masks: Mapping[str, ParameterMask]) -> list[str]:
    """What is compared, with ``mask`` where masks are given.

    Raises:
        CircuitsError: there is nothing of that name to compare by, or no mask.
    """
    wanted = list(dict.fromkeys([*by, *(["mask"] if masks else [])]))
    for name in wanted:
        if name not in BY:
            raise CircuitsError(f"gradients are not compared by {name!r}: choose from {', '.join(BY)}")
    if "mask" in wanted and not masks:
        raise CircuitsError("inside and outside of which mask? give one as mask=…")
    return wanted


def _check_mask(mask: ParameterMask, model: Model) -> None:
    check_mask(mask, model)
    compared = {row.name for row in checkpoint_of(model).rows if row.component in ("attention", "mlp")}
    for name, packed in mask.packed.items():
        if packed.count and name not in compared:
            raise CircuitsError(
                f"the mask holds entries of {name}, but gradients are compared in attention and MLP alone"
            )


def compared(
    lean: LeanModel,
    task: Task,
    other: Task,
    by: Sequence[str],
    *,
    masks: Mapping[str, ParameterMask],
    loss: str,
    batch_size: int,
    projection: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, pandas.DataFrame]]:
    """The cosines over each part, and the parts: what `gradient_consistency` does once all is checked."""
    shape, layout = (len(task), len(other)), lean.layout
    grouped = lean.n_groups < lean.n_heads
    counts = {"head": lean.n_heads, "group": lean.n_groups, "neuron": layout.d_mlp, "layer": 1, "component": 2}
    by = [name for name in dict.fromkeys(by) if name != "group" or grouped]
    bytes_needed = sum(4 * shape[0] * shape[1] * counts.get(name, 0) * lean.n_layers for name in by)
    if bytes_needed > _LARGEST:
        raise CircuitsError(
            f"the cosines would take {bytes_needed / 1e9:.1f} GB: give fewer examples, or compare by fewer parts"
        )
    whole = _Sums(1, shape, torch.float64, lean.device)
    inside = {name: _Sums(1, shape, torch.float64, lean.device) for name in masks}
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
            whole.add(slice(0, 1), summed)
            if "layer" in here:
                here["layer"].add(slice(0, 1), summed)
            if "component" in here:
                number = ("attention", "mlp").index(row.component)
                here["component"].add(slice(number, number + 1), summed)
            here_too = {name: mask for name, mask in masks.items() if row.name in mask.masks}
            chosen = {name: mask.masks[row.name] for name, mask in here_too.items() if mask.packed[row.name].count}
            for name, every in products_inside(*pair, block, chosen).items() if chosen else ():
                inside[name].add(slice(0, 1), every)
        for name, sums in here.items():
            found[name].insert(0, sums.cosines())
    cosines = {name: torch.cat(layers) for name, layers in found.items()}
    if "all" in by:
        cosines["all"] = whole.cosines()
    if "mask" in by:
        cosines["mask"] = torch.cat([part for one in inside.values() for part in (one.cosines(), _outside(whole, one))])
    cosines = {name: cosines[name] for name in by}
    return cosines, {name: _parts(name, lean, counts, masks) for name in by}


def _outside(every: _Sums, inside: _Sums) -> Tensor:
    """What is left of all; where that is next to nothing it is what rounding left, and NaN."""
    rest = _Sums(1, (every.lengths[0].shape[1], every.lengths[1].shape[1]), torch.float64, every.products.device)
    rest.products = every.products - inside.products
    rest.lengths = [
        torch.where(all_ - in_ > _LEAST * all_, all_ - in_, 0.0)
        for all_, in_ in zip(every.lengths, inside.lengths, strict=True)
    ]
    return rest.cosines()


def _parts(name: str, lean: LeanModel, counts: Mapping[str, int], masks: Mapping[str, Any]) -> pandas.DataFrame:
    if name in ("all", "mask"):
        units = ["all"] if name == "all" else [f"{side}{one}" for one in masks for side in ("inside", "outside")]
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
    mask: ParameterMask | Mapping[str, ParameterMask] | None = None,
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
        moved = None
        if mask is not None:
            moved = (
                mask.for_model(model)
                if isinstance(mask, ParameterMask)
                else {name: one.for_model(model) for name, one in mask.items()}
            )
        found = gradient_consistency(model, task, other, by=by, mask=moved, **settings)
        tables += [found.means(name).assign(by=name, step=step) for name in found.cosines]
    table = pandas.concat(tables, ignore_index=True)
    return table[["step", "by", *(name for name in table if name not in ("step", "by"))]]
