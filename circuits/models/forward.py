"""Running a model: logits at the positions that matter, and activations.

The arithmetic (`lean_model`) does it, unless functions are hooked into the model: then the hookable model itself runs,
so that they are honoured.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuits.errors import CircuitsError
from circuits.models.arithmetic import Site, check_tokens
from circuits.models.checkpoint import lean_model
from circuits.models.hookable import hook_name, user_hooks
from circuits.tasks import Task

#: Tokens that the hookable model runs at once: it makes logits at every one of them.
_TOKENS = 1 << 11

#: Tokenizer → texts of tokens that agree with it: of the last few tasks.
_AGREE: WeakKeyDictionary[Any, deque[Mapping[int, str]]] = WeakKeyDictionary()


def refuse_hooks(model: nn.Module, why: str = "it would have no effect here") -> None:
    """Raise a `CircuitsError` if a function is hooked into a model, forward or backward, by whatever means.

    What computes with a model's weights, and does not run the model itself, asks this first.

    Args:
        model: the model.
        why: what would become of the function; the end of the sentence.

    Example:
        >>> from circuits import Head, ablate_heads, load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> refuse_hooks(model)
        >>> with ablate_heads(model, [Head(2, 1)]):
        ...     refuse_hooks(model)
        Traceback (most recent call last):
        circuits.errors.CircuitsError: a function is hooked into the model at blocks.2.attn.hook_z: it would have no \
effect here
    """
    for found in user_hooks(model):
        where = f" at {found.name}" if found.name else ""
        raise CircuitsError(f"a function is hooked into the model{where}: {why}")


def check_task(model: nn.Module, task: Task) -> None:
    """Raise a `CircuitsError` if a task was made with another tokenizer than the model's, as far as both are known.

    They are compared by the texts of the tokens that the task has: a tokenizer with a token more is no other one.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> model = load_model(new_model("tiny-llama", tokenizer), tokenizer=tokenizer)
        >>> check_task(model, Task.from_prompts(["Ada was born in"], [" Paris"], word_tokenizer()))
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or not task.token_texts:
        return
    agree = _AGREE.setdefault(tokenizer, deque(maxlen=16))
    if any(texts is task.token_texts for texts in agree):  # a task's parts share them
        return
    for token, text in task.token_texts.items():
        # a token that does not exist has no text; some tokenizers leave out a space where they decode
        own = str(tokenizer.decode([token])) if token < len(tokenizer) else ""
        if own.strip() != text.strip():
            there = f"is {own!r}" if own else "does not exist"
            raise CircuitsError(
                f"the task {task.name} was made with another tokenizer than the model's: its token {token} is "
                f"{text!r}, and {there} there; make the task with model.tokenizer"
            )
    agree.append(task.token_texts)


def answer_logits(model: nn.Module, task: Task) -> Float[Tensor, "answer_token d_vocab"]:
    """Logits that predict each answer token: read one position before it.

    The order is that of ``task.answer_mask.nonzero()``. Padding is moved to the right, so that no token sees it.
    Functions hooked into the model are run.

    Args:
        model: loaded with `circuits.load_model`, or a Hugging Face model.
        task: what to predict.

    Raises:
        CircuitsError: the task was made with another tokenizer, or has tokens that the model does not embed.
    """
    check_task(model, task)
    task = task.right_padded()
    where = task.answer_mask.nonzero()
    where[:, 1] -= 1
    return logits_at(model, task.tokens, where)


def logits_at(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], where: Int[Tensor, "answer 2"]
) -> Float[Tensor, "answer d_vocab"]:
    """Logits at some positions; functions hooked into the model are run.

    Args:
        model: loaded with `circuits.load_model`, or a Hugging Face model.
        tokens: padded on the right, if at all.
        where: pairs of example and position, sorted.
    """
    if not user_hooks(model):
        return lean_model(model).logits_at(tokens, where)
    return _hooked_logits(model, tokens, where)


def _hooked_logits(model: Any, tokens: Tensor, where: Tensor) -> Tensor:
    """The slow way, through the hookable model, with gradients if they are enabled."""
    device = model.device if isinstance(model, PreTrainedModel) else torch.device(model.cfg.device)
    check_tokens(tokens, model.config.vocab_size if isinstance(model, PreTrainedModel) else model.cfg.d_vocab)
    found, rows = [], max(1, _TOKENS // tokens.shape[1])
    for first in range(0, len(tokens), rows):
        output = model(tokens[first : first + rows].to(device))
        logits = output.logits if isinstance(model, PreTrainedModel) else output
        here = where[(where[:, 0] >= first) & (where[:, 0] < first + rows)].to(device)
        found.append(logits[here[:, 0] - first, here[:, 1]])
    return torch.cat(found)


@torch.no_grad()
def capture(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
) -> dict[Site, Float[Tensor, "batch ..."]]:
    """Run a model's layers and keep activations; functions hooked into the model are run.

    Args:
        model: loaded with `circuits.load_model`.
        tokens: padded on the right, if at all.
        sites: pairs of layer and name (`circuits.models.SITES`).

    Raises:
        CircuitsError: the model has no such activation.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> {site: tuple(x.shape) for site, x in capture(model, torch.tensor([[5, 6, 7]]), [(2, "pattern")]).items()}
        {(2, 'pattern'): (1, 4, 3, 3)}
    """
    wanted: Sequence[Site] = list(sites)
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def look(activation: Tensor, _: Any = None, **__: Any) -> Tensor:
            kept[site] = activation.detach().clone()
            return activation

        return look

    if user_hooks(model):
        hooked: Any = model
        check_tokens(tokens, hooked.cfg.d_vocab)
        hooks = [(hook_name(model, site), keep(site)) for site in wanted]
        with hooked.hooks(fwd_hooks=hooks):
            hooked(tokens.to(hooked.cfg.device))
    elif wanted:
        last = max(layer for layer, _ in wanted)
        lean_model(model).run(tokens, last + 1, visits={site: keep(site) for site in wanted})
    return kept
