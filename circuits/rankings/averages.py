"""What one head does on average over a task, with its prompts aligned by their spans.

1. Rows are spans that attend, and the last token; columns are what is attended to: the first token, the spans, and
   all other tokens together.
2. A cell of one prompt is the mean over the row's tokens of the attention that falls into the column's tokens; a cell
   of the task is the mean over the prompts that have both. Where spans do not overlap, a row adds up to 1.
3. Beside each cell stands what attention that is the same for all earlier tokens would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import Model, capture, check_task, shape_of
from circuits.rankings.attention import prompt_length, prompt_spans, uniform
from circuits.tasks import Task
from circuits.units import Head


@dataclass(frozen=True)
class HeadAverage:
    """The attention of one head over a task, between spans.

    Attributes:
        head: the head.
        title: what was read, such as the task's name.
        rows: spans that attend.
        columns: spans that are attended to.
        values: attention of each example, ``[example, row, column]``; NaN where it lacks a span, or nothing can attend.
        even: what uniform attention would give there.
        groups: what each example belongs to, for intervals.
    """

    head: Head
    title: str
    rows: list[str]
    columns: list[str]
    values: Float[Tensor, "example row column"]
    even: Float[Tensor, "example row column"]
    groups: Sequence[str]

    @property
    def pattern(self) -> Float[Tensor, "row column"]:
        """The mean over examples."""
        return self.values.nanmean(0)

    @property
    def uniform(self) -> Float[Tensor, "row column"]:
        """The mean of uniform attention over examples."""
        return self.even.nanmean(0)


#: Columns beside the spans.
FIRST, OTHER = "first token", "other tokens"


@torch.no_grad()
def average_head(model: Model, head: Head | str, task: Task, *, title: str = "", batch_size: int = 64) -> HeadAverage:
    """The attention of one head between the spans of a task, over all its examples.

    Args:
        model: loaded with `circuits.load_model`.
        head: the head, or its name, as in ``L21H17``.
        task: with spans.
        title: what to call it; the task's name if not given.
        batch_size: examples in one pass.

    Raises:
        CircuitsError: the model has no such head, or the task no spans.
    """
    check_task(model, task)
    head = Head.of(head, shape_of(model))
    if not task.spans:
        raise CircuitsError(f"{task.name} has no spans: an average over prompts needs some to align them by")
    names = _in_order(task)
    rows, columns = [*names, "last"], [FIRST, *names, OTHER]
    shape = (len(task), len(rows), len(columns))
    values, even = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    done = 0
    for batch in task.batches(batch_size):
        kept = capture(model, batch.tokens, [(head.layer, "pattern")])
        patterns = kept[head.layer, "pattern"][:, head.index].float().cpu()
        for example in range(len(batch)):
            length = prompt_length(batch, example)
            spans = prompt_spans(batch, example, length)
            named = {position for positions in spans.values() for position in positions} | {0}
            spans |= {FIRST: [0], OTHER: [position for position in range(length) if position not in named]}
            spans.setdefault("last", [length - 1])
            own, flat = patterns[example, :length, :length], uniform(length)
            for row, queries in enumerate(rows):
                for column, keys in enumerate(columns):
                    pair = spans.get(queries, ()), spans.get(keys, ())
                    values[done, row, column], even[done, row, column] = _mean(own, *pair), _mean(flat, *pair)
            done += 1
    groups = task.answers.drop_duplicates("example").sort_values("example")
    named_groups = groups["group"] if "group" in groups else groups["example"]
    return HeadAverage(head, title or task.name, rows, columns, values, even, [str(one) for one in named_groups])


def _in_order(task: Task) -> list[str]:
    """Spans in the order in which they stand, on average."""
    places = {name: at.nonzero()[:, 1].float().mean() for name, at in task.spans.items() if bool(at.any())}
    return sorted(places, key=lambda name: float(places[name]))


def _mean(weights: Tensor, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Attention to some tokens, the mean over those that attend; NaN where none is there, or none is before them."""
    if not queries or not keys or min(keys) > max(queries):
        return float("nan")
    return float(weights[list(queries)][:, list(keys)].sum(1).mean())
