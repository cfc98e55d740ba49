"""Which heads attend how: scores that make every head searchable.

1. A prompt is an example up to the token that predicts its answer.
2. A behaviour is a pair of spans: who attends, to what. Each token of the first attends to those of the second that
   are before it or at its own place; the score is the mean over those tokens, set beside what uniform attention over
   the same places would give. Subject linking: tokens after the subject's first one, to the subject. Relation
   focusing: the last token, to the words that name the relation. Of a task with other spans: the last token, to each.
3. A behaviour counts for all formats: a head's score is the smallest of them, of its BIO and its QA score say.
4. Induction: on a sequence of random tokens said twice, the attention from a token's second place to the one that
   followed its first (Olsson et al. 2022).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import Model, capture, check_task, checkpoint_of, shape_of
from circuits.tasks import RESERVED, Task
from circuits.units import ModelShape


@dataclass(frozen=True)
class Behaviour:
    """A pair of spans: who attends, to what.

    Attributes:
        name: what it is called.
        queries: the span whose tokens attend; `LATER` is those after the first token of ``keys``.
        keys: the span attended to.

    Example:
        >>> str(Behaviour("name_mover", "last", "IO"))
        'name mover: last → IO'
    """

    name: str
    queries: str
    keys: str

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.queries} → {self.keys}"

    def cells(self, spans: Mapping[str, Sequence[int]], length: int) -> Bool[Tensor, "query key"] | None:
        """Which cells of a prompt's pattern it is about; None where nothing attends or is attended to.

        Args:
            spans: name → positions in the prompt.
            length: of the prompt, in tokens.

        Example:
            >>> SUBJECT_LINKING.cells({"subject": [1, 2]}, 4).int().tolist()
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
        """
        everywhere = {"all": range(length), "last": [length - 1], **spans}
        keys = [position for position in everywhere.get(self.keys, ()) if position < length]
        if not keys:
            return None
        chosen = range(min(keys) + 1, length) if self.queries == LATER else everywhere.get(self.queries, ())
        queries = [position for position in chosen if position < length]
        cells = torch.zeros(length, length, dtype=torch.bool)
        cells[torch.tensor(queries, dtype=torch.long)[:, None], torch.tensor(keys)] = True
        cells = cells.tril()
        return cells if bool(cells.any()) else None


#: The tokens after the first one that is attended to.
LATER = "later"
SUBJECT_LINKING = Behaviour("subject_linking", LATER, "subject")
RELATION_FOCUSING = Behaviour("relation_focusing", "last", "relation")
#: Those of the study.
BEHAVIOURS: tuple[Behaviour, ...] = (SUBJECT_LINKING, RELATION_FOCUSING)


def behaviours_of(*tasks: Task) -> tuple[Behaviour, ...]:
    """The behaviours that tasks have spans for: those of the study, or the last token to each span of theirs."""
    names = list(dict.fromkeys(name for task in tasks for name in task.spans))
    known = {behaviour.keys: behaviour for behaviour in BEHAVIOURS}
    ordered = sorted(names, key=lambda name: list(known).index(name) if name in known else len(known))
    return tuple(known.get(name, Behaviour(f"last_to_{name}", "last", name)) for name in ordered)


def prompt_length(task: Task, example: int) -> int:
    """Number of tokens before the first answer of an example.

    Raises:
        CircuitsError: the task has no such example.
    """
    if not 0 <= example < len(task):
        raise CircuitsError(f"there is no example {example} of {task.name}: it has 0 to {len(task) - 1}")
    own = task.select([example])
    return int(own.answers["start"].min())


def prompt_spans(task: Task, example: int, length: int) -> dict[str, list[int]]:
    """Name → positions in the prompt of one example; spans that are not there are left out."""
    found = {name: at[example, :length].nonzero().flatten().tolist() for name, at in task.spans.items()}
    return {name: positions for name, positions in found.items() if positions}


def uniform(length: int) -> Float[Tensor, "query key"]:
    """Attention that is the same for every token up to one's own."""
    weights = torch.ones(length, length).tril()
    return weights / weights.sum(-1, keepdim=True)


def pattern_score(pattern: Float[Tensor, "... query key"], cells: Tensor) -> Float[Tensor, "..."]:
    """Mean over the queries of the attention that falls into the cells."""
    return (pattern * cells).sum((-1, -2)) / cells.any(-1).sum()


@torch.no_grad()
def attention_scores(
    model: Model,
    tasks: Task | Mapping[str, Task],
    behaviours: Sequence[Behaviour] | None = None,
    *,
    batch_size: int = 64,
) -> pandas.DataFrame:
    """How strongly every head shows each behaviour, in every task.

    Args:
        model: loaded with `circuits.load_model`.
        tasks: one task, or name → task, such as ``{"bio": …, "qa": …}``.
        behaviours: what to look for; by default what the tasks' spans allow, as `behaviours_of` says.
        batch_size: examples in one pass.

    Returns:
        One row for each head: ``unit``, ``layer``, ``index``; for each behaviour its mean attention in each task
        (``subject_linking.bio`` …), what uniform attention would give (``….uniform``), and under the behaviour's own
        name the smallest excess over uniform among the tasks.

    Raises:
        CircuitsError: a task has no example with the spans of a behaviour.

    Source:
        docs/method.md, section 7.
    """
    tasks = {tasks.name: tasks} if isinstance(tasks, Task) else dict(tasks)
    behaviours = behaviours_of(*tasks.values()) if behaviours is None else tuple(behaviours)
    shape = shape_of(model)
    sites = [(layer, "pattern") for layer in range(shape.n_layers)]
    columns: dict[str, Tensor] = {}
    for kind, task in tasks.items():
        check_task(model, task)
        sums = {behaviour: torch.zeros(shape.n_layers, shape.n_heads) for behaviour in behaviours}
        uniform_sums, counts = dict.fromkeys(behaviours, 0.0), dict.fromkeys(behaviours, 0)
        for batch in task.batches(batch_size):
            kept = capture(model, batch.tokens, sites)
            patterns = torch.stack([kept[site].float().cpu() for site in sites], 1)
            for example in range(len(batch)):
                length = prompt_length(batch, example)
                pattern, even = patterns[example, :, :, :length, :length], uniform(length)
                spans = prompt_spans(batch, example, length)
                for behaviour in behaviours:
                    cells = behaviour.cells(spans, length)
                    if cells is not None:
                        sums[behaviour] += pattern_score(pattern, cells)
                        uniform_sums[behaviour] += float(pattern_score(even, cells))
                        counts[behaviour] += 1
        for behaviour in behaviours:
            if counts[behaviour] == 0:
                raise CircuitsError(
                    f"no prompt of {kind} has what {behaviour} needs: it has the spans "
                    f"{', '.join([*RESERVED, *task.spans])}"
                )
            uniform_mean = uniform_sums[behaviour] / counts[behaviour]
            columns[f"{behaviour.name}.{kind}"] = sums[behaviour] / counts[behaviour]
            columns[f"{behaviour.name}.{kind}.uniform"] = torch.full_like(sums[behaviour], uniform_mean)
    for behaviour in behaviours:
        name = behaviour.name
        excess = [columns[f"{name}.{kind}"] - columns[f"{name}.{kind}.uniform"] for kind in tasks]
        columns[name] = torch.stack(excess).amin(0)
    return _head_table(shape, columns)


def _head_table(shape: ModelShape, columns: dict[str, Tensor]) -> pandas.DataFrame:
    heads = list(shape.heads())
    return pandas.DataFrame(
        {
            "unit": [str(head) for head in heads],
            "layer": [head.layer for head in heads],
            "index": [head.index for head in heads],
            **{name: value.flatten().numpy() for name, value in columns.items()},
        }
    )


@torch.no_grad()
def induction_scores(model: Model, length: int = 32, sequences: int = 8, *, seed: int = 0) -> pandas.DataFrame:
    """How much every head is an induction head: attention to what followed the same token before.

    Args:
        model: loaded with `circuits.load_model`.
        length: tokens in the sequence that is said twice.
        sequences: number of sequences.
        seed: of the random tokens.

    Returns:
        One row for each head: ``unit``, ``layer``, ``index``, ``induction``: mean attention from a token's second
        place to the place after its first, between 0 and 1.

    Source:
        Olsson et al. 2022 (arXiv 2209.11895), the prefix-matching score.
    """
    shape = shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(checkpoint_of(model).layout.d_vocab, (sequences, length), generator=generator)
    names = [(layer, "pattern") for layer in range(shape.n_layers)]
    kept = capture(model, torch.cat([once, once], 1), names)
    queries = torch.arange(length, 2 * length - 1)
    scores = torch.stack([kept[name][:, :, queries, queries - length + 1].float().mean((0, 2)).cpu() for name in names])
    return _head_table(shape, {"induction": scores})
