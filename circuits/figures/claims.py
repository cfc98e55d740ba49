"""What the paper claims, and what a study found of it: one number against another, beside its control.

1. Every claim is a difference between two numbers, positive if it is as the paper says.
2. Beside it stands a margin: what chance could do to the difference. Accuracies over n answers have a standard error of
   √(p (1 − p) / n), areas under their curves at most that of their mean. The two that are compared were asked the same
   questions, which would make the error of their difference smaller: the margin is rather too wide. Random masks and
   rankings vary from draw to draw besides. Sizes have no interval in one run, and count as different from a twentieth
   of the larger one on.
3. A difference above the margin: the claim holds here. Below minus the margin: it does not. Between: it cannot be told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from circuits.figures.rankings import RANKING_LABELS

_Z = 1.96
SIZE_MARGIN = 0.05
VERDICTS = ("holds here", "does not hold here", "cannot be told")
#: What the last verdict means, for a reader.
CANNOT_BE_TOLD = (
    "Cannot be told: the numbers lie no further apart than chance could have brought them if each had been measured on "
    "questions of its own; as they share their questions, that asks rather too much. Random masks and rankings have "
    f"the spread of their draws; sizes have no interval in one run and count as different from {SIZE_MARGIN:.0%} on."
)
_TASKS = {"qa_id": "QA-ID", "qa_ood": "QA-OOD"}
_KINDS = ("head", "neuron")


@dataclass(frozen=True)
class Finding:
    """A claim of the paper and what was found of it.

    Attributes:
        figure: of the paper.
        claim: what the paper says.
        here: the numbers.
        control: what they are to be read against.
        difference: how far the numbers lie apart, positive in the paper's direction; NaN if they could not be had.
        margin: what chance could do to the difference.
    """

    figure: str
    claim: str
    here: str
    control: str
    difference: float
    margin: float

    @property
    def verdict(self) -> str:
        """Whether the claim holds here.

        Example:
            >>> [Finding("1a", "", "", "", difference, 0.1).verdict for difference in (0.3, -0.3, 0.05)]
            ['holds here', 'does not hold here', 'cannot be told']
        """
        if not abs(self.difference) > self.margin:
            return "cannot be told"
        return "holds here" if self.difference > 0 else "does not hold here"


def _accuracy_margin(counts: int, *accuracies: float) -> float:
    """95 % of sums and differences of independent accuracies lie within this of their mean."""
    return _Z * math.sqrt(sum(accuracy * (1 - accuracy) / counts for accuracy in accuracies))


def _draw_margin(low: float, high: float, draws: int) -> float:
    """95 % of single draws lie within this of the mean of several, from the 95 % interval of that mean."""
    return (high - low) / 2 * math.sqrt(draws + 1)


def _sizes(one: float | int | None, other: float | int | None) -> tuple[float, float]:
    """How much larger one size is, and the margin."""
    if one is None or other is None:
        return math.nan, 0.0
    return float(one - other), SIZE_MARGIN * max(one, other)


def formatted(value: float | int | None, form: str) -> str:
    """A number, or that there is none."""
    return "none" if value is None else f"{value:{form}}"


def findings(summary: dict[str, Any], tables: dict[str, pandas.DataFrame]) -> list[Finding]:
    """Every claim of the paper with what a study of one seed found of it, as far as it has come.

    Args:
        summary: the content of ``summary.json``.
        tables: the study's result tables by name.
    """
    found = _recall(summary, tables)
    if "shared" in summary:
        found += _sharing(summary)
    if "ablation" in summary:
        found += _ablation(summary, tables)
    if "graft" in summary:
        found.append(_grafting(summary))
    if "rankings" in summary:
        answers = min(summary["settings"]["rank_examples"], _answers(tables, "qa_id"))
        found += [_curve(tables, answers, kind, *row) for row in _CURVES for kind in _KINDS]
        found.append(_agreement(tables))
    return found


def _recall(summary: dict[str, Any], tables: dict[str, pandas.DataFrame]) -> list[Finding]:
    mixed, two, gentle = (summary["accuracy"][name] for name in ("mixed", "two_stage", "two_stage_gentle"))
    answers = _answers(tables, "qa_ood")
    return [
        Finding(
            "1a",
            "Mixed training recalls held-out questions, two-stage training does not (QA-OOD; the paper: 88.6 % against "
            "9.7 %)",
            f"{mixed['qa_ood']:.1%} against {two['qa_ood']:.1%}",
            f"BIO of two-stage: {two['bio_after_stage_1']:.1%} after the first stage, {two['bio']:.1%} after the "
            "second",
            mixed["qa_ood"] - two["qa_ood"],
            _accuracy_margin(answers, mixed["qa_ood"], two["qa_ood"]),
        ),
        Finding(
            "1a",
            "So it does beside a second stage at a small rate, which forgets less: it is not forgetting alone (QA-OOD)",
            f"{mixed['qa_ood']:.1%} against {gentle['qa_ood']:.1%}",
            f"BIO of this one: {gentle['bio']:.1%}",
            mixed["qa_ood"] - gentle["qa_ood"],
            _accuracy_margin(answers, mixed["qa_ood"], gentle["qa_ood"]),
        ),
    ]


def _answers(tables: dict[str, pandas.DataFrame], split: str) -> int:
    accuracy = tables["accuracy"]
    return int(accuracy[accuracy["split"] == split]["answers"].min())


def _sharing(summary: dict[str, Any]) -> list[Finding]:
    mixed, two = (summary["shared"][name] for name in ("mixed", "two_stage"))
    return [
        Finding(
            "2a",
            "The mixed model shares more parameters between BIO and QA",
            f"{mixed['size']:,} against {two['size']:,} of {mixed['influenced']:,}",
            f"one task's set shuffled within each tensor: {mixed['permuted']:,.0f} and {two['permuted']:,.0f}; "
            f"independent sets: {mixed['chance']:,.0f}",
            *_sizes(mixed["size"], two["size"]),
        ),
        Finding(
            "2a",
            "Its shared parameters are more centralised (Gini over heads)",
            f"{mixed['gini']:.3f} against {two['gini']:.3f}; the top tenth of heads holds {mixed['top_tenth']:.1%} "
            f"against {two['top_tenth']:.1%}",
            f"shuffled: {mixed['permuted_gini']:.3f} and {two['permuted_gini']:.3f}",
            *_sizes(mixed["gini"], two["gini"]),
        ),
    ]


def _ablation(summary: dict[str, Any], tables: dict[str, pandas.DataFrame]) -> list[Finding]:
    mixed, two, settings = summary["ablation"]["mixed"], summary["ablation"]["two_stage"], summary["settings"]
    means = tables["ablation"].groupby(["model", "task", "condition"])["log_prob"].mean()
    found = []
    for task, label in _TASKS.items():
        answers = min(settings["trace_examples"], _answers(tables, task))
        before, after, random = (mixed[condition][task] for condition in ("none", "shared", "random"))
        other_before, other_after, other_random = (two[condition][task] for condition in ("none", "shared", "random"))
        found.append(
            Finding(
                "2b",
                f"Reverting the shared parameters costs the mixed model more ({label})",
                f"{before:.1%} → {after:.1%} against {other_before:.1%} → {other_after:.1%}",
                f"as many random ones: {random:.1%} and {other_random:.1%}; log-probability in nats "
                + " against ".join(
                    f"{means[model, task, 'none']:.3f} → {means[model, task, 'shared']:.3f} (random "
                    f"{means[model, task, 'random']:.3f})"
                    for model in ("mixed", "two_stage")
                ),
                (before - after) - (other_before - other_after),
                _accuracy_margin(answers, before, after, other_before, other_after),
            )
        )
        low, high = mixed["random_interval_95"][task]
        found.append(
            Finding(
                "2b",
                f"It costs the mixed model more than reverting random ones ({label})",
                f"{after:.1%} against {random:.1%} ({settings['draws']} draws, {low:.1%} to {high:.1%})",
                f"the whole model: {before:.1%}",
                random - after,
                math.hypot(_draw_margin(low, high, settings["draws"]), _accuracy_margin(answers, after)),
            )
        )
    return found


def _grafting(summary: dict[str, Any]) -> Finding:
    mixed, two, keep = summary["graft"]["mixed"], summary["graft"]["two_stage"], summary["settings"]["keep"]
    difference, margin = _sizes(two["size"], mixed["size"])
    return Finding(
        "3b",
        f"The mixed model needs fewer grafted parameters to keep {keep:.0%} of QA-ID",
        f"{formatted(mixed['size'], ',')} ({formatted(mixed['fraction'], '.2%')}) against "
        f"{formatted(two['size'], ',')} ({formatted(two['fraction'], '.2%')})",
        f"exact match of these grafts alone on QA-ID {formatted(mixed['splits']['qa_id'], '.1%')} and "
        f"{formatted(two['splits']['qa_id'], '.1%')}, on QA-OOD {formatted(mixed['splits']['qa_ood'], '.1%')} and "
        f"{formatted(two['splits']['qa_ood'], '.1%')}",
        difference,
        margin,
    )


#: Figure, condition of the curve, whether a larger area is better, and the claim.
_CURVES = (
    ("4a", "sufficient", True, "The mixed model's top {kind}s by Shared Size are enough sooner than random ones"),
    (
        "4b",
        "revert",
        False,
        "Without its top {kind}s by Shared Size the mixed model breaks sooner than without random ones",
    ),
)


def _curve(
    tables: dict[str, pandas.DataFrame],
    answers: int,
    kind: str,
    figure: str,
    condition: str,
    larger: bool,
    claim: str,
) -> Finding:
    table = tables["ranking_summary"]
    rows = table[
        (table["model"] == "mixed")
        & (table["kind"] == kind)
        & (table["condition"] == condition)
        & (table["task"] == "qa_id")
    ].set_index("metric")
    area, random = float(rows.loc["shared_size", "auc"]), rows.loc["random"]
    drawn = _draw_margin(float(random["auc_low"]), float(random["auc_high"]), int(random["draws"]))
    ranked = rows["auc"].sort_values(ascending=not larger, kind="stable")
    best = ", ".join(f"{RANKING_LABELS[str(name)]} {value:.3f}" for name, value in ranked.head(2).items())
    place = 1 + int((ranked > area).sum() if larger else (ranked < area).sum())
    return Finding(
        figure,
        f"{claim.format(kind=kind)} (area under QA-ID)",
        f"{area:.3f} against {float(random['auc']):.3f} on {answers} questions (single random rankings: ± {drawn:.3f})",
        f"Shared Size is number {place} of {len(ranked)} rankings; the best are {best}",
        area - float(random["auc"]) if larger else float(random["auc"]) - area,
        math.hypot(drawn, _accuracy_margin(answers, area, float(random["auc"]))),
    )


def _agreement(tables: dict[str, pandas.DataFrame]) -> Finding:
    pairs = tables["agreement"]
    pairs = pairs[(pairs["model"] == "mixed") & (pairs["kind"] == "head") & (pairs["metric"] == "ablation")]
    others = pairs.set_index("other")["spearman"].drop("ablation")
    heads = tables["shared_heads"]
    margin = _Z / math.sqrt(int((heads["model"] == "mixed").sum()) - 1)
    rivals = ", ".join(
        f"{RANKING_LABELS[str(name)]} {value:.2f}"
        for name, value in others.drop("shared_size").sort_values(ascending=False).items()
        if value == value
    )
    return Finding(
        "4c",
        "The mixed model's heads with more shared parameters are those whose ablation costs more (Spearman)",
        f"{float(others['shared_size']):.2f} (unrelated rankings: ± {margin:.2f})",
        f"with the cost of ablation: {rivals}",
        float(others["shared_size"]),
        margin,
    )


def claims_table(found: Sequence[Finding]) -> pandas.DataFrame:
    """Each claim of the paper, the numbers here, their control, and whether it holds."""
    return pandas.DataFrame(
        [(one.figure, one.claim, one.here, one.control, one.verdict) for one in found],
        columns=["Fig.", "claim", "here", "control", "verdict"],
    )


def claims_over_seeds(found: Sequence[Sequence[Finding]]) -> pandas.DataFrame:
    """Each claim of the paper, its numbers seed by seed, and in how many seeds it holds or does not."""
    rows = []
    for claims in zip(*found, strict=True):
        counts = [f"{sum(one.verdict == verdict for one in claims)} of {len(claims)}" for verdict in VERDICTS[:2]]
        rows.append((claims[0].figure, claims[0].claim, " · ".join(one.here for one in claims), *counts))
    return pandas.DataFrame(rows, columns=["Fig.", "claim", "here, seed by seed", "holds in", "does not hold in"])
