"""Units: attention heads, key/value groups and MLP neurons, their names, and the parameters they own.

A unit is written as the paper writes it: ``L21H17`` is head 17 of layer 21, ``L21N512`` neuron 512, and ``L21G5``
key/value group 5 of a model with grouped-query attention. Layers, heads, groups and neurons count from 0. A whole
activation of a layer is a component, such as ``L21.attn_out``.

This file and ``circuits.models`` are the only ones that know how TransformerLens names and lays out parameters.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, TypeVar

from circuits.errors import CircuitsError

Unit = TypeVar("Unit", bound="_Unit")


def _count_from_0(unit: Any, name: str, noun: str) -> None:
    """Make a field of a unit that is being made a plain int, or refuse it."""
    value = getattr(unit, name)
    if type(value) is int and value >= 0:  # models have tens of thousands of neurons: this must be quick
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise CircuitsError(f"a {noun} has no {name} {value!r}: give a whole number from 0 on")
    object.__setattr__(unit, name, int(value))


@dataclass(frozen=True, order=True)
class ModelShape:
    """The sizes that say which units a model has and which parameters belong to them.

    Attributes:
        n_layers: number of layers.
        n_heads: query heads in a layer.
        n_key_value_heads: key/value groups in a layer; equals ``n_heads`` without grouped-query attention.
        d_mlp: neurons in a layer.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_mlp: int

    def heads(self) -> Iterator["Head"]:
        """All heads, layer by layer.

        Example:
            >>> [str(head) for head in ModelShape(2, 2, 2, 8).heads()]
            ['L0H0', 'L0H1', 'L1H0', 'L1H1']
        """
        return (Head(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads))


@dataclass(frozen=True, order=True)
class _Unit:
    layer: int
    index: int

    LETTER: ClassVar[str]
    NOUN: ClassVar[str]
    SIZE: ClassVar[str]

    def __post_init__(self) -> None:
        _count_from_0(self, "layer", self.NOUN)
        _count_from_0(self, "index", self.NOUN)

    def __str__(self) -> str:
        return f"L{self.layer}{self.LETTER}{self.index}"

    @classmethod
    def of(cls: type[Unit], unit: Any, shape: ModelShape) -> Unit:
        """A unit of the model, given as itself or by its name.

        Raises:
            CircuitsError: it is neither, or the model has no such unit.

        Example:
            >>> Head.of("L1H0", ModelShape(2, 2, 2, 8)), Head.of(Head(1, 0), ModelShape(2, 2, 2, 8))
            (Head(layer=1, index=0), Head(layer=1, index=0))
        """
        if not isinstance(unit, cls):
            return cls.parse(unit, shape)
        unit.check(shape)
        return unit

    @classmethod
    def parse(cls: type[Unit], text: str, shape: ModelShape | None = None) -> Unit:
        """Read a unit's name; with ``shape``, also check that the model has it.

        Raises:
            CircuitsError: the text is not such a name, or the model has no such unit.
        """
        match = re.fullmatch(rf"L(\d+){cls.LETTER}(\d+)", str(text).strip(), re.IGNORECASE)
        if match is None:
            raise CircuitsError(f"{text!r} is not a {cls.NOUN}: write layer and {cls.NOUN} as in {cls(21, 17)}")
        unit = cls(int(match[1]), int(match[2]))
        if shape is not None:
            unit.check(shape)
        return unit

    def check(self, shape: ModelShape) -> None:
        """Raise a `CircuitsError` unless a model of this shape has the unit."""
        count = self.count(shape)
        if self.layer >= shape.n_layers:
            raise CircuitsError(f"there is no {self.NOUN} {self}: the model has layers 0 to {shape.n_layers - 1}")
        if self.index >= count:
            raise CircuitsError(f"there is no {self.NOUN} {self}: each layer has {self.NOUN}s 0 to {count - 1}")

    @classmethod
    def count(cls, shape: ModelShape) -> int:
        """How many units of this kind each layer has."""
        return int(getattr(shape, cls.SIZE))


class Head(_Unit):
    """An attention head, written ``L21H17``.

    Raises:
        CircuitsError: layer or index is not a whole number from 0 on.

    Example:
        >>> Head.parse("L21H17")
        Head(layer=21, index=17)
        >>> str(Head(2, 1))
        'L2H1'
    """

    LETTER = "H"
    NOUN = "head"
    SIZE = "n_heads"


class KVGroup(_Unit):
    """A key/value group of grouped-query attention, written ``L21G5``.

    Raises:
        CircuitsError: layer or index is not a whole number from 0 on.

    Example:
        >>> str(KVGroup.parse("L21G5"))
        'L21G5'
    """

    LETTER = "G"
    NOUN = "group"
    SIZE = "n_key_value_heads"


def with_groups(heads: Iterable[Head], shape: ModelShape) -> list[Head | KVGroup]:
    """Heads, and after them the key/value groups that they read; a head without grouping has its own keys and values.

    Example:
        >>> [str(unit) for unit in with_groups([Head(0, 0), Head(0, 1), Head(1, 2)], ModelShape(2, 4, 2, 8))]
        ['L0H0', 'L0H1', 'L1H2', 'L0G0', 'L1G1']
        >>> [str(unit) for unit in with_groups([Head(0, 0)], ModelShape(2, 4, 4, 8))]
        ['L0H0']
    """
    chosen = list(heads)
    repeats = shape.n_heads // shape.n_key_value_heads
    groups = dict.fromkeys(KVGroup(head.layer, head.index // repeats) for head in chosen)
    return [*chosen, *(groups if repeats > 1 else ())]


class Neuron(_Unit):
    """An MLP neuron, written ``L21N512``.

    Raises:
        CircuitsError: layer or index is not a whole number from 0 on.

    Example:
        >>> str(Neuron.parse("L21N512"))
        'L21N512'
    """

    LETTER = "N"
    NOUN = "neuron"
    SIZE = "d_mlp"


@dataclass(frozen=True, order=True)
class Component:
    """A whole activation of one layer, written ``L21.attn_out``.

    Attributes:
        layer: its layer.
        name: ``resid_pre`` (the residual stream before the layer), ``attn_out``, ``resid_mid`` (between attention and
            MLP), ``mlp_out`` or ``resid_post``.

    Raises:
        CircuitsError: the layer is not a whole number from 0 on, or there is no such name.

    Example:
        >>> str(Component(21, "attn_out")), Component.parse("L3.mlp_out")
        ('L21.attn_out', Component(layer=3, name='mlp_out'))
    """

    layer: int
    name: str

    NAMES: ClassVar[tuple[str, ...]] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

    def __post_init__(self) -> None:
        _count_from_0(self, "layer", "component")
        if self.name not in self.NAMES:
            raise CircuitsError(f"there is no component {self.name!r}: choose from {', '.join(self.NAMES)}")

    def __str__(self) -> str:
        return f"L{self.layer}.{self.name}"

    @classmethod
    def parse(cls, text: str, shape: ModelShape | None = None) -> "Component":
        """Read a component's name; with ``shape``, also check that the model has it.

        Raises:
            CircuitsError: the text is not such a name, or the model has no such layer.
        """
        match = re.fullmatch(rf"L(\d+)\.({'|'.join(cls.NAMES)})", text.strip(), re.IGNORECASE)
        if match is None:
            raise CircuitsError(f"{text!r} is not a component: write layer and one of {', '.join(cls.NAMES)}")
        component = cls(int(match[1]), match[2].lower())
        if shape is not None:
            component.check(shape)
        return component

    def check(self, shape: ModelShape) -> None:
        """Raise a `CircuitsError` unless a model of this shape has the component."""
        if self.layer >= shape.n_layers:
            raise CircuitsError(f"there is no {self}: the model has layers 0 to {shape.n_layers - 1}")


#: Anything an intervention can act on.
AnyUnit = Head | KVGroup | Neuron | Component


def parse_unit(text: str, shape: ModelShape | None = None) -> AnyUnit:
    """Read the name of a head, key/value group, neuron or component.

    Raises:
        CircuitsError: the text is no such name, or the model has no such unit.

    Example:
        >>> [type(parse_unit(name)).__name__ for name in ("L2H1", "L2G0", "L2N7", "L2.mlp_out")]
        ['Head', 'KVGroup', 'Neuron', 'Component']
    """
    if "." in text:
        return Component.parse(text, shape)
    for kind in (Head, KVGroup, Neuron):
        if re.fullmatch(rf"L\d+{kind.LETTER}\d+", text.strip(), re.IGNORECASE):
            return kind.parse(text, shape)
    raise CircuitsError(f"{text!r} is not a unit: write L21H17, L21G5, L21N512 or L21.attn_out")


@dataclass(frozen=True)
class ParameterLayout:
    """To whom the entries of one parameter belong.

    Attributes:
        unit: the kind of unit that owns slices of the parameter; None if it belongs to no unit.
        axis: the axis of the parameter that counts the units.
    """

    unit: type[Head] | type[KVGroup] | type[Neuron] | None
    axis: int = 0


#: The embedding and the unembedding: one tensor and its transpose where a model ties them.
TIED = ("embed.W_E", "unembed.W_U")

_HEAD, _GROUP = ParameterLayout(Head), ParameterLayout(KVGroup)
_LAYOUTS: dict[str, ParameterLayout] = {
    "attn.W_Q": _HEAD,
    "attn.b_Q": _HEAD,
    "attn.W_O": _HEAD,
    "attn.W_K": _GROUP,
    "attn.W_V": _GROUP,
    "attn.b_K": _GROUP,
    "attn.b_V": _GROUP,
    "mlp.W_in": ParameterLayout(Neuron, 1),
    "mlp.W_gate": ParameterLayout(Neuron, 1),
    "mlp.b_in": ParameterLayout(Neuron),
    "mlp.b_gate": ParameterLayout(Neuron),
    "mlp.W_out": ParameterLayout(Neuron),
}
_NO_UNIT = ParameterLayout(None)


def layer_of(parameter: str) -> int | None:
    """The layer a parameter lies in, or None for the embedding, the unembedding and the final norm.

    Example:
        >>> layer_of("blocks.3.attn.W_Q"), layer_of("embed.W_E")
        (3, None)
    """
    match = re.match(r"blocks\.(\d+)\.", parameter)
    return int(match[1]) if match else None


def layout_of(parameter: str) -> ParameterLayout:
    """Which kind of unit owns slices of a parameter, and along which axis they are counted.

    Names are the same in every family. Keys and values always belong to key/value groups, of one head each where heads
    are not grouped. Biases added to the residual stream (``b_O``, ``b_out``), embeddings and norms belong to no unit.

    Example:
        >>> layout_of("blocks.3.attn.W_Q").unit.__name__, layout_of("blocks.3.mlp.W_in").axis
        ('Head', 1)
        >>> layout_of("blocks.3.attn.b_O").unit is None
        True
    """
    return _LAYOUTS.get(re.sub(r"^blocks\.\d+\.", "", parameter), _NO_UNIT)


#: The parts of a model that parameters are counted by.
COMPONENTS: tuple[str, ...] = ("attention", "mlp", "norms", "embeddings")


def component_of(parameter: str) -> str:
    """Which of the `COMPONENTS` a parameter is a piece of; the unembedding counts as an embedding.

    Example:
        >>> component_of("blocks.3.attn.b_O"), component_of("blocks.3.ln2.w"), component_of("unembed.W_U")
        ('attention', 'norms', 'embeddings')
    """
    inner = re.sub(r"^blocks\.\d+\.", "", parameter)
    if inner.startswith("ln") or "_norm." in inner:
        return "norms"
    return {"attn": "attention", "mlp": "mlp"}.get(inner.split(".")[0], "embeddings")
