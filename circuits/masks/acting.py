"""Acting with a mask on a model's weights: revert, zero, mean, graft.

1. Inside the ``with`` block the masked entries hold other values: those of θ_pre (`revert`), zero (`zero`), or the
   mean of their tensor (`mean`). `graft` does the opposite of `revert`: θ_pre with the masked entries of θ_ft.
2. Only the masked entries are kept aside. Blocks may lie inside one another. When one ends, also by an exception, its
   masked entries hold their old values again, bit for bit.
3. Ctrl-C while a block is entered or left is raised when that is done.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.mask import ParameterMask, check_mask
from circuits.models import (
    Model,
    checkpoint_of,
    editing,
    parameters_of,
    require_start,
    same_parameters,
    uninterrupted,
)
from circuits.units import TIED

MASK_MODES: tuple[str, ...] = ("revert", "zero", "mean")
#: What a parameter becomes where it is masked, given its name and what it is.
NewValue = Callable[[str, Tensor], Tensor | float]


def new_value(model: Model, mode: str, pre: Model | None, *, check_start: bool = True) -> NewValue:
    """What masked parameters become.

    Args:
        model: θ_ft.
        mode: one of `MASK_MODES`.
        pre: θ_pre, needed to revert.
        check_start: as in `revert`.

    Raises:
        CircuitsError: there is no such mode, or ``pre`` is missing, has other parameters or is not the start.
    """
    if mode not in MASK_MODES:
        raise CircuitsError(f"there is no mode {mode!r}: choose from {', '.join(MASK_MODES)}")
    if mode == "zero":
        return lambda _, __: 0.0
    if mode == "mean":
        return lambda _, old: old.float().mean().item()
    if pre is None:
        raise CircuitsError("reverting needs the model before fine-tuning: give pre")
    others = same_parameters(model, pre)
    if check_start:
        require_start(model, pre)
    return lambda name, _: others[name]


@uninterrupted
def replaced(model: Model, mask: ParameterMask, value: NewValue) -> Iterator[None]:
    """Inside the block, the masked parameters hold new values."""
    parameters = parameters_of(model)
    touched = _touched(model, mask)
    before: dict[str, Tensor] = {}
    with editing(model):
        try:
            with torch.no_grad():
                for name in touched:
                    parameter = parameters[name]
                    entries = mask.masks[name].to(parameter.device)
                    new = torch.as_tensor(value(name, parameter), dtype=parameter.dtype, device=parameter.device)
                    before[name] = parameter.masked_select(entries)
                    parameter.masked_scatter_(entries, new.expand_as(parameter).masked_select(entries))
            yield
        finally:
            with torch.no_grad():
                for name, old in before.items():
                    parameters[name].masked_scatter_(mask.masks[name].to(old.device), old)


def _touched(model: Model, mask: ParameterMask) -> list[str]:
    """The parameters with masked entries; of tied embeddings, which are one tensor, one name."""
    names = [name for name, packed in mask.packed.items() if packed.count]
    if checkpoint_of(model).tied and all(name in mask.masks for name in TIED):
        embedding, unembedding = (mask.masks[name] for name in TIED)
        if not torch.equal(embedding, unembedding.T):
            raise CircuitsError(f"{TIED[0]} and {TIED[1]} are one tensor in this model: a mask must treat them alike")
        names = [name for name in names if name != TIED[1]]
    return names


def revert(model: Model, mask: ParameterMask, pre: Model, *, check_start: bool = True) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters of ``model`` are back at their values before fine-tuning.

    Args:
        model: θ_ft.
        mask: made for ``model``.
        pre: θ_pre, of the same shape.
        check_start: refuse a ``pre`` if the checkpoint of ``model`` says that it was trained from another model.

    Raises:
        CircuitsError: the mask was made for another model, or ``pre`` has other parameters or is not the start.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    check_mask(mask, model)
    return replaced(model, mask, new_value(model, "revert", pre, check_start=check_start))


def zero(model: Model, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters are zero.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    check_mask(mask, model)
    return replaced(model, mask, new_value(model, "zero", None))


def mean(model: Model, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters hold the mean of their tensor.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    check_mask(mask, model)
    return replaced(model, mask, new_value(model, "mean", None))


def graft(
    pre: Model, mask: ParameterMask, fine_tuned: Model, *, check_start: bool = True
) -> AbstractContextManager[None]:
    """Inside the block, ``pre`` is the grafted model θ_pre + γ ⊙ (θ_ft − θ_pre), γ the mask.

    Args:
        pre: θ_pre, which is changed.
        mask: γ, made for ``fine_tuned``.
        fine_tuned: θ_ft.
        check_start: as in `revert`.

    Raises:
        CircuitsError: the mask was made for another model, or ``pre`` has other parameters or is not the start.

    Source:
        arXiv 2505.16178, Fig. 3; Panigrahi et al. 2023 (arXiv 2302.06600).
    """
    check_mask(mask, fine_tuned)
    others = same_parameters(fine_tuned, pre, values_of=fine_tuned)
    if check_start:
        require_start(fine_tuned, pre)
    return replaced(pre, mask, lambda name, _: others[name])
