"""Sweeps over all heads: ablate or patch each one alone, and measure what that does to the answers.

Each row of the result is one head under one intervention on one task, beside the model's own score without it.
"""

from collections.abc import Sequence

import pandas

from circuits.datasets import Task
from circuits.errors import CircuitsError
from circuits.interventions import ablate_heads, mean_head_outputs, patched_outputs, replace_heads
from circuits.metrics import evaluate
from circuits.models import HookedTransformer, shape_of
from circuits.progress import track
from circuits.units import Head


def _row(head: Head, mode: str, task: Task, scores: pandas.DataFrame, own: pandas.DataFrame) -> dict[str, object]:
    row: dict[str, object] = {
        "head": str(head),
        "layer": head.layer,
        "index": head.index,
        "mode": mode,
        "task": task.name,
        "answers": len(scores),
    }
    for metric in ("exact_match", "log_prob"):
        row[metric] = float(scores[metric].mean())
        row[f"{metric}_effect"] = float(scores[metric].mean() - own[metric].mean())
    return row


def sweep_heads(
    model: HookedTransformer,
    tasks: Sequence[Task],
    modes: Sequence[str] = ("zero", "mean"),
    reference: Task | None = None,
    heads: Sequence[Head] | None = None,
) -> pandas.DataFrame:
    """Ablate every head alone.

    Args:
        model: loaded with `circuits.load_model`.
        tasks: what to score.
        modes: ``zero``, ``mean``, or both.
        reference: the set that mean outputs are taken over; the first task if not given.
        heads: only these; all of them if not given.

    Returns:
        One row for each head, mode and task: ``head``, ``layer``, ``index``, ``mode``, ``task``, ``answers``,
        ``exact_match`` and ``log_prob`` (nats, mean over answers) under the ablation, and their ``…_effect``:
        the difference from the model without it.

    Raises:
        CircuitsError: there is no task, no such mode or no such head.

    Source:
        docs/method.md, section 6 (head ablation).
    """
    if not tasks:
        raise CircuitsError("a sweep needs a task to score: none was given")
    chosen = list(shape_of(model).heads()) if heads is None else list(heads)
    means = mean_head_outputs(model, reference or tasks[0]) if "mean" in modes else None
    own = {task.name: evaluate(model, task) for task in tasks}
    rows = []
    plan = [(head, mode) for mode in modes for head in chosen]
    for head, mode in track(plan, "ablate heads", len(plan), "head"):
        with ablate_heads(model, [head], mode, means):
            for task in tasks:
                rows.append(_row(head, mode, task, evaluate(model, task), own[task.name]))
    return pandas.DataFrame(rows)


def sweep_patches(
    model: HookedTransformer, source: Task, target: Task, mode: str = "patch", heads: Sequence[Head] | None = None
) -> pandas.DataFrame:
    """Patch every head alone from a source run into a target run.

    Args:
        model: loaded with `circuits.load_model`.
        source: the run that values are taken from, paired with the target by `circuits.interventions.pair_formats`
            or `circuits.interventions.pair_people`.
        target: the run that is changed and scored.
        mode: what to call it in the table.
        heads: only these; all of them if not given.

    Returns:
        As `sweep_heads`, and where every source answer has as many tokens as the target's: ``source_exact_match`` and
        ``source_exact_match_effect``, the share of target runs that now give the source's answer.

    Raises:
        CircuitsError: the tasks cannot be paired, or the model has no such head.

    Source:
        docs/method.md, section 6 (activation patching).
    """
    chosen = list(shape_of(model).heads()) if heads is None else list(heads)
    outputs = patched_outputs(model, source, target)
    other = _with_answers_of(target, source)
    own = evaluate(model, target, len(target))
    own_other = None if other is None else evaluate(model, other, len(other))
    rows = []
    for head in track(chosen, f"{mode} heads", len(chosen), "head"):
        with replace_heads(model, {head: outputs[head.layer, :, :, head.index]}):
            row = _row(head, mode, target, evaluate(model, target, len(target)), own)
            if other is not None and own_other is not None:
                scores = evaluate(model, other, len(other))
                row["source_exact_match"] = float(scores["exact_match"].mean())
                row["source_exact_match_effect"] = float(
                    (scores["exact_match"] * 1.0 - own_other["exact_match"]).mean()
                )
        rows.append(row)
    return pandas.DataFrame(rows)


def _with_answers_of(target: Task, source: Task) -> Task | None:
    """The target's prompts with the source's answers, if those are other answers of the same lengths."""
    lengths = [(task.answers["end"] - task.answers["start"]).tolist() for task in (target, source)]
    if lengths[0] != lengths[1] or (target.answers["value"] == source.answers["value"]).all():
        return None
    tokens = target.tokens.clone()
    for ours, theirs in zip(target.answers.itertuples(), source.answers.itertuples(), strict=True):
        tokens[ours.example, ours.start : ours.end] = source.tokens[theirs.example, theirs.start : theirs.end]
    return Task(target.name, tokens, target.roles, target.answers.assign(value=source.answers["value"]), target.texts)
