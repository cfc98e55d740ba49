"""Boolean tensors in few bytes, in memory as on disk.

1. Bits: eight entries to a byte, in row-major order; the last byte is filled up with zeros.
2. Gaps: one byte for each entry that is set: how many that are not set stand between it and the one before. 255 passes
   over 255 entries and sets none; the gap goes on in the next byte.
3. Each tensor keeps the shorter of the two. A tenth of all entries or more are bits; one in a hundred takes a byte
   each, an eleventh of the bits.
4. Two tensors are combined as bits, eight entries at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[numpy.uint8]

_ONES = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1).sum(1, dtype=numpy.uint8)
_ON = 255


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A boolean tensor, packed.

    Attributes:
        code: the bytes.
        gaps: whether they are gaps; else they are bits.
        shape: of the tensor.
        count: how many entries are set.
    """

    code: Bytes
    gaps: bool
    shape: tuple[int, ...]
    count: int

    @property
    def total(self) -> int:
        """How many entries the tensor has."""
        return prod(self.shape)

    @classmethod
    def from_bits(cls, bits: Bytes, shape: tuple[int, ...]) -> "PackedTensor":
        """Keep bits, or the gaps if they are shorter."""
        count = int(_ONES[bits].sum(dtype=numpy.int64))
        # each entry that is set takes a byte, and every 255 entries take one at most
        if count < len(bits) and len(code := _gaps(bits)) < len(bits):
            return cls(code, True, shape, count)
        return cls(bits, False, shape, count)

    @classmethod
    def from_code(cls, code: Bytes, gaps: bool, shape: tuple[int, ...]) -> "PackedTensor":
        """Take the bytes of a file.

        Raises:
            ValueError: they are not those of a tensor of this shape.
        """
        size, total = len(code), prod(shape)
        passed = int(code.sum(dtype=numpy.int64)) + int((code != _ON).sum())
        if (passed > total) if gaps else (size != -(-total // 8)):
            raise ValueError(f"{size} bytes are no mask of shape {shape}")
        count = int((code != _ON).sum()) if gaps else int(_ONES[code].sum(dtype=numpy.int64))
        return cls(code, gaps, shape, count)

    def bits(self) -> Bytes:
        """The tensor as bits."""
        if not self.gaps:
            return self.code
        return numpy.packbits(self._entries())

    def unpack(self) -> Bool[Tensor, "..."]:
        """The tensor itself, one byte an entry."""
        return torch.from_numpy(self._entries().view(numpy.bool_)).view(self.shape)

    def _entries(self) -> Bytes:
        if not self.gaps:
            return numpy.unpackbits(self.code, count=self.total)
        entries = numpy.zeros(self.total, dtype=numpy.uint8)
        sets = self.code != _ON
        entries[(numpy.cumsum(self.code, dtype=numpy.int64) + numpy.cumsum(sets))[sets] - 1] = 1
        return entries


def _gaps(bits: Bytes) -> Bytes:
    some = numpy.flatnonzero(bits)
    rows, columns = numpy.unpackbits(bits[some, None], axis=1).nonzero()
    gaps = numpy.diff(some[rows] * 8 + columns, prepend=-1) - 1
    ends = numpy.cumsum(gaps // _ON + 1)
    code = numpy.full(ends[-1] if len(ends) else 0, _ON, dtype=numpy.uint8)
    code[ends - 1] = gaps % _ON
    return code


def pack(tensor: Bool[Tensor, "..."]) -> PackedTensor:
    """Pack a boolean tensor.

    Example:
        >>> packed = pack(torch.arange(1000) % 100 == 7)
        >>> len(packed.code), packed.count, packed.unpack().nonzero()[:3, 0].tolist()
        (10, 10, [7, 107, 207])
    """
    return PackedTensor.from_bits(numpy.packbits(tensor.cpu().numpy().ravel()), tuple(tensor.shape))


def combine(one: PackedTensor, two: PackedTensor, operation: Callable[[Bytes, Bytes], Bytes]) -> PackedTensor:
    """Combine two packed tensors of one shape, byte by byte."""
    return PackedTensor.from_bits(operation(one.bits(), two.bits()), one.shape)


def invert(packed: PackedTensor) -> PackedTensor:
    """Every entry the other way."""
    bits = ~packed.bits()
    if packed.total % 8:
        bits[-1] &= 0xFF << (8 - packed.total % 8) & 0xFF
    return PackedTensor.from_bits(bits, packed.shape)


class PackedTensors(Mapping[str, Tensor]):
    """Boolean tensors by name, packed; each is unpacked when it is asked for.

    Args:
        packed: the tensors.

    Example:
        >>> tensors = PackedTensors({"w": pack(torch.tensor([True, False]))})
        >>> tensors["w"]
        tensor([ True, False])
    """

    def __init__(self, packed: dict[str, PackedTensor]) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> Tensor:
        return self.packed[name].unpack()

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, name: object) -> bool:
        return name in self.packed

    def __repr__(self) -> str:
        return f"PackedTensors({', '.join(self.packed)})"
