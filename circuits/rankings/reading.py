"""What one head reads and says on one prompt.

1. A head's reading is its attention pattern over the prompt, and its output at the last token mapped through the final
   norm and the unembedding as if it were all there is (docs/method.md, section 7).
2. Its direct contribution to a logit is the same output through the final norm with the length of the whole stream, so
   that the contributions of everything that writes into the stream add up to the logit (direct logit attribution).
3. The value-weighted pattern says how much is moved, and not only from where: each weight times the length of what the
   head would write of that token, ‖α v W_O‖ (Kobayashi et al. 2020, arXiv 2004.10102, section 3).
"""

import re
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.html import html_table
from circuits.models import LeanModel, Model, capture, check_task, lean_model, shape_of, user_hooks
from circuits.rankings.attention import Behaviour, behaviours_of, pattern_score, prompt_length, prompt_spans, uniform
from circuits.tasks import Task
from circuits.units import Head


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
        weighted: the value-weighted pattern, ``[query, key]``, in units of the residual stream's length.
        direct: ``answer``, and ``foil`` if the task has foils → its first token, and what the head adds to its logit.
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
    weighted: Float[Tensor, "query key"] | None = None
    direct: dict[str, tuple[str, float]] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """What Jupyter shows: the scores, and the tokens that the head writes."""
        scores = [(name, found, uniform) for name, (found, uniform) in self.scores.items()]
        shown = html_table(scores, [f"{self.head} on {self.title}", "attention", "uniform"])
        return f"<div>{shown}{html_table(self.top_tokens, ['token', 'logit'])}</div>"


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
    head = Head.of(head, shape_of(model))
    refuse_later(model, head)
    check_task(model, task)
    length = prompt_length(task, example)
    # its own prompt alone, without what pads it
    title, task, example = title or task.name, task.select([example]), 0
    tokens = task.tokens[:, :length]
    last = shape_of(model).n_layers - 1
    kept = capture(model, tokens, [(head.layer, site) for site in ("pattern", "v", "z")] + [(last, "resid_post")])
    pattern, z = kept[head.layer, "pattern"][0, head.index].float(), kept[head.layer, "z"][0]
    answers = {"answer": int(task.tokens[example, length])}
    if task.foils is not None:
        answers["foil"] = int(task.foils.tokens[example, prompt_length(task.foils, example)])
    with torch.no_grad():
        lean = lean_model(model)
        output = head_output(lean, head, z[-1:])
        logits = lean.unembed(output)[0].float().cpu()
        added = lean.added_logits(output, kept[last, "resid_post"][0, -1:], torch.tensor(list(answers.values())))
        moved = pattern * _lengths(lean, head, kept[head.layer, "v"][0], z)
    best = logits.topk(top)
    answer = answers["answer"]
    spans, even = prompt_spans(task, example, length), uniform(length)
    pattern = pattern.cpu()
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
            token_texts(model, torch.tensor([answer]))[0],
            float(logits[answer]),
            int((logits > logits[answer]).sum()) + 1,
        ),
        {
            behaviour.name: (float(pattern_score(pattern, found)), float(pattern_score(even, found)))
            for behaviour, found in shown.items()
        },
        tuple(shown),
        moved.float().cpu(),
        {
            name: (token_texts(model, torch.tensor([token]))[0], float(value))
            for (name, token), value in zip(answers.items(), added[0].tolist(), strict=True)
        },
    )


def refuse_later(model: Model, head: Head) -> None:
    """Refuse a model without a tokenizer, or with functions hooked into it behind a head.

    Raises:
        CircuitsError: it is such a model.
    """
    if model.tokenizer is None:
        raise CircuitsError("reading a head needs a tokenizer: load the model from a folder that has one")
    for found in user_hooks(model):
        if not _acts_before(found.name, head):
            raise CircuitsError(
                f"a function is hooked into the model at {found.name or 'the whole model'}: it would have no effect "
                f"on what {head} says"
            )


def _acts_before(name: str, head: Head) -> bool:
    """Whether a hook point lies before a head's z or there, as far as its name says."""
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    if block is None:
        return name in ("hook_embed", "hook_pos_embed")
    layer, rest = int(block[1]), block[2]
    inside = ("hook_resid_pre", *(f"attn.hook_{site}" for site in ("q", "k", "v", "pattern", "z")))
    return layer < head.layer or (layer == head.layer and rest in inside)


def head_output(lean: LeanModel, head: Head, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "pos d_model"]:
    """What one head adds to the stream: through a post-norm as all heads together go through it."""
    layer = lean.layers[head.layer]
    own = torch.zeros_like(z)
    own[:, head.index] = z[:, head.index]
    part = torch.nn.functional.linear(own.flatten(1), layer.o.weight)
    norm = layer.post_norm1
    return part if norm is None else norm.part(part, layer.o(z.flatten(1))).to(part.dtype)


def _lengths(
    lean: LeanModel, head: Head, v: Float[Tensor, "pos group d_head"], z: Float[Tensor, "pos head d_head"]
) -> Float[Tensor, "#query key"]:
    """The length of what a head would write of each token if it attended to that alone."""
    layer, count = lean.layers[head.layer], z.shape[1]
    width = z.shape[2]
    own = layer.o.weight[:, head.index * width : (head.index + 1) * width].float()
    written = v[:, head.index * v.shape[1] // count].float() @ own.T
    norm = layer.post_norm1
    if norm is None:
        lengths: Tensor = torch.linalg.vector_norm(written, dim=-1)[None]
        return lengths
    # a post-norm divides by what all heads write at the token that attends
    whole = layer.o(z.flatten(1)).float()
    length = (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    found: Tensor = torch.linalg.vector_norm(written * norm.rows[0].acting(norm.weight.float()), dim=-1)[None] / length
    return found


def token_texts(model: Model, tokens: Tensor) -> list[str]:
    """Tokens as a reader wants to see them: without the marks a tokenizer puts for white space."""
    decoded = [str(model.tokenizer.decode([token])) for token in tokens.tolist()]
    return [text.strip() or repr(text) for text in decoded]
