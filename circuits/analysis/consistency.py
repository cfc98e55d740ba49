"""How alike tasks are where they tell the same facts, and what their answers rest on: three steps of an analysis.

1. Facts that two tasks both tell are drawn, and paired answer by answer; there are as many pairs of tasks as have three
   facts in common.
2. Gradients of matched pairs of answers are compared, and of mismatched ones beside them: over all parameters, by
   layer and component, inside the shared parameters, and inside as many random ones outside them (both thinned alike
   where there is too little room, as in the step ``ablate``).
3. Activations of the same pairs are compared layer by layer, at the token that predicts the answer and at the last
   token of the first span that both tasks have, such as the subject.
4. Differences are tested fact by fact: matched less mismatched, inside less random, retrieval less chance.
5. The signature is by causal replacement, of the same facts where a task shares facts with another; integrated
   gradients, of fewer facts, stand beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from typing import Any

import pandas
import torch

from circuits.analysis.artifacts import MASKS, Table
from circuits.analysis.case import Case
from circuits.analysis.running import step
from circuits.consistency import (
    answer_shares,
    gradient_consistency,
    input_signature,
    mismatched_kind,
    representation_consistency,
    signature_means,
)
from circuits.masks import ParameterMask
from circuits.progress import track
from circuits.statistics import Kind, beyond_draws, corrected, of_draws, paired
from circuits.tasks import Task, facts_in_common, pair_facts

GRADIENTS, GRADIENT_PAIRS = Table("gradient_consistency"), Table("gradient_consistency_pairs")
REPRESENTATIONS, REPRESENTATION_PAIRS = Table("representation_consistency"), Table("representation_consistency_pairs")
TESTS = Table("consistency_tests")
SIGNATURE, SIGNATURE_ANSWERS = Table("signature"), Table("signature_answers")
INTEGRATED = Table("integrated_signature")

#: Fewer facts have no mismatched ones to be told from.
_LEAST = 3
#: Answers that lend their tokens to each span, where there are as many draws.
DONORS = 3
#: Steps along the path of integrated gradients.
PATH = 32
#: What tells the parts of gradients apart.
PARTS = ("by", "scope", "condition", "draw", "unit", "layer", "index")


def told_twice(case: Case, step: str = "consistency") -> dict[tuple[str, str], pandas.DataFrame]:
    """For each two tasks that tell the same facts those of them that are drawn."""
    grouped = {name: task for name, task in case.named(step).items() if task.provenance.get("grouped")}
    found = {
        (one, other): facts_in_common(grouped[one], grouped[other], case.count(step), seed=case.settings.seed)
        for one, other in combinations(grouped, 2)
    }
    return {names: facts for names, facts in found.items() if len(facts) >= _LEAST}


def _no_facts(case: Case) -> str | None:
    return None if told_twice(case) else "no two tasks tell three facts of the same groups"


@step(GRADIENTS, GRADIENT_PAIRS, REPRESENTATIONS, REPRESENTATION_PAIRS, TESTS, needs=[MASKS], lacking=_no_facts)
def consistency(case: Case, masks: Mapping[str, ParameterMask]) -> tuple[pandas.DataFrame, ...]:
    """Compare the gradients and activations of tasks that tell the same facts."""
    found: list[list[pandas.DataFrame]] = [[] for _ in range(4)]
    settings, named = case.settings, told_twice(case)
    controlled = controlled_masks(masks, settings.draws, settings.seed)
    for name, other in track(named, "consistency", len(named), "pair of tasks"):
        about, count = {"task": name, "other": other}, case.count("consistency")
        one, two = pair_facts(case.tasks[name], case.tasks[other], count, seed=settings.seed)
        spans = ["last", *_common_spans(one, two)[:1]]
        tables = [
            *_gradients(case, one, two, controlled),
            representation_consistency(case.model, one, two, spans=spans, seed=settings.seed),
            representation_consistency(case.model, one, two, spans=spans, per_pair=True),
        ]
        for kept, table in zip(found, tables, strict=True):
            kept.append(table.assign(**about)[[*about, *table]])
    joined = [pandas.concat(tables, ignore_index=True) for tables in found]
    return (*joined, consistency_tests(joined[1], joined[3]))


def controlled_masks(
    masks: Mapping[str, ParameterMask], draws: int, seed: int
) -> dict[tuple[str, str, int], ParameterMask]:
    """Scope, condition and draw → the shared parameters, and random ones outside them."""
    found = {}
    for scope, mask in masks.items():
        if not mask.size:
            continue
        found[scope, "shared", 0] = mask
        for draw in range(draws):
            thinned, random = mask.control(f"{seed}/{draw}")
            if thinned is not mask:
                found[scope, "shared_thinned", draw] = thinned
            found[scope, "random", draw] = random
    return found


def _gradients(
    case: Case, one: Task, two: Task, masks: Mapping[tuple[str, str, int], ParameterMask]
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Means over pairs, and a row for each fact."""
    by_name = {f"{scope} {condition} {draw}": mask for (scope, condition, draw), mask in masks.items()}
    by = ("all", "layer", "component")
    found = gradient_consistency(case.model, one, two, by=by, mask=by_name or None)
    facts = one.answers[[name for name in ("example", "attribute") if name in one.answers]]
    means = [_named(found.means(name), name) for name in found.cosines]
    pairs = [_named(found.by_example(name), name).merge(facts, on="example") for name in found.cosines]
    return pandas.concat(means, ignore_index=True), pandas.concat(pairs, ignore_index=True)


def _named(table: pandas.DataFrame, by: str) -> pandas.DataFrame:
    """With the columns that tell parts apart; of all outside a mask only that outside the shared parameters."""
    if by != "mask":
        told = table.assign(by=by, scope="", condition="all", draw=0)
    else:
        words = table["unit"].str.split(" ", expand=True)
        told = table.assign(by=by, scope=words[1], condition=words[2], draw=words[3].astype(int))
        outside = words[0] == "outside"
        told = told[~outside | (told["condition"] == "shared")]
        told.loc[outside, "condition"] = "rest"
        told = told.assign(unit=told["condition"])
    return told[[*PARTS, *(name for name in table if name not in PARTS)]]


def _common_spans(one: Task, two: Task) -> list[str]:
    """The spans that both tasks have before at least three of their answers."""
    found = []
    for span in one.spans:
        if span in two.spans:
            there = [
                (task.spans[span] & (torch.arange(task.tokens.shape[1]) < _starts(task)[:, None])).any(1)
                for task in (one, two)
            ]
            if int((there[0] & there[1]).sum()) >= _LEAST:
                found.append(span)
    return found


def _starts(task: Task) -> torch.Tensor:
    return torch.as_tensor(task.answers["start"].to_numpy(copy=True))


# what is tested


def masked_cosines(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """For each pair of tasks, scope and fact the matched cosine inside the shared parameters and inside random ones.

    Args:
        pairs: the table ``gradient_consistency_pairs``.

    Returns:
        ``task``, ``other``, ``scope``, ``group``, ``example``, ``attribute`` if there is one; ``inside`` (the shared
        parameters, thinned as the random ones had to be) and ``random``, means over draws; ``rest``: all outside.
    """
    rows = pairs[(pairs["by"] == "mask") & (pairs["kind"] == "matched")]
    names = [name for name in ("task", "other", "scope", "group", "example", "attribute") if name in rows]
    wide = rows.pivot_table(index=names, columns="condition", values="cosine", sort=False, dropna=True)
    inside = wide["shared"]
    if "shared_thinned" in wide:
        inside = wide["shared_thinned"].fillna(inside)
    table = wide.assign(inside=inside)[["inside", "random", "rest"]].rename_axis(columns=None)
    return table.dropna().reset_index()


def consistency_tests(gradients: pandas.DataFrame, representations: pandas.DataFrame) -> pandas.DataFrame:
    """What is compared fact by fact: paired differences with intervals and tests by group.

    Args:
        gradients: the table ``gradient_consistency_pairs``.
        representations: the table ``representation_consistency_pairs``.

    Returns:
        One row for each comparison: ``task``, ``other``, ``measure`` (``gradient``, ``inside``, ``representation``,
        ``retrieval``), ``scope`` or ``span``, ``unit``, ``layer``, ``than``: what the mean ``value`` is compared with,
        whose mean is ``control``; ``difference``, ``low``, ``high``, ``p`` and, corrected by Benjamini–Hochberg over
        the table, ``q``; the number of ``facts``. Where a side is drawn, interval and p-value also take into account
        how far single draws lie apart (NaN for a single one).
    """
    rows = [*_matched_less_mismatched(gradients, representations), *_inside_less_random(gradients)]
    table = pandas.DataFrame(rows)
    return table.assign(q=corrected(table["p"].to_numpy(), "bh"))


def _matched_less_mismatched(
    gradients: pandas.DataFrame, representations: pandas.DataFrame
) -> Iterator[dict[str, Any]]:
    parts = gradients[gradients["by"] != "mask"].assign(measure="gradient", span="")
    together = pandas.concat([parts, representations.assign(measure="representation")], ignore_index=True)
    keys = ["task", "other", "measure", "span", "unit", "layer"]
    for key, part in together.groupby(keys, sort=False):
        about = dict(zip(keys, key, strict=True)) | {"scope": ""}
        cosines = part.pivot(index=["group", "example"], columns="kind", values="cosine")
        wanted = [kind for kind in cosines if kind != "matched"]
        for kind in wanted if about["unit"] == "all" else [mismatched_kind(wanted)]:
            if kind in cosines:
                yield about | {"than": kind, **_tested(cosines, "matched", str(kind))}
        if about["measure"] == "representation":
            matched = part[part["kind"] == "matched"].set_index(["group", "example"])
            yield about | {
                "measure": "retrieval",
                "than": "chance",
                **_tested(matched, "retrieved", "chance", "bounded_difference"),
            }


def _inside_less_random(gradients: pandas.DataFrame) -> Iterator[dict[str, Any]]:
    if not (gradients["by"] == "mask").any():
        return
    keys = ["task", "other", "scope"]
    rows = gradients[(gradients["by"] == "mask") & (gradients["kind"] == "matched")]
    by_draw = dict(list(rows.groupby(keys, sort=False)))
    for key, part in masked_cosines(gradients).groupby(keys, sort=False):
        about = dict(zip(keys, key, strict=True)) | {"measure": "inside", "span": "", "unit": "shared", "layer": -1}
        random, apart = of_draws(by_draw[key], "cosine")
        masks = [one - beyond for one, beyond in zip(random, apart, strict=True)]
        # all outside is not drawn, but the mask is where it is thinned
        thinned = masks if (by_draw[key]["condition"] == "shared_thinned").any() else None
        for than, draws in (("random", apart), ("rest", thinned)):
            tested = _tested(part.set_index(["group", "example"]), "inside", than, draws=draws)
            yield about | {"than": than, **tested}


def _tested(
    table: pandas.DataFrame, one: str, other: str, kind: Kind = "real", draws: Sequence[float] | None = None
) -> dict[str, Any]:
    known = table[[one, other]].dropna()
    if known.empty:
        return {"value": float("nan"), "control": float("nan"), "difference": float("nan"), "p": float("nan")}
    sides = known[one].to_numpy(float), known[other].to_numpy(float)
    found = paired(*sides, known.index.get_level_values("group").to_numpy(), kind=kind)
    if draws is not None:
        found = beyond_draws(found, draws, answers=len(known))
    return {
        "value": known[one].mean(),
        "control": known[other].mean(),
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p_value,
        "facts": len(known),
    }


# what an answer rests on


def asked_of(case: Case, step: str = "signature") -> dict[str, Task]:
    """The tasks whose signature is taken: examples of facts that another task tells too, or those that are drawn."""
    found = {name: task for name, task in case.of(step).items() if task.spans}
    told: dict[str, pandas.Series[int]] = {}
    for names, facts in told_twice(case, step).items():
        for side, name in enumerate(names):
            told.setdefault(name, facts[f"example_{side}"])
    return found | {name: case.tasks[name].select(sorted({*told[name]})) for name in found if name in told}


def _no_spans(case: Case) -> str | None:
    return None if asked_of(case) else "no task has spans"


@step(SIGNATURE, SIGNATURE_ANSWERS, lacking=_no_spans)
def signature(case: Case) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Replace each span of the tasks, and see what the answers rest on."""
    means, answers = [], []
    for name, task in asked_of(case).items():
        found = input_signature(
            case.model,
            task,
            list(task.spans),
            per_answer=True,
            draws=min(case.settings.draws, DONORS),
            seed=case.settings.seed,
        )
        shares = answer_shares(found)
        if shares.empty:
            continue  # for want of donors: such a task has no rows
        means.append(signature_means(found).assign(task=name))
        keys = ["example", "start", "span"]
        named = found.merge(shares[[*keys, "share"]], on=keys, how="left")
        answers.append(named[[one for one in _OF_ANSWERS if one in named]].assign(task=name))
    if not means:
        return pandas.DataFrame(), pandas.DataFrame()
    return pandas.concat(means, ignore_index=True), pandas.concat(answers, ignore_index=True)


def _no_path(case: Case) -> str | None:
    if find_spec("captum") is None:
        return "the package captum is not there: install fact-circuits[attributions]"
    return None if asked_of(case, "integrate") else "no task has spans"


@step(INTEGRATED, lacking=_no_path)
def integrate(case: Case) -> tuple[pandas.DataFrame]:
    """Take integrated gradients of the tasks' answers, beside what replacing spans says."""
    means = [
        input_signature(case.model, task, list(task.spans), method="integrated_gradients", steps=PATH).assign(task=name)
        for name, task in asked_of(case, "integrate").items()
    ]
    return (pandas.concat(means, ignore_index=True),)


_OF_ANSWERS = (
    "example", "group", "attribute", "start", "place", "log_prob", "span", "tokens", "effect", "donors", "share",
)  # fmt: skip
