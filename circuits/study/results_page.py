"""The page of results: what a study found of each claim of the paper, as Markdown with images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.figures.saving import save_images
from circuits.storage import atomic_file, flatten
from circuits.study.claims import claims_table, findings
from circuits.study.page_tables import (
    ABOUT_LOCALISATION,
    ABOUT_MECHANISM,
    ABOUT_RATES,
    ABOUT_UPDATED,
    WHAT_UPDATED_DO,
    condition_in_words,
    controls_in_words,
    controls_table,
    everything_else,
    grafts_table,
    heads_in_words,
    mechanism_table,
    rankings_table,
    recall_table,
    updated_table,
)
from circuits.study.seeds_page import over_seeds_in_words, seeds_tables
from circuits.study.study_page import study_figures
from circuits.verdicts import ABOUT_VERDICTS, VERDICTS, Finding

_WIDTH = 1000


def _markdown(table: pandas.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    cells = [["" if pandas.isna(cell) else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


#: Figures of the page: name → what it shows.
_SHOWN = {
    "accuracy": "Exact match of every arm on every split (Fig. 1a).",
    "curves": "Exact match along training.",
    "rates": "Exact match after second stages at several peak learning rates; dashed, mixed training.",
    "sharing": "The share of the influenced parameters that is shared, at every fraction k; dashed, the permuted "
    "control; dotted, chance (Fig. 2a).",
    "sharing_per_tensor": "The same for the top k of each tensor.",
    "shared_heads": "Shared Size by head: the top of all parameters together.",
    "shared_heads_per_tensor": "Shared Size by head: the top of each tensor.",
    "ablation": "Exact match with the shared parameters back at their values before training, against random ones "
    "outside them (Fig. 2b; range over draws).",
    "ablation_per_tensor": "The same for the shared parameters of each tensor.",
    "consistency_bio_qa_ood": "How alike BIO and QA-OOD are by layer: the same fact (solid) and other facts (dashed).",
    "consistency_along": "Cosines of the gradients of one fact's two formats along training; dashed, other facts.",
    "inside_bio_qa_ood": "Cosines of the gradients of one fact's two formats, inside the shared parameters and out.",
    "localisation_bio_qa_ood": "Facts with the shared parameters reverted, or these alone trained, beside random ones.",
    "signature": "What answers rest on.",
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
    if "rates" in images:
        parts += ["## The rate of the second stage", ABOUT_RATES, *shown("rates")]
    if "shared" in summary:
        parts += [
            "## Shared parameters",
            "The top of all parameters together may lie in few tensors; the top of each tensor stands beside it. A set "
            "of few parameters is spread unevenly over heads by chance alone: its Gini coefficient is to be read "
            "beside that of random sets of the same size.",
            _markdown(controls_table(tables["shared"])),
            *shown("sharing", "sharing_per_tensor", "shared_heads", "shared_heads_per_tensor"),
        ]
    if "ablation" in summary:
        parts += ["## Without them", controls_in_words(tables["ablation"], summary["settings"]["draws"])]
        parts += shown("ablation", "ablation_per_tensor")
    if "consistency" in summary:
        parts += ["## Are both formats alike inside?", ABOUT_MECHANISM, _markdown(mechanism_table(summary))]
        parts += shown("consistency_bio_qa_ood", "consistency_along", "inside_bio_qa_ood")
        if "localisation_bio_qa_ood" in images:
            parts += [ABOUT_LOCALISATION, *shown("localisation_bio_qa_ood")]
        parts += shown("signature")
    if "updated" in summary:
        parts += [
            "## Parameters updated by both formats",
            f"{ABOUT_UPDATED} {WHAT_UPDATED_DO}",
            _markdown(updated_table(tables)),
        ]
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
    if "sweep" in tables:
        parts += ["## Every head ablated", heads_in_words(tables["sweep"]), *shown("heads_zero")]
    parts += _making(summary)
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [*images.values(), path]


def write_seeds_results(
    path: str | Path, studies: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, pandas.DataFrame]]]]
) -> Path:
    """Write the page of studies of several seeds as Markdown, a part for each.

    Args:
        path: the Markdown file.
        studies: of each the content of its seeds' ``summary.json``, and its seeds' tables by name.

    Returns:
        The page.
    """
    parts = [
        "# The study on small models",
        "<!-- written by circuits report: changes are lost -->",
        "The study of arXiv 2505.16178 on small models, trained from new weights. Each claim is tested on its "
        f"differences, one for each seed (Student's t): the two models of a seed are a pair. {ABOUT_VERDICTS}",
    ]
    for summaries, tables in studies:
        settings, source = summaries[0]["settings"], summaries[0]["provenance"]
        shown = seeds_tables(summaries, tables)
        verdicts = [_bold(verdict) for verdict in shown["claims"]["verdict"]]
        parts += [
            f"## {_name(settings).removeprefix('a ').capitalize()}, {condition_in_words(settings)}",
            f"{settings['data']['people']} made-up people; {settings['optimisation']['steps']} steps of "
            f"{settings['optimisation']['rows']} rows, second stages at peak rates of "
            f"{settings['optimisation']['gentle_learning_rate']:g} and {settings['optimisation']['learning_rate']:g}. "
            f"{over_seeds_in_words([summary['settings']['seed'] for summary in summaries])} Made on "
            f"{_machine(summaries[0])}, at commit {source['git_commit']}.",
            _markdown(shown["recall"]),
            _markdown(shown["claims"].assign(verdict=verdicts)),
            f"The smallest grafts that keep {settings['keep']:.0%} of QA-ID:",
            _markdown(shown["grafts"]),
            *([ABOUT_MECHANISM, _markdown(shown["mechanism"])] if "mechanism" in shown else []),
            *([ABOUT_UPDATED, _markdown(shown["updated"])] if "updated" in shown else []),
        ]
    path = Path(path)
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _claims(found: Sequence[Finding]) -> list[str]:
    """All findings in a table, and what the verdicts mean."""
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in VERDICTS}
    table = claims_table(found)
    return [
        "## The paper's claims",
        f"Verdicts on {len(found)} statements: {', '.join(f'{verdict} {count}' for verdict, count in counts.items())}. "
        f"One seed of one small model decides nothing about larger ones. {ABOUT_VERDICTS}",
        _markdown(table.assign(verdict=[_bold(verdict) for verdict in table["verdict"]])),
    ]


def _bold(verdict: str) -> str:
    """The verdict in bold, and not what could tell."""
    word, colon, needed = verdict.partition(":")
    return f"**{word}**{colon}{needed}"


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
        f"The study of arXiv 2505.16178 on {_name(settings)}: {data['people']} made-up people, their "
        f"{condition_in_words(settings)}, {data['qa_id_fraction']:.0%} of them with their questions in "
        f"training. *Mixed* training takes {training['steps']} steps of {training['rows']} rows, of which "
        f"{training['qa_share']:.0%} are questions, at a peak rate of {training['learning_rate']:g}. *Two-stage* "
        "training takes the same biographies alone in as many steps, then the same questions alone, at two peak rates: "
        f"{training['gentle_learning_rate']:g}, which forgets little and is compared with mixed training below, and "
        f"{training['learning_rate']:g}.",
        f"Seed {settings['seed']}, {summary['seconds']['total'] / 3600:.1f} hours on {_machine(summary)}. Written by "
        f"`circuits report` from a study made at commit {source['git_commit']} (version {source['library_version']}, "
        f"dataset {source['dataset']}, model {settings.get('model_fingerprint', 'new')}).",
    ]


def _machine(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return (
        f"{machine['cores']} cores of {machine['processor'] or 'an unnamed processor'}, {threads} (two processes "
        "of one thread while training and analysing)"
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
