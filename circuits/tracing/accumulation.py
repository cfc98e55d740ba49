"""Sums over examples of a statistic of each example's gradient, without keeping any one of these gradients.

1. What a weight reads and the gradient of what it writes come as ``[group, row, features]``: for each group of rows,
   the weight's gradient is the product of the two. A group is an example. Where the gradient of a whole batch is
   wanted, or the statistic is linear, so that it may be taken last, all rows of the batch are one group.
2. Products are formed for as many groups, and as many of the weight's own rows, as stay in the cache of one core.
   There the statistic is taken in place, and a product with a vector of ones adds the groups to the sum: memory
   outside the cache is touched once for several examples.
3. Blocks of rows of many weights are shared out among threads of one core each, which never wait for one another.
   What is added to a number, and in which order, does not depend on how many threads there are.
4. A bias's gradient is the sum of the rows of its group, a scale's the sum of their products with what the norm read.
5. An embedding's gradient has rows for the tokens of the group alone; only these are formed and added.
6. Tied embeddings are one tensor with one gradient, the sum of what both uses give: the unembedding's products leave
   out the group's own tokens, and these are added with their row of the embedding's gradient.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": Tensor.abs_,
    "square": Tensor.square_,
    "signed": lambda gradient: gradient,
}

#: Numbers formed at a time: three quarters of a megabyte, which stay in the cache of one core.
_AT_A_TIME = 3 << 16
#: Examples formed at a time for a weight that is larger than that.
_FEWEST = 4
#: Numbers of a sum that a thread takes in charge at a time.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Products:
    """What gives a weight's gradients: for each group, ∂L/∂W = Σ over its rows of ∂L/∂y ⊗ x.

    Attributes:
        total: the sum that the statistic of every group's gradient is added to.
        gradients: ∂L/∂y of each row.
        inputs: x of each row.
    """

    total: Float[Tensor, "out in"]
    gradients: Float[Tensor, "group row out"]
    inputs: Float[Tensor, "group row in"]

    def blocks(self) -> "list[Products]":
        """The same for some rows of the weight at a time."""
        rows = _even_part(self.total.shape[0], _BLOCK // self.total.shape[1])
        pairs = zip(self.total.split(rows), self.gradients.split(rows, 2), strict=True)
        return [Products(total, gradients, self.inputs) for total, gradients in pairs]


def add_products(products: Iterable[Products], statistic: str) -> None:
    """Add to every sum the statistic of every group's gradient, on as many threads as torch uses.

    Example:
        >>> total = torch.zeros(1, 2)
        >>> gradients, inputs = torch.tensor([[[1.0]], [[-1.0]]]), torch.tensor([[[2.0, 3.0]], [[2.0, 0.5]]])
        >>> add_products([Products(total, gradients, inputs)], "abs")
        >>> total
        tensor([[4.0000, 3.5000]])
    """
    blocks = [block for one in products for block in one.blocks()]
    threads = torch.get_num_threads()
    if threads == 1 or len(blocks) < 2 or blocks[0].total.device.type != "cpu":
        for block in blocks:
            _add_block(block, statistic)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(lambda block: _add_block(block, statistic), blocks):
                pass
    finally:
        # the number a thread sets for itself is also what threads to come start with
        torch.set_num_threads(threads)


def _even_part(whole: int, limit: int) -> int:
    """The largest size of at most ``limit`` that leaves no smaller part over; at least half of it."""
    limit = max(1, min(whole, limit))
    return next((size for size in range(limit, limit // 2, -1) if whole % size == 0), limit)


def _add_block(block: Products, statistic: str) -> None:
    change, (written, read) = STATISTICS[statistic], block.total.shape
    groups = min(len(block.inputs), max(_FEWEST, _AT_A_TIME // block.total.numel()))
    rows = _even_part(written, _AT_A_TIME // (groups * read))
    buffer = block.total.new_empty(groups * rows, read)
    parts = [part.view(-1) for part in block.total.split(rows)]
    shape: tuple[int, ...] = ()
    for gradients, inputs in zip(block.gradients.split(groups), block.inputs.split(groups), strict=True):
        for part, some in zip(parts, gradients.transpose(1, 2).split(rows, 1), strict=True):
            if some.shape[:2] != shape:
                # views are made as seldom as can be: threads wait for one another in Python, not in the products
                shape = some.shape[:2]
                formed = buffer[: shape[0] * shape[1]].view(*shape, read)
                columns, ones = formed.view(shape[0], -1).T, formed.new_ones(shape[0])
            torch.bmm(some, inputs, out=formed)
            change(formed)
            part.addmv_(columns, ones)


def add_vectors(
    total: Float[Tensor, " features"], gradients: Float[Tensor, "group row features"], statistic: str
) -> None:
    """Add to ``total`` the statistic of every group's sum over its rows."""
    total += STATISTICS[statistic](gradients.sum(1)).sum(0)


def add_embeddings(
    total: Float[Tensor, "token features"],
    tokens: Int[Tensor, "group row"],
    gradients: Float[Tensor, "group row features"],
    statistic: str,
    more: Float[Tensor, "group row features"] | None = None,
) -> None:
    """Add to ``total`` the statistic of every group's gradient of an embedding.

    Args:
        total: the sum.
        tokens: the token of each row.
        gradients: of each row's embedding.
        statistic: of each group's gradient.
        more: what the gradient of each row's token has besides, the same wherever the token stands in the group.
    """
    vocabulary, features = total.shape
    keys = torch.arange(len(tokens), device=tokens.device)[:, None] * vocabulary + tokens
    present, which = keys.flatten().unique(return_inverse=True)
    rows = total.new_zeros(len(present), features)
    if more is not None:
        rows[which] = more.flatten(0, 1)
    rows.index_add_(0, which, gradients.flatten(0, 1))
    total.index_add_(0, present % vocabulary, STATISTICS[statistic](rows))


def add_tied(
    total: Float[Tensor, "token features"],
    tokens: Int[Tensor, "group row"],
    embedded: Float[Tensor, "group row features"],
    logits: Float[Tensor, "group answer token"],
    unembedded: Float[Tensor, "group answer features"],
    statistic: str,
) -> None:
    """Add to ``total`` the statistic of every group's gradient of a tensor that both embeds and unembeds.

    Args:
        total: the sum.
        tokens: the token of each row.
        embedded: gradient of each row's embedding.
        logits: gradient of the logits; set to zero at the group's own tokens.
        unembedded: what the unembedding read.
        statistic: of each group's gradient.
    """
    own = tokens[:, None].expand(-1, logits.shape[1], -1)
    more = torch.bmm(logits.gather(2, own).transpose(1, 2), unembedded)
    logits.scatter_(2, own, 0.0)
    add_products([Products(total, logits, unembedded)], statistic)
    add_embeddings(total, tokens, embedded, statistic, more)
