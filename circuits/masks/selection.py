"""The largest of billions of values, exactly, without sorting or copying them.

1. The bits of a float32 that is not negative, read as an integer, have the order of the floats.
2. A histogram of the upper 16 bits over all tensors says in which bin the smallest chosen value lies, and a second one,
   of the lower 16 bits in that bin, which value it is. Both go through the tensors in chunks.
3. Chosen are all that are larger, then as many that equal it as there is room for, in their order.
4. Where there are few values, histograms would cost more than to select that value among all of them.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.masks.packing import PackedTensor, PackedTensors, pack

_CHUNK = 1 << 22
_HALF = 16
#: Values up to which they are put together.
_FEW = 1 << 20


def largest(values: Mapping[str, Tensor], count: int) -> PackedTensors:
    """The entries with the largest absolute values over all tensors together.

    Args:
        values: by name; all finite (see `all_finite`). Compared in float32.
        count: how many to choose, at most as many as there are; ties go to the first.

    Example:
        >>> chosen = largest({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0, 2.0])}, 2)
        >>> {name: entries.tolist() for name, entries in chosen.items()}
        {'a': [False, True], 'b': [True, False]}
    """
    if count == 0:
        return PackedTensors({name: pack(torch.zeros(value.shape, dtype=torch.bool)) for name, value in values.items()})
    if sum(value.numel() for value in values.values()) <= _FEW:
        every = torch.cat([value.detach().flatten().float().cpu() for value in values.values()]).abs()
        least = every.kthvalue(len(every) - count + 1).values.item()
        chosen, _ = _chosen(every, least, count - int((every > least).sum()))
        parts = chosen.split([value.numel() for value in values.values()])
        return PackedTensors(
            {name: pack(part.view(value.shape)) for (name, value), part in zip(values.items(), parts, strict=True)}
        )
    least, room = _least(values, count)
    packed: dict[str, PackedTensor] = {}
    for name, value in values.items():
        chosen, room = _chosen(value.detach().flatten().float().abs().cpu(), least, room)
        packed[name] = pack(chosen.view(value.shape))
    return PackedTensors(packed)


def _chosen(sizes: Float[Tensor, " entry"], least: float, room: int) -> tuple[Bool[Tensor, " entry"], int]:
    """All that are larger than the least, the first that equal it, and how much room these leave."""
    chosen = sizes > least
    ties = (sizes == least).nonzero()[:room, 0]
    chosen[ties] = True
    return chosen, room - len(ties)


def all_finite(values: Mapping[str, Tensor]) -> bool:
    """Whether no value is infinite or NaN."""
    return all(bool(chunk.isfinite().all()) for value in values.values() for chunk in _chunks(value))


def _least(values: Mapping[str, Tensor], count: int) -> tuple[float, int]:
    """The smallest chosen absolute value, and how many entries equal to it are chosen."""
    upper = torch.zeros(1 << _HALF, dtype=torch.long)
    for bits in _bits(values):
        upper += torch.bincount(bits >> _HALF, minlength=1 << _HALF)
    place, room = _place(upper, count)
    lower = torch.zeros(1 << _HALF, dtype=torch.long)
    for bits in _bits(values):
        inside = bits[bits >> _HALF == place]
        lower += torch.bincount(inside & ((1 << _HALF) - 1), minlength=1 << _HALF)
    last, room = _place(lower, room)
    return torch.tensor([place << _HALF | last], dtype=torch.int32).view(torch.float32).item(), room


def _place(histogram: Int[Tensor, " bin"], count: int) -> tuple[int, int]:
    """The bin that the count-th largest value lies in, and how many of the bin belong to the largest."""
    from_top = histogram.flip(0).cumsum(0)
    bins = int((from_top < count).sum())
    return len(histogram) - 1 - bins, count - (int(from_top[bins - 1]) if bins else 0)


def _chunks(value: Tensor) -> Iterator[Float[Tensor, " chunk"]]:
    for chunk in value.detach().flatten().split(_CHUNK):
        yield chunk.float().cpu()


def _bits(values: Mapping[str, Tensor]) -> Iterator[Int[Tensor, " chunk"]]:
    # small tensors are put together: a histogram costs its bins however few entries it counts
    small: list[Tensor] = []
    size = 0
    for value in values.values():
        for chunk in _chunks(value):
            small.append(chunk.abs().view(torch.int32))
            size += len(chunk)
            if size >= _CHUNK:
                yield torch.cat(small)
                small, size = [], 0
    if small:
        yield torch.cat(small)
