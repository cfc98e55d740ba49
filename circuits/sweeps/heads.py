"""Sweeps over all heads of a model in memory: ablate or patch each one alone, and measure what that does to answers."""

from collections.abc import Sequence

import pandas

from circuits.errors import CircuitsError
from circuits.interventions import ABLATIONS, run_interventions, single
from circuits.interventions.effects import with_corrections
from circuits.metrics import Metric
from circuits.models import Model, shape_of
from circuits.tasks import Task
from circuits.units import Head

_METRICS: tuple[str, ...] = ("exact_match", "log_prob")


def _by_head(table: pandas.DataFrame) -> pandas.DataFrame:
    """A table of single heads without what all rows have in common."""
    return table.drop(columns=["site", "positions"])


def sweep_heads(
    model: Model,
    tasks: Task | Sequence[Task],
    modes: str | Sequence[str] = ABLATIONS,
    *,
    reference: Task | None = None,
    heads: Sequence[Head] | None = None,
) -> pandas.DataFrame:
    """Ablate every head alone.

    Args:
        model: loaded with `circuits.load_model`.
        tasks: what to score; one or several.
        modes: ``zero``, ``mean``, ``mean_by_position``, ``resample``; one or several.
        reference: the set that means and resampled values come from; the first task if not given.
        heads: only these; all of them if not given.

    Returns:
        One row for each head, mode and task: ``unit``, ``layer``, ``index``, ``mode``, ``task``, ``answers``,
        ``exact_match`` and ``log_prob`` (nats, mean over answers) under the ablation, their ``…_effect``: the
        difference from the model without it, with its 95 % interval, ``…_effect_low`` and ``…_effect_high``, and
        ``…_effect_p`` and ``…_effect_q`` as in `circuits.interventions.run_interventions`, corrected for all rows.

    Raises:
        CircuitsError: there is no task, no such mode or no such head.

    Source:
        docs/method.md, section 6 (head ablation).
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise CircuitsError("a sweep needs a task to score: none was given")
    chosen = list(shape_of(model).heads()) if heads is None else list(heads)
    plan = [one for mode in ([modes] if isinstance(modes, str) else modes) for one in single(chosen, mode)]
    tables = [run_interventions(model, task, plan, reference=reference or tasks[0], metrics=_METRICS) for task in tasks]
    together = with_corrections(pandas.concat(tables, ignore_index=True))
    together.attrs = tables[0].attrs | {"task": [table.attrs["task"] for table in tables]}
    return _by_head(together)


def sweep_patches(
    model: Model, source: Task, target: Task, *, mode: str = "patch", heads: Sequence[Head] | None = None
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
    metrics: list[str | Metric] = list(_METRICS)
    if _other_answers(target, source):
        metrics.append("source_exact_match")
    table = run_interventions(model, target, single(chosen, "patch"), source=source, metrics=metrics)
    return _by_head(table.assign(mode=mode))


def _other_answers(target: Task, source: Task) -> bool:
    """Whether the source has other answers of the same lengths."""
    lengths = [(task.answers["end"] - task.answers["start"]).tolist() for task in (target, source)]
    return lengths[0] == lengths[1] and not (target.answers["value"] == source.answers["value"]).all()
