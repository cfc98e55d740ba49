"""What the paper's second version claims: formats that agree inside, and answers that rest on subject and relation.

Each claim is compared fact by fact, of the same people in both models; how a verdict is found stands in
`circuits.verdicts`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas

from circuits.analysis.compared_consistency import excess
from circuits.analysis.consistency import masked_cosines
from circuits.consistency.signature import CONTEXT
from circuits.statistics import of_draws
from circuits.study.folder import COMPARED, FULL_RATE
from circuits.verdicts import SMALLEST_COSINE, Finding, compare_answers

Frames = dict[str, pandas.DataFrame]
_OTHERS = (COMPARED[1], FULL_RATE)
#: Cosines lie within −1 and 1, and so do their excesses over mismatched ones, doubled.
_FORM: dict[str, Any] = {"smallest": SMALLEST_COSINE, "most": 4.0, "form": "+.3f"}


def mechanism_findings(
    summary: dict[str, Any], tables: Frames, scopes: dict[str, str]
) -> list[Callable[[float], Finding]]:
    """The claims that a study has come far enough for, each to be asked at a level.

    Args:
        summary: the content of ``summary.json``.
        tables: the study's result tables by name.
        scopes: of shared parameters, with their names for a reader.
    """
    asked: list[Callable[[float], Finding]] = []
    if "consistency" in summary:
        others = [name for name in _OTHERS if name in summary["consistency"]["gradient"]]
        asked += [functools.partial(one, summary, tables, other) for one in (_gradients, _places) for other in others]
        pairs = tables["gradient_consistency_pairs"]
        masked = masked_cosines(pairs[pairs["model"] == "mixed"])
        asked += [
            functools.partial(inside_finding, tables, masked[masked["scope"] == scope], scopes[scope])
            for scope in masked["scope"].unique()
        ]
    if "localisation_facts" in tables:
        asked += [
            functools.partial(localised_finding, tables, scope, scopes[scope], act)
            for scope in scopes
            for act in ("revert", "alone")
            if (tables["localisation_facts"]["scope"] == scope).any()
        ]
    if "mixed" in summary.get("signature", {}):
        others = [name for name in _OTHERS if name in summary["signature"]]
        asked += [functools.partial(_rests, summary, tables, other) for other in others]
    return asked


def _facts(table: pandas.DataFrame, value: str) -> "pandas.Series[float]":
    """One number for each fact."""
    return table.groupby(["group", "example", "attribute"])[value].mean()


def _compared(
    one: "pandas.Series[float]", other: "pandas.Series[float]", level: float, draws: Sequence[float] | None = None
) -> dict[str, Any]:
    # what is nothing in one model has no cosine there
    one, other = one.align(other, join="inner")
    return compare_answers(one, other, level, kind="real", smallest=SMALLEST_COSINE, draws=draws)


def _gradients(summary: dict[str, Any], tables: Frames, other: str, level: float) -> Finding:
    pairs = tables["gradient_consistency_pairs"]
    above = excess(pairs[pairs["by"] == "all"])
    sides = [_facts(above[above["model"] == model], "cosine") for model in ("mixed", other)]
    numbers = [summary["consistency"]["gradient"][model] for model in ("mixed", other)]
    return Finding(
        "v2",
        "The gradients of a fact's two formats (BIO and QA-OOD) agree more in the mixed model than after "
        f"{_named(other)}, above those of different facts",
        f"cosine {_both(numbers, 'matched')} on {len(sides[0])} facts",
        f"of the same attribute of other people: {_both(numbers, 'mismatched', ' and ')}",
        **_FORM,
        **_compared(sides[0], sides[1], level),
    )


def _places(summary: dict[str, Any], tables: Frames, other: str, level: float) -> Finding:
    pairs = tables["representation_consistency_pairs"]
    above = excess(pairs[pairs["span"] == "last"])
    sides = [_facts(above[above["model"] == model], "cosine") for model in ("mixed", other)]
    numbers = [summary["consistency"]["representation"][model] for model in ("mixed", other)]
    retrieved = " against ".join(f"{one['retrieval']:.1%}" for one in numbers)
    return Finding(
        "v2",
        "The activations of a fact's two formats at the token that predicts the answer agree more in the mixed model "
        f"than after {_named(other)}, above those of different facts (mean over layers)",
        f"cosine {_both(numbers, 'matched')}; {retrieved} of the facts are retrieved",
        f"of the same attribute of other people: {_both(numbers, 'mismatched', ' and ')}; chance would retrieve "
        f"{numbers[0]['chance']:.1%}",
        **_FORM,
        **_compared(sides[0], sides[1], level),
    )


def inside_finding(
    tables: Frames, masked: pandas.DataFrame, scope: str, level: float, of: str = "the shared parameters"
) -> Finding:
    """Whether gradients agree more inside a set of parameters than outside it.

    Args:
        tables: with ``gradient_consistency``.
        masked: the facts of one scope, as `circuits.analysis.consistency.masked_cosines` gives them.
        scope: its name for a reader.
        level: of the interval.
        of: what the parameters are, for a reader.
    """
    table = tables["gradient_consistency"]
    rows = table[(table["model"] == "mixed") & (table["scope"] == masked["scope"].iloc[0])]
    rows = rows[rows["kind"] == "matched"]
    draws, apart = of_draws(rows, "mean")
    inside, random = (_facts(masked, name) for name in ("inside", "random"))
    thinned = thinned_in_words(draws, apart, ".3f") if (rows["condition"] == "shared_thinned").any() else ""
    return Finding(
        "v2",
        f"The mixed model's gradients of both formats agree more inside {of} than in as many random ones outside them "
        f"({scope})",
        f"cosine {inside.mean():.3f}{thinned} against {random.mean():.3f} ({len(draws)} draws, {min(draws):.3f} to "
        f"{max(draws):.3f})",
        f"all parameters outside them: {masked['rest'].mean():.3f}",
        **_FORM,
        **_compared(inside, random, level, apart),
    )


def localised_finding(
    tables: Frames, scope: str, named: str, act: str, level: float, of: str = "the shared parameters"
) -> Finding:
    """Whether the mixed model's agreement about facts hangs on a set of parameters more than on random ones.

    Args:
        tables: with ``localisation_facts`` and ``localisation``.
        scope: of the parameters.
        named: its name for a reader.
        act: ``revert``: it falls more without them; ``alone``: more of it stays with them alone.
        level: of the interval.
        of: what the parameters are, for a reader.
    """
    facts, means = (
        table[(table["model"] == "mixed") & table["scope"].isin([scope, ""])]
        for table in (tables["localisation_facts"], tables["localisation"])
    )
    acted = facts[facts["act"] == act]
    mask = "shared_thinned" if (acted["condition"] == "shared_thinned").any() else "shared"
    sides = {name: _facts(acted[acted["condition"] == name], "cosine") for name in (mask, "random")}
    draws, apart = of_draws(acted, "cosine")
    at = means.set_index(["act", "condition"])
    claims = {
        "revert": f"Reverting {of} lowers the agreement of both formats' activations more than reverting as many "
        f"random ones outside them ({named})",
        "alone": f"With {of} alone trained, both formats' activations agree more than with as many random ones "
        f"({named})",
    }
    recalled = {
        split: [at.loc[(act, condition), measure] for condition in (mask, "random")]
        for split, measure in (("BIO", "task_exact_match"), ("QA-OOD", "exact_match"))
    }
    order = (sides["random"], sides[mask]) if act == "revert" else (sides[mask], sides["random"])
    return Finding(
        "v2",
        claims[act],
        f"cosine {sides[mask].mean():.3f}{'' if mask == 'shared' else thinned_in_words(draws, apart, '.3f')} against "
        f"{sides['random'].mean():.3f} ({len(draws)} draws, {min(draws):.3f} to {max(draws):.3f})",
        f"the whole model: {at.loc[('none', ''), 'cosine']:.3f}, all reverted: {at.loc[('all', ''), 'cosine']:.3f}; "
        + "; ".join(f"{split} {one:.1%} against {other:.1%}" for split, (one, other) in recalled.items()),
        **_FORM,
        **_compared(*order, level, apart),
    )


def _rests(summary: dict[str, Any], tables: Frames, other: str, level: float) -> Finding:
    table = tables["signature_answers"]
    rows = table[(table["task"] == "bio") & (table["span"] != CONTEXT)].dropna(subset="share")
    keys = ["model", "group", "example", "attribute"]
    shares = rows.groupby(keys)["share"].sum().reset_index()
    sides = [_facts(shares[shares["model"] == model], "share") for model in ("mixed", other)]
    numbers = [summary["signature"][model] for model in ("mixed", other)]
    nats = [", ".join(f"{span} {value:.2f}" for span, value in one["nats"].items()) for one in numbers]
    return Finding(
        "v2",
        "In BIO the mixed model's answers rest more on subject and relation, and less on the rest of the context, than "
        f"after {_named(other)}",
        f"{' against '.join(f'{side.mean():.1%}' for side in sides)} of what replacing spans costs, on {len(sides[0])} "
        "answers",
        f"in nats: {' against '.join(nats)}",
        **(_FORM | {"most": math.inf, "form": "+.1%"}),
        **_compared(sides[0], sides[1], level),
    )


def thinned_in_words(random: Sequence[float], apart: Sequence[float], form: str) -> str:
    """That the mask was thinned for each draw as its control was, and what came out, from `of_draws`."""
    masks = [one - beyond for one, beyond in zip(random, apart, strict=True)]
    return f" (thinned as their control, {min(masks):{form}} to {max(masks):{form}})"


def _named(model: str) -> str:
    return "two-stage training with " + ("the full second rate" if model == FULL_RATE else "a small second rate")


def _both(numbers: list[dict[str, Any]], name: str, between: str = " against ") -> str:
    return between.join(f"{round(one[name], 3) + 0.0:.3f}" for one in numbers)
