"""Which heads attend how: what one head reads and says, and scores that make every head searchable.

1. A prompt is an example up to the token that predicts its answer. A head's reading is its attention pattern over the
   prompt, and its output at the last token mapped through the final norm and the unembedding (docs/method.md,
   section 7).
2. A behaviour is a pair of spans: who attends, to what. Each token of the first attends to those of the second that
   are before it or at its own place; the score is the mean over those tokens, set beside what uniform attention over
   the same places would give. Subject linking: tokens after the subject's first one, to the subject. Relation
   focusing: the last token, to the words that name the relation. Of a task with other spans: the last token, to each.
3. A behaviour counts for all formats: a head's score is the smallest of them, of its BIO and its QA score say.
4. Induction: on a sequence of random tokens said twice, the attention from a token's second place to the one that
   followed its first (Olsson et al. 2022).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.html import html_table
from circuits.models import LeanModel, Model, capture, checkpoint_of, lean_model, shape_of, user_hooks
from circuits.tasks import RESERVED, Task
from circuits.units import Head, ModelShape


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


@dataclass(frozen=True)
class HeadReading:
    """What one head does on one prompt.

    Attributes:
        head: the head.
        title: what the prompt is, such as ``BIO``.
        text: the whole example.
        tokens: the prompt's tokens as text.
        spans: name → positions of its tokens.
        pattern: attention weights, ``[query, key]``; each row sums to 1.
        top_tokens: the tokens that the head's output at the last position raises most, with their logits.
        answer: the answer's first token, with its logit and its rank among all tokens, from 1: where that is at most
            the number of ``top_tokens``, it stands there at that place.
        scores: behaviour → (attention, what uniform attention would give).
        behaviours: those that the prompt has spans for.
    """

    head: Head
    title: str
    text: str
    tokens: list[str]
    spans: dict[str, list[int]]
    pattern: Float[Tensor, "query key"]
    top_tokens: list[tuple[str, float]]
    answer: tuple[str, float, int]
    scores: dict[str, tuple[float, float]]
    behaviours: tuple[Behaviour, ...]

    def _repr_html_(self) -> str:
        """What Jupyter shows: the scores, and the tokens that the head writes."""
        scores = [(name, found, uniform) for name, (found, uniform) in self.scores.items()]
        shown = html_table(scores, [f"{self.head} on {self.title}", "attention", "uniform"])
        return f"<div>{shown}{html_table(self.top_tokens, ['token', 'logit'])}</div>"


def prompt_length(task: Task, example: int) -> int:
    """Number of tokens before the first answer of an example.

    Raises:
        CircuitsError: the task has no such example.
    """
    if not 0 <= example < len(task):
        raise CircuitsError(f"there is no example {example} of {task.name}: it has 0 to {len(task) - 1}")
    own = task.select([example])
    return int(own.answers["start"].min())


def _spans(task: Task, example: int, length: int) -> dict[str, list[int]]:
    """Name → positions in the prompt of one example; spans that are not there are left out."""
    found = {name: at[example, :length].nonzero().flatten().tolist() for name, at in task.spans.items()}
    return {name: positions for name, positions in found.items() if positions}


def _uniform(length: int) -> Float[Tensor, "query key"]:
    uniform = torch.ones(length, length).tril()
    return uniform / uniform.sum(-1, keepdim=True)


def _score(pattern: Float[Tensor, "... query key"], cells: Tensor) -> Float[Tensor, "..."]:
    """Mean over the queries of the attention that falls into the cells."""
    return (pattern * cells).sum((-1, -2)) / cells.any(-1).sum()


def read_head(
    model: Model, head: Head | str, task: Task, *, example: int, title: str = "", top: int = 8
) -> HeadReading:
    """What one head does on one example of a task, up to the token that predicts the answer.

    Args:
        model: loaded with `circuits.load_model` from a folder with a tokenizer.
        head: the head, or its name, as in ``L21H17``.
        task: tokenised examples.
        example: which of them.
        title: what to call the prompt.
        top: how many output tokens to name.

    Raises:
        CircuitsError: the model has no such head or no tokenizer, or the task no such example, or a function is hooked
            into the model behind the head.

    Source:
        arXiv 2505.16178, Fig. 5; docs/method.md, section 7.
    """
    head = Head.parse(head) if isinstance(head, str) else head
    head.check(shape_of(model))
    if model.tokenizer is None:
        raise CircuitsError("reading a head needs a tokenizer: load the model from a folder that has one")
    for found in user_hooks(model):
        if not _acts_before(found.name, head):
            raise CircuitsError(
                f"a function is hooked into the model at {found.name or 'the whole model'}: it would have no effect "
                f"on what {head} says"
            )
    length = prompt_length(task, example)
    # its own prompt alone, without what pads it
    title, task, example = title or task.name, task.select([example]), 0
    tokens = task.tokens[:, :length]
    kept = capture(model, tokens, [(head.layer, "pattern"), (head.layer, "z")])
    pattern = kept[head.layer, "pattern"][0, head.index].float().cpu()
    with torch.no_grad():
        lean = lean_model(model)
        logits = lean.unembed(_added(lean, head, kept[head.layer, "z"][0, -1]))[0].float().cpu()
    best = logits.topk(top)
    answer = int(task.tokens[example, length])
    spans, uniform = _spans(task, example, length), _uniform(length)
    cells = {behaviour: behaviour.cells(spans, length) for behaviour in behaviours_of(task)}
    shown = {behaviour: found for behaviour, found in cells.items() if found is not None}
    return HeadReading(
        head,
        title,
        task.texts[example],
        token_texts(model, tokens[0]),
        spans,
        pattern,
        [
            (text, float(value))
            for text, value in zip(token_texts(model, best.indices), best.values.tolist(), strict=True)
        ],
        (
            token_texts(model, task.tokens[example, length : length + 1])[0],
            float(logits[answer]),
            int((logits > logits[answer]).sum()) + 1,
        ),
        {
            behaviour.name: (float(_score(pattern, found)), float(_score(uniform, found)))
            for behaviour, found in shown.items()
        },
        tuple(shown),
    )


def _acts_before(name: str, head: Head) -> bool:
    """Whether a hook point lies before a head's z or there, as far as its name says."""
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    if block is None:
        return name in ("hook_embed", "hook_pos_embed")
    layer, rest = int(block[1]), block[2]
    inside = ("hook_resid_pre", *(f"attn.hook_{site}" for site in ("q", "k", "v", "pattern", "z")))
    return layer < head.layer or (layer == head.layer and rest in inside)


def _added(lean: LeanModel, head: Head, z: Float[Tensor, "head d_head"]) -> Float[Tensor, "1 d_model"]:
    """What one head adds to the stream at one position: through a post-norm as all heads together go through it."""
    layer = lean.layers[head.layer]
    own = torch.zeros_like(z)
    own[head.index] = z[head.index]
    part, whole = (torch.nn.functional.linear(heads.flatten()[None], layer.o.weight) for heads in (own, z))
    norm = layer.post_norm1
    if norm is None:
        return part
    if layer.o.bias is not None:
        whole = whole + layer.o.bias
    length = (whole.float().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return (part.float() / length * norm.rows[0].acting(norm.weight.float())).to(part.dtype)


def token_texts(model: Model, tokens: Tensor) -> list[str]:
    """Tokens as a reader wants to see them: without the marks a tokenizer puts for white space."""
    decoded = [str(model.tokenizer.decode([token])) for token in tokens.tolist()]
    return [text.strip() or repr(text) for text in decoded]


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
        sums = {behaviour: torch.zeros(shape.n_layers, shape.n_heads) for behaviour in behaviours}
        uniform_sums, counts = dict.fromkeys(behaviours, 0.0), dict.fromkeys(behaviours, 0)
        for batch in task.batches(batch_size):
            kept = capture(model, batch.tokens, sites)
            patterns = torch.stack([kept[site].float().cpu() for site in sites], 1)
            for example in range(len(batch)):
                length = prompt_length(batch, example)
                pattern, uniform = patterns[example, :, :, :length, :length], _uniform(length)
                spans = _spans(batch, example, length)
                for behaviour in behaviours:
                    cells = behaviour.cells(spans, length)
                    if cells is not None:
                        sums[behaviour] += _score(pattern, cells)
                        uniform_sums[behaviour] += float(_score(uniform, cells))
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
