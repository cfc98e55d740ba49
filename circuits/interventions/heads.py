"""Acting on the output of attention heads, at ``attn.hook_z``: ablation and patching.

1. A head's output z is overwritten before W_O: with zero, with its mean over a reference set, or with its own value
   from another run. Zero is the same as zeroing that head's rows of W_O.
2. Patching takes z from the source run at the source's positions and writes it at the matching positions of the run
   that is changed.
3. Hooks leave with the ``with`` block. A hook that did not fire is an error.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.pairing import matching_positions
from circuits.models import Model, capture, hook_name, hooked, shape_of, uninterrupted
from circuits.tasks import Task
from circuits.units import Head, Neuron

#: Values to put in the place of heads' outputs: head → something that broadcasts to ``[example, pos, d_head]``.
Replacement = dict[Head, Tensor]

ABLATIONS: tuple[str, ...] = ("zero", "mean")


@torch.no_grad()
def mean_head_outputs(model: Model, reference: Task, batch_size: int = 256) -> Float[Tensor, "layer head d_head"]:
    """Mean output z of every head over all tokens of a reference set; padding is not counted.

    Args:
        model: loaded with `circuits.load_model`.
        reference: the set that stands for ordinary input.
        batch_size: examples in one pass.
    """
    return mean_outputs(model, reference, Head, batch_size)


#: Where units of a kind put out what they compute.
OUTPUT_SITES: dict[type[Head] | type[Neuron], str] = {Head: "z", Neuron: "post"}


@torch.no_grad()
def mean_outputs(
    model: Model, reference: Task, kind: type[Head] | type[Neuron], batch_size: int = 64
) -> Float[Tensor, "layer unit width"]:
    """Mean output of every unit over all tokens of a reference set; padding is not counted.

    Args:
        model: loaded with `circuits.load_model`.
        reference: the set that stands for ordinary input.
        kind: `Head` (its z, as wide as ``d_head``) or `Neuron` (one number).
        batch_size: examples in one pass.
    """
    sites = [(layer, OUTPUT_SITES[kind]) for layer in range(shape_of(model).n_layers)]
    total, count = torch.zeros(0), 0
    for batch in reference.right_padded().batches(batch_size):
        outputs = capture(model, batch.tokens, sites)
        mask, some = batch.attention_mask, outputs[sites[0]]
        summed = torch.stack([outputs[site][mask.to(some.device)].double().sum(0).cpu() for site in sites])
        total = total + summed if total.numel() else summed
        count += int(mask.sum())
    return (total / count).to(some).view(*total.shape[:2], -1)


@uninterrupted
def replace_heads(model: Model, values: Replacement) -> Iterator[None]:
    """Inside the block, the outputs z of these heads are the given values in every forward pass.

    Args:
        model: loaded with `circuits.load_model`.
        values: head → tensor that broadcasts to ``[example, pos, d_head]``; NaN entries keep the head's own value.

    Raises:
        CircuitsError: the model has no such head, or the model was not run in the block.
    """
    shape = shape_of(model)
    for head in values:
        head.check(shape)
    fired: set[Head] = set()

    def overwrite(heads: list[Head]) -> Any:
        def act(z: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            z = z.clone()
            for head in heads:
                own = z[:, :, head.index]
                new = values[head].to(z.device, z.dtype).expand_as(own)
                z[:, :, head.index] = torch.where(new.isnan(), own, new)
                fired.add(head)
            return z

        return act

    layers = sorted({head.layer for head in values})
    in_layer = {layer: [head for head in values if head.layer == layer] for layer in layers}
    with hooked(model, {hook_name(model, (layer, "z")): overwrite(heads) for layer, heads in in_layer.items()}):
        yield
    for head in values.keys() - fired:
        raise CircuitsError(f"{head} was to be replaced, but its layer was never run inside the block")


def ablate_heads(
    model: Model,
    heads: Iterable[Head],
    mode: str = "zero",
    *,
    means: Float[Tensor, "layer head d_head"] | None = None,
) -> AbstractContextManager[None]:
    """Inside the block, these heads put out nothing of their own.

    Args:
        model: loaded with `circuits.load_model`.
        heads: which.
        mode: ``zero``, or ``mean``: the mean output given.
        means: from `mean_head_outputs`.

    Raises:
        CircuitsError: the model has no such head, there is no such mode, or the means are missing.

    Source:
        docs/method.md, section 6; ``zero`` equals zeroing the head's W_O.

    Example:
        >>> from circuits import Head, evaluate, load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("bio", tokenizer)
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> with ablate_heads(model, [Head(2, 1)]):
        ...     ablated = evaluate(model, task)
    """
    if mode not in ABLATIONS:
        raise CircuitsError(f"there is no ablation {mode!r}: choose from {', '.join(ABLATIONS)}")
    if mode == "zero":
        return replace_heads(model, dict.fromkeys(heads, torch.zeros(())))
    if means is None:
        raise CircuitsError("mean ablation needs the mean outputs: give means=mean_head_outputs(model, reference)")
    shape = shape_of(model)
    chosen = list(heads)
    for head in chosen:
        head.check(shape)
    return replace_heads(model, {head: means[head.layer, head.index] for head in chosen})


@torch.no_grad()
def patched_outputs(model: Model, source: Task, target: Task) -> Float[Tensor, "layer example pos head d_head"]:
    """Every head's output in the source run, at the positions of the target run; NaN where nothing matches.

    Slices of it are values for `replace_heads`: ``outputs[layer, :, :, head]`` patches one head.

    Args:
        model: loaded with `circuits.load_model`.
        source: the run that values are taken from: another person's, or the same person's in the other format.
        target: the run that is changed.

    Raises:
        CircuitsError: the tasks cannot be paired, or one is padded on the left.
    """
    for task in (source, target):
        if not bool(task.attention_mask[:, 0].all()):
            raise CircuitsError(f"{task.name} is padded on the left: give {task.name}.right_padded()")
    sites = [(layer, "z") for layer in range(shape_of(model).n_layers)]
    outputs = capture(model, source.tokens, sites)
    example, theirs, ours = matching_positions(source, target).T
    some = outputs[sites[0]]
    patched = some.new_full((len(sites), *target.tokens.shape, *some.shape[2:]), torch.nan)
    for layer, site in enumerate(sites):
        patched[layer, example, ours] = outputs[site][example, theirs]
    return patched


def patch_heads(model: Model, heads: Iterable[Head], source: Task, *, target: Task) -> AbstractContextManager[None]:
    """Inside the block, these heads put out in the target's run what they put out in the source's run.

    Args:
        model: loaded with `circuits.load_model`.
        heads: which.
        source: the run that values are taken from.
        target: the run that is changed; only its tokens may be run inside the block.

    Raises:
        CircuitsError: the model has no such head, or the tasks cannot be paired.

    Source:
        docs/method.md, section 6 (activation patching).

    Example:
        >>> from circuits import Head, evaluate, load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> with patch_heads(model, [Head(2, 1)], source=task, target=task):
        ...     same = evaluate(model, task)
    """
    shape = shape_of(model)
    chosen = list(heads)
    for head in chosen:
        head.check(shape)
    outputs = patched_outputs(model, source, target)
    return replace_heads(model, {head: outputs[head.layer, :, :, head.index] for head in chosen})
