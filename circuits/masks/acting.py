"""Acting with a mask on a model's weights: revert, zero, mean, graft; and what that does to accuracy.

1. Inside the ``with`` block the masked entries hold other values: those of θ_pre (`revert`), zero (`zero`), or the
   mean of their tensor (`mean`). `graft` does the opposite of `revert`: θ_pre with the masked entries of θ_ft.
2. Only the masked entries are kept aside. Blocks may lie inside one another. When one ends, also by an exception, its
   masked entries hold their old values again, bit for bit.
3. An ablation is compared with random masks that have the same count in each tensor (docs/method.md, section 3).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pandas
import torch
from torch import Tensor

from circuits.datasets import Task
from circuits.errors import CircuitsError
from circuits.masks.mask import ParameterMask
from circuits.metrics import evaluate
from circuits.models import HookedTransformer, checkpoint_of, editing, parameters_of
from circuits.progress import track
from circuits.statistics import mean_interval
from circuits.units import TIED

MODES: tuple[str, ...] = ("revert", "zero", "mean")


@contextmanager
def _replaced(
    model: HookedTransformer, mask: ParameterMask, value: Callable[[str, Tensor], Tensor | float]
) -> Iterator[None]:
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


def _touched(model: HookedTransformer, mask: ParameterMask) -> list[str]:
    """The parameters with masked entries; of tied embeddings, which are one tensor, one name."""
    names = [name for name, packed in mask.packed.items() if packed.count]
    if checkpoint_of(model).config.tie_word_embeddings and all(name in mask.masks for name in TIED):
        embedding, unembedding = (mask.masks[name] for name in TIED)
        if not torch.equal(embedding, unembedding.T):
            raise CircuitsError(f"{TIED[0]} and {TIED[1]} are one tensor in this model: a mask must treat them alike")
        names = [name for name in names if name != TIED[1]]
    return names


def revert(model: HookedTransformer, mask: ParameterMask, pre: HookedTransformer) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters of ``model`` are back at their values before fine-tuning.

    Args:
        model: θ_ft.
        mask: made for ``model``.
        pre: θ_pre, of the same shape.

    Raises:
        CircuitsError: the mask was made for another model, or ``pre`` has other parameters.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    mask.check(model)
    others = same_parameters(model, pre)
    return _replaced(model, mask, lambda name, _: others[name])


def zero(model: HookedTransformer, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters are zero.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    mask.check(model)
    return _replaced(model, mask, lambda _, __: 0.0)


def mean(model: HookedTransformer, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters hold the mean of their tensor.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    mask.check(model)
    return _replaced(model, mask, lambda _, old: old.float().mean().item())


def graft(pre: HookedTransformer, mask: ParameterMask, fine_tuned: HookedTransformer) -> AbstractContextManager[None]:
    """Inside the block, ``pre`` is the grafted model θ_pre + γ ⊙ (θ_ft − θ_pre), γ the mask.

    Args:
        pre: θ_pre, which is changed.
        mask: γ, made for ``fine_tuned``.
        fine_tuned: θ_ft.

    Raises:
        CircuitsError: the mask was made for another model, or ``pre`` has other parameters.

    Source:
        arXiv 2505.16178, Fig. 3; Panigrahi et al. 2023 (arXiv 2302.06600).
    """
    mask.check(fine_tuned)
    others = same_parameters(fine_tuned, pre, values_of=fine_tuned)
    return _replaced(pre, mask, lambda name, _: others[name])


def same_parameters(
    model: HookedTransformer, other: HookedTransformer, values_of: HookedTransformer | None = None
) -> dict[str, Tensor]:
    """The parameters of ``values_of`` (default ``other``), after checking that both models have the same ones."""
    one, two = parameters_of(model), parameters_of(other)
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two or one[name].shape != two[name].shape:
            raise CircuitsError(
                f"{checkpoint_of(model).source} and {checkpoint_of(other).source} are not the same kind of model: "
                f"{name} has another shape or is missing in one of them"
            )
    if checkpoint_of(model).config.tie_word_embeddings != checkpoint_of(other).config.tie_word_embeddings:
        raise CircuitsError(
            f"of {checkpoint_of(model).source} and {checkpoint_of(other).source} only one ties its embeddings: "
            "both must, or neither"
        )
    return {name: value.detach() for name, value in parameters_of(values_of or other).items()}


def ablate_mask(
    model: HookedTransformer,
    mask: ParameterMask,
    tasks: Sequence[Task],
    pre: HookedTransformer | None = None,
    mode: str = "revert",
    draws: int = 5,
    seed: int = 0,
) -> pandas.DataFrame:
    """Accuracy before and after ablating a mask, and after ablating random masks of the same size.

    Args:
        model: θ_ft.
        mask: made for ``model``.
        tasks: what to evaluate.
        pre: θ_pre, needed to revert.
        mode: ``revert``, ``zero`` or ``mean``.
        draws: random masks.
        seed: of the random masks.

    Returns:
        One row for each ``condition`` (``none``, ``shared``, ``random``), ``draw`` and ``task``: ``mode``,
        ``parameters`` ablated, ``exact_match`` and ``log_prob``, means over answers.

    Raises:
        CircuitsError: the mask was made for another model, there is no such mode, or ``pre`` is missing.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    if mode not in MODES:
        raise CircuitsError(f"there is no mode {mode!r}: choose from {', '.join(MODES)}")
    if mode == "revert" and pre is None:
        raise CircuitsError("reverting needs the model before fine-tuning: give pre")
    conditions = [("none", 0, None), ("shared", 0, mask)]
    conditions += [("random", draw, mask.random(f"{seed}/{draw}")) for draw in range(draws)]
    rows = []
    with editing(model):
        for condition, draw, chosen in track(conditions, f"{mode} masks", len(conditions), "mask"):
            with _acting(model, chosen, pre, mode):
                for task in tasks:
                    scores = evaluate(model, task)
                    rows.append(
                        {
                            "condition": condition,
                            "draw": draw,
                            "mode": mode,
                            "task": task.name,
                            "parameters": 0 if chosen is None else chosen.size,
                            "exact_match": float(scores["exact_match"].mean()),
                            "log_prob": float(scores["log_prob"].mean()),
                        }
                    )
    return pandas.DataFrame(rows)


def ablation_summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """What an ablation costs, beside what random masks of the same size cost.

    Args:
        table: from `ablate_mask`, or several of them with a ``model`` column.

    Returns:
        One row for each ``task`` (and ``model``): ``before`` and ``after`` (exact match), ``drop``, and for the random
        masks the mean ``random_drop``, the ends ``random_drop_low`` and ``random_drop_high`` of its 95 % interval, and
        how many ``draws`` there were.

    Example:
        >>> rows = [("none", 0, 1.0), ("shared", 0, 0.25), ("random", 0, 0.9), ("random", 1, 0.8)]
        >>> table = pandas.DataFrame(rows, columns=["condition", "draw", "exact_match"]).assign(task="qa_id")
        >>> ablation_summary(table)[["before", "after", "drop", "draws"]].to_dict("records")
        [{'before': 1.0, 'after': 0.25, 'drop': 0.75, 'draws': 2}]
    """
    keys = [name for name in ("model", "task") if name in table]
    rows = []
    for values, part in table.groupby(keys, sort=False):
        scores = {condition: rows["exact_match"].tolist() for condition, rows in part.groupby("condition")}
        before, after = scores["none"][0], scores["shared"][0]
        drops = [before - score for score in scores.get("random", [])]
        mean_drop, low, high = mean_interval(drops) if drops else (math.nan,) * 3
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "before": before,
                "after": after,
                "drop": before - after,
                "random_drop": mean_drop,
                "random_drop_low": low,
                "random_drop_high": high,
                "draws": len(drops),
            }
        )
    return pandas.DataFrame(rows)


@contextmanager
def _acting(
    model: HookedTransformer, mask: ParameterMask | None, pre: HookedTransformer | None, mode: str
) -> Iterator[None]:
    if mask is None:
        yield
    elif mode == "revert" and pre is not None:
        with revert(model, mask, pre):
            yield
    else:
        with zero(model, mask) if mode == "zero" else mean(model, mask):
            yield
