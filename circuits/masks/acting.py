"""Acting with a mask on a model's weights: revert, zero, mean, graft; and what that does to accuracy.

1. Inside the ``with`` block the masked entries hold other values: those of θ_pre (`revert`), zero (`zero`), or the
   mean of their tensor (`mean`). `graft` does the opposite of `revert`: θ_pre with the masked entries of θ_ft.
2. Only the masked entries are kept aside. Blocks may lie inside one another. When one ends, also by an exception, its
   masked entries hold their old values again, bit for bit.
3. An ablation is compared with random masks drawn outside the mask, with the same count in each tensor. Where a tensor
   has too little room outside, the mask is thinned like its control and is ablated so too, once for each draw.
4. Ctrl-C while a block is entered or left is raised when that is done.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import pandas
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.mask import ParameterMask
from circuits.metrics import evaluate
from circuits.models import (
    Model,
    checkpoint_of,
    editing,
    parameters_of,
    refuse_hooks,
    require_start,
    uninterrupted,
)
from circuits.progress import track
from circuits.statistics import mean_interval
from circuits.tasks import Task
from circuits.units import TIED

MODES: tuple[str, ...] = ("revert", "zero", "mean")


@uninterrupted
def _replaced(model: Model, mask: ParameterMask, value: Callable[[str, Tensor], Tensor | float]) -> Iterator[None]:
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
    mask.check(model)
    others = same_parameters(model, pre)
    if check_start:
        require_start(model, pre)
    return _replaced(model, mask, lambda name, _: others[name])


def zero(model: Model, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters are zero.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    mask.check(model)
    return _replaced(model, mask, lambda _, __: 0.0)


def mean(model: Model, mask: ParameterMask) -> AbstractContextManager[None]:
    """Inside the block, the masked parameters hold the mean of their tensor.

    Raises:
        CircuitsError: the mask was made for another model.
    """
    mask.check(model)
    return _replaced(model, mask, lambda _, old: old.float().mean().item())


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
    mask.check(fine_tuned)
    others = same_parameters(fine_tuned, pre, values_of=fine_tuned)
    if check_start:
        require_start(fine_tuned, pre)
    return _replaced(pre, mask, lambda name, _: others[name])


def same_parameters(model: Model, other: Model, values_of: Model | None = None) -> dict[str, Tensor]:
    """The parameters of ``values_of`` (default ``other``), after checking that both models have the same ones.

    Raises:
        CircuitsError: they do not, or a function is hooked into ``values_of``, whose weights alone are taken.
    """
    refuse_hooks(values_of or other, "only the weights of that model are taken")
    one, two = parameters_of(model), parameters_of(other)
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two or one[name].shape != two[name].shape:
            raise CircuitsError(
                f"{checkpoint_of(model).source} and {checkpoint_of(other).source} are not the same kind of model: "
                f"{name} has another shape or is missing in one of them"
            )
    if checkpoint_of(model).tied != checkpoint_of(other).tied:
        raise CircuitsError(
            f"of {checkpoint_of(model).source} and {checkpoint_of(other).source} only one ties its embeddings: "
            "both must, or neither"
        )
    return {name: value.detach() for name, value in parameters_of(values_of or other).items()}


def ablate_mask(
    model: Model,
    mask: ParameterMask,
    tasks: Sequence[Task],
    pre: Model | None = None,
    mode: str = "revert",
    draws: int = 5,
    seed: int = 0,
    *,
    per_answer: bool = False,
    check_start: bool = True,
) -> pandas.DataFrame:
    """Accuracy before and after ablating a mask, and after ablating random masks of the same size outside it.

    Args:
        model: θ_ft.
        mask: made for ``model``.
        tasks: what to evaluate.
        pre: θ_pre, needed to revert.
        mode: ``revert``, ``zero`` or ``mean``.
        draws: random masks.
        seed: of the random masks.
        per_answer: keep every answer, for paired comparisons; `ablation_means` gives the other table.
        check_start: as in `revert`.

    Returns:
        One row for each ``condition``, ``draw`` and ``task``: ``mode``, ``parameters`` ablated, their ``overlap`` with
        the mask, ``exact_match`` and ``log_prob``, means over answers. Conditions are ``none``, ``shared`` (the mask),
        ``random`` (outside the mask) and, if some tensor has too little room for that, ``shared_thinned``: the mask,
        for each draw thinned to what its random mask has in each tensor.

        With ``per_answer`` one row for each of these and each answer: also ``example``, ``group`` and ``attribute``.

    Raises:
        CircuitsError: the mask was made for another model, there is no such mode, or ``pre`` is missing or not the
            start.

    Source:
        arXiv 2505.16178, Fig. 2b.
    """
    if mode not in MODES:
        raise CircuitsError(f"there is no mode {mode!r}: choose from {', '.join(MODES)}")
    if mode == "revert" and pre is None:
        raise CircuitsError("reverting needs the model before fine-tuning: give pre")
    mask.check(model)
    if mode == "revert" and pre is not None:
        same_parameters(model, pre)
        if check_start:
            require_start(model, pre)
    tables = []
    with editing(model):
        conditions = _conditions(mask, draws, seed)
        for condition, draw, chosen in track(conditions, f"{mode} masks", 2 + draws, "mask"):
            with _acting(model, chosen, pre, mode):
                scored = [evaluate(model, task).assign(task=task.name) for task in tasks]
            facts = {
                "condition": condition,
                "draw": draw,
                "mode": mode,
                "parameters": 0 if chosen is None else chosen.size,
                "overlap": 0 if chosen is None else (chosen & mask).size,
            }
            tables += [one.assign(**facts) for one in scored]
    if not tables:
        raise CircuitsError("an ablation needs a task to evaluate: none was given")
    answers = pandas.concat(tables, ignore_index=True)
    answers = answers[[*_ABLATED, *(name for name in NAMES_OF_ANSWERS if name in answers), *_SCORES]]
    return answers if per_answer else ablation_means(answers)


#: What names a row of an ablation, and what is measured.
_ABLATED = ("condition", "draw", "mode", "task", "parameters", "overlap")
_SCORES = ("exact_match", "log_prob")
#: What tells answers of one task apart, and which of them belong together.
NAMES_OF_ANSWERS: tuple[str, ...] = ("example", "group", "attribute")


def _conditions(mask: ParameterMask, draws: int, seed: int) -> Iterator[tuple[str, int, ParameterMask | None]]:
    yield "none", 0, None
    yield "shared", 0, mask
    for draw in range(draws):
        thinned, random = mask.control(f"{seed}/{draw}")
        if thinned is not mask:
            yield "shared_thinned", draw, thinned
        yield "random", draw, random


def ablation_means(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over answers: the table that `ablate_mask` gives without ``per_answer``.

    Args:
        answers: from `ablate_mask` with ``per_answer``, or several of them joined, with the columns that tell them
            apart, such as ``model``.
    """
    keys = [name for name in answers if name not in (*NAMES_OF_ANSWERS, *_SCORES)]
    scores = answers[[*keys, *_SCORES]].astype(dict.fromkeys(_SCORES, float))
    return scores.groupby(keys, sort=False, as_index=False, dropna=False).mean()


def ablation_summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """What an ablation costs, beside what random masks of the same size cost.

    Args:
        table: from `ablate_mask`, or several of them joined, with the columns that tell them apart, such as ``model``.

    Returns:
        One row for each ``task`` and ``mode``, and each value of the columns that were added: ``before`` and ``after``
        (exact match), ``drop`` and how many ``parameters`` were ablated. ``thinned_drop``, the mean drop of the mask
        thinned to as many as its random masks, ``thinned_parameters``, is what compares with them: ``drop`` itself
        where nothing had to be thinned. For the random masks the mean ``random_drop``, the ends ``random_drop_low`` and
        ``random_drop_high`` of its 95 % interval (within what accuracies allow; NaN where all draws are alike), and how
        many ``draws`` there were.

    Raises:
        CircuitsError: a condition has several rows for one draw.

    Example:
        >>> rows = [("none", 0, 0, 1.0), ("shared", 0, 9, 0.25), ("random", 0, 9, 0.9), ("random", 1, 9, 0.8)]
        >>> table = pandas.DataFrame(rows, columns=["condition", "draw", "parameters", "exact_match"])
        >>> ablation_summary(table.assign(task="qa_id"))[["before", "after", "drop", "draws"]].to_dict("records")
        [{'before': 1.0, 'after': 0.25, 'drop': 0.75, 'draws': 2}]
    """
    measured = ("condition", "draw", "parameters", "overlap", *NAMES_OF_ANSWERS, *_SCORES)
    keys = [name for name in table if name not in measured]
    if table.duplicated([*keys, "condition", "draw"]).any():
        raise CircuitsError(
            "the table has several rows for one condition and draw: give each model or mask that was joined a column "
            "of its own, and take ablation_means of answers first"
        )
    rows = []
    for values, part in table.groupby(keys, sort=False, dropna=False):
        by_condition = {str(condition): rows for condition, rows in part.groupby("condition")}
        scores = {condition: rows["exact_match"].tolist() for condition, rows in by_condition.items()}
        before, after = scores["none"][0], scores["shared"][0]
        randoms = scores.get("random", [])
        middle, low, high = mean_interval(randoms) if randoms else (math.nan,) * 3
        alike = by_condition.get("shared_thinned", by_condition["shared"])
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "before": before,
                "after": after,
                "drop": before - after,
                "parameters": int(by_condition["shared"]["parameters"].iloc[0]),
                "thinned_drop": before - float(alike["exact_match"].mean()),
                "thinned_parameters": int(alike["parameters"].iloc[0]),
                "random_drop": before - middle,
                "random_drop_low": before - (min(1.0, high) if high == high else math.nan),
                "random_drop_high": before - (max(0.0, low) if low == low else math.nan),
                "draws": len(randoms),
            }
        )
    return pandas.DataFrame(rows)


@uninterrupted
def _acting(model: Model, mask: ParameterMask | None, pre: Model | None, mode: str) -> Iterator[None]:
    if mask is None:
        yield
    elif mode == "revert" and pre is not None:
        with revert(model, mask, pre, check_start=False):
            yield
    else:
        with zero(model, mask) if mode == "zero" else mean(model, mask):
            yield
