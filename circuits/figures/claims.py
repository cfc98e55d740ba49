"""What the paper claims, and what a study found of it: one number against another, beside its control.

1. Every claim is a difference between two numbers, positive if it is as the paper says, and comes with a smallest size
   below which no difference is called one.
2. What was asked of both sides is compared question by question: the interval and the p-value are those of paired
   answers, those of one person kept together (`circuits.statistics`). Where one side is the mean of random draws, the
   other must also lie beyond what single draws reach (Student's t), and the larger p-value counts.
3. Sizes (of shared sets and grafts) are one number for each run: they are compared over seeds or not at all.
4. Over several seeds every claim is tested on its differences, one for each seed: two models that were trained from the
   same seed are a pair. Interval and p-value are Student's t.
5. The p-values of a page are corrected together (Holm), and its intervals hold together (level 1 − 0.05 / claims).
6. *Holds*: p is below 0.05, the interval lies above zero, and the difference is at least the smallest size. *Does not
   hold*: the interval has no room for a difference of the smallest size. *Cannot be told*: all else, with the number of
   questions or seeds that could tell four times in five. (p alone would not do: Holm's correction finds more than
   intervals that hold together, so p may be below 0.05 beside an interval with zero in it.)
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pandas
from scipy import stats

from circuits.errors import CircuitsError
from circuits.figures.rankings import RANKING_LABELS
from circuits.statistics import answers_needed, corrected, paired

_ERROR = 0.05
_POWER = 0.8
#: Smaller differences are not called differences: of accuracies and areas under them, of sizes as a share of their
#: mean, of Gini coefficients and of correlations.
SMALLEST_ACCURACY, SMALLEST_SIZE, SMALLEST_GINI, SMALLEST_CORRELATION = 0.02, 0.05, 0.02, 0.1
_PERMUTATIONS = 20_000
VERDICTS = ("holds", "does not hold", "cannot be told")
#: What the verdicts mean, for a reader.
ABOUT_VERDICTS = (
    "A claim holds if the interval lies where the paper says, p is below 0.05, and the difference is worth the name: "
    f"at least {100 * SMALLEST_ACCURACY:.0f} points of accuracy (or area), {SMALLEST_SIZE:.0%} of a size, "
    f"{SMALLEST_GINI} of a Gini coefficient or {SMALLEST_CORRELATION} of a correlation. It does not hold if the "
    "interval has no room for a difference as large as that. All else cannot be told from "
    f"this many answers or seeds. All p-values are corrected together (Holm), and all intervals hold together at "
    f"{1 - _ERROR:.0%}."
)
_ONE_RUN = "one run: sizes vary with the seed more than one run can show"
_TASKS = {"qa_id": "QA-ID", "qa_ood": "QA-OOD"}
_KINDS = ("head", "neuron")
SCOPE_LABELS = {"global": "top of all parameters", "tensor": "top of each tensor"}


@dataclass(frozen=True)
class Finding:
    """A claim of the paper and what was found of it.

    Attributes:
        figure: of the paper.
        claim: what the paper says.
        here: the numbers.
        control: what they are to be read against.
        difference: how far the numbers lie apart, positive in the paper's direction; NaN if they could not be had.
        low: the lower end of its interval; NaN if one run cannot tell.
        high: the upper end.
        p_value: corrected for all claims of the page; NaN if one run cannot tell.
        smallest: the size from which on a difference is called one.
        form: how to write the difference.
        needed: what could tell.
    """

    figure: str
    claim: str
    here: str
    control: str
    difference: float
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    smallest: float = SMALLEST_ACCURACY
    form: str = "+.1%"
    needed: str = _ONE_RUN

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`.

        Example:
            >>> told = [(0.3, 0.2, 0.4, 0.001), (0.05, -0.1, 0.2, 0.4), (0.0, -0.01, 0.01, 1.0)]
            >>> [Finding("1a", "", "", "", *numbers).verdict for numbers in told]
            ['holds', 'cannot be told', 'does not hold']
        """
        if self.p_value < _ERROR and self.low > 0 and self.difference >= self.smallest:
            return "holds"
        return "does not hold" if self.high < self.smallest else "cannot be told"


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
        functools.partial(_recall, summary, tables, other) for other in ("two_stage", "two_stage_gentle")
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
    return _corrected([one(1 - _ERROR / len(asked)) for one in asked])


def _scopes(tables: dict[str, pandas.DataFrame]) -> list[str]:
    return [str(scope) for scope in tables["shared"]["scope"].unique()] if "shared" in tables else []


def _corrected(found: Sequence[Finding]) -> list[Finding]:
    """The findings with the p-values of all that have one corrected together."""
    tested = [number for number, one in enumerate(found) if not math.isnan(one.p_value)]
    p_values = dict(zip(tested, corrected([found[number].p_value for number in tested]), strict=True))
    return [replace(one, p_value=float(p_values.get(number, math.nan))) for number, one in enumerate(found)]


# comparing question by question


def _by_question(answers: pandas.DataFrame, value: str = "exact_match", **chosen: str) -> "pandas.Series[float]":
    """One number for each question, the mean over draws."""
    for name, wanted in chosen.items():
        answers = answers[answers[name] == wanted]
    return answers.groupby(["group", "example", "attribute"])[value].mean()


def _compared(one: "pandas.Series[float]", other: "pandas.Series[float]", level: float) -> dict[str, Any]:
    """Difference, interval and p-value of two sides of the same questions, and how many questions could tell."""
    if not one.index.equals(other.index):
        raise CircuitsError("two conditions are compared on the same questions, but these were asked different ones")
    people = one.index.get_level_values("group").to_numpy()
    found = paired(one.to_numpy(), other.to_numpy(), people, level=level)
    sought = max(abs(found.difference), SMALLEST_ACCURACY)
    count = answers_needed(sought, one.to_numpy(), other.to_numpy(), people)
    if count is None:
        needed = "the answers show no spread to judge by"
    else:
        # that many tell one difference alone; a page of claims asks for more
        reach, alone = (stats.norm.isf(error / 2) + stats.norm.ppf(_POWER) for error in (1 - level, _ERROR))
        needed = f"about {math.ceil(count * (reach / alone) ** 2):,} questions could tell"
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "needed": needed,
    }


def _beyond_draws(found: dict[str, Any], draws: Sequence[float], level: float) -> dict[str, Any]:
    """A comparison with the mean of random draws, now also with what a single draw may be.

    Both must be beyond chance, so the larger p-value counts; the two uncertainties are independent.
    """
    count = len(draws)
    spread = float(numpy.std(draws, ddof=1)) * math.sqrt(1 + 1 / count)
    apart = abs(found["difference"])
    p_value = float(2 * stats.t.sf(apart / spread, count - 1)) if spread else float(apart == 0)
    drawn = spread * float(stats.t.ppf((1 + level) / 2, count - 1))
    if p_value > found["p_value"]:
        found = found | {"needed": f"{count} random draws lie too far apart: more of them could tell"}
    return found | {
        "low": found["difference"] - math.hypot(found["difference"] - found["low"], drawn),
        "high": found["difference"] + math.hypot(found["high"] - found["difference"], drawn),
        "p_value": max(found["p_value"], p_value),
    }


# the claims


def _recall(summary: dict[str, Any], tables: dict[str, pandas.DataFrame], other: str, level: float) -> Finding:
    mixed, two = summary["accuracy"]["mixed"], summary["accuracy"][other]
    sides = [_by_question(tables["answers"], model=model, split="qa_ood") for model in ("mixed", other)]
    claims = {
        "two_stage": "Mixed training recalls held-out questions, two-stage training does not (QA-OOD; the paper: "
        "88.6 % against 9.7 %)",
        "two_stage_gentle": "Mixed training also recalls more of them than two-stage training with a small second "
        "rate, which forgets less (QA-OOD)",
    }
    return Finding(
        "1a",
        claims[other],
        f"{mixed['qa_ood']:.1%} against {two['qa_ood']:.1%} of {len(sides[0])} questions",
        f"BIO of two-stage: {two['bio_after_stage_1']:.1%} after the first stage, {two['bio']:.1%} after the second",
        **_compared(sides[0], sides[1], level),
    )


def _relative(one: float, other: float) -> float:
    """How much larger one size is than another, as a share of their mean; 0 if both are nothing."""
    return 2 * (one - other) / (one + other) if one + other else 0.0


def _shared(tables: dict[str, pandas.DataFrame], scope: str) -> list[dict[str, Any]]:
    """The numbers of sharing of the mixed and of the two-stage model."""
    rows = tables["shared"]
    by_model = rows[rows["scope"] == scope].set_index("model")
    return [by_model.loc[model].to_dict() for model in ("mixed", "two_stage")]


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
        form="+.3f",
    )


def _ablated(
    tables: dict[str, pandas.DataFrame], scope: str, task: str, model: str
) -> tuple[dict[str, "pandas.Series[float]"], list[float]]:
    """The answers of a model under each condition, and the accuracy of each random draw."""
    answers = tables["ablation_answers"]
    answers = answers[(answers["scope"] == scope) & (answers["task"] == task) & (answers["model"] == model)]
    random = answers[answers["condition"] == "random"]
    return (
        {str(name): _by_question(rows) for name, rows in answers.groupby("condition")},
        random.groupby("draw")["exact_match"].mean().tolist(),
    )


def _mask_of(by_condition: dict[str, Any]) -> str:
    """The condition that random draws are the control of: the mask, thinned where they had no room beside it."""
    return "shared_thinned" if "shared_thinned" in by_condition else "shared"


def _costs_more(tables: dict[str, pandas.DataFrame], scope: str, task: str, level: float) -> Finding:
    (mixed, _), (two, _) = (_ablated(tables, scope, task, model) for model in ("mixed", "two_stage"))
    drops = [side["none"] - side["shared"] for side in (mixed, two)]
    return Finding(
        "2b",
        f"Reverting the shared parameters costs the mixed model more ({_TASKS[task]}; {SCOPE_LABELS[scope]})",
        " against ".join(f"{side['none'].mean():.1%} → {side['shared'].mean():.1%}" for side in (mixed, two)),
        "a model can lose no more than it has; as many random parameters outside the mask: "
        + " and ".join(_control_in_words(side) for side in (mixed, two)),
        **_compared(drops[0], drops[1], level),
    )


def _control_in_words(side: dict[str, "pandas.Series[float]"]) -> str:
    thinned = f" (the mask thinned alike: {side['shared_thinned'].mean():.1%})" if "shared_thinned" in side else ""
    return f"{side['random'].mean():.1%}{thinned}" if "random" in side else "none"


def _costs_more_than_random(tables: dict[str, pandas.DataFrame], scope: str, task: str, level: float) -> Finding:
    mixed, draws = _ablated(tables, scope, task, "mixed")
    mask = mixed[_mask_of(mixed)]
    return Finding(
        "2b",
        f"It costs the mixed model more than reverting random ones outside the mask ({_TASKS[task]}; "
        f"{SCOPE_LABELS[scope]})",
        f"{mask.mean():.1%} against {mixed['random'].mean():.1%} ({len(draws)} draws, {min(draws):.1%} to "
        f"{max(draws):.1%})",
        f"the whole model: {mixed['none'].mean():.1%}{_overlap(tables, scope, 'mixed')}",
        **_beyond_draws(_compared(mixed["random"], mask, level), draws, level),
    )


def _grafting(summary: dict[str, Any], _level: float) -> Finding:
    mixed, two, keep = summary["graft"]["mixed"], summary["graft"]["two_stage"], summary["settings"]["keep"]
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
        needed="a model that learned no question has nothing to graft" if None in sizes else _ONE_RUN,
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
        **_beyond_draws(_compared(*((one, random) if larger else (random, one)), level), draws, level),
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


def spearman(one: Sequence[float], other: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Spearman's correlation with its interval (Fisher's z, Bonett & Wright 2000) and its permutation p-value.

    The p-value, two-sided, is exact up to eight pairs and otherwise from 20,000 random permutations; it is never 0.

    Returns:
        correlation, lower and upper end, p-value; NaN, NaN, NaN and 1 if one side is all alike.

    Example:
        >>> spearman([1, 2, 3, 4], [1, 2, 3, 4])[3] * 24
        2.0
    """
    ranks = [stats.rankdata(values) for values in (one, other)]
    first, second = (values - values.mean() for values in ranks)
    scale, count = float(numpy.linalg.norm(first) * numpy.linalg.norm(second)), len(first)
    if scale == 0:
        return math.nan, math.nan, math.nan, 1.0
    found = float(first @ second) / scale
    if count <= 8:
        orders = numpy.array(list(itertools.permutations(range(count))))
        extra = 0
    else:
        generator = numpy.random.default_rng(0)
        orders, extra = generator.permuted(numpy.tile(numpy.arange(count), (_PERMUTATIONS, 1)), axis=1), 1
    as_far = int((numpy.abs(first[orders] @ second) >= abs(found) * scale - 1e-9).sum())
    p_value = (as_far + extra) / (len(orders) + extra)
    if count < 4 or abs(found) > 1 - 1e-12:
        return found, -1.0 if count < 4 else found, 1.0 if count < 4 else found, p_value
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt((1 + found**2 / 2) / (count - 3))
    return found, math.tanh(math.atanh(found) - half), math.tanh(math.atanh(found) + half), p_value


# over seeds


def findings_over_seeds(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Each claim of the paper tested on its differences, one for each seed.

    Args:
        found: the `findings` of each seed, the same claims in each.
    """
    level = 1 - _ERROR / len(found[0])
    return _corrected([_over_seeds(one, level) for one in zip(*found, strict=True)])


def _over_seeds(claims: Sequence[Finding], level: float) -> Finding:
    first, differences = claims[0], [one.difference for one in claims]
    known = [value for value in differences if not math.isnan(value)]
    both = replace(
        first,
        here=" · ".join(one.here for one in claims),
        control=" · ".join(f"{value:{first.form}}" for value in differences),
        difference=float(numpy.mean(known)) if known else math.nan,
        low=math.nan,
        high=math.nan,
        p_value=math.nan,
    )
    if len(known) < len(claims):
        return replace(both, needed=f"{len(claims) - len(known)} of {len(claims)} seeds have no such number")
    if len(claims) == 1:
        return replace(both, needed="one seed: differences between seeds are not known")
    deviation = float(numpy.std(known, ddof=1))
    error = deviation / math.sqrt(len(known))
    half = error * float(stats.t.ppf((1 + level) / 2, len(known) - 1))
    apart = abs(both.difference)
    p_value = float(2 * stats.t.sf(apart / error, len(known) - 1)) if error else float(apart == 0)
    needed = seeds_needed(deviation, max(apart, first.smallest), 1 - level)
    return replace(
        both,
        low=both.difference - half,
        high=both.difference + half,
        p_value=p_value,
        needed=f"{needed:,} seeds could tell" if needed else "more than 1,000 seeds would have to tell",
    )


def seeds_needed(deviation: float, difference: float, error: float = _ERROR) -> int | None:
    """How many seeds a paired t-test needs to find a difference four times in five.

    Args:
        deviation: standard deviation of the difference over seeds.
        difference: what there is to find.
        error: how often a difference may be found that is not there.

    Returns:
        The number; None if 1,000 are too few.

    Example:
        >>> seeds_needed(0.1, 0.05), seeds_needed(0.1, 0.2)
        (34, 5)
    """
    for seeds in range(2, 1001):
        apart = math.sqrt(seeds) * difference / deviation if deviation else math.inf
        critical = float(stats.t.isf(error / 2, seeds - 1))
        if math.isinf(apart) or float(stats.nct.sf(critical, seeds - 1, apart)) >= _POWER:
            return seeds
    return None


def claims_table(found: Sequence[Finding], control: str = "control") -> pandas.DataFrame:
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
        columns=["Fig.", "claim", "here", control, "difference", "p", "verdict"],
    )


def _in_words(one: Finding) -> str:
    """The difference and its interval."""
    if math.isnan(one.difference):
        return ""
    if math.isnan(one.low):
        return f"{one.difference:{one.form}}"
    return f"{one.difference:{one.form}} ({one.low:{one.form}} to {one.high:{one.form}})"


def _overlap(tables: dict[str, pandas.DataFrame], scope: str, model: str) -> str:
    """How much of the mask its random controls hold, in words."""
    rows = tables["ablation"]
    rows = rows[(rows["scope"] == scope) & (rows["model"] == model) & (rows["condition"] == "random")]
    return f"; {rows['overlap'].max():,.0f} of the parameters of the random sets are the mask's"
