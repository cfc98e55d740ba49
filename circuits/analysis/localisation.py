"""Does the agreement of two tasks that tell the same facts hang on the shared parameters? A step of an analysis.

1. Facts that two tasks both tell are drawn and paired, as in the step ``consistency``.
2. The shared parameters S go back to their values before fine-tuning, or they alone keep those after it. (What else is
   as before fine-tuning then, ``rest`` says, as for curves over ranked units.) The same is done with as many random
   parameters outside S in each tensor, both thinned alike where a tensor has too little room.
3. Each time, fact by fact: the cosine of the centred activations of both tasks at the token that predicts the answer,
   mean over layers; whether the activation of the last layer is nearest to its own fact's in the other task; and
   whether each task's answer is recalled, and its log-probability.
4. Differences between S and random parameters are tested fact by fact.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas

from circuits.analysis.artifacts import MASKS, Table
from circuits.analysis.case import Case
from circuits.analysis.consistency import controlled_masks, told_twice
from circuits.analysis.running import step
from circuits.consistency import representation_consistency
from circuits.masks import ParameterMask, graft, revert
from circuits.metrics import evaluate
from circuits.models import Model
from circuits.progress import track
from circuits.statistics import Kind, beyond_draws, corrected, intervals, of_draws, paired
from circuits.tasks import Task, pair_facts

LOCALISATION, LOCALISATION_FACTS = Table("localisation"), Table("localisation_facts")
LOCALISATION_TESTS = Table("localisation_tests")

#: What is measured of each fact → what kind of number it is. Right, and how likely, are the answers of the other task,
#: and with ``task_`` those of the task itself.
MEASURES: Mapping[str, Kind] = {
    "cosine": "real",
    "retrieved": "share",
    "exact_match": "share",
    "log_prob": "real",
    "task_exact_match": "share",
    "task_log_prob": "real",
}
_DIFFERENCES: Mapping[str, Kind] = {"real": "real", "share": "bounded_difference"}
#: What is done: nothing, parameters reverted, they alone fine-tuned, all reverted.
ACTS = ("none", "revert", "alone", "all")


def _cannot(case: Case) -> str | None:
    if case.pre is None:
        return "there is no model before fine-tuning (pre)"
    return None if told_twice(case, "localise") else "no two tasks tell three facts of the same groups"


@step(LOCALISATION, LOCALISATION_FACTS, LOCALISATION_TESTS, needs=[MASKS], lacking=_cannot)
def localise(case: Case, masks: Mapping[str, ParameterMask]) -> tuple[pandas.DataFrame, ...]:
    """Revert the shared parameters, or keep them alone, and see whether the tasks still agree about facts."""
    settings, tables = case.settings, []
    for name, other in told_twice(case, "localise"):
        one, two = pair_facts(case.tasks[name], case.tasks[other], case.count("localise"), seed=settings.seed)
        conditions = list(_conditions(case, masks))
        for about, model, changed in track(conditions, "localise", len(conditions), "set of parameters"):
            with changed:
                tables.append(measured(model, one, two).assign(task=name, other=other, **about))
    facts = pandas.concat(tables, ignore_index=True)
    return localisation_means(facts), facts, localisation_tests(facts)


def _conditions(
    case: Case, masks: Mapping[str, ParameterMask]
) -> Iterator[tuple[dict[str, Any], Model, AbstractContextManager[None]]]:
    """What is done, the model it is done to, and the block in which it is."""
    model, pre = case.model, case.pre
    assert pre is not None
    nothing = {"scope": "", "condition": "", "draw": 0, "parameters": 0}
    yield nothing | {"act": "none"}, model, nullcontext()
    for (scope, condition, draw), mask in controlled_masks(masks, case.settings.draws, case.settings.seed).items():
        about = {"scope": scope, "condition": condition, "draw": draw, "parameters": mask.size}
        yield about | {"act": "revert"}, model, revert(model, mask, pre, check_start=False)
        if case.settings.rest == "pre":
            yield about | {"act": "alone"}, pre, graft(pre, mask, model, check_start=False)
        else:
            yield about | {"act": "alone"}, model, revert(model, ~mask, pre, check_start=False)
    if case.settings.rest == "pre":
        yield nothing | {"act": "all"}, pre, nullcontext()
    elif masks:
        mask = next(iter(masks.values()))
        yield nothing | {"act": "all"}, model, revert(model, mask | ~mask, pre, check_start=False)


def measured(model: Model, one: Task, two: Task) -> pandas.DataFrame:
    """One row for each fact: how alike its activations in both tasks are, and whether each recalls it."""
    pairs = representation_consistency(model, one, two, per_pair=True)
    matched = pairs[pairs["kind"] == "matched"]
    last = matched[matched["layer"] == matched["layer"].max()].set_index("example")["retrieved"]
    cosines = matched.groupby("example")["cosine"].mean()
    scores = ["exact_match", "log_prob"]
    own, answers = (evaluate(model, task).set_index("example") for task in (one, two))
    keys = [name for name in ("group", "attribute") if name in answers]
    found = answers[[*keys, *scores]].assign(cosine=cosines, retrieved=last)
    return found.join(own[scores].add_prefix("task_")).reset_index()


def _by_fact(facts: pandas.DataFrame) -> pandas.DataFrame:
    """Means over draws."""
    keys = ["task", "other", "scope", "act", "condition", "group", "example"]
    measures = facts[[*MEASURES]].astype(float)
    return facts[[*keys, "parameters"]].assign(**measures).groupby(keys, sort=False).mean().reset_index()


def localisation_means(facts: pandas.DataFrame) -> pandas.DataFrame:
    """Means over facts with their intervals.

    Args:
        facts: the table ``localisation_facts``.

    Returns:
        One row for each ``task``, ``other``, ``scope``, ``act`` (`ACTS`) and ``condition``, the measures with ``_low``
        and ``_high``; ``parameters``; the number of ``facts``. Several draws are more rows of the same groups.
    """
    keys, rows = ["task", "other", "scope", "act", "condition"], []
    for key, part in facts.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {
            "parameters": part["parameters"].mean(),
            "facts": part["example"].nunique(),
        }
        for measure, kind in MEASURES.items():
            known = part.dropna(subset=measure)
            low, high = intervals(known[measure].to_numpy(float), known["group"].to_numpy(), kind=kind)
            row |= {measure: known[measure].mean(), f"{measure}_low": float(low), f"{measure}_high": float(high)}
        rows.append(row)
    return pandas.DataFrame(rows)


def localisation_tests(facts: pandas.DataFrame) -> pandas.DataFrame:
    """The shared parameters less the random ones, fact by fact.

    Args:
        facts: the table ``localisation_facts``.

    Returns:
        One row for each ``task``, ``other``, ``scope``, ``act`` and ``measure``: the mean with the shared parameters
        (thinned, where their controls are) and with the ``random`` ones, their ``difference`` with ``low``, ``high``
        and ``p``, which also take into account how far single draws lie apart (NaN for a single one), and ``q``,
        corrected by Benjamini–Hochberg over the table.
    """
    keys, rows = ["task", "other", "scope", "act"], []
    by_draw = dict(list(facts.astype(dict.fromkeys(MEASURES, float)).groupby(keys, sort=False)))
    by_fact = _by_fact(facts)
    for key, part in by_fact[by_fact["condition"] != ""].groupby(keys, sort=False):
        told = part["condition"].unique()
        if "random" not in told:
            continue
        one, random = (
            part[part["condition"] == condition].set_index(["group", "example"])
            for condition in ("shared_thinned" if "shared_thinned" in told else "shared", "random")
        )
        for measure, kind in MEASURES.items():
            both = pandas.DataFrame({"shared": one[measure], "random": random[measure]}).dropna()
            groups = both.index.get_level_values("group").to_numpy()
            found = paired(both["shared"].to_numpy(), both["random"].to_numpy(), groups, kind=_DIFFERENCES[kind])
            found = beyond_draws(found, of_draws(by_draw[key], measure)[1], answers=len(both))
            rows.append(
                dict(zip(keys, key, strict=True))
                | {
                    "measure": measure,
                    "shared": both["shared"].mean(),
                    "random": both["random"].mean(),
                    "difference": found.difference,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p_value,
                    "facts": len(both),
                }
            )
    table = pandas.DataFrame(rows)
    return table.assign(q=corrected(table["p"].to_numpy(), "bh")) if rows else table
