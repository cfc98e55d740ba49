"""A set of parameters of one model.

1. A mask holds, for every parameter it covers, a boolean tensor of the parameter's shape, packed to a bit an entry or
   less (`circuits.masks.packing`) and unpacked when it is asked for.
2. Masks over the same parameters of the same model combine with ``&``, ``|``, ``-`` and ``~``.
3. A mask knows the model it was made for; acting with it on another one is an error that names both.
4. Where a model ties its embeddings, a mask may cover the embedding, the unembedding or both: they are one tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.html import html_facts
from circuits.masks.packing import Bytes, PackedTensor, PackedTensors, combine, invert, pack
from circuits.models import Model, checkpoint_of, fingerprint, identity, parameters_of, rows_of, shape_of
from circuits.storage import digest, provenance, read_tensors, write_tensors
from circuits.units import COMPONENTS, TIED, Head, KVGroup, Neuron, component_of, layer_of

#: Random draws in one go.
_DRAWN = 1 << 24


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """A set of parameters.

    Attributes:
        masks: parameter name → which of its entries are in the set, ``Bool`` in the parameter's shape; packed, so that
            each access unpacks a new tensor.
        model: fingerprint of the model the mask was made for.
        provenance: how it was made.

    Example:
        >>> mask = ParameterMask({"w": torch.tensor([True, False, False, True])}, model="a")
        >>> mask.size, (~mask).size, (mask & ~mask).size
        (2, 2, 0)
    """

    masks: Mapping[str, Tensor]
    model: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.masks, PackedTensors):
            packed = PackedTensors({name: pack(entries) for name, entries in self.masks.items()})
            object.__setattr__(self, "masks", packed)

    @property
    def packed(self) -> dict[str, PackedTensor]:
        """The packed tensors, which know their shape and count."""
        assert isinstance(self.masks, PackedTensors)
        return self.masks.packed

    @property
    def size(self) -> int:
        """How many parameters are in the set."""
        return sum(packed.count for packed in self.packed.values())

    @property
    def total(self) -> int:
        """How many parameters the set is drawn from."""
        return sum(packed.total for packed in self.packed.values())

    def __repr__(self) -> str:
        share = self.size / self.total if self.total else 0.0
        return f"ParameterMask({self.size:,} of {self.total:,} parameters, {share:.3%}, model={self.model})"

    def _repr_html_(self) -> str:
        """What Jupyter shows: the size, and how it spreads over layers and components."""
        table = self.by_layer()
        shown = table.assign(
            cell=[f"{row.size:,} ({row.fraction:.2%})" for row in table.itertuples(index=False)],
            layer=["–" if layer < 0 else str(layer) for layer in table["layer"]],
        )
        wide = shown.pivot(index="layer", columns="component", values="cell").fillna("")
        wide = wide.loc[list(dict.fromkeys(shown["layer"])), [name for name in COMPONENTS if name in wide]]
        wide.index.name = wide.columns.name = None
        share = self.size / self.total if self.total else 0.0
        of = f"({share:.3%}) of model <code>{escape(self.model)}</code>"
        head = f"<b>{self.size:,}</b> of {self.total:,} parameters {of}"
        return f"<div>{head}{wide.to_html(border=0)}{html_facts(self._made_from())}</div>"

    def _made_from(self) -> dict[str, Any]:
        """What the provenance says of the sets that the mask was made from, each but once."""
        found: dict[str, Any] = {}
        for name, value in self.provenance.items():
            parts = value if isinstance(value, list) else [value]
            inner = [part for part in parts if isinstance(part, dict) and "task" in part]
            if inner:
                found[name] = ", ".join(f"{part['task']}" for part in inner)
                found |= {key: one for key, one in inner[0].items() if key in ("fraction", "scope", "threshold")}
            elif name != "trace":
                found[name] = value
        return found

    def by_layer(self) -> pandas.DataFrame:
        """How the set spreads over the model.

        Returns:
            One row for each ``layer`` and ``component`` (attention, mlp, norms, embeddings): ``size`` (how many of its
            parameters are in the set), ``parameters`` (how many the mask covers), ``fraction``. The layer is -1 for
            embeddings, the unembedding and the final norm.

        Example:
            >>> mask = ParameterMask({"blocks.0.attn.W_Q": torch.ones(2, 3, 4) > 0}, model="a")
            >>> mask.by_layer().to_dict("records")
            [{'layer': 0, 'component': 'attention', 'size': 24, 'parameters': 24, 'fraction': 1.0}]
        """
        rows = [
            {
                "layer": -1 if (layer := layer_of(name)) is None else layer,
                "component": component_of(name),
                "size": packed.count,
                "parameters": packed.total,
            }
            for name, packed in self.packed.items()
        ]
        table = pandas.DataFrame(rows, columns=["layer", "component", "size", "parameters"])
        table = table.groupby(["layer", "component"], as_index=False).sum()
        return table.assign(fraction=table["size"] / table["parameters"])

    def _combine(
        self, other: "ParameterMask", sign: str, operation: Callable[[Bytes, Bytes], Bytes]
    ) -> "ParameterMask":
        if self.model != other.model:
            raise CircuitsError(f"the masks belong to different models, {self.model} and {other.model}")
        if self.masks.keys() != other.masks.keys():
            only = sorted(self.masks.keys() ^ other.masks.keys())[0]
            raise CircuitsError(f"the masks cover different parameters: only one of them covers {only}")
        masks = {name: combine(packed, other.packed[name], operation) for name, packed in self.packed.items()}
        return ParameterMask(PackedTensors(masks), self.model, {sign: [self.provenance, other.provenance]})

    def __and__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "&", numpy.bitwise_and)

    def __or__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "|", numpy.bitwise_or)

    def __sub__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "-", lambda one, two: one & ~two)

    def __invert__(self) -> "ParameterMask":
        masks = PackedTensors({name: invert(packed) for name, packed in self.packed.items()})
        return ParameterMask(masks, self.model, {"~": self.provenance})

    def for_model(self, model: Model) -> "ParameterMask":
        """The same entries in another model of the same shape, on purpose: the check of `check` is waived once.

        Raises:
            CircuitsError: the model has other parameters.
        """
        moved = ParameterMask(self.masks, fingerprint(model), self.provenance | {"made_for": self.model})
        moved.check(model)
        return moved

    def check(self, model: Model) -> None:
        """Raise a `CircuitsError` unless the mask was made for this model."""
        parameters = parameters_of(model)
        for name, packed in self.packed.items():
            if name not in parameters or parameters[name].shape != packed.shape:
                raise CircuitsError(
                    f"the mask was made for model {self.model}, not for {checkpoint_of(model).source}: "
                    f"{name} has another shape or is missing there"
                )
        found = identity(model)
        if found != self.model:
            raise CircuitsError(
                f"the mask was made for model {self.model}, not for {found} ({checkpoint_of(model).source}): "
                "load that model, or transfer the mask with mask.for_model(model)"
            )

    def random(self, seed: int | str) -> "ParameterMask":
        """A random mask outside this one, with the same count in each tensor: the control for acting with it.

        Args:
            seed: names the draw; draws with different names are independent.

        Raises:
            CircuitsError: a tensor has too little room outside the mask; `control` thins the mask to what fits.

        Example:
            >>> mask = ParameterMask({"w": torch.arange(100) < 7}, model="a")
            >>> drawn = mask.random(0)
            >>> drawn.size, (drawn & mask).size
            (7, 0)
        """
        for name, packed in self.packed.items():
            if packed.count > packed.total - packed.count:
                raise CircuitsError(
                    f"the mask holds {packed.count:,} of the {packed.total:,} entries of {name}: outside it there is "
                    "no room for as many random ones; thin it to what fits with mask.control(seed)"
                )
        return self.control(seed)[1]

    def control(self, seed: int | str) -> tuple["ParameterMask", "ParameterMask"]:
        """This mask and a random one outside it, thinned alike to what fits.

        In each tensor both have as many entries as the mask, or as there is room for outside it. Where that is less,
        those of the mask that stay are drawn, and the random ones are all there are. Draws of several seeds thin the
        mask several ways.

        Args:
            seed: names the draw; draws with different names are independent.

        Returns:
            The mask, itself where nothing has to be thinned, and its control.

        Example:
            >>> mask = ParameterMask({"w": torch.arange(100) < 70, "v": torch.arange(100) < 7}, model="a")
            >>> thinned, drawn = mask.control(0)
            >>> thinned.size, drawn.size, (thinned - mask).size, (drawn & mask).size
            (37, 37, 0, 0)
        """
        generator = _generator(seed)
        kept: dict[str, PackedTensor] = {}
        drawn: dict[str, PackedTensor] = {}
        for name, packed in self.packed.items():
            inside = packed.unpack()
            fits = min(packed.count, packed.total - packed.count)
            drawn[name] = pack(_some(~inside, fits, generator))
            kept[name] = packed if fits == packed.count else pack(_some(inside, fits, generator))
        random = ParameterMask(PackedTensors(drawn), self.model, provenance(random_outside=self.provenance, seed=seed))
        if random.size == self.size:
            return self, random
        facts = provenance(thinned=self.provenance, parameters=self.size, seed=seed)
        return ParameterMask(PackedTensors(kept), self.model, facts), random

    def permuted(self, seed: int | str) -> "ParameterMask":
        """The mask permuted within each tensor: random entries, as many, inside the mask or outside it.

        Args:
            seed: names the draw; draws with different names are independent.

        Example:
            >>> mask = ParameterMask({"w": torch.arange(100) < 70}, model="a")
            >>> mask.permuted(0).size
            70
        """
        generator = _generator(seed)
        masks = {
            name: pack(_some(torch.ones(packed.shape, dtype=torch.bool), packed.count, generator))
            for name, packed in self.packed.items()
        }
        return ParameterMask(PackedTensors(masks), self.model, provenance(permuted=self.provenance, seed=seed))

    def save(self, path: str | Path) -> None:
        """Save as safetensors, a bit for each parameter or less."""
        metadata = {
            "kind": "mask",
            "model": self.model,
            "shapes": {name: list(packed.shape) for name, packed in self.packed.items()},
            "gaps": [name for name, packed in self.packed.items() if packed.gaps],
            "provenance": self.provenance,
        }
        write_tensors(
            Path(path), {name: torch.from_numpy(packed.code) for name, packed in self.packed.items()}, metadata
        )

    @classmethod
    def load(cls, path: str | Path) -> "ParameterMask":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        codes, metadata = read_tensors(Path(path), "mask")
        gaps = set(metadata.get("gaps", []))
        try:
            packed = {
                name: PackedTensor.from_code(codes[name].numpy(), name in gaps, tuple(shape))
                for name, shape in metadata["shapes"].items()
            }
        except (KeyError, ValueError) as error:
            raise CircuitsError(f"{path} is damaged: {error}") from None
        return cls(PackedTensors(packed), metadata["model"], metadata["provenance"])


def check_mask(mask: Any, model: Model | None = None) -> None:
    """Raise a `CircuitsError` unless this is a mask and, if one is given, was made for the model."""
    if not isinstance(mask, ParameterMask):
        if isinstance(mask, str | Path):
            raise CircuitsError(f"{str(mask)!r} is no mask: load it with ParameterMask.load({str(mask)!r})")
        raise CircuitsError(
            f"a mask is needed, and this is a {type(mask).__name__}: load one with ParameterMask.load, or make one, as "
            "with shared_parameters or unit_mask"
        )
    if model is not None:
        mask.check(model)


def _generator(seed: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(str(seed)), 16) >> 1)


def _some(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the allowed entries of a tensor, drawn without replacement."""
    # the smaller of the set and its complement is drawn; every entry is as likely as any other at each draw, so that
    # drawing again for those that were drawn before leaves all sets equally likely
    forbidden = numpy.flatnonzero(~allowed.numpy())
    room = allowed.numel() - len(forbidden)
    few = min(count, room - count)
    drawn = torch.zeros(room, dtype=torch.bool)
    missing = few
    while missing:
        drawn[torch.randint(room, (min(missing, _DRAWN),), generator=generator)] = True
        missing = few - int(numpy.count_nonzero(drawn.numpy()))
    # the n-th allowed entry stands behind the forbidden ones that have no more than n allowed ones before them
    ranks = numpy.flatnonzero(drawn.numpy())
    before = forbidden - numpy.arange(len(forbidden))
    places = ranks + numpy.searchsorted(before, ranks, side="right")
    found = torch.zeros_like(allowed) if few == count else allowed.clone()
    found.view(-1)[torch.from_numpy(places)] = few == count
    return found


def covered_parameters(model: Model) -> dict[str, Tensor]:
    """The parameters of a model, each tensor of the checkpoint once: tied embeddings as the embedding alone."""
    tied = checkpoint_of(model).tied
    return {name: value.detach() for name, value in parameters_of(model).items() if not (tied and name == TIED[1])}


def unit_mask(model: Model, units: Iterable[Head | KVGroup | Neuron]) -> ParameterMask:
    """All the parameters of some units.

    Args:
        model: whose units they are.
        units: heads, key/value groups or neurons, in any mixture. A head brings its own weights: query and output,
            and where keys and values are not grouped, those too. A group brings its keys and values; `with_groups`
            adds them to heads.

    Returns:
        A mask that covers the parameters that belong to units, as a gradient trace does.

    Raises:
        CircuitsError: the model has no such unit.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> unit_mask(model, [Head(2, 1)]).size == 2 * 32 * 128, unit_mask(model, [Neuron(0, 7)]).size
        (True, 384)
        >>> from circuits.units import with_groups
        >>> unit_mask(model, with_groups([Head(2, 1)], shape_of(model))).size == 4 * 32 * 128
        True
    """
    shape, chosen = shape_of(model), list(units)
    wanted: dict[tuple[int, type], set[int]] = {}
    grouped = shape.n_heads > shape.n_key_value_heads
    for unit in chosen:
        unit.check(shape)
        wanted.setdefault((unit.layer, type(unit)), set()).add(unit.index)
        if isinstance(unit, Head) and not grouped:
            wanted.setdefault((unit.layer, KVGroup), set()).add(unit.index)
    masks = {}
    rows = rows_of(model)
    for name, value in parameters_of(model).items():
        row = rows[name]
        if row.owner is None or row.layer is None:
            continue
        entries = torch.zeros(value.shape, dtype=torch.bool)
        entries.movedim(row.axis, 0)[sorted(wanted.get((row.layer, row.owner), ()))] = True
        masks[name] = pack(entries)
    names = [str(unit) for unit in sorted(set(chosen), key=lambda unit: (unit.layer, unit.LETTER, unit.index))]
    return ParameterMask(PackedTensors(masks), identity(model), provenance(units=names))
