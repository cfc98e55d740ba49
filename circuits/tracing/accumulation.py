"""Sums over examples of a statistic of each example's gradient, without keeping any one of these gradients.

1. What a weight reads and the gradient of what it writes come as ``[group, row, features]``: for each group of rows,
   the weight's gradient is the product of the two. A group is an example. Where the gradient of a whole batch is
   wanted, or the statistic is linear, so that it may be taken last, all rows of the batch are one group.
2. Products are formed for as many groups, and as many of the weight's own rows, as stay in the processor's cache.
   There the statistic is taken in place, and a product with a vector of ones adds the groups to the sum: memory
   outside the cache is touched once for many examples.
3. A bias's gradient is the sum of the rows of its group, a scale's the sum of their products with what the norm read.
4. An embedding's gradient has rows for the tokens of the group alone; only these are formed and added.
5. Tied embeddings are one tensor with one gradient, the sum of what both uses give: the unembedding's products leave
   out the group's own tokens, and these are added with their row of the embedding's gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": Tensor.abs_,
    "square": Tensor.square_,
    "signed": lambda gradient: gradient,
}

#: Numbers formed at a time: two megabytes, what the caches of two cores hold.
_AT_A_TIME = 1 << 19
#: Examples formed at a time for a weight that is larger than that.
_FEWEST = 8


def add_products(
    total: Float[Tensor, "out in"],
    gradients: Float[Tensor, "group row out"],
    inputs: Float[Tensor, "group row in"],
    statistic: str,
) -> None:
    """Add to ``total`` the statistic of every group's ∂L/∂W = Σ over its rows of ∂L/∂y ⊗ x.

    Example:
        >>> total = torch.zeros(1, 2)
        >>> add_products(total, torch.tensor([[[1.0]], [[-1.0]]]), torch.tensor([[[2.0, 3.0]], [[2.0, 0.5]]]), "abs")
        >>> total
        tensor([[4.0000, 3.5000]])
    """
    change = STATISTICS[statistic]
    written, read = total.shape
    groups = min(len(inputs), max(_FEWEST, _AT_A_TIME // total.numel()))
    rows = max(1, min(written, _AT_A_TIME // (groups * read)))
    buffer, ones = total.new_empty(groups * rows * read), total.new_ones(groups)
    for left, right in zip(gradients.split(groups), inputs.split(groups), strict=True):
        for first in range(0, written, rows):
            part = total[first : first + rows].view(-1)
            products = buffer[: len(left) * len(part)].view(len(left), -1, read)
            torch.bmm(left[:, :, first : first + rows].transpose(1, 2), right, out=products)
            part.addmv_(change(products).flatten(1).T, ones[: len(left)])


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
    add_products(total, logits, unembedded, statistic)
    add_embeddings(total, tokens, embedded, statistic, more)
