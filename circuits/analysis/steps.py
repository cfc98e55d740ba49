"""The steps of an analysis: nothing but calls to the other rooms.

1. evaluate: score the model on every task.
2. trace: each task's gradients at every parameter of heads and neurons.
3. share: the parameters that the tasks share, and Shared Size, with the permuted control.
4. ablate: do without the shared parameters, and without as many random ones outside them.
5. graft: the fewest fine-tuned parameters that keep each task (with a model before fine-tuning).
6. sweep: ablate every head alone.
7. neurons: ablate alone the neurons with the largest Shared Size.
8. patch: every head from the counterfactual run, or from the run of another task about the same.
9. rank: heads and neurons by Shared Size and its rivals; are the top ones needed, and enough?
10. attend: every head's attention to the spans of the tasks.

Each says what it needs of earlier ones and what it writes; `circuits.analysis.running` does the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from circuits.analysis.artifacts import Grafts, Masks, Table, Traces
from circuits.analysis.case import Case
from circuits.analysis.running import step
from circuits.interventions import effects_table, pair_groups, run_interventions, single
from circuits.masks import (
    SCOPES,
    SCORES,
    ParameterMask,
    ablate_mask,
    ablation_means,
    graft_by_score,
    shared_parameters,
    shared_size,
    sharing,
    sharing_curve,
    units_of,
)
from circuits.metrics import evaluate as score
from circuits.models import shape_of
from circuits.progress import track
from circuits.rankings import (
    RANKINGS,
    Evidence,
    agreement,
    attention_scores,
    behaviours_of,
    critical_curve,
    curve_areas,
    curve_means,
    curve_summary,
    rank_units,
    sufficient_curve,
)
from circuits.statistics import intervals
from circuits.tasks import Task
from circuits.tracing import GradientTrace, trace_gradients
from circuits.units import Head, Neuron

ANSWERS, ACCURACY = Table("answers"), Table("accuracy")
TRACES, TRACED_HEADS = Traces("traces"), Table("traced_heads")
MASKS, SHARED, SHARING = Masks("masks"), Table("shared"), Table("sharing_curve")
SHARED_HEADS, SHARED_NEURONS = Table("shared_heads"), Table("shared_neurons")
ABLATION, ABLATION_ANSWERS = Table("ablation"), Table("ablation_answers")
GRAFTS, GRAFT_CURVES = Grafts("grafts"), Table("grafts")
SWEEP, SWEEP_ANSWERS = Table("sweep"), Table("sweep_answers")
NEURONS, NEURON_ANSWERS = Table("neurons"), Table("neuron_answers")
PATCHES, PATCH_ANSWERS = Table("patches"), Table("patch_answers")
RANKED, CURVES, CURVE_ANSWERS = Table("rankings"), Table("ranking_curves"), Table("ranking_answers")
AREAS, SUMMARY, AGREEMENT = Table("ranking_areas"), Table("ranking_summary"), Table("agreement")
ATTENTION = Table("attention")

#: Curves over more units than this are measured at all of them and at so many halvings: the first ones matter most.
_ALL_COUNTS, _HALVINGS = 16, 7
#: Curves are what takes longest: as many examples of each task are scored at each of their points.
CURVE_EXAMPLES = 8


def _metrics(task: Task) -> list[str]:
    """What interventions are measured by."""
    return ["exact_match", "log_prob", *(["logit_diff"] if task.foils is not None else [])]


#: What names an answer in joined tables; other columns are each task's own.
_NAMES = ("example", "group", "attribute", "value", "start", "end")


def _joined(tables: Sequence[pandas.DataFrame], tasks: Mapping[str, Task]) -> pandas.DataFrame:
    """The answers of several tasks in one table, without what each task alone knows of its answers."""
    own = {column for task in tasks.values() for column in task.answers} - set(_NAMES)
    joined = pandas.concat([table.drop(columns=[*own & set(table.columns)]) for table in tables], ignore_index=True)
    return joined.assign(group=joined["group"].astype(str))


def _one_task(case: Case) -> str | None:
    return "there is one task alone" if len(case.tasks) < 2 else None


@step(ANSWERS, ACCURACY)
def evaluate(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score the model on every task."""
    scored = [score(case.model, task).assign(task=name) for name, task in case.tasks.items()]
    answers = _joined(scored, case.tasks)
    return answers, accuracies(answers)


def accuracies(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Means over the answers of each task, with 95 % intervals for exact match and log-probability.

    Args:
        answers: one row per answer: ``task``, ``group``, ``exact_match``, ``first_token``, ``log_prob``, and
            ``logit_diff`` where a task has foils.

    Returns:
        One row per task: ``answers``, and for each metric its mean and the ends of its interval.
    """
    rows = []
    for name, part in answers.groupby("task", sort=False):
        row: dict[str, Any] = {"task": name, "answers": len(part)}
        groups = part["group"].to_numpy()
        for metric in ("exact_match", "first_token", "log_prob", "logit_diff"):
            if metric in part and part[metric].notna().all():
                values = part[metric].to_numpy(float)
                low, high = intervals(
                    values, groups, kind="share" if metric in ("exact_match", "first_token") else "real"
                )
                row |= {metric: values.mean(), f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return pandas.DataFrame(rows)


@step(TRACES, TRACED_HEADS)
def trace(case: Case) -> tuple[dict[str, GradientTrace], pandas.DataFrame]:
    """Trace the gradients of every task."""
    traces = {
        name: trace_gradients(case.model, task, out=TRACES.path(case.folder) / f"{name}.safetensors")
        for name, task in case.tasks.items()
    }
    heads = [found.units(Head).assign(task=name) for name, found in traces.items()]
    return traces, pandas.concat(heads, ignore_index=True)


@step(MASKS, SHARED, SHARING, SHARED_HEADS, SHARED_NEURONS, needs=[TRACES], lacking=_one_task)
def share(case: Case, traces: dict[str, GradientTrace]) -> tuple[Any, ...]:
    """Find the parameters that the tasks share."""
    several, settings = list(traces.values()), case.settings
    masks, reports, heads, neurons = {}, [], [], []
    for scope in SCOPES:
        mask = masks[scope] = shared_parameters(several, settings.fraction, scope)
        reports.append(
            {"scope": scope, **sharing(several, settings.fraction, settings.draws, seed=settings.seed, scope=scope)}
        )
        heads.append(shared_size(mask, Head).assign(scope=scope))
        neurons.append(shared_size(mask, Neuron).assign(scope=scope))
    curve = sharing_curve(several, settings.fractions, settings.draws, seed=settings.seed)
    sizes = (pandas.concat(parts, ignore_index=True) for parts in (heads, neurons))
    return masks, pandas.DataFrame(reports), curve, *sizes


@step(ABLATION, ABLATION_ANSWERS, needs=[MASKS])
def ablate(case: Case, masks: dict[str, ParameterMask]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Do without the shared parameters, and without random ones outside them."""
    tasks, settings = list(case.scored().values()), case.settings
    draws, seed = settings.draws, settings.seed
    each = [
        ablate_mask(
            case.model, mask, tasks, pre=case.pre, mode=case.mode, draws=draws, seed=seed, per_answer=True
        ).assign(scope=scope)
        for scope, mask in masks.items()
        if mask.size
    ]
    answers = _joined(each, case.tasks)
    means = [ablation_means(part).assign(scope=scope) for scope, part in answers.groupby("scope", sort=False)]
    return pandas.concat(means, ignore_index=True), answers


def _no_start(case: Case) -> str | None:
    return "there is no model before fine-tuning (pre)" if case.pre is None else None


@step(GRAFTS, GRAFT_CURVES, lacking=_no_start)
def graft(case: Case) -> tuple[Any, ...]:
    """Find the fewest fine-tuned parameters that keep each task."""
    grafts, curves = {}, []
    for name, task in case.tasks.items():
        if case.pre is None or not score(case.model, task)["exact_match"].any():
            continue  # there is nothing to keep: such a task has no rows
        found = [graft_by_score(case.pre, case.model, task, score=by, keep=case.settings.keep) for by in SCORES]
        grafts[name] = min(found, key=lambda one: one.size)
        curves += [one.curve.assign(task=name) for one in found]
    return grafts, pandas.concat(curves, ignore_index=True) if curves else pandas.DataFrame()


def _ablated(case: Case, units: Sequence[Any], what: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Each unit alone puts out zero."""
    answers = [
        run_interventions(case.model, task, single(units), metrics=_metrics(task), per_answer=True).assign(task=name)
        for name, task in track(case.scored().items(), f"ablate {what}", len(case.tasks), "task")
    ]
    joined = _joined(answers, case.tasks)
    return effects_table(joined), joined


@step(SWEEP, SWEEP_ANSWERS)
def sweep(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Ablate every head alone."""
    return _ablated(case, list(shape_of(case.model).heads()), "heads")


def _no_neurons(case: Case) -> str | None:
    return "no neurons were asked for" if case.settings.neurons == 0 else None


@step(NEURONS, NEURON_ANSWERS, needs=[MASKS], lacking=_no_neurons)
def neurons(case: Case, masks: dict[str, ParameterMask]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Ablate alone the neurons with the largest Shared Size."""
    return _ablated(case, units_of(masks["tensor"], Neuron, top=case.settings.neurons), "neurons")


def sources_of(case: Case) -> dict[str, tuple[Task, Task]]:
    """What can be patched: for each task with counterfactuals, and for two tasks about the same, source and target."""
    found = {}
    scored = case.scored()
    for name, task in scored.items():
        if task.counterfactuals is not None:
            found[name] = (task.counterfactuals, task)
    for source_name, source in case.tasks.items():
        for name, task in scored.items():
            if source_name != name and (pair := pair_groups(task, source)) is not None:
                found[f"{name} from {source_name}"] = pair
    return found


def _nothing_to_patch(case: Case) -> str | None:
    return None if sources_of(case) else "no task has counterfactuals, and no two have groups in common"


@step(PATCHES, PATCH_ANSWERS, lacking=_nothing_to_patch)
def patch(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Patch every head from the counterfactual run."""
    heads = list(shape_of(case.model).heads())
    pairs = sources_of(case)
    answers = [
        run_interventions(
            case.model, target, single(heads, "patch"), source=source, metrics=_metrics(target), per_answer=True
        ).assign(task=name)
        for name, (source, target) in track(pairs.items(), "patch heads", len(pairs), "task")
    ]
    joined = _joined(answers, case.tasks)
    return effects_table(joined), joined


def counts_of(units: int) -> list[int]:
    """The numbers of units that curves are measured at."""
    if units <= _ALL_COUNTS:
        return list(range(units + 1))
    return sorted({0, *(round(units / 2**power) for power in range(_HALVINGS))})


@step(RANKED, CURVES, CURVE_ANSWERS, AREAS, SUMMARY, AGREEMENT, needs=[TRACES, MASKS])
def rank(case: Case, traces: dict[str, GradientTrace], masks: dict[str, ParameterMask]) -> tuple[Any, ...]:
    """Rank heads and neurons, and test whether the top ones are needed and enough."""
    draws, seed = case.settings.draws, case.settings.seed
    tasks = [task.sample(CURVE_EXAMPLES, seed) for task in case.scored().values()]
    ordered = {name: traces[name] for name in case.tasks}
    evidence = Evidence(case.model, case.pre, ordered, masks["global"], task=tasks[0], seed=seed)
    per_tensor = Evidence(case.model, shared=masks["tensor"], seed=seed)
    # heads are ablated in the sweep, and grafts are of one task each
    left_out = {"ablation", "graft_size", *(["change"] if case.pre is None else [])}
    names = ["shared_size", *(f"{name}_trace" for name in ordered), *RANKINGS]
    names = [name for name in dict.fromkeys(names) if name not in left_out]
    rankings, answers, summaries, areas, agreements = [], [], [], [], []
    for kind in (Head, Neuron):
        parts = [
            rank_units(evidence, kind, [name for name in names if name != "random"], draws=1),
            rank_units(per_tensor, kind, ["shared_size"], draws=1).assign(metric="shared_size_per_tensor"),
            rank_units(evidence, kind, ["random"], draws=draws),
        ]
        ranking = pandas.concat(parts, ignore_index=True)
        counts = counts_of(ranking["unit"].nunique())
        both = [
            critical_curve(ranking, case.model, tasks, pre=case.pre, mode=case.mode, counts=counts, per_answer=True)
        ]
        if case.pre is not None:
            both.append(
                sufficient_curve(
                    ranking,
                    case.pre,
                    case.model,
                    tasks=tasks,
                    counts=counts,
                    rest=case.settings.rest,
                    per_answer=True,
                )
            )
        measured = _joined(both, case.tasks).assign(kind=kind.NOUN)
        agreed = agreement(ranking).rename_axis("metric").reset_index()
        rankings.append(ranking.assign(kind=kind.NOUN))
        answers.append(measured)
        areas.append(curve_areas(measured.drop(columns="kind")).assign(kind=kind.NOUN))
        summaries.append(curve_summary(curve_means(measured)).assign(kind=kind.NOUN))
        agreements.append(agreed.melt("metric", var_name="other", value_name="spearman").assign(kind=kind.NOUN))
    joined = [pandas.concat(parts, ignore_index=True) for parts in (rankings, answers, areas, summaries, agreements)]
    curves = [curve_means(part).assign(kind=part["kind"].iloc[0]) for part in answers]
    return joined[0], pandas.concat(curves, ignore_index=True), *joined[1:]


def _no_spans(case: Case) -> str | None:
    return None if any(task.spans for task in case.tasks.values()) else "no task has spans"


@step(ATTENTION, lacking=_no_spans)
def attend(case: Case) -> tuple[pandas.DataFrame]:
    """Score every head's attention to the spans of the tasks."""
    tables = []
    for name, task in case.scored().items():
        for behaviour in behaviours_of(task):
            table = attention_scores(case.model, {"found": task}, [behaviour])
            columns = {f"{behaviour.name}.found": "attention", f"{behaviour.name}.found.uniform": "uniform"}
            named = table.rename(columns=columns)[["unit", "layer", "index", *columns.values()]]
            tables.append(named.assign(task=name, behaviour=behaviour.name))
    table = pandas.concat(tables, ignore_index=True)
    return (table.assign(excess=table["attention"] - table["uniform"]),)


STEPS = (evaluate, trace, share, ablate, graft, sweep, neurons, patch, rank, attend)
