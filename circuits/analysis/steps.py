"""The steps of an analysis: nothing but calls to the other rooms.

1. evaluate: score the model on every task.
2. trace: each task's gradients at every parameter of heads and neurons.
3. share: the parameters that the tasks share, and Shared Size, with the permuted control.
4. ablate: do without the shared parameters, and without as many random ones outside them.
5. graft: the fewest fine-tuned parameters that keep each task, and what else they keep (with a model before
   fine-tuning).
6. sweep: ablate every head alone.
7. neurons: ablate alone the neurons with the largest Shared Size.
8. patch: every head from the counterfactual run, or from the run of another task about the same.
9. rank: heads and neurons by Shared Size and its rivals; are the top ones needed, and enough?
10. attend: every head's attention to the spans of the tasks.
11. consistency: how alike two tasks' gradients and activations are where they tell the same facts, inside the shared
    parameters and outside them.
12. localise: do the tasks still agree about facts without the shared parameters, and with these alone?
13. signature: which spans the answers rest on.
14. integrate: what integrated gradients say of the same.

Each says what it needs of earlier ones and what it writes; `circuits.analysis.running` does the rest.
"""

import glob
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from circuits.analysis.artifacts import MASKS, Grafts, Table, Traces, TracesOnDisk
from circuits.analysis.case import Case
from circuits.analysis.consistency import consistency, integrate, signature
from circuits.analysis.jobs import Asked, intervene
from circuits.analysis.localisation import localise
from circuits.analysis.running import choose, give_back, step
from circuits.analysis.summary import accuracies
from circuits.interventions import effects_table, pair_groups, single
from circuits.masks import (
    SCOPES,
    SCORES,
    Graft,
    ParameterMask,
    ablate_mask,
    ablation_means,
    graft_by_score,
    influenced_parameters,
    shared_parameters,
    shared_size,
    sharing,
    units_of,
)
from circuits.masks import graft as grafted
from circuits.metrics import evaluate as score
from circuits.models import shape_of
from circuits.progress import track
from circuits.rankings import (
    Evidence,
    agreement,
    attention_scores,
    behaviours_of,
    critical_curve,
    curve_areas,
    curve_means,
    curve_summary,
    default_counts,
    rank_units,
    rankings_of,
    sufficient_curve,
)
from circuits.tasks import Task
from circuits.tracing import GradientTrace, trace_gradients
from circuits.units import Head, Neuron

ANSWERS, ACCURACY = Table("answers"), Table("accuracy")
TRACES, TRACED_HEADS = Traces("traces"), Table("traced_heads")
SHARED, SHARING = Table("shared"), Table("sharing_curve")
SHARED_HEADS, SHARED_NEURONS = Table("shared_heads"), Table("shared_neurons")
ABLATION, ABLATION_ANSWERS = Table("ablation"), Table("ablation_answers")
GRAFTS, GRAFT_CURVES = Grafts("grafts"), Table("grafts")
GRAFT_ANSWERS, GRAFT_ACCURACY = Table("graft_answers"), Table("graft_accuracy")
SWEEP, SWEEP_ANSWERS = Table("sweep"), Table("sweep_answers")
NEURONS, NEURON_ANSWERS = Table("neurons"), Table("neuron_answers")
PATCHES, PATCH_ANSWERS = Table("patches"), Table("patch_answers")
RANKED, CURVES, CURVE_ANSWERS = Table("rankings"), Table("ranking_curves"), Table("ranking_answers")
AREAS, SUMMARY, AGREEMENT = Table("ranking_areas"), Table("ranking_summary"), Table("agreement")
ATTENTION = Table("attention")

#: Examples in one pass of a trace: with twice as many its activations would be the most memory that any step takes.
_TRACED_TOGETHER = 16


def _metrics(task: Task) -> list[str]:
    """What interventions are measured by."""
    return ["exact_match", "log_prob", *(["logit_diff"] if task.foils is not None else [])]


#: What names an answer in joined tables; other columns are each task's own.
_NAMES = ("example", "group", "attribute", "value", "start", "end")


def _joined(tables: Sequence[pandas.DataFrame], tasks: Mapping[str, Task]) -> pandas.DataFrame:
    """The answers of several tasks in one table, without what each task alone knows of its answers."""
    own = {column for task in tasks.values() for column in task.answers} - set(_NAMES)
    return pandas.concat([table.drop(columns=[*own & set(table.columns)]) for table in tables], ignore_index=True)


@step(ANSWERS, ACCURACY)
def evaluate(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score the model on every task."""
    scored = [score(case.model, task).assign(task=name) for name, task in case.of("evaluate").items()]
    answers = _joined(scored, case.tasks)
    return answers, accuracies(answers)


@step(TRACES, TRACED_HEADS)
def trace(case: Case) -> tuple[Mapping[str, GradientTrace], pandas.DataFrame]:
    """Trace the gradients of every task."""
    heads = []
    for name, task in case.of("trace").items():
        file = TRACES.path(case.folder) / f"{name}.safetensors"
        if case.traces is None:
            found = trace_gradients(case.model, task, batch_size=_TRACED_TOGETHER, out=file, executor=case.executor)
        else:
            found = case.traces[name]
            found.save(file)
        for left in file.parent.glob(f"{glob.escape(file.name)}.*"):
            # what was begun by another executor, each as large as the trace
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        heads.append(found.units(Head).assign(task=name))
        del found  # as large as the model, and the next one is made beside it
        give_back()
    return TRACES.load(case.folder), pandas.concat(heads, ignore_index=True)


def _one_task(case: Case) -> str | None:
    return "there is one task alone" if len(case.of("trace")) < 2 else None


@step(MASKS, SHARED, SHARING, SHARED_HEADS, SHARED_NEURONS, needs=[TRACES], lacking=_one_task)
def share(case: Case, traces: Mapping[str, GradientTrace]) -> tuple[Any, ...]:
    """Find the parameters that the tasks share."""
    settings = case.settings
    fractions = sorted({settings.fraction, *settings.fractions})
    sets: dict[tuple[str, float], list[ParameterMask]] = {(one, k): [] for one in SCOPES for k in fractions}
    for name in track(traces, "influenced parameters", len(traces), "task"):
        found = traces[name]
        for (scope, fraction), each in sets.items():
            each.append(influenced_parameters(found, fraction, scope))
        del found  # one trace in memory at a time
        give_back()
    curve = pandas.DataFrame(
        {"scope": scope, "fraction": fraction, **sharing(each, draws=settings.draws, seed=settings.seed)}
        for (scope, fraction), each in track(sets.items(), "sharing curve", len(sets), "set")
    )
    masks = {scope: shared_parameters(sets[scope, settings.fraction]) for scope in SCOPES}
    heads, neurons = (
        pandas.concat([shared_size(mask, kind).assign(scope=scope) for scope, mask in masks.items()], ignore_index=True)
        for kind in (Head, Neuron)
    )
    return masks, curve[curve["fraction"] == settings.fraction].drop(columns="fraction"), curve, heads, neurons


@step(ABLATION, ABLATION_ANSWERS, needs=[MASKS])
def ablate(case: Case, masks: dict[str, ParameterMask]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Do without the shared parameters, and without random ones outside them."""
    tasks, settings = list(case.of("ablate").values()), case.settings
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


@step(GRAFTS, GRAFT_CURVES, GRAFT_ANSWERS, GRAFT_ACCURACY, lacking=_no_start)
def graft(case: Case) -> tuple[Any, ...]:
    """Find the fewest fine-tuned parameters that keep each task."""
    grafts, curves, answers = {}, [], []
    for name, task in case.of("graft").items():
        if case.pre is None or not score(case.model, task)["exact_match"].any():
            continue  # there is nothing to keep: such a task has no rows
        found = {by: graft_by_score(case.pre, case.model, task, score=by, keep=case.settings.keep) for by in SCORES}
        grafts[name] = min(found.values(), key=lambda one: one.size)
        for by, one in found.items():
            curves.append(one.curve.assign(task=name))
            with grafted(case.pre, one.mask, case.model):
                scored = [score(case.pre, other).assign(task=on) for on, other in case.of("evaluate").items()]
            answers.append(_joined(scored, case.tasks).assign(graft=name, score=by))
    if not grafts:
        return grafts, pandas.DataFrame(), pandas.DataFrame(), pandas.DataFrame()
    scored_all = pandas.concat(answers, ignore_index=True)
    accuracy = accuracies(scored_all, ["graft", "score", "task"])
    return grafts, pandas.concat(curves, ignore_index=True), scored_all, accuracy


def _alone(
    case: Case, step: str, asked: Mapping[str, tuple[Task | None, Task]], units: Sequence[Any], *modes: str
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """What happens when each unit alone is changed in targets, patched from their sources if there are any."""
    plan = [one for mode in modes for one in single(units, mode)]
    changed = {name: Asked(target, plan, _metrics(target), source) for name, (source, target) in asked.items()}
    joined = _joined(intervene(case, step, changed), case.tasks)
    return effects_table(joined), joined


def _without_source(case: Case, step: str) -> dict[str, tuple[None, Task]]:
    return {name: (None, task) for name, task in case.of(step).items()}


@step(SWEEP, SWEEP_ANSWERS)
def sweep(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Ablate every head alone."""
    heads = list(shape_of(case.model).heads())
    return _alone(case, "sweep", _without_source(case, "sweep"), heads, *case.settings.modes)


def _no_neurons(case: Case) -> str | None:
    return "no neurons were asked for" if case.settings.neurons == 0 else None


@step(NEURONS, NEURON_ANSWERS, needs=[MASKS], lacking=_no_neurons)
def neurons(case: Case, masks: dict[str, ParameterMask]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Ablate alone the neurons with the largest Shared Size."""
    largest = units_of(masks["tensor"], Neuron, top=case.settings.neurons)
    return _alone(case, "neurons", _without_source(case, "neurons"), largest, "zero")


def sources_of(case: Case) -> dict[str, tuple[Task, Task]]:
    """What can be patched: for each task with counterfactuals, and for two tasks about the same, source and target."""
    found = {}
    scored = case.of("patch")
    for name, task in scored.items():
        if task.counterfactuals is not None:
            found[name] = (task.counterfactuals, task)
    for source in case.of("trace"):  # what is held out of the shared set is a target alone
        for name, task in scored.items():
            if source != name and (pair := pair_groups(task, case.tasks[source])) is not None:
                found[f"{name} from {source}"] = pair
    return found


def _nothing_to_patch(case: Case) -> str | None:
    return None if sources_of(case) else "no task has counterfactuals, and no two have groups in common"


@step(PATCHES, PATCH_ANSWERS, lacking=_nothing_to_patch)
def patch(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Patch every head from the counterfactual run."""
    return _alone(case, "patch", sources_of(case), list(shape_of(case.model).heads()), "patch")


@step(RANKED, CURVES, CURVE_ANSWERS, AREAS, SUMMARY, AGREEMENT, needs=[TRACES, MASKS], uses=[GRAFTS])
def rank(
    case: Case, traces: TracesOnDisk, masks: dict[str, ParameterMask], grafts: dict[str, Graft]
) -> tuple[Any, ...]:
    """Rank heads and neurons, and test whether the top ones are needed and enough."""
    settings = case.settings
    draws, seed, ties = settings.draws, settings.seed, settings.ties
    tasks = list(case.of("rank").values())
    # in the order of the tasks, for the last trace gives gradient × activation
    ordered = traces.of(case.of("trace"))
    made = grafts.get(tasks[0].name)
    evidence = Evidence(
        case.model, case.pre, ordered, masks["global"], None if made is None else made.mask, task=tasks[0], seed=seed
    )
    per_tensor = Evidence(case.model, shared=masks["tensor"], seed=seed)
    lacking = {"change": case.pre is None, "graft_size": made is None}
    named = [*settings.rankings, *(f"{name}_trace" for name in ordered)]
    names = [name for name in rankings_of(evidence) if name in named and not lacking.get(name)]
    rankings, answers, summaries, areas, agreements = [], [], [], [], []
    for kind in (Head, Neuron):
        # ablating every neuron alone would take longer than all the rest
        scored = [name for name in names if name != "random" and (name != "ablation" or kind is Head)]
        parts = [
            rank_units(evidence, kind, scored, draws=ties),
            rank_units(per_tensor, kind, ["shared_size"], draws=ties).assign(metric="shared_size_per_tensor"),
            rank_units(evidence, kind, ["random"], draws=draws),
        ]
        ranking = pandas.concat(parts, ignore_index=True)
        counts = default_counts(ranking["unit"].nunique(), halvings=settings.halvings, tenths=settings.tenths)
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
                    rest=settings.rest,
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
    return None if any(task.spans for task in case.of("attend").values()) else "no task has spans"


@step(ATTENTION, lacking=_no_spans)
def attend(case: Case) -> tuple[pandas.DataFrame]:
    """Score every head's attention to the spans of the tasks."""
    tables = []
    for name, task in case.of("attend").items():
        for behaviour in behaviours_of(task):
            table = attention_scores(case.model, {"found": task}, [behaviour])
            columns = {f"{behaviour.name}.found": "attention", f"{behaviour.name}.found.uniform": "uniform"}
            named = table.rename(columns=columns)[["unit", "layer", "index", *columns.values()]]
            tables.append(named.assign(task=name, behaviour=behaviour.name))
    table = pandas.concat(tables, ignore_index=True)
    return (table.assign(excess=table["attention"] - table["uniform"]),)


STEPS = (
    evaluate, trace, share, ablate, graft, sweep, neurons, patch, rank, attend, consistency, localise, signature,
    integrate,
)  # fmt: skip


def check_steps(only: Sequence[str] | None = None, skip: Sequence[str] | None = None) -> None:
    """Refuse, before anything is loaded, steps that `circuits.analysis.analyse` would refuse.

    Raises:
        CircuitsError: there is no such step, or one is asked for that needs one to be skipped.

    Example:
        >>> check_steps(["share"], ["trace"])
        Traceback (most recent call last):
        circuits.errors.CircuitsError: the step share needs trace, which is to be skipped: leave out one of them
    """
    choose(STEPS, only, skip)
