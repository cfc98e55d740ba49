"""Acting with a mask at chosen tokens alone.

1. There are two values for every masked parameter: the model's own, and a grafted or an ablated one.
2. Every projection of attention and MLP, and every norm before them, is computed with both (`positional_weights`), and
   each token keeps the one of its position. No weight of the model is changed.
3. So what the masked parameters write at the chosen tokens is another, and so are the keys and values that later tokens
   read there; all that is written elsewhere comes from the model's own weights.

Source: Nief et al. 2025 (dynamic weight grafting).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.acting import NewValue, new_value
from circuits.masks.mask import ParameterMask, check_mask
from circuits.models import Model, parameters_of, positional_weights, require_start, same_parameters
from circuits.tasks import Task


def graft_at(
    pre: Model,
    mask: ParameterMask,
    fine_tuned: Model,
    *,
    task: Task,
    positions: Bool[Tensor, "example pos"],
    check_start: bool = True,
) -> AbstractContextManager[None]:
    """Inside the block, ``pre`` is the grafted model at some positions of the task's examples and itself at the others.

    Every projection of attention and MLP is computed with both weights, and each token keeps the one of its position;
    so the keys and values that later tokens attend to are those of their own position's weights. At all positions it
    is `graft`, to rounding. Blocks of `graft` may lie around it.

    Args:
        pre: θ_pre; its parameters are not changed.
        mask: γ, made for ``fine_tuned``; such as `unit_mask` of some heads. Embeddings and the final norm may not be
            in it.
        fine_tuned: θ_ft.
        task: only its examples may be run inside the block, in any batches.
        positions: where, as in ``task.span("subject")``.
        check_start: refuse a ``pre`` if the checkpoint of ``fine_tuned`` says that it was trained from another model.

    Raises:
        CircuitsError: the mask was made for another model or holds embeddings or the final norm, ``pre`` has other
            parameters, the positions are not the task's, other tokens are run in the block, or none.

    Source:
        Nief et al. 2025 (dynamic weight grafting).

    Example:
        >>> from circuits import Task, evaluate, load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> from circuits.masks import unit_mask
        >>> from circuits.units import Head
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> pre, fine_tuned = (load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1))
        >>> heads = unit_mask(fine_tuned, [Head(2, 0), Head(2, 1)])
        >>> with graft_at(pre, heads, fine_tuned, task=task, positions=task.span("subject")):
        ...     scores = evaluate(pre, task)
    """
    check_mask(mask, fine_tuned)
    new = same_parameters(fine_tuned, pre, values_of=fine_tuned)
    if check_start:
        require_start(fine_tuned, pre)
    return _at(pre, mask, task, positions, lambda name, _: new[name])


def ablate_at(
    model: Model,
    mask: ParameterMask,
    task: Task,
    *,
    positions: Bool[Tensor, "example pos"],
    mode: str = "zero",
    pre: Model | None = None,
    check_start: bool = True,
) -> AbstractContextManager[None]:
    """Inside the block, the model does without the masked parameters at some positions of the task's examples.

    At all positions it is `zero`, `revert` or `mean`, to rounding. Blocks of these may lie around it.

    Args:
        model: θ_ft; its parameters are not changed.
        mask: made for ``model``. Embeddings and the final norm may not be in it.
        task: only its examples may be run inside the block, in any batches.
        positions: where, as in ``task.span("subject")``.
        mode: what masked parameters are there: ``zero``, ``revert`` or ``mean``.
        pre: θ_pre, needed to revert.
        check_start: as in `revert`.

    Raises:
        CircuitsError: the mask was made for another model or holds embeddings or the final norm, there is no such mode,
            ``pre`` is missing, has other parameters or is not the start, the positions are not the task's, other tokens
            are run in the block, or none.

    Source:
        docs/method.md, section 3; Nief et al. 2025 (dynamic weight grafting).

    Example:
        >>> from circuits import Task, evaluate, load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.masks import unit_mask
        >>> from circuits.training import new_model
        >>> from circuits.units import Head
        >>> tokenizer = word_tokenizer()
        >>> task = Task.from_prompts(["Ada was born in"], [" Paris"], tokenizer, spans=[{"subject": "Ada"}])
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> with ablate_at(model, unit_mask(model, [Head(2, 1)]), task, positions=task.span("subject")):
        ...     scores = evaluate(model, task)
    """
    check_mask(mask, model)
    return _at(model, mask, task, positions, new_value(model, mode, pre, check_start=check_start))


def _at(
    model: Model, mask: ParameterMask, task: Task, positions: Bool[Tensor, "example pos"], value: NewValue
) -> AbstractContextManager[None]:
    """Inside the block, masked parameters have another value at some positions."""
    if positions.shape != task.tokens.shape:
        raise CircuitsError(
            f"the positions have shape {tuple(positions.shape)}, the tokens of {task.name} {tuple(task.tokens.shape)}: "
            "they must be alike"
        )
    weights = {}
    for name, packed in mask.packed.items():
        if packed.count:
            own = parameters_of(model)[name].detach()
            new = torch.as_tensor(value(name, own), dtype=own.dtype, device=own.device)
            weights[name] = torch.where(mask.masks[name].to(own.device), new, own)
    return positional_weights(model, weights, _positions_of(task, positions))


def _positions_of(
    task: Task, positions: Bool[Tensor, "example pos"]
) -> Callable[[Int[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]:
    """A function from tokens of some of the task's examples, padded more or less, to their positions."""
    known: dict[int, dict[bytes, Tensor]] = {}
    lengths = task.attention_mask.sum(1)

    def rows_of(width: int) -> dict[bytes, Tensor]:
        rows: dict[bytes, Tensor] = {}
        for example in (lengths <= width).nonzero()[:, 0].tolist():
            tokens, at = task.tokens[example, :width], positions[example, :width]
            if not torch.equal(rows.setdefault(tokens.numpy().tobytes(), at), at):
                raise CircuitsError(
                    f"two examples of {task.name} have the same tokens but other positions: {task.texts[example]!r}"
                )
        return rows

    def find(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        width = tokens.shape[1]
        if width not in known:
            known[width] = rows_of(width)
        found = [known[width].get(row.numpy().tobytes()) for row in tokens.cpu()]
        for number, at in enumerate(found):
            if at is None:
                raise CircuitsError(
                    f"row {number} of the tokens is no example of {task.name}: only those may be run inside the block"
                )
        return torch.stack([at for at in found if at is not None])

    return find
