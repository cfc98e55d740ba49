"""What interventions do to the answers, as a table.

1. The engine runs the interventions, and gives each metric of each answer with and without them (``engine.py``).
2. The effect is the difference. Its mean over the answers that an intervention acts on has an interval and a paired
   test, in which answers of one group count together.
3. The p-values of all the rows of a table are corrected together, and again when tables are joined.
"""

from collections.abc import Sequence
from typing import Any

import numpy
import pandas
from jaxtyping import Float

from circuits.interventions.engine import Engine
from circuits.interventions.intervention import Intervention
from circuits.metrics import NAMED_METRICS, Metric, effect_kind, is_signed, log_prob
from circuits.models import Model, facts_of
from circuits.statistics import corrected, intervals, paired_p_values
from circuits.storage import provenance
from circuits.tasks import Task
from circuits.units import Component

#: What names an intervention in a table.
NAMES_OF_INTERVENTIONS: tuple[str, ...] = ("unit", "layer", "index", "mode", "site", "positions", "task")

#: Endings of the columns of a metric, and of those that it has if its effects can be tested.
_MEASURED, _TESTED = ("", "_effect", "_effect_low", "_effect_high"), ("_effect_p", "_effect_q")


def run_interventions(
    model: Model,
    task: Task,
    interventions: Intervention | Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    pre: Model | None = None,
    metrics: str | Metric | Sequence[str | Metric] = ("exact_match", "log_prob"),
    seed: int = 0,
    per_answer: bool = False,
    tokens: int | None = None,
    check_start: bool = True,
) -> pandas.DataFrame:
    """Run each intervention over a task, and measure what it does to the answers.

    Args:
        model: loaded with `circuits.load_model`.
        task: the prompts and their answers; padding may stand on either side.
        interventions: what to change, each in a run of its own.
        source: for ``patch``: the run to take values from, paired with the task by `pair_people` or `pair_formats`; the
            task's counterfactuals if not given. Where the task has no foils, its answers are those of ``logit_diff``.
        reference: for ``mean``, ``mean_by_position`` and ``resample``: where values come from; the task if not given.
        pre: for ``revert``: the model before fine-tuning.
        metrics: names (``exact_match``, ``first_token``, ``log_prob``, ``logit_diff``, ``source_exact_match``,
            ``kl``), or functions of the answer logits and `circuits.metrics.AnswerTokens`; one or several.
        seed: of resampling.
        per_answer: one row for each intervention and answer instead of means.
        tokens: how many tokens to compute at once, by default as many as suit the device; changes speed and memory,
            the result only by rounding.
        check_start: refuse a ``pre`` to revert to if the checkpoint of ``model`` says that it was trained from another
            model.

    Returns:
        One row for each intervention, in order: ``unit`` (several joined by ``+``; of single units also ``layer`` and
        ``index``), ``mode``, ``site``, ``positions``, ``task``, ``answers``:
        how many answers it acts on, because their prompts have such a position before the answer ends (and, for
        ``patch``, a match in the source). Over these, for each metric: its mean, ``…_effect`` (mean difference from the
        model without intervention), ``…_effect_low`` and ``…_effect_high`` (its 95 % interval), ``…_effect_p`` (of a
        paired test that there is none) and ``…_effect_q`` (the same, corrected by Benjamini–Hochberg for the rows of
        the table); NaN where no answer is acted on. Answers of one group (a person, say) are taken together in
        intervals and tests. With ``per_answer``, one row for each intervention and answer: the
        columns of ``task.answers``, ``changed`` (whether it acts on this one), and each metric with its ``…_effect``.
        Provenance is in ``attrs``.

    Raises:
        CircuitsError: a unit, site, position or metric does not exist; what a mode or metric needs is missing;
            ``pre`` is not the start; a reference is too short or has no other example; a metric does not give one
            number for each answer; memory does not suffice for one example.

    Source:
        docs/method.md, sections 6 and 9.

    Example:
        >>> from circuits import Head, Task, load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> table = run_interventions(model, task, [Intervention((Head(2, 1),)), Intervention((Head(3, 0),), "mean")])
        >>> table[["unit", "mode", "answers"]].values.tolist()
        [['L2H1', 'zero', 12], ['L3H0', 'mean', 12]]
    """
    engine = Engine(
        model,
        task,
        interventions,
        source=source,
        reference=reference,
        pre=pre,
        metrics=metrics,
        seed=seed,
        tokens=tokens,
        check_start=check_start,
    )
    clean, found = engine.run()
    table = answers_table(engine, clean, found) if per_answer else means_table(engine, clean, found)
    table.attrs = provenance(
        **facts_of(model),
        task=task.provenance,
        seed=seed,
        arithmetic=str(engine.lean.dtype).removeprefix("torch."),
    )
    return table


def answers_table(engine: Engine, clean: dict[str, numpy.ndarray], found: dict[str, numpy.ndarray]) -> pandas.DataFrame:
    """What `Engine.run` found, one row for each intervention and answer."""
    answers, count = engine.task.answers, len(engine.interventions)
    rows = describe(engine.interventions)
    rows = rows.loc[rows.index.repeat(len(answers))].reset_index(drop=True)
    repeated = pandas.concat([answers] * count, ignore_index=True)
    table = pandas.concat([rows.assign(task=engine.task.name), repeated], axis=1)
    changed = numpy.empty((count, len(answers)), dtype=bool)
    for (positions, mode), members in engine.groups().items():
        changed[members] = engine.changed(positions, mode)
    table["changed"] = changed.ravel()
    for name, values in found.items():
        table[name] = values.ravel()
        table[f"{name}_effect"] = (values - clean[name]).ravel()
    return table


def means_table(engine: Engine, clean: dict[str, numpy.ndarray], found: dict[str, numpy.ndarray]) -> pandas.DataFrame:
    """What `Engine.run` found, one row for each intervention: means over the answers that it acts on."""
    answers, count = engine.task.answers, len(engine.interventions)
    groups = answers["group"].to_numpy() if "group" in answers else None
    numbers = numpy.zeros(count, dtype=int)
    columns = {
        f"{name}{ending}": numpy.full(count, numpy.nan)
        for name, metric in engine.metrics.items()
        for ending in (*_MEASURED, *(_TESTED if is_signed(metric) else ()))
    }
    for (positions, mode), members in engine.groups().items():
        changed = engine.changed(positions, mode)
        numbers[members] = changed.sum()
        if not changed.any():
            continue
        own = None if groups is None else groups[changed]
        for name, values in found.items():
            chosen = values[members][:, changed]
            measured = _measured(chosen, chosen - clean[name][changed], own, engine.metrics[name])
            for ending, column in measured.items():
                columns[f"{name}{ending}"][members] = column
    table = describe(engine.interventions).assign(task=engine.task.name, answers=numbers)
    return with_corrections(table.assign(**columns))


def effects_table(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over the answers that each intervention acts on.

    Args:
        answers: from `run_interventions` with ``per_answer``, or several of them joined.

    Returns:
        As `run_interventions` gives it without ``per_answer``, for all rows together: the corrections are for all.

    Source:
        docs/method.md, section 9.

    Example:
        >>> answers = pandas.DataFrame({
        ...     "unit": "L0H1", "mode": "zero", "site": "", "positions": "all", "task": "qa", "group": [0, 1, 2, 3],
        ...     "changed": [True, True, True, False], "log_prob": -2.0, "log_prob_effect": [-1.0, -2.0, -3.0, 0.0]})
        >>> effects_table(answers)[["unit", "answers", "log_prob_effect"]].to_numpy().tolist()
        [['L0H1', 3, -2.0]]
    """
    metrics = [name.removesuffix("_effect") for name in answers if name.endswith("_effect")]
    names = [name for name in NAMES_OF_INTERVENTIONS if name in answers]
    rows = []
    for key, part in answers.groupby(names, sort=False):
        chosen = part[part["changed"]]
        row: dict[str, Any] = dict(zip(names, key, strict=True)) | {"answers": len(chosen)}
        groups = chosen["group"].to_numpy() if "group" in chosen else None
        for name in metrics:
            if len(chosen) == 0 or chosen[f"{name}_effect"].isna().all():
                continue
            effects = chosen[f"{name}_effect"].to_numpy(float)
            measured = _measured(chosen[name].to_numpy(float), effects, groups, NAMED_METRICS.get(name, log_prob))
            row |= {f"{name}{ending}": float(number) for ending, number in measured.items()}
        rows.append(row)
    return with_corrections(pandas.DataFrame(rows))


def _measured(
    values: Float[numpy.ndarray, "*row answer"],
    effects: Float[numpy.ndarray, "*row answer"],
    groups: numpy.ndarray | None,
    metric: Metric,
) -> dict[str, Any]:
    """What a table says of a metric in each row, by the ending of the column's name."""
    kind = effect_kind(metric)
    numbers = (values.mean(-1), effects.mean(-1), *intervals(effects, groups, kind=kind))
    tested = {"_effect_p": paired_p_values(effects, groups, kind=kind)} if is_signed(metric) else {}
    return dict(zip(_MEASURED, numbers, strict=True)) | tested


def with_corrections(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table with each ``…_effect_q`` made anew from ``…_effect_p`` over all of its rows."""
    tested = [name for name in table if name.endswith("_effect_p")]
    return table.assign(**{f"{name[:-2]}_q": corrected(table[name].to_numpy(), "bh") for name in tested})


def describe(interventions: Sequence[Intervention]) -> pandas.DataFrame:
    """A table of interventions: ``unit`` (several joined by ``+``), ``mode``, ``site``, ``positions``.

    Where each is of one unit also ``layer``, and ``index`` unless some are whole activations of a layer.
    """
    units = [one.units[0] for one in interventions]
    alone = all(len(one.units) == 1 for one in interventions)
    indices = [unit.index for unit in units if not isinstance(unit, Component)]
    return pandas.DataFrame(
        {
            "unit": ["+".join(map(str, one.units)) for one in interventions],
            **({"layer": [unit.layer for unit in units]} if alone else {}),
            **({"index": indices} if alone and len(indices) == len(units) else {}),
            "mode": [one.mode for one in interventions],
            "site": [one.site or "" for one in interventions],
            "positions": [str(one.positions) for one in interventions],
        }
    )
