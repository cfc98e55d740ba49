"""The loss that a trace follows: the tokens that carry it, its value for each example, and its gradient as a whole."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import LeanModel, Model, Row, check_task, checkpoint_of, lean_model, logits_at, refuse_hooks
from circuits.tasks import Task
from circuits.units import COMPONENTS

LOSSES: tuple[str, ...] = ("answer", "all")


def example_losses(model: Model, task: Task, loss: str = "answer") -> Float[Tensor, " example"]:
    """Each example's loss: mean cross-entropy in nats over its answer tokens, or over ``all`` its tokens but the first.

    Functions hooked into the model are run.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        loss: over ``answer`` tokens or ``all`` tokens.

    Raises:
        CircuitsError: there is no such loss.
    """
    return _losses(task, loss, partial(logits_at, model))


def _losses(task: Task, loss: str, logits_of: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " example"]:
    """From a function that gives the logits at chosen positions of tokens."""
    counted = counted_tokens(task, loss)
    where = counted.nonzero()
    before = where.clone()
    before[:, 1] -= 1
    logits = logits_of(task.tokens, before).float()
    where = where.to(logits.device)
    targets = task.tokens.to(logits.device)[where[:, 0], where[:, 1]]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(task), device=losses.device).index_add(0, where[:, 0], losses)
    return sums / counted.sum(1).to(losses.device)


def loss_gradients(model: Model, task: Task, loss: str = "answer") -> dict[str, Tensor]:
    """The gradient of the sum of the examples' losses at every parameter, as it is stored.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        loss: as in `example_losses`.

    Returns:
        Parameter → gradient, in the parameter's shape. Tied embeddings are one parameter, ``embed.W_E``.

    Raises:
        CircuitsError: there is no such loss, or functions are hooked into the model.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> tuple(loss_gradients(load_model(new_model("tiny-llama", tokenizer)), task)["blocks.0.attn.W_Q"].shape)
        (4, 128, 32)
    """
    refuse_hooks(model)
    check_task(model, task)
    checkpoint = checkpoint_of(model)
    lean_model(model)  # refuses a model whose parameters were replaced
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in checkpoint.tensors.items()}
    with torch.enable_grad():
        total = _losses(task, loss, LeanModel(tensors, checkpoint.rows, checkpoint.layout).logits_at).sum()
        found = dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))
    return {row.name: row.stored(found[row.tensor]) for row in traced_rows(checkpoint.rows, COMPONENTS)}


def traced_rows(rows: Sequence[Row], components: Sequence[str]) -> list[Row]:
    """The rows of some components; of tied embeddings, which are one tensor, the embedding alone."""
    embedded = {row.tensor for row in rows if row.kind == "embedding"}
    return [
        row
        for row in rows
        if row.component in components and not (row.kind == "unembedding" and row.tensor in embedded)
    ]


def counted_tokens(task: Task, loss: str) -> Tensor:
    """Which tokens carry the loss: ``Bool[example pos]``, and at least one of each example."""
    if loss not in LOSSES:
        raise CircuitsError(f"there is no loss {loss!r}: choose from {', '.join(LOSSES)}")
    counted = task.answer_mask if loss == "answer" else task.attention_mask
    counted = counted.clone()
    counted[:, 0] = False
    if not counted.any(1).all():
        example = int((~counted.any(1)).nonzero()[0])
        raise CircuitsError(f"example {example} of the task {task.name} has no token that carries the loss")
    return counted
