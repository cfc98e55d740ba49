"""The page of a study over several seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from circuits.figures import LABELS, Number, Section, ranking_curves_figure, write_report
from circuits.statistics import mean_interval
from circuits.study.claims import SCOPE_LABELS, claims_table, findings
from circuits.study.page_tables import (
    ABOUT_MECHANISM,
    ABOUT_UPDATED,
    SEE,
    SHOWN_SPLITS,
    mechanism_rows,
    setting_in_words,
    start_of,
)
from circuits.verdicts import ABOUT_VERDICTS, findings_over_seeds


def _with_interval(values: Sequence[float | int | None], form: str) -> str:
    """The mean over seeds, and its interval if they show one; how many have no value."""
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return f"none in {len(values) - len(known)} of {len(values)} seeds"
    mean, low, high = mean_interval(known)
    if form == ".1%":  # a share of answers
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{mean:{form}}" if math.isnan(low) else f"{mean:{form}} ({low:{form}} to {high:{form}})"


#: Of the parameters updated by both formats: column → number of the summary, and how it is written.
_UPDATED = {
    "size": ("size", ",.0f"),
    "shuffled": ("permuted", ",.0f"),
    "in S too": ("both_with_shared", ",.0f"),
    "of S": ("of_shared", ",.0f"),
}


def seeds_tables(
    summaries: Sequence[dict[str, Any]], tables: Sequence[dict[str, pandas.DataFrame]]
) -> dict[str, pandas.DataFrame]:
    """What several seeds found, for a reader: ``claims``, ``recall``, ``grafts`` and so on; means with intervals.

    Args:
        summaries: the content of each seed's ``summary.json``.
        tables: each seed's result tables by name.
    """
    found = findings_over_seeds([findings(*one) for one in zip(summaries, tables, strict=True)])
    recall = [
        {"model": LABELS.get(name, name)}
        | {
            LABELS[split]: _with_interval([summary["accuracy"][name][split] for summary in summaries], ".1%")
            for split in SHOWN_SPLITS
        }
        for name in summaries[0]["accuracy"]
    ]
    grafts = [
        {
            "model": LABELS[name],
            "graft": LABELS[method],
            "size": _with_interval([summary["graft"][name]["by"][method]["size"] for summary in summaries], ",.0f"),
            "fraction": _with_interval(
                [summary["graft"][name]["by"][method]["fraction"] for summary in summaries], ".1%"
            ),
        }
        for name, graft in summaries[0]["graft"].items()
        for method in graft["by"]
    ]
    updated = [
        {"scope": SCOPE_LABELS[scope], "model": LABELS[model]}
        | {
            column: _with_interval([summary["updated"][scope][model][name] for summary in summaries], form)
            for column, (name, form) in _UPDATED.items()
        }
        for scope, models in summaries[0].get("updated", {}).items()
        for model in models
    ]
    measured = all("consistency" in summary for summary in summaries)
    return {
        "claims": claims_table(found),
        "recall": pandas.DataFrame(recall),
        "grafts": pandas.DataFrame(grafts),
        **({"updated": pandas.DataFrame(updated)} if updated else {}),
        **({"mechanism": mechanism_rows(summaries, _with_interval)} if measured else {}),
    }


def over_seeds_in_words(seeds: Sequence[int]) -> str:
    """What numbers over seeds are."""
    return (
        f"Means over the seeds {', '.join(map(str, seeds))}, with the 95% interval of the mean (Student's t; of "
        "a share within 0 and 1)."
    )


def write_seeds_report(
    path: str | Path, summaries: Sequence[dict[str, Any]], tables: Sequence[dict[str, pandas.DataFrame]]
) -> None:
    """Write the page over several seeds: how many hold each claim, and means with intervals.

    Args:
        path: the HTML file.
        summaries: the content of each seed's ``summary.json``.
        tables: each seed's result tables by name.
    """
    settings, seeds = summaries[0]["settings"], [summary["settings"]["seed"] for summary in summaries]
    start = start_of(settings)
    shown = seeds_tables(summaries, tables)
    curves = pandas.concat(
        [one["ranking_curves"].assign(seed=seed) for seed, one in zip(seeds, tables, strict=True)], ignore_index=True
    )
    heads = curves[(curves["model"] == "mixed") & (curves["kind"] == "head")]
    # a curve for each seed: the mean over the draws of a random ranking first
    keys = ["condition", "metric", "seed", "n", "task"]
    heads = heads.groupby(keys, sort=False)[["exact_match", "fine_tuned", "pre"]].mean().reset_index()
    for whole in ("fine_tuned", "pre"):
        heads[whole] = heads.groupby("task")[whole].transform("mean")
    heads = heads.rename(columns={"seed": "draw"})
    write_report(
        path,
        "Does mixed training let a model recall facts where two-stage training does not?",
        f"{start[0].upper()}{start[1:]} of {settings['data']['people']} made-up people, {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'}, each with people, weights and draws of its own. "
        f"{over_seeds_in_words(seeds)}",
        sections=[
            Section(
                "What holds",
                [
                    "Each claim is tested on its differences, one for each seed (Student's t): the two models of a "
                    "seed are a pair. Each seed's own page tests the same claims on its questions.",
                    ABOUT_VERDICTS,
                ],
                shown["claims"],
            ),
            Section("Recall", ["Exact match under greedy decoding."], shown["recall"]),
            Section("Grafting", [f"The smallest grafts that keep {settings['keep']:.0%} of QA-ID."], shown["grafts"]),
            *(
                [Section("Are both formats alike inside?", [ABOUT_MECHANISM], shown["mechanism"])]
                if "mechanism" in shown
                else []
            ),
            *(
                [Section("Parameters updated by both formats", [ABOUT_UPDATED], shown["updated"])]
                if "updated" in shown
                else []
            ),
            Section(
                "Are the top heads enough?",
                ["Heads of the mixed models; the band is the interval over seeds."],
                None,
                ranking_curves_figure(heads[heads["condition"] == "sufficient"], units="heads"),
                SEE["sufficient_heads_mixed"],
            ),
            Section(
                "Are the top heads needed?",
                [],
                None,
                ranking_curves_figure(heads[heads["condition"] == "revert"], units="heads"),
                SEE["critical_heads_mixed"],
            ),
        ],
        footer=f"circuits {summaries[0]['provenance']['library_version']} · "
        f"{sum(summary['seconds']['total'] for summary in summaries):.0f} seconds",
        numbers=_numbers(summaries),
        setting=setting_in_words(settings),
    )


def _numbers(summaries: Sequence[dict[str, Any]]) -> list[Number]:
    """The answer of all seeds."""
    recall, shared, grafts = (
        [
            _with_interval([found(summary)[arm][name] for summary in summaries], form)
            for arm in ("mixed", "two_stage_gentle")
        ]
        for found, name, form in (
            (lambda summary: summary["accuracy"], "qa_ood", ".1%"),
            (lambda summary: summary["shared"], "size", ",.0f"),
            (lambda summary: summary["graft"], "fraction", ".1%"),
        )
    )
    return [
        Number(recall[0], "of the held-out questions, answered after mixed training", f"two-stage: {recall[1]}"),
        Number(shared[0], "parameters that both formats share after mixed training", f"two-stage: {shared[1]}"),
        Number(
            grafts[0], "of the changes of mixed training are enough: the smallest grafts", f"two-stage: {grafts[1]}"
        ),
    ]
