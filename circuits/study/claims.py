"""What the paper claims, and what a study found of it: one number against another, beside its control.

Sizes (of shared sets and grafts) are one number for each run: they are compared over seeds or not at all. How a verdict
is found stands in `circuits.verdicts`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas

from circuits.analysis.consistency import masked_cosines
from circuits.figures.rankings import RANKING_LABELS
from circuits.statistics import of_draws
from circuits.study.folder import COMPARED
from circuits.study.mechanism_claims import inside_finding, localised_finding, mechanism_findings, thinned_in_words
from circuits.verdicts import (
    ERROR,
    ONE_RUN,
    SMALLEST_CORRELATION,
    SMALLEST_GINI,
    SMALLEST_SIZE,
    VERDICTS,
    Finding,
    compare_answers,
    corrected_together,
    spearman,
)

_TASKS = {"qa_id": "QA-ID", "qa_ood": "QA-OOD"}
_KINDS = ("head", "neuron")
#: The second definition of shared parameters (docs/method.md, section 2).
UPDATED = "the parameters updated by both formats"
SCOPE_LABELS = {"global": "top of all parameters", "tensor": "top of each tensor"}


def formatted(value: float | int | None, form: str) -> str:
    """A number, or that there is none."""
    return "none" if value is None else f"{value:{form}}"


def findings(summary: dict[str, Any], tables: dict[str, pandas.DataFrame]) -> list[Finding]:
    """Every claim of the paper with what a study of one seed found of it, as far as it has come.

    Args:
        summary: the content of ``summary.json``.
        tables: the study's result tables by name.
    """
    asked: list[Callable[[float], Finding]] = [
        functools.partial(_recall, summary, tables, other) for other in ("two_stage_gentle", "two_stage")
    ]
    scopes = _scopes(tables)
    if "shared" in summary:
        asked += [functools.partial(one, tables, scope) for scope in scopes for one in (_sharing, _centralisation)]
    if "ablation" in summary:
        asked += [
            functools.partial(one, tables, scope, task)
            for scope in scopes
            for task in _TASKS
            for one in (_costs_more, _costs_more_than_random)
        ]
    if "graft" in summary:
        asked.append(functools.partial(_grafting, summary))
    if "rankings" in summary:
        rankings = [name for name in _RANKED if (tables["ranking_areas"]["metric"] == name).any()]
        asked += [
            functools.partial(_curve, tables, kind, name, *row)
            for name in rankings
            for row in _CURVES
            for kind in _KINDS
        ]
        asked += [functools.partial(_agreement, tables, name) for name in rankings]
    asked += mechanism_findings(summary, tables, SCOPE_LABELS)
    if "updated" in summary:
        asked += _updated(tables)
    return corrected_together([one(1 - ERROR / len(asked)) for one in asked])


def _scopes(tables: dict[str, pandas.DataFrame]) -> list[str]:
    return [str(scope) for scope in tables["shared"]["scope"].unique()] if "shared" in tables else []


# comparing question by question


def _by_question(answers: pandas.DataFrame, value: str = "exact_match", **chosen: str) -> "pandas.Series[float]":
    """One number for each question, the mean over draws."""
    for name, wanted in chosen.items():
        answers = answers[answers[name] == wanted]
    return answers.groupby(["group", "example", "attribute"])[value].mean()


# the claims


def _recall(summary: dict[str, Any], tables: dict[str, pandas.DataFrame], other: str, level: float) -> Finding:
    mixed, two = summary["accuracy"]["mixed"], summary["accuracy"][other]
    sides = [_by_question(tables["answers"], model=model, split="qa_ood") for model in ("mixed", other)]
    full, gentle = (
        of["bio_after_stage_1"] - of["bio"]
        for of in (summary["accuracy"][name] for name in ("two_stage", "two_stage_gentle"))
    )
    forgets = ", which forgets more" if full > max(0.0, gentle) else ""
    claims = {
        "two_stage_gentle": "Mixed training recalls held-out questions, two-stage training with a small second rate "
        "does not (QA-OOD; the paper: 88.6 % against 9.7 %)",
        "two_stage": "Mixed training also recalls more of them than two-stage training with the full second rate"
        f"{forgets} (QA-OOD)",
    }
    return Finding(
        "1a",
        claims[other],
        f"{mixed['qa_ood']:.1%} against {two['qa_ood']:.1%} of {len(sides[0])} questions",
        f"BIO of two-stage: {two['bio_after_stage_1']:.1%} after the first stage, {two['bio']:.1%} after the second",
        **compare_answers(sides[0], sides[1], level, kind="binary_difference"),
    )


def _relative(one: float, other: float) -> float:
    """How much larger one size is than another, as a share of their mean; 0 if both are nothing."""
    return 2 * (one - other) / (one + other) if one + other else 0.0


def _shared(tables: dict[str, pandas.DataFrame], scope: str, name: str = "shared") -> list[dict[str, Any]]:
    """The numbers of sharing of the two models that are compared."""
    rows = tables[name]
    by_model = rows[rows["scope"] == scope].set_index("model")
    return [by_model.loc[model].to_dict() for model in COMPARED]


def _sharing(tables: dict[str, pandas.DataFrame], scope: str, _level: float) -> Finding:
    mixed, two = _shared(tables, scope)
    return Finding(
        "2a",
        f"The mixed model shares more parameters between BIO and QA ({SCOPE_LABELS[scope]})",
        f"{mixed['size']:,} against {two['size']:,} of {mixed['influenced']:,}",
        f"one task's set shuffled within each tensor: {mixed['permuted']:,.0f} and {two['permuted']:,.0f}; "
        f"independent sets: {mixed['chance']:,.0f}",
        _relative(mixed["size"], two["size"]),
        smallest=SMALLEST_SIZE,
        most=2.0,
    )


def _updated(tables: dict[str, pandas.DataFrame]) -> list[Callable[[float], Finding]]:
    """The claims about shared parameters, of those that both formats updated along training."""
    # the same tables, as made with these parameters
    own = {name.removeprefix("updated_"): table for name, table in tables.items() if name.startswith("updated_")}
    asked: list[Callable[[float], Finding]] = []
    for scope in own["ablation"]["scope"].unique():
        asked.append(functools.partial(_more_updated, tables, scope))
        if len(of_scope := own["ablation_answers"].query("scope == @scope and condition == 'random'")):
            told = of_scope["task"].unique()
            asked += [
                functools.partial(_costs_more_than_random, own, scope, task, of=UPDATED)
                for task in _TASKS
                if task in told
            ]
    asked += [
        functools.partial(localised_finding, own, scope, SCOPE_LABELS[scope], act, of=UPDATED)
        for scope in own["localisation"]["scope"].unique()
        if scope
        for act in ("revert", "alone")
    ]
    pairs = own["gradient_consistency_pairs"]
    masked = masked_cosines(pairs[pairs["model"] == "mixed"])
    asked += [
        functools.partial(inside_finding, own, masked[masked["scope"] == scope], SCOPE_LABELS[scope], of=UPDATED)
        for scope in masked["scope"].unique()
    ]
    return asked


def _more_updated(tables: dict[str, pandas.DataFrame], scope: str, _level: float) -> Finding:
    mixed, two = _shared(tables, scope, "updated")
    return Finding(
        "v2",
        f"In mixed training both formats update more parameters, by their gradients along training "
        f"({SCOPE_LABELS[scope]})",
        f"{mixed['size']:,} against {two['size']:,} of {mixed['influenced']:,}",
        f"one task's set shuffled within each tensor: {mixed['permuted']:,.0f} and {two['permuted']:,.0f}; also shared "
        f"by the gradients after training: {mixed['both_with_shared']:,} and {two['both_with_shared']:,}",
        _relative(mixed["size"], two["size"]),
        smallest=SMALLEST_SIZE,
        most=2.0,
    )


def _centralisation(tables: dict[str, pandas.DataFrame], scope: str, _level: float) -> Finding:
    mixed, two = _shared(tables, scope)
    return Finding(
        "2a",
        "Its shared parameters are more centralised than random sets of the same size, compared with those of the "
        f"two-stage model (Gini over heads; {SCOPE_LABELS[scope]})",
        f"{mixed['gini']:.3f} against {two['gini']:.3f}; the top tenth of heads holds {mixed['top_tenth']:.1%} "
        f"against {two['top_tenth']:.1%}",
        f"random sets: {mixed['random_gini']:.3f} and {two['random_gini']:.3f}; shuffled within each tensor: "
        f"{mixed['permuted_gini']:.3f} and {two['permuted_gini']:.3f}",
        (mixed["gini"] - mixed["random_gini"]) - (two["gini"] - two["random_gini"]),
        smallest=SMALLEST_GINI,
        most=2.0,
        form="+.3f",
    )


def _ablated(
    tables: dict[str, pandas.DataFrame], scope: str, task: str, model: str
) -> tuple[dict[str, "pandas.Series[float]"], list[float], list[float]]:
    """The answers of a model under each condition, and of each draw the accuracy and what it lies above the mask's."""
    answers = tables["ablation_answers"]
    answers = answers[(answers["scope"] == scope) & (answers["task"] == task) & (answers["model"] == model)]
    return {str(name): _by_question(rows) for name, rows in answers.groupby("condition")}, *of_draws(
        answers, "exact_match"
    )


def _mask_of(by_condition: dict[str, Any]) -> str:
    """The condition that random draws are the control of: the mask, thinned where they had no room beside it."""
    return "shared_thinned" if "shared_thinned" in by_condition else "shared"


def _costs_more(tables: dict[str, pandas.DataFrame], scope: str, task: str, level: float) -> Finding:
    mixed, two = (_ablated(tables, scope, task, model)[0] for model in COMPARED)
    drops = [side["none"] - side["shared"] for side in (mixed, two)]
    return Finding(
        "2b",
        f"Reverting the shared parameters costs the mixed model more ({_TASKS[task]}; {SCOPE_LABELS[scope]})",
        " against ".join(f"{side['none'].mean():.1%} → {side['shared'].mean():.1%}" for side in (mixed, two)),
        "a model can lose no more than it has; as many random parameters outside the mask: "
        + " and ".join(_control_in_words(side) for side in (mixed, two)),
        most=2.0,
        **compare_answers(drops[0], drops[1], level, most=2.0),
    )


def _control_in_words(side: dict[str, "pandas.Series[float]"]) -> str:
    thinned = f" (the mask thinned alike: {side['shared_thinned'].mean():.1%})" if "shared_thinned" in side else ""
    return f"{side['random'].mean():.1%}{thinned}" if "random" in side else "none"


def _costs_more_than_random(
    tables: dict[str, pandas.DataFrame], scope: str, task: str, level: float, of: str = "the shared parameters"
) -> Finding:
    mixed, draws, apart = _ablated(tables, scope, task, "mixed")
    mask = mixed[_mask_of(mixed)]
    thinned = thinned_in_words(draws, apart, ".1%") if "shared_thinned" in mixed else ""
    return Finding(
        "v2" if of == UPDATED else "2b",
        f"Reverting {of} costs the mixed model more than reverting random ones outside them ({_TASKS[task]}; "
        f"{SCOPE_LABELS[scope]})",
        f"{mask.mean():.1%}{thinned} against {mixed['random'].mean():.1%} ({len(draws)} draws, {min(draws):.1%} to "
        f"{max(draws):.1%})",
        f"the whole model: {mixed['none'].mean():.1%}{_overlap(tables, scope, 'mixed')}",
        **compare_answers(mixed["random"], mask, level, draws=apart),
    )


def _grafting(summary: dict[str, Any], _level: float) -> Finding:
    mixed, two, keep = *(summary["graft"][name] for name in COMPARED), summary["settings"]["keep"]
    sizes = [mixed["size"], two["size"]]
    return Finding(
        "3b",
        f"The mixed model needs fewer grafted parameters to keep {keep:.0%} of QA-ID",
        f"{formatted(mixed['size'], ',')} ({formatted(mixed['fraction'], '.2%')}) against "
        f"{formatted(two['size'], ',')} ({formatted(two['fraction'], '.2%')})",
        f"exact match of these grafts alone on QA-ID {formatted(mixed['splits']['qa_id'], '.1%')} and "
        f"{formatted(two['splits']['qa_id'], '.1%')}, on QA-OOD {formatted(mixed['splits']['qa_ood'], '.1%')} and "
        f"{formatted(two['splits']['qa_ood'], '.1%')}",
        math.nan if None in sizes else _relative(two["size"], mixed["size"]),
        smallest=SMALLEST_SIZE,
        most=2.0,
        needed="a model that learned no question has nothing to graft" if None in sizes else ONE_RUN,
    )


#: The rankings by Shared Size: with the shared sets of all parameters together and of each tensor.
_RANKED = ("shared_size", "shared_size_per_tensor")
#: Figure, condition of the curve, whether a larger area is better, and the claim.
_CURVES = (
    ("4a", "sufficient", True, "The mixed model's top {kind}s by {ranking} are enough sooner than random ones"),
    (
        "4b",
        "revert",
        False,
        "Without its top {kind}s by {ranking} the mixed model breaks sooner than without random ones",
    ),
)


def _curve(
    tables: dict[str, pandas.DataFrame],
    kind: str,
    ranking: str,
    figure: str,
    condition: str,
    larger: bool,
    claim: str,
    level: float,
) -> Finding:
    areas = tables["ranking_areas"]
    areas = areas[
        (areas["model"] == "mixed")
        & (areas["kind"] == kind)
        & (areas["condition"] == condition)
        & (areas["task"] == "qa_id")
    ]
    one, random = (_by_question(areas, "area", metric=metric) for metric in (ranking, "random"))
    draws = areas[areas["metric"] == "random"].groupby("draw")["area"].mean().tolist()
    ranked = areas.groupby("metric", sort=False)["area"].mean().sort_values(ascending=not larger, kind="stable")
    best = ", ".join(f"{RANKING_LABELS[str(name)]} {value:.3f}" for name, value in ranked.head(2).items())
    place = 1 + list(ranked.index).index(ranking)
    return Finding(
        figure,
        f"{claim.format(kind=kind, ranking=RANKING_LABELS[ranking])} (area under QA-ID)",
        f"{one.mean():.3f} against {random.mean():.3f} on {len(one)} questions ({len(draws)} random rankings: "
        f"{min(draws):.3f} to {max(draws):.3f})",
        f"number {place} of {len(ranked)} rankings; the best are {best}",
        form="+.3f",
        **compare_answers(*((one, random) if larger else (random, one)), level, draws=draws),
    )


def _agreement(tables: dict[str, pandas.DataFrame], ranking: str, level: float) -> Finding:
    rows = tables["rankings"]
    rows = rows[(rows["model"] == "mixed") & (rows["kind"] == "head") & (rows["draw"] == 0)]
    scores = rows.pivot(index="unit", columns="metric", values="score")
    with_ablation = scores.corr(method="spearman")["ablation"].drop(["ablation", "random"])
    rivals = ", ".join(
        f"{RANKING_LABELS[str(name)]} {value:.2f}"
        for name, value in with_ablation.drop(list(_RANKED), errors="ignore").sort_values(ascending=False).items()
        if value == value
    )
    found, low, high, p_value = spearman(scores[ranking].to_numpy(), scores["ablation"].to_numpy(), level)
    return Finding(
        "4c",
        f"The mixed model's heads that rank higher by {RANKING_LABELS[ranking]} are those whose ablation costs more "
        "(Spearman)",
        f"{found:.2f} over {len(scores)} heads",
        f"with the cost of ablation: {rivals}",
        found,
        low,
        high,
        p_value,
        smallest=SMALLEST_CORRELATION,
        form="+.2f",
        needed="a model has no more heads than these: further seeds could tell",
    )


def claims_table(found: Sequence[Finding]) -> pandas.DataFrame:
    """Each claim of the paper, the numbers here, their control, the difference, and whether the claim holds."""
    return pandas.DataFrame(
        [
            (
                one.figure,
                one.claim,
                one.here,
                one.control,
                _in_words(one),
                "" if math.isnan(one.p_value) else "< 0.0001" if one.p_value < 1e-4 else f"{one.p_value:.2g}",
                one.verdict + (f": {one.needed}" if one.verdict == VERDICTS[2] else ""),
            )
            for one in found
        ],
        columns=["Fig.", "claim", "here", "control", "difference", "p", "verdict"],
    )


def _in_words(one: Finding) -> str:
    """The difference and its interval."""
    if math.isnan(one.difference):
        return ""
    interval = "" if math.isnan(one.low) else f" ({one.low:{one.form}} to {one.high:{one.form}})"
    return f"{one.difference:{one.form}}{interval}" + (f"; by seed {one.by_seed}" if one.by_seed else "")


def _overlap(tables: dict[str, pandas.DataFrame], scope: str, model: str) -> str:
    """How much of the mask its random controls hold, in words."""
    rows = tables["ablation"]
    rows = rows[(rows["scope"] == scope) & (rows["model"] == model) & (rows["condition"] == "random")]
    return f"; {rows['overlap'].max():,.0f} of the parameters of the random sets are the mask's"
