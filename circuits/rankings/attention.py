"""Which heads attend how: what one head reads and says, and scores that make every head searchable.

1. A prompt is an example up to the token that predicts its answer. A head's reading is its attention pattern over the
   prompt, and its output at the last token mapped through the final norm and the unembedding (docs/method.md,
   section 7).
2. Subject linking: the attention that tokens after the subject's first one pay to the subject's tokens, each to those
   before or at its own place. Relation focusing: the attention that the last token pays to the words that name the
   relation. Each is a mean of attention weights, set beside what uniform attention over the same places would give.
3. A behaviour counts for both formats: a head's score is the smaller of its BIO and its QA score.
4. Induction: on a sequence of random tokens said twice, the attention from a token's second place to the one that
   followed its first (Olsson et al. 2022).
"""

from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.datasets import Role, Task
from circuits.errors import CircuitsError
from circuits.models import LeanModel, Model, capture, checkpoint_of, lean_model, shape_of
from circuits.units import Head, ModelShape

BEHAVIOURS: tuple[str, ...] = ("subject_linking", "relation_focusing")


@dataclass(frozen=True)
class HeadReading:
    """What one head does on one prompt.

    Attributes:
        head: the head.
        title: what the prompt is, such as ``BIO``.
        text: the whole example.
        tokens: the prompt's tokens as text.
        roles: the `Role` of each token.
        pattern: attention weights, ``[query, key]``; each row sums to 1.
        top_tokens: the tokens that the head's output at the last position raises most, with their logits.
        answer: the answer's first token, with its logit and its rank among all tokens, from 1: where that is at most
            the number of ``top_tokens``, it stands there at that place.
        scores: behaviour → (attention, what uniform attention would give).
    """

    head: Head
    title: str
    text: str
    tokens: list[str]
    roles: list[int]
    pattern: Float[Tensor, "query key"]
    top_tokens: list[tuple[str, float]]
    answer: tuple[str, float, int]
    scores: dict[str, tuple[float, float]]


def prompt_length(task: Task, example: int) -> int:
    """Number of tokens before the first answer of an example.

    Raises:
        CircuitsError: the task has no such example.
    """
    if not 0 <= example < len(task):
        raise CircuitsError(f"there is no example {example} of {task.name}: it has 0 to {len(task) - 1}")
    return int(task.answers.loc[task.answers["example"] == example, "start"].min())


def behaviour_masks(roles: list[int]) -> dict[str, Tensor]:
    """Behaviour → which cells ``[query, key]`` of a prompt's pattern it is about; a missing role leaves it out.

    Example:
        >>> masks = behaviour_masks([Role.OTHER, Role.SUBJECT, Role.SUBJECT, Role.RELATION])
        >>> masks["subject_linking"].int().tolist()
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    """
    length = len(roles)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = {}
    subject = torch.tensor([role == Role.SUBJECT for role in roles])
    relation = torch.tensor([role == Role.RELATION for role in roles])
    if subject.any():
        queries = torch.arange(length) > int(subject.nonzero()[0])
        masks["subject_linking"] = queries[:, None] & subject[None, :] & causal
    if relation.any():
        queries = torch.arange(length) == length - 1
        masks["relation_focusing"] = queries[:, None] & relation[None, :] & causal
    return masks


def _score(pattern: Float[Tensor, "... query key"], mask: Tensor) -> Float[Tensor, "..."]:
    """Mean over the mask's queries of the attention that falls into the mask."""
    return (pattern * mask).sum((-1, -2)) / mask.any(-1).sum()


def read_head(model: Model, head: Head | str, task: Task, example: int, title: str = "", top: int = 8) -> HeadReading:
    """What one head does on one example of a task, up to the token that predicts the answer.

    Args:
        model: loaded with `circuits.load_model` from a folder with a tokenizer.
        head: the head, or its name, as in ``L21H17``.
        task: tokenised examples.
        example: which of them.
        title: what to call the prompt.
        top: how many output tokens to name.

    Raises:
        CircuitsError: the model has no such head or no tokenizer, or the task no such example.

    Source:
        arXiv 2505.16178, Fig. 5; docs/method.md, section 7.
    """
    head = Head.parse(head) if isinstance(head, str) else head
    head.check(shape_of(model))
    if model.tokenizer is None:
        raise CircuitsError("reading a head needs a tokenizer: load the model from a folder that has one")
    length = prompt_length(task, example)
    tokens = task.tokens[example : example + 1, :length]
    kept = capture(model, tokens, [(head.layer, "pattern"), (head.layer, "z")])
    pattern = kept[head.layer, "pattern"][0, head.index].float().cpu()
    with torch.no_grad():
        lean = lean_model(model)
        logits = lean.unembed(_added(lean, head, kept[head.layer, "z"][0, -1]))[0].float().cpu()
    best = logits.topk(top)
    answer = int(task.tokens[example, length])
    roles = task.roles[example, :length].tolist()
    uniform = torch.ones(length, length).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    return HeadReading(
        head,
        title or task.name,
        task.texts[example],
        token_texts(model, tokens[0]),
        roles,
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
            name: (float(_score(pattern, mask)), float(_score(uniform, mask)))
            for name, mask in behaviour_masks(roles).items()
        },
    )


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
def attention_scores(model: Model, tasks: dict[str, Task], batch_size: int = 64) -> pandas.DataFrame:
    """How strongly every head shows each behaviour, in every format.

    Args:
        model: loaded with `circuits.load_model`.
        tasks: format → examples with one answer each, such as ``{"bio": …, "qa": …}``.
        batch_size: examples in one pass.

    Returns:
        One row for each head: ``unit``, ``layer``, ``index``; for each behaviour its mean attention in each format
        (``subject_linking.bio`` …), what uniform attention would give (``….uniform``), and under the behaviour's own
        name the smallest excess over uniform among the formats.

    Source:
        docs/method.md, section 7.
    """
    shape = shape_of(model)
    names = [(layer, "pattern") for layer in range(shape.n_layers)]
    columns: dict[str, Tensor] = {}
    for kind, task in tasks.items():
        sums = {name: torch.zeros(shape.n_layers, shape.n_heads) for name in BEHAVIOURS}
        uniform_sums, counts = dict.fromkeys(BEHAVIOURS, 0.0), dict.fromkeys(BEHAVIOURS, 0)
        for batch in task.batches(batch_size):
            kept = capture(model, batch.tokens, names)
            patterns = torch.stack([kept[name].float().cpu() for name in names], 1)
            for example in range(len(batch)):
                length = prompt_length(batch, example)
                pattern = patterns[example, :, :, :length, :length]
                uniform = torch.ones(length, length).tril()
                uniform = uniform / uniform.sum(-1, keepdim=True)
                for name, mask in behaviour_masks(batch.roles[example, :length].tolist()).items():
                    sums[name] += _score(pattern, mask)
                    uniform_sums[name] += float(_score(uniform, mask))
                    counts[name] += 1
        for name in BEHAVIOURS:
            columns[f"{name}.{kind}"] = sums[name] / max(counts[name], 1)
            columns[f"{name}.{kind}.uniform"] = torch.full_like(sums[name], uniform_sums[name] / max(counts[name], 1))
    for name in BEHAVIOURS:
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
def induction_scores(model: Model, length: int = 32, sequences: int = 8, seed: int = 0) -> pandas.DataFrame:
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
