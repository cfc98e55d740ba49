"""Every head and every behaviour: how strongly each head shows each, in one pass.

1. A behaviour says, for one prompt, which cells of a pattern it is about. Four need nothing but tokens: **previous
   token**; **first token**; **duplicate token**, an earlier place of the same token; **induction**, the place behind an
   earlier place of the same token (Olsson et al. 2022, arXiv 2209.11895). The others are pairs of a task's spans: from
   each span, and from the last token, to each span.
2. A head's score on a prompt is the mean, over the tokens that attend in those cells, of the attention that falls into
   them; tokens without such a cell do not count. Beside it stands what uniform attention over the same places would
   give, and the excess over that with its interval over the examples.
3. A batch's scores are one product for each layer: patterns ``[example, head, query · key]`` times weights
   ``[example, query · key, behaviour]``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import Model, capture, check_task, shape_of
from circuits.rankings.attention import Behaviour, prompt_length, prompt_spans, uniform
from circuits.rankings.reading import token_texts
from circuits.statistics import intervals
from circuits.tasks import Task

#: Numbers in the patterns of one pass.
_NUMBERS = 2**26

Cells = Bool[Tensor, "query key"]


def previous_token(tokens: Int[Tensor, " pos"]) -> Cells:
    """The token before.

    Example:
        >>> previous_token(torch.tensor([5, 6, 7])).nonzero().tolist()
        [[1, 0], [2, 1]]
    """
    return torch.eye(len(tokens), dtype=torch.bool).roll(-1, 1).tril(-1)


def first_token(tokens: Int[Tensor, " pos"]) -> Cells:
    """The first token, from all others.

    Example:
        >>> first_token(torch.tensor([5, 6, 7])).nonzero().tolist()
        [[1, 0], [2, 0]]
    """
    cells = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    cells[1:, 0] = True
    return cells


def duplicate_token(tokens: Int[Tensor, " pos"]) -> Cells:
    """Earlier places of the same token.

    Example:
        >>> duplicate_token(torch.tensor([5, 6, 5])).nonzero().tolist()
        [[2, 0]]
    """
    return (tokens[:, None] == tokens).tril(-1)


def induction(tokens: Int[Tensor, " pos"]) -> Cells:
    """The places behind earlier places of the same token.

    Example:
        >>> induction(torch.tensor([5, 6, 5])).nonzero().tolist()
        [[2, 1]]
    """
    cells = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    cells[:, 1:] = duplicate_token(tokens)[:, :-1]
    return cells


#: Behaviours that need no spans.
TOKEN_BEHAVIOURS: Mapping[str, Callable[[Tensor], Tensor]] = {
    found.__name__: found for found in (previous_token, duplicate_token, induction, first_token)
}


def span_pairs(task: Task) -> tuple[Behaviour, ...]:
    """From each span of a task, and from its last token, to each of its spans.

    Those that no prompt has, because what attends stands before what is attended to, are among them.
    """
    names = list(task.spans)
    return tuple(Behaviour(f"{one}_to_{other}", one, other) for one in ("last", *names) for other in names)


@torch.no_grad()
def behaviour_scores(
    model: Model, task: Task, behaviours: Sequence[Behaviour] | None = None, *, level: float = 0.95
) -> pandas.DataFrame:
    """How strongly every head shows every behaviour, over a task's prompts.

    Args:
        model: loaded with `circuits.load_model`.
        task: whose prompts are read, each up to the token that predicts its answer.
        behaviours: pairs of spans; by default every pair of the task's. Those that need no spans are always there.
        level: of the intervals.

    Returns:
        One row for each head and behaviour that any prompt has: ``unit``, ``layer``, ``index``, ``behaviour``;
        ``score``, the attention; ``uniform``, what uniform attention would give; ``excess`` of the score over it, with
        the ends of its interval over examples, ``excess_low`` and ``excess_high`` (examples of one group are not
        independent); and ``examples``, the number of prompts that have the behaviour.

    Raises:
        CircuitsError: a behaviour that was asked for is in no prompt.

    Source:
        docs/method.md, section 7; Olsson et al. 2022 (arXiv 2209.11895).
    """
    check_task(model, task)
    pairs = span_pairs(task) if behaviours is None else tuple(behaviours)
    names = [*TOKEN_BEHAVIOURS, *(pair.name for pair in pairs)]
    shape = shape_of(model)
    sites = [(layer, "pattern") for layer in range(shape.n_layers)]
    longest = max(prompt_length(task, example) for example in range(len(task)))
    size = max(1, _NUMBERS // (shape.n_layers * shape.n_heads * longest**2))
    found, even = [], []
    for batch in task.batches(size):
        lengths = [prompt_length(batch, example) for example in range(len(batch))]
        weights = torch.stack(
            [_weights(batch, example, length, pairs, max(lengths)) for example, length in enumerate(lengths)]
        )
        patterns = capture(model, batch.tokens[:, : max(lengths)], sites)
        scores = [patterns[site].float().cpu().flatten(2) @ weights.flatten(1, 2) for site in sites]
        found.append(torch.stack(scores, 1))
        flat = torch.stack([uniform(max(lengths))] * len(batch)).flatten(1)[:, None]
        even.append((flat @ weights.flatten(1, 2))[:, 0])
    groups = task.answers.drop_duplicates("example").sort_values("example")
    chosen = groups["group"].tolist() if "group" in groups else groups["example"].tolist()
    # [example, layer, head, behaviour], [example, behaviour]
    values, uniforms = torch.cat(found).numpy(), torch.cat(even).numpy()
    tables = []
    for place, name in enumerate(names):
        there = ~numpy.isnan(uniforms[:, place])
        if not there.any():
            if behaviours is not None and name not in TOKEN_BEHAVIOURS:
                raise CircuitsError(f"no prompt of {task.name} has what {pairs[place - len(TOKEN_BEHAVIOURS)]} needs")
            continue
        own, flat = values[there][..., place].reshape(there.sum(), -1), uniforms[there, place]
        excess = (own - flat[:, None]).astype(float)
        low, high = intervals(
            excess.T,
            [group for group, here in zip(chosen, there, strict=True) if here],
            kind="bounded_difference",
            level=level,
        )
        heads = list(shape.heads())
        tables.append(
            pandas.DataFrame(
                {
                    "unit": [str(head) for head in heads],
                    "layer": [head.layer for head in heads],
                    "index": [head.index for head in heads],
                    "behaviour": name,
                    "score": own.mean(0),
                    "uniform": float(flat.mean()),
                    "excess": excess.mean(0),
                    "excess_low": low,
                    "excess_high": high,
                    "examples": int(there.sum()),
                }
            )
        )
    return pandas.concat(tables, ignore_index=True)


def _weights(
    task: Task, example: int, length: int, pairs: Sequence[Behaviour], longest: int
) -> Float[Tensor, "query key behaviour"]:
    """What each cell of a prompt's pattern counts for each behaviour; NaN in all cells of what the prompt lacks."""
    spans = prompt_spans(task, example, length)
    cells = [look(task.tokens[example, :length]) for look in TOKEN_BEHAVIOURS.values()]
    cells += [
        torch.zeros(length, length, dtype=torch.bool) if found is None else found
        for found in (pair.cells(spans, length) for pair in pairs)
    ]
    weights = torch.zeros(longest, longest, len(cells))
    for place, chosen in enumerate(cells):
        count = chosen.any(-1).sum()
        weights[:length, :length, place] = chosen / count if count else torch.nan
    return weights


@dataclass(frozen=True)
class HeadPatterns:
    """The patterns of all heads on one prompt.

    Attributes:
        title: what the prompt is.
        tokens: the prompt's tokens as text.
        spans: name → positions of its tokens.
        patterns: attention weights.
    """

    title: str
    tokens: list[str]
    spans: dict[str, list[int]]
    patterns: Float[Tensor, "layer head query key"]


def head_patterns(model: Model, task: Task, *, example: int = 0) -> HeadPatterns:
    """The patterns of all heads on one example of a task, up to the token that predicts the answer.

    Args:
        model: loaded with `circuits.load_model` from a folder with a tokenizer.
        task: tokenised examples.
        example: which of them.

    Raises:
        CircuitsError: the model has no tokenizer, or the task no such example.
    """
    if model.tokenizer is None:
        raise CircuitsError("the names of tokens need a tokenizer: load the model from a folder that has one")
    check_task(model, task)
    length = prompt_length(task, example)
    one = task.select([example])
    sites = [(layer, "pattern") for layer in range(shape_of(model).n_layers)]
    kept = capture(model, one.tokens[:, :length], sites)
    return HeadPatterns(
        f"example {example} of {task.name}",
        token_texts(model, one.tokens[0, :length]),
        prompt_spans(one, 0, length),
        torch.stack([kept[site][0].float().cpu() for site in sites]),
    )
