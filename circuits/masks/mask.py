"""A set of parameters of one model, stored as one bit each.

1. A mask holds, for every parameter it covers, a boolean tensor of the parameter's shape.
2. Masks over the same parameters of the same model combine with ``&``, ``|``, ``-`` and ``~``.
3. A mask knows the model it was made for; acting with it on another one is an error that names both.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import HookedTransformer, checkpoint_of, fingerprint, identity, parameters_of
from circuits.storage import digest, provenance, read_tensors, write_tensors


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """A set of parameters.

    Attributes:
        masks: parameter name → which of its entries are in the set, ``Bool`` in the parameter's shape.
        model: fingerprint of the model the mask was made for.
        provenance: how it was made.

    Example:
        >>> mask = ParameterMask({"w": torch.tensor([True, False, False, True])}, model="a")
        >>> mask.size, (~mask).size, (mask & ~mask).size
        (2, 2, 0)
    """

    masks: dict[str, Tensor]
    model: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many parameters are in the set."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """How many parameters the set is drawn from."""
        return sum(mask.numel() for mask in self.masks.values())

    def __repr__(self) -> str:
        share = self.size / self.total if self.total else 0.0
        return f"ParameterMask({self.size:,} of {self.total:,} parameters, {share:.3%}, model={self.model})"

    def _combine(
        self, other: "ParameterMask", sign: str, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> "ParameterMask":
        if self.model != other.model:
            raise CircuitsError(f"the masks belong to different models, {self.model} and {other.model}")
        if self.masks.keys() != other.masks.keys():
            only = sorted(self.masks.keys() ^ other.masks.keys())[0]
            raise CircuitsError(f"the masks cover different parameters: only one of them covers {only}")
        return ParameterMask(
            {name: combine(mask, other.masks[name]) for name, mask in self.masks.items()},
            self.model,
            {sign: [self.provenance, other.provenance]},
        )

    def __and__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "&", torch.logical_and)

    def __or__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "|", torch.logical_or)

    def __sub__(self, other: "ParameterMask") -> "ParameterMask":
        return self._combine(other, "-", lambda one, two: one & ~two)

    def __invert__(self) -> "ParameterMask":
        return ParameterMask({name: ~mask for name, mask in self.masks.items()}, self.model, {"~": self.provenance})

    def for_model(self, model: HookedTransformer) -> "ParameterMask":
        """The same entries in another model of the same shape, on purpose: the check of `check` is waived once.

        Raises:
            CircuitsError: the model has other parameters.
        """
        moved = ParameterMask(self.masks, fingerprint(model), self.provenance | {"made_for": self.model})
        moved.check(model)
        return moved

    def check(self, model: HookedTransformer) -> None:
        """Raise a `CircuitsError` unless the mask was made for this model."""
        parameters = parameters_of(model)
        for name, mask in self.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
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
        """A random mask with the same count in each tensor: the control for what is special about the set.

        Args:
            seed: names the draw; draws with different names are independent.

        Example:
            >>> mask = ParameterMask({"w": torch.arange(100) < 7}, model="a")
            >>> mask.random(0).size
            7
        """
        generator = torch.Generator().manual_seed(int(digest(str(seed)), 16) >> 1)
        masks: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            drawn = torch.zeros(mask.numel(), dtype=torch.bool)
            drawn[torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]] = True
            masks[name] = drawn.view(mask.shape)
        return ParameterMask(masks, self.model, provenance(random_like=self.provenance, seed=seed))

    def save(self, path: str | Path) -> None:
        """Save as safetensors, one bit for each parameter."""
        packed = {name: torch.from_numpy(numpy.packbits(mask.numpy().ravel())) for name, mask in self.masks.items()}
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        metadata = {"kind": "mask", "model": self.model, "shapes": shapes, "provenance": self.provenance}
        write_tensors(Path(path), packed, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "ParameterMask":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        packed, metadata = read_tensors(Path(path), "mask")
        masks: dict[str, Bool[Tensor, ...]] = {}
        for name, shape in metadata["shapes"].items():
            bits = numpy.unpackbits(packed[name].numpy(), count=int(numpy.prod(shape)))
            masks[name] = torch.from_numpy(bits).bool().view(shape)
        return cls(masks, metadata["model"], metadata["provenance"])
