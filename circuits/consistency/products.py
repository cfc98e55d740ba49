"""Inner products of the gradients of single examples, all pairs of two tasks, tensor by tensor.

1. A weight's gradient of one example is Σ over positions of ∂L/∂y ⊗ x (`Sides`); a bias's has x = 1.
2. The entries of a head, group or neuron are a block: some of the rows, some of the columns (`Block`).
3. Where positions are many, the entries are formed, a bounded number at a time, and one matrix product of
   ``[example, entry]`` with ``[other, entry]`` gives all pairs. Where they are few,
   ⟨x₁ ⊗ g₁, x₂ ⊗ g₂⟩ = ⟨x₁, x₂⟩⟨g₁, g₂⟩ is summed over pairs of positions. Both are exact; the cheaper one is taken.
4. As an option both are replaced by k random numbers for each gradient, Σ over positions of (R g) ⊙ (R′ x) / √k with
   random signs R and R′: their inner products have the right mean.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models import Row

#: Numbers formed at a time.
_AT_A_TIME = 1 << 24
#: What adding up a product of two positions costs, beside a multiplication inside a matrix product.
_ADDING = 10
#: What taking single entries out of both sides costs, beside a multiplication inside a matrix product.
_TAKING = 60


@dataclass(frozen=True)
class Sides:
    """What gives the gradients of one tensor: ∂L/∂y and x at each position of each example."""

    written: Float[Tensor, "example pos out"]
    read: Float[Tensor, "example pos in"]


def _present(index: Int[Tensor, "..."]) -> Int[Tensor, " value"]:
    """The values that there are, in order: without sorting them all, as ``unique`` does."""
    found = torch.zeros(int(index.max()) + 1, dtype=torch.bool)
    found[index.flatten()] = True
    return found.nonzero().flatten()


@dataclass(frozen=True)
class Block:
    """The entries of a tensor that one parameter is, unit by unit.

    Attributes:
        row: the parameter.
        rows: the rows ``[unit, …]`` that are each unit's.
        columns: the columns.
        places: row and column of each entry, in the parameter's shape.
    """

    row: Row
    rows: Int[Tensor, "unit rows"]
    columns: Int[Tensor, "unit columns"]
    places: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, row: Row, shape: torch.Size, units: bool) -> "Block":
        """Find a parameter's entries in its tensor; all of them as those of one unit if units are not wanted."""
        if len(shape) == 1:
            first, second = torch.arange(shape[0]), torch.zeros(shape[0], dtype=torch.long)
        else:
            first, second = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
            first, second = (second, first) if row.inputs_first else (first, second)
        places = row.stored(first), row.stored(second)
        by_unit = [
            index.movedim(row.axis if units else 0, 0).reshape(index.shape[row.axis] if units else 1, -1)
            for index in places
        ]
        rows, columns = (torch.stack([_present(one) for one in index]) for index in by_unit)
        return cls(row, rows, columns, places)

    def parts(self, examples: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Units, rows and columns whose entries can be formed at a time."""
        height, width = self.rows.shape[1], self.columns.shape[1]
        units = max(1, _AT_A_TIME // (examples * height * width))
        if units > 1 or len(self.rows) > 1:
            for first in range(0, len(self.rows), units):
                chosen = slice(first, first + units)
                yield chosen, self.rows[chosen], self.columns[chosen]
            return
        for rows in self.rows.split(max(1, _AT_A_TIME // (examples * width)), 1):
            yield slice(0, 1), rows, self.columns


Products = tuple[Tensor, Tensor, Tensor]


def products(one: Sides, two: Sides, block: Block, sketch: Callable[[int], Tensor] | None = None) -> Products:
    """Inner products ``[unit, example, other]`` and squared lengths ``[unit, example]``, ``[unit, other]``."""
    n, m = len(one.written), len(two.written)
    units, height, width = len(block.rows), block.rows.shape[1], block.columns.shape[1]
    gram = one.written.new_zeros(units, n, m)
    lengths = [one.written.new_zeros(units, count) for count in (n, m)]
    pairs = one.written.shape[1] * two.written.shape[1]
    forming = height * width * units
    by_position = pairs * (one.written.shape[2] + one.read.shape[2] + _ADDING * units)
    if sketch is not None:
        signs = sketch(one.written.shape[2]), sketch(one.read.shape[2])
        for unit in range(units):
            found = [_sketched(side, block.rows[unit], block.columns[unit], signs) for side in (one, two)]
            gram[unit] = found[0] @ found[1].T
            for length, side in zip(lengths, found, strict=True):
                length[unit] = side.square().sum(1)
    elif forming <= by_position:
        for chosen, rows, columns in block.parts(max(n, m)):
            formed = [_formed(side, rows, columns) for side in (one, two)]
            gram[chosen] += formed[0] @ formed[1].transpose(1, 2)
            for length, side in zip(lengths, formed, strict=True):
                length[chosen] += torch.linalg.vector_norm(side, dim=2).square()
    else:
        step = max(1, _AT_A_TIME // (m * pairs))
        for unit, (rows, columns) in enumerate(zip(block.rows, block.columns, strict=True)):
            sides = [(side.written[..., rows], side.read[..., columns]) for side in (one, two)]
            for first in range(0, n, step):
                some = slice(first, first + step)
                both = torch.ones((), device=gram.device)
                for mine, theirs in zip(*sides, strict=True):
                    both = both * (mine[some].flatten(0, 1) @ theirs.flatten(0, 1).T)
                gram[unit, some] = both.view(-1, one.written.shape[1], m, two.written.shape[1]).sum((1, 3))
            for length, (written, read) in zip(lengths, sides, strict=True):
                length[unit] = ((written @ written.transpose(1, 2)) * (read @ read.transpose(1, 2))).sum((1, 2))
    return gram, lengths[0], lengths[1]


def _formed(side: Sides, rows: Tensor, columns: Tensor) -> Float[Tensor, "unit example entry"]:
    if len(rows) == 1:
        entries = side.written[..., rows[0]].transpose(1, 2) @ side.read[..., columns[0]]
        return entries.flatten(1)[None]
    if bool((columns == columns[:1]).all()):
        entries = side.written[..., rows.flatten()].transpose(1, 2) @ side.read[..., columns[0]]
        by_row: Tensor = entries.unflatten(1, rows.shape).transpose(0, 1).flatten(2)
        return by_row
    entries = side.written[..., rows[0]].transpose(1, 2) @ side.read[..., columns.flatten()]
    by_column: Tensor = entries.unflatten(2, columns.shape).permute(2, 0, 1, 3).flatten(2)
    return by_column


def _sketched(side: Sides, rows: Tensor, columns: Tensor, signs: tuple[Tensor, Tensor]) -> Float[Tensor, "example k"]:
    written, read = side.written[..., rows] @ signs[0][rows], side.read[..., columns] @ signs[1][columns]
    found: Tensor = (written * read).sum(1) / signs[0].shape[1] ** 0.5
    return found


def products_inside(
    one: Sides, two: Sides, block: Block, inside: Mapping[str, Bool[Tensor, "..."]]
) -> dict[str, Products]:
    """The same over the entries of masks, by name: these alone are formed where they are few, else all and taken of."""
    n, m = len(one.written), len(two.written)
    found = {
        name: (one.written.new_zeros(1, n, m), one.written.new_zeros(1, n), one.written.new_zeros(1, m))
        for name in inside
    }
    entries = {name: tuple(place[mask] for place in block.places) for name, mask in inside.items()}
    rows, columns = map(_present, block.places)
    if sum(len(chosen) for chosen, _ in entries.values()) * _TAKING < len(rows) * len(columns):
        size = max(1, _AT_A_TIME // (max(n, m) * max(one.written.shape[1], two.written.shape[1])))
        for name, chosen in entries.items():
            for some in zip(*(place.split(size) for place in chosen), strict=True):
                _add(found[name], [_taken(side, *some) for side in (one, two)])
        return found
    for part in rows.split(max(1, _AT_A_TIME // (max(n, m) * len(columns)))):
        formed = [_formed(side, part[None], columns[None])[0] for side in (one, two)]
        for name, (row, column) in entries.items():
            here = torch.isin(row, part)
            at = torch.searchsorted(part, row[here]) * len(columns) + torch.searchsorted(columns, column[here])
            _add(found[name], [side[:, at] for side in formed])
    return found


def _taken(side: Sides, rows: Tensor, columns: Tensor) -> Float[Tensor, "example entry"]:
    return (side.written[..., rows] * side.read[..., columns]).sum(1)


def _add(found: Products, formed: Sequence[Tensor]) -> None:
    gram, *lengths = found
    gram[0] += formed[0] @ formed[1].T
    for length, side in zip(lengths, formed, strict=True):
        length[0] += side.square().sum(1)
