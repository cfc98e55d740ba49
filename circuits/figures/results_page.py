"""The page of results: what a study found of each claim of the paper, as Markdown with images.

1. Every claim is a difference between two numbers, positive if it is as the paper says.
2. Beside it stands a margin: what chance could do to the difference. Accuracies over n answers have a standard error of
   √(p (1 − p) / n), areas under their curves at most that of their mean; random masks and rankings vary from draw to
   draw besides; sizes have no interval in one run, and count as different from a twentieth of the larger one on.
3. A difference above the margin: the claim holds here. Below minus the margin: it does not. Between: it cannot be told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.figures.rankings import RANKING_LABELS
from circuits.figures.saving import save_images
from circuits.figures.study_page import (
    controls_table,
    everything_else,
    grafts_table,
    rankings_table,
    recall_table,
    study_figures,
)
from circuits.storage import atomic_file, flatten

_Z = 1.96
_SIZE_MARGIN = 0.05
_WIDTH = 1000
_VERDICTS = ("holds here", "does not hold here", "cannot be told")
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
    return float(one - other), _SIZE_MARGIN * max(one, other)


def _number(value: float | int | None, form: str) -> str:
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
        f"{_number(mixed['size'], ',')} ({_number(mixed['fraction'], '.2%')}) against "
        f"{_number(two['size'], ',')} ({_number(two['fraction'], '.2%')})",
        f"exact match of these grafts alone on QA-ID {_number(mixed['splits']['qa_id'], '.1%')} and "
        f"{_number(two['splits']['qa_id'], '.1%')}, on QA-OOD {_number(mixed['splits']['qa_ood'], '.1%')} and "
        f"{_number(two['splits']['qa_ood'], '.1%')}",
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
    pairs = pairs[(pairs["model"] == "mixed") & (pairs["kind"] == "head") & (pairs["metric"] == "shared_size")]
    others = pairs.set_index("other")["spearman"].drop("shared_size")
    heads = tables["shared_heads"]
    margin = _Z / math.sqrt(int((heads["model"] == "mixed").sum()) - 1)
    rest = ", ".join(
        f"{RANKING_LABELS[str(name)]} {value:.2f}" for name, value in others.drop("ablation").items() if value == value
    )
    return Finding(
        "4c",
        "The mixed model's heads with more shared parameters are those whose ablation costs more (Spearman)",
        f"{float(others['ablation']):.2f} (unrelated rankings: ± {margin:.2f})",
        rest,
        float(others["ablation"]),
        margin,
    )


def _markdown(table: pandas.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    cells = [["" if pandas.isna(cell) else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


#: Figures of the page: name → what it shows.
_SHOWN = {
    "accuracy": "Exact match of every arm on every split (Fig. 1a).",
    "curves": "Exact match along training.",
    "sharing": "The share of the influenced parameters that is shared, at every fraction k; dashed, the permuted "
    "control; dotted, chance (Fig. 2a).",
    "shared_heads": "Shared Size by head.",
    "ablation": "Exact match with the shared parameters back at their values before training, against random ones "
    "(Fig. 2b; range over draws).",
    "grafts": "Exact match on QA-ID of grafts of every size (Fig. 3b).",
    "sufficient_heads_mixed": "Of all heads only the top n of each ranking have their trained weights (Fig. 4a).",
    "critical_heads_mixed": "The top n heads of each ranking go back to their weights before training (Fig. 4b).",
    "sufficient_neurons_mixed": "The same for neurons.",
    "critical_neurons_mixed": "The same for neurons: the top n go back.",
    "agreement_heads_mixed": "How far rankings of heads agree (Fig. 4c).",
    "heads_zero": "Change of the answer's log-probability (QA-ID, nats) with one head's output set to zero.",
}


def write_results_page(
    path: str | Path, summary: dict[str, Any], tables: dict[str, pandas.DataFrame], missing: Sequence[str] = ()
) -> list[Path]:
    """Write the page of a study of one seed as Markdown, and its figures as images.

    Args:
        path: the Markdown file. ``results.md`` has its images in ``figures/results-*.png`` beside it.
        summary: the content of ``summary.json``.
        tables: the study's result tables by name.
        missing: the steps that are not done yet; their parts of the summary and their tables may be left out.

    Returns:
        What was written, the page last.

    Raises:
        CircuitsError: no browser is there to draw images.
    """
    path = Path(path)
    images: dict[str, Path] = {}
    drawn: dict[Path, go.Figure] = {}
    figures = study_figures(tables, summary["settings"]["keep"])
    for name in _SHOWN:
        if name in figures:
            images[name] = path.parent / "figures" / f"{path.stem}-{name.replace('_', '-')}.png"
            figure = figures[name]
            drawn[images[name]] = figure.update_layout(width=figure.layout.width or _WIDTH)
    save_images(drawn)

    def shown(*names: str) -> list[str]:
        return [
            f"![{_SHOWN[name]}](figures/{images[name].name})\n\n*{_SHOWN[name]}*" for name in names if name in images
        ]

    parts = [
        *_opening(summary, tables, missing),
        *_claims(findings(summary, tables)),
        "## Recall",
        "Exact match under greedy decoding. QA-ID questions were in training; QA-OOD people had their questions held "
        "out. Unseen wordings are forms of question that were never trained on.",
        _markdown(recall_table(tables["accuracy"])),
        *shown("accuracy", "curves"),
    ]
    if "shared" in summary:
        parts += ["## Shared parameters", _markdown(controls_table(tables["shared"]))]
        parts += shown("sharing", "shared_heads", "ablation")
    if "graft" in summary:
        parts += [
            "## Grafts",
            "Sizes are upper bounds: a better search may find smaller grafts. Accuracies are those of the model before "
            "training with the graft alone, on the examples of the table under Recall.",
            _markdown(grafts_table(summary)),
            *shown("grafts"),
        ]
    if "rankings" in summary:
        parts += [
            "## Rankings",
            "Of all heads, or of all neurons, only the top n of a ranking have their trained weights. "
            f"{everything_else(summary['settings'])} Area under exact match on QA-ID against n, from 0 to 1: larger is "
            "better. n: the smallest measured number that reaches 95 % of the whole model.",
            _markdown(rankings_table(tables["ranking_summary"], "sufficient", "n95")),
            *shown("sufficient_heads_mixed", "sufficient_neurons_mixed"),
            "The top n go back to their weights before training, and all else stays trained. Area: smaller is better. "
            "n: the smallest measured number that leaves less than half.",
            _markdown(rankings_table(tables["ranking_summary"], "revert", "n50")),
            *shown("critical_heads_mixed", "critical_neurons_mixed", "agreement_heads_mixed"),
        ]
    if "heads" in tables:
        parts += ["## Every head ablated", *shown("heads_zero")]
    parts += _making(summary)
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [*images.values(), path]


def _claims(found: Sequence[Finding]) -> list[str]:
    """All findings in a table, and what the verdicts mean."""
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in _VERDICTS}
    rows = [(one.figure, one.claim, one.here, one.control, f"**{one.verdict}**") for one in found]
    return [
        "## The paper's claims",
        f"Of {len(found)} statements: {', '.join(f'{verdict} {count}' for verdict, count in counts.items())}. One seed "
        "of one small model decides nothing about larger ones. *Cannot be told*: the numbers lie no further apart than "
        "chance could bring them. Accuracies and areas have the error of their number of answers, random masks and "
        "rankings that of their draws; sizes have no interval in one run and count as different from "
        f"{_SIZE_MARGIN:.0%} on.",
        _markdown(pandas.DataFrame(rows, columns=["Fig.", "claim", "here", "control", "verdict"])),
    ]


def _name(settings: dict[str, Any]) -> str:
    return f"a small {settings['family']} model" if settings["model"] is None else Path(settings["model"]).name


def _opening(summary: dict[str, Any], tables: dict[str, pandas.DataFrame], missing: Sequence[str]) -> list[str]:
    settings, source = summary["settings"], tables["accuracy"].attrs
    data, training = settings["data"], settings["optimisation"]
    unfinished = f"**This study is not finished: {', '.join(missing)} are still to come.** `circuits study` goes on."
    return [
        f"# The study on {_name(settings)}",
        "<!-- written by circuits report: changes are lost -->",
        *([unfinished] if missing else []),
        f"The study of arXiv 2505.16178 on {_name(settings)}: {data['people']} made-up people with "
        f"{data['biographies']} biographies each, {data['qa_id_fraction']:.0%} of them with their questions in "
        f"training. *Mixed* training takes {training['steps']} steps of {training['rows']} rows, of which "
        f"{training['qa_share']:.0%} are questions, at a peak rate of {training['learning_rate']:g}. *Two-stage* "
        "training takes the same biographies alone in as many steps, then the same questions alone. As a control, the "
        f"second stage is run again at a peak rate of {training['gentle_learning_rate']:g}.",
        f"Seed {settings['seed']}, {summary['seconds']['total'] / 3600:.1f} hours on {_machine(summary)}. Written by "
        f"`circuits report` from a study made at commit {source['git_commit']} (version {source['library_version']}, "
        f"dataset {source['dataset']}, model {settings.get('model_fingerprint', 'new')}).",
    ]


def _machine(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return (
        f"{machine['cores']} cores of {machine['processor'] or 'an unnamed processor'}, {threads} (two processes "
        "of one thread while training)"
    )


def _making(summary: dict[str, Any]) -> list[str]:
    """Hours and settings."""
    seconds = summary["seconds"]
    hours = pandas.DataFrame(
        [(name, f"{value / 60:.1f}") for name, value in seconds.items()], columns=["step", "minutes"]
    )
    settings = flatten(summary["settings"]) | {"model": _name(summary["settings"])}
    listed = pandas.DataFrame(
        [(f"`{name}`", "all" if value is None else value) for name, value in settings.items()],
        columns=["setting", "value"],
    ).map(lambda value: ", ".join(map(str, value)) if isinstance(value, list) else value)
    return [
        "## How long it took",
        "Minutes by the clock; whatever else the machine did then is in them.",
        _markdown(hours),
        "## All settings",
        "Where fewer examples than there are were used, it stands here.",
        _markdown(listed),
    ]
