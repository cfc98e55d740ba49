"""Where two checkpoints of one model differ.

1. Both configs must describe the same model: architecture, sizes, vocabulary; so must the tokenizers' words.
2. One tensor after another is read from both folders, whatever it is stored as, in float32: Δ = tuned − base. An
   adapter is merged first, which takes the memory of its whole model.
3. Each parameter's Σ Δ², Σ base² and its entries, all and changed, are added up by the unit that owns them, by
   component and layer, and over the model. Tied embeddings count once.
4. For each of these: the norm of Δ, that norm as a share of the base's, and the fraction of entries that changed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from circuits.adapter_config import is_adapter
from circuits.errors import CircuitsError
from circuits.models.families import family_of
from circuits.models.fingerprints import fingerprint_of
from circuits.models.folder import weights_of
from circuits.models.huggingface import has_tokenizer, load_config, load_huggingface, load_tokenizer, model_folder
from circuits.models.layout import Layout
from circuits.models.rows import Row
from circuits.units import Head, KVGroup, Neuron

KINDS: tuple[str, ...] = ("model", "layer", "component", *(kind.NOUN for kind in (Head, KVGroup, Neuron)))


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a folder, each read when it is asked for."""

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        self.rows = {row.name: row for row in family_of(config).rows(config)}
        self.tied = bool(config.tie_word_embeddings)
        self.stored: Any = None if is_adapter(folder) else weights_of(folder)
        if self.stored is None or any(row.tensor not in self.stored for row in self.rows.values()):
            # merged, or under names that only transformers knows
            model = load_huggingface(folder)
            self.tied = bool(model.config.tie_word_embeddings)
            self.rows = {row.name: row for row in family_of(model.config).rows(model.config)}
            self.stored = dict(model.named_parameters())

    def parameter(self, row: Row) -> Tensor:
        """A parameter as it is stored."""
        return row.stored(self[row.tensor])

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.stored[name]
        return tensor.detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(row.tensor for row in self.rows.values()))

    def __len__(self) -> int:
        return len({row.tensor for row in self.rows.values()})


@torch.no_grad()
def difference(base: str | Path, tuned: str | Path) -> pandas.DataFrame:
    """How far every layer, component, head, key/value group and neuron lies from where it was before fine-tuning.

    Args:
        base: folder of the checkpoint before.
        tuned: folder of the checkpoint after, or of an adapter.

    Returns:
        One row for the ``kind`` model, for each layer, each component of a layer (and of none: embeddings, the final
        norm), each head with the parameters it alone owns, each key/value group of several heads, and each neuron.
        Columns ``unit``, its name; ``kind``; ``layer`` and ``index``, missing where there is none; ``component``;
        ``parameters``; ``norm`` of the change, ``relative`` to the norm before (NaN where that is 0), and ``changed``,
        the fraction of entries that are not what they were. Its ``attrs`` hold both fingerprints.

    Raises:
        CircuitsError: a folder cannot be read, or the two are not of one model.

    Source:
        docs/method.md, section 5: ``|Δθ|`` of units.
    """
    configs = [load_config(folder) for folder in (base, tuned)]
    _check_sizes([str(base), str(tuned)], configs)
    before, after = (_Tensors(Path(folder), config) for folder, config in zip((base, tuned), configs, strict=True))
    _check_words(base, tuned)
    layout = family_of(configs[0]).layout(configs[0])
    sums: dict[tuple[str, int | None, str | None], Tensor] = {}
    for row in before.rows.values():
        if row.kind == "unembedding" and before.tied and after.tied:
            continue
        old, new = before.parameter(row), after.parameter(after.rows[row.name])
        if old.shape != new.shape:
            raise CircuitsError(
                f"{row.name} has the shape {tuple(old.shape)} in {base} and {tuple(new.shape)} in {tuned}"
            )
        layer, component = row.layer, row.component
        owned = _measures(old, new, row.axis if row.owner else None)
        if not bool(torch.isfinite(owned).all()):
            raise CircuitsError(f"{row.name} holds numbers that are not finite in {base} or {tuned}")
        if row.owner is not None:
            # a group of one head is the head
            owner = Head if row.owner is KVGroup and layout.n_groups == layout.n_heads else row.owner
            _add(sums, (owner.NOUN, layer, component), owned)
        whole = owned.sum(1, keepdim=True)
        _add(sums, ("component", layer, component), whole)
        _add(sums, ("model", None, None), whole)
        if layer is not None:
            _add(sums, ("layer", layer, None), whole)
    rows = [_rows(kind, layer, component, values) for (kind, layer, component), values in sums.items()]
    table = pandas.concat(rows, ignore_index=True)
    table["kind"] = pandas.Categorical(table["kind"], KINDS, ordered=True)
    table = table.sort_values(["kind", "layer", "index"], kind="stable", ignore_index=True)
    table["kind"] = table["kind"].astype(str)
    table.attrs = {
        side: fingerprint_of(config, values)
        for side, config, values in zip(("base", "tuned"), configs, (before, after), strict=True)
    }
    return table


def _measures(old: Tensor, new: Tensor, axis: int | None) -> Tensor:
    """Σ Δ², Σ base², how many entries changed and how many there are: a column for each unit along the axis."""
    units = 1 if axis is None else old.shape[axis]

    def by_unit(values: Tensor) -> Tensor:
        placed = values if axis is None else values.movedim(axis, 0)
        return placed.reshape(units, -1).sum(1, dtype=torch.float64)

    entries = torch.full((units,), old.numel() / units, dtype=torch.float64)
    return torch.stack([by_unit((new - old).square_()), by_unit(old.square()), by_unit(new != old), entries])


def _add(sums: dict[tuple[Any, ...], Tensor], key: tuple[Any, ...], values: Tensor) -> None:
    sums[key] = sums[key] + values if key in sums else values


def _rows(kind: str, layer: int | None, component: str | None, values: Tensor) -> pandas.DataFrame:
    change, old, changed, entries = values
    place = "" if layer is None else f"L{layer}"
    letters = {one.NOUN: one.LETTER for one in (Head, KVGroup, Neuron)}
    if kind in letters:
        units = [f"{place}{letters[kind]}{index}" for index in range(values.shape[1])]
    else:
        units = [{"model": "model", "layer": place}.get(kind, f"{place}.{component}".strip("."))]
    ratio = torch.where(old > 0, change / old, math.nan).sqrt()
    return pandas.DataFrame(
        {
            "unit": units,
            "kind": kind,
            "layer": pandas.array([layer] * len(units), dtype="Int64"),
            "index": pandas.array(list(range(len(units))) if kind in letters else [None], dtype="Int64"),
            "component": component,
            "parameters": entries.long().numpy(),
            "norm": change.sqrt().numpy(),
            "relative": ratio.numpy(),
            "changed": (changed / entries).numpy(),
        }
    )


def _check_sizes(names: list[str], configs: list[PreTrainedConfig]) -> None:
    one, two = names
    kinds = [family_of(config).ARCHITECTURE for config in configs]
    if kinds[0] != kinds[1]:
        raise CircuitsError(f"{one} is a {kinds[0]} and {two} a {kinds[1]}: compare checkpoints of one model")
    first, second = (family_of(config).layout(config) for config in configs)
    for size in fields(Layout):
        old, new = getattr(first, size.name), getattr(second, size.name)
        # how far it may read, and whether embeddings are stored twice, can change in training
        if isinstance(old, int) and not isinstance(old, bool) and size.name != "n_ctx" and old != new:
            raise CircuitsError(
                f"{one} and {two} are not of one model: {size.name} is {old} in the first and {new} in the second"
            )


def _check_words(base: str | Path, tuned: str | Path) -> None:
    if not all(has_tokenizer(place) or has_tokenizer(model_folder(place)) for place in (base, tuned)):
        return
    one, two = (load_tokenizer(place).get_vocab() for place in (base, tuned))
    if one != two:
        word = min(set(one.items()) ^ set(two.items()))[0]
        raise CircuitsError(
            f"{base} and {tuned} are not of one model: their tokenizers have other words, {word!r} among them"
        )
