"""The page of the paper's study: which claims hold here, with the tables and figures that say so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.figures.charts import (
    LABELS,
    ablation_figure,
    accuracy_figure,
    curves_figure,
    graft_figure,
    heads_figure,
    sharing_figure,
)
from circuits.figures.claims import (
    ABOUT_VERDICTS,
    SCOPE_LABELS,
    claims_table,
    findings,
    findings_over_seeds,
    formatted,
)
from circuits.figures.rankings import RANKING_LABELS, agreement_figure, ranking_curves_figure
from circuits.figures.report import Section, write_report
from circuits.statistics import mean_interval

_ARMS = ("mixed", "two_stage", "two_stage_gentle")
_SPLITS = ("bio", "qa_id", "qa_ood")


def start_of(settings: dict[str, Any]) -> str:
    """What was trained, in words."""
    model = settings.get("model")
    return f"a small {settings['family']} model" if model is None else f"the model {Path(model).name}"


def everything_else(settings: dict[str, Any]) -> str:
    """In which model everything stands that belongs to no ranked unit, where curves ask whether units are enough."""
    if settings.get("model") is None:
        return "What belongs to none is trained at every n, also at 0, and may be enough by itself."
    return "Everything else is as it was before training at every n, so that all of them together need not be enough."


def study_figures(tables: dict[str, pandas.DataFrame], keep: float | None = None) -> dict[str, go.Figure]:
    """The study's figures by name.

    Args:
        tables: its result tables by name; figures whose tables are not there are left out.
        keep: the share of accuracy that grafts had to keep, for the title of their figure.
    """
    figures: dict[str, go.Figure] = {}
    if "accuracy" in tables:
        accuracy = tables["accuracy"]
        chosen = accuracy[accuracy["model"].isin(_ARMS) & accuracy["split"].isin(_SPLITS)]
        figures["accuracy"] = accuracy_figure(chosen)
    if "curves" in tables:
        figures["curves"] = curves_figure(tables["curves"])
    for scope, ending in (("global", ""), ("tensor", "_per_tensor")):
        of = {
            name: tables[name][tables[name]["scope"] == scope]
            for name in ("sharing_curve", "shared_heads", "ablation")
            if name in tables and (tables[name]["scope"] == scope).any()
        }
        if "sharing_curve" in of:
            figures[f"sharing{ending}"] = sharing_figure(of["sharing_curve"])
        if "shared_heads" in of:
            title = "shared<br>parameters"
            figures[f"shared_heads{ending}"] = heads_figure(of["shared_heads"], "size", title=title, digits=0)
        if "ablation" in of:
            figures[f"ablation{ending}"] = ablation_figure(of["ablation"])
    if len(tables.get("grafts", ())):
        figures["grafts"] = graft_figure(tables["grafts"], keep)
    if "ranking_curves" in tables:
        figures |= _ranking_figures(tables["ranking_curves"], tables["agreement"])
    change = "change of<br>log-prob"
    if "heads" in tables:
        heads = tables["heads"].rename(columns={"head": "index"})
        figures["heads_zero"] = heads_figure(heads[heads["mode"] == "zero"], "log_prob_effect.qa_id", title=change)
    if "patches" in tables:
        for mode in ("person", "bio"):
            rows = tables["patches"][tables["patches"]["mode"] == mode]
            figures[f"patch_{mode}"] = heads_figure(rows, "log_prob_effect", title=change)
    return figures


def _ranking_figures(curves: pandas.DataFrame, agreement: pandas.DataFrame) -> dict[str, go.Figure]:
    """Figures 4a, 4b and 4c of each model's heads and neurons."""
    figures = {}
    for (model, kind), rows in curves.groupby(["model", "kind"], sort=False):
        for condition, name in (("sufficient", "sufficient"), ("revert", "critical")):
            chosen = rows[rows["condition"] == condition]
            figures[f"{name}_{kind}s_{model}"] = ranking_curves_figure(chosen, units=f"{kind}s")
        pairs = agreement[(agreement["model"] == model) & (agreement["kind"] == kind)]
        names = list(pairs["metric"].unique())
        square = pairs.pivot(index="metric", columns="other", values="spearman").loc[names, names]
        figures[f"agreement_{kind}s_{model}"] = agreement_figure(square, f"{kind}s, {LABELS[str(model)]}")
    return figures


def _with_interval(values: Sequence[float | int | None], form: str) -> str:
    """The mean over seeds, and its interval if there are several; how many have no value."""
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return f"none in {len(values) - len(known)} of {len(values)} seeds"
    mean, low, high = mean_interval(known)
    if form.endswith("%"):  # a share
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{mean:{form}}" if len(known) < 2 else f"{mean:{form}} ({low:{form}} to {high:{form}})"


def recall_table(accuracy: pandas.DataFrame) -> pandas.DataFrame:
    """Exact match of every model on every split."""
    table = accuracy.pivot(index="model", columns="split", values="exact_match")
    table = table.loc[accuracy["model"].unique(), accuracy["split"].unique()].map(lambda value: f"{value:.1%}")
    table.index = [LABELS.get(name, name) for name in table.index]
    table.columns = [LABELS[split] for split in table.columns]
    return table.reset_index(names="model")


def controls_table(shared: pandas.DataFrame) -> pandas.DataFrame:
    """Size and centralisation of the shared parameters, with the permuted control."""
    columns = ["scope", "model", "size", "influenced", "total", "share", "jaccard", "lift", "permuted_lift", "gini"]
    columns += ["random_gini", "permuted_gini", "top_tenth"]
    table = shared[columns].assign(model=shared["model"].map(LABELS), scope=shared["scope"].map(SCOPE_LABELS))
    table = table.rename(columns=lambda name: name.replace("_", " "))
    return table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)


def heads_in_words(heads: pandas.DataFrame) -> str:
    """How many heads matter beyond chance, when so many are looked at."""
    rows = heads[heads["mode"] == "zero"]
    each = []
    for model, part in rows.groupby("model", sort=False):
        told = part[part["log_prob_effect_q.qa_id"] < 0.05]
        each.append(f"{len(told)} of {len(part)} heads ({LABELS[str(model)]})")
    return (
        f"It differs from none for {' and '.join(each)}: a paired test over people, with p-values corrected for the "
        "number of heads (Benjamini–Hochberg, 5 %)."
    )


def controls_in_words(ablation: pandas.DataFrame, draws: int) -> str:
    """What the random controls of an ablation hold of the mask, and what was thinned."""
    random = ablation[ablation["condition"] == "random"]
    words = f"Of the parameters of the {draws} random sets, {random['overlap'].max():,.0f} lie in the mask."
    thinned = ablation[ablation["condition"] == "shared_thinned"]
    if len(thinned):
        keys = ["model", "scope"]
        sizes = ablation[ablation["condition"] == "shared"].groupby(keys)["parameters"].first()
        kept = (thinned.groupby(keys)["parameters"].min() / sizes).dropna()
        each = [f"{share:.1%} ({LABELS[model]}, {SCOPE_LABELS[scope]})" for (model, scope), share in kept.items()]
        words += (
            " Where a tensor has less room outside the mask than the mask takes, the mask is thinned to what fits and "
            f"compared with as many random parameters. What is left of the mask: {', '.join(each)}."
        )
    return words


def grafts_table(summary: dict[str, Any]) -> pandas.DataFrame:
    """Size of the graft of each score, and its accuracy on every split."""
    return pandas.DataFrame(
        [
            {
                "model": LABELS[name],
                "graft": LABELS[score],
                "size": formatted(graft["size"], ",.0f"),
                "fraction": formatted(graft["fraction"], ".1%"),
                **{LABELS[split]: formatted(graft["splits"][split], ".1%") for split in _SPLITS},
            }
            for name, found in summary["graft"].items()
            for score, graft in found["by"].items()
        ]
    )


def rankings_table(summary: pandas.DataFrame, condition: str, smallest: str) -> pandas.DataFrame:
    """Area and smallest n of every ranking: heads and neurons of both models on QA-ID."""
    rows = summary[(summary["condition"] == condition) & (summary["task"] == "qa_id")]
    table = pandas.DataFrame({"ranking": [RANKING_LABELS[name] for name in rows["metric"].unique()]})
    for (model, kind), part in rows.groupby(["model", "kind"], sort=False):
        by_label = part.assign(label=part["metric"].map(RANKING_LABELS)).set_index("label").reindex(table["ranking"])
        of = f"{kind}s, {LABELS[str(model)]}"
        table[f"area: {of}"] = ["" if pandas.isna(value) else f"{value:.3f}" for value in by_label["auc"]]
        numbers = zip(by_label["auc"], by_label[smallest], strict=True)
        table[f"n: {of}"] = [
            "" if pandas.isna(area) else "never" if pandas.isna(n) else f"{n:,.0f}" for area, n in numbers
        ]
    return table


def _in_first_layer(heads: pandas.DataFrame, neurons: pandas.DataFrame) -> str:
    """Where the shared parameters are, in words."""
    heads, neurons = (table[table["scope"] == "global"] for table in (heads, neurons))
    parts = []
    for model, rows in heads.groupby("model", sort=False):
        total = rows["size"].sum() + neurons[neurons["model"] == model]["size"].sum()
        first = rows[rows["layer"] == 0]["size"].sum()
        parts.append(f"{first / max(total, 1):.0%} of them ({LABELS[str(model)]})")
    return f"{' and '.join(parts)} lie in the attention of layer 0."


def write_study_report(
    path: str | Path,
    summary: dict[str, Any],
    tables: dict[str, pandas.DataFrame],
    figures: dict[str, go.Figure],
    attention: dict[str, go.Figure],
) -> None:
    """Write the study's page.

    Args:
        path: the HTML file.
        summary: the content of ``summary.json``.
        tables: the study's result tables by name.
        figures: from `study_figures`.
        attention: attention figures by head.
    """
    settings, start = summary["settings"], start_of(summary["settings"])
    mixed, two, gentle = (summary["accuracy"][name] for name in _ARMS)
    rate, gentle_rate = (settings["optimisation"][name] for name in ("learning_rate", "gentle_learning_rate"))
    sections = [
        Section(
            "What holds in this run",
            [
                f"This is one seed ({settings['seed']}) of {start}. What holds here holds for these models and these "
                "questions; whether it holds for other models trained in the same way, only several seeds can tell. "
                "The control under Recall shows how much of the gap is forgetting.",
                ABOUT_VERDICTS,
            ],
            claims_table(findings(summary, tables)),
        ),
        Section(
            "Recall",
            [
                "Exact match under greedy decoding. QA-ID questions were in training; QA-OOD people had their "
                "questions held out. Unseen wordings are forms of question that were never trained on.",
                f"Two-stage training forgets: recall of biographies goes from {two['bio_after_stage_1']:.1%} after the "
                f"first stage to {two['bio']:.1%} after the second. As a control, the second stage was run again at a "
                f"peak rate of {gentle_rate:g} instead of {rate:g}: recall of biographies is then {gentle['bio']:.1%}, "
                f"of QA-ID {gentle['qa_id']:.1%} and of QA-OOD {gentle['qa_ood']:.1%}, against {two['qa_ood']:.1%} at "
                f"the higher rate and {mixed['qa_ood']:.1%} for mixed training.",
            ],
            recall_table(tables["accuracy"]),
            figures["accuracy"],
        ),
        Section(
            "Training", ["Exact match along training, on up to 600 answers of each split."], None, figures["curves"]
        ),
        Section(
            "Shared parameters",
            [
                f"The parameters in the top {settings['fraction']:.1%} by gradient for both BIO and QA-ID: the top of "
                "all parameters together, which may lie in few tensors, and the top of each tensor. Lift: how many "
                "there are for each one that independent sets would share. Permuted lift: the same with one task's set "
                "shuffled within each tensor. That much comes from which tensors matter; only the rest comes from "
                "which of their parameters matter. No lift can exceed one over the fraction. Gini: how unevenly the "
                "heads hold them, beside random sets of the same size and shuffled ones; few parameters are spread "
                "unevenly by chance alone. Top tenth: the share that the top tenth of heads holds. The maps show "
                "Shared Size by head; of the top of all parameters, "
                f"{_in_first_layer(tables['shared_heads'], tables['shared_neurons'])}",
            ],
            controls_table(tables["shared"]),
            figures["shared_heads"],
        ),
        Section("Shared parameters of each tensor", [], None, figures["shared_heads_per_tensor"]),
        Section(
            "Shared parameters at every fraction",
            [
                "What share of the influenced parameters is shared, for influenced sets of every size k; dashed, the "
                "same with one task's set shuffled within each tensor.",
            ],
            None,
            figures["sharing"],
        ),
        Section("The same with the top of each tensor", [], None, figures["sharing_per_tensor"]),
        Section(
            "Without them",
            [
                "Shared parameters back at their values before training, against random parameters outside them with "
                f"the same count in each tensor (mean and range of {settings['draws']} draws).",
                controls_in_words(tables["ablation"], settings["draws"]),
            ],
            None,
            figures["ablation"],
        ),
        *(
            [Section("Without those of each tensor", [], None, figures["ablation_per_tensor"])]
            if "ablation_per_tensor" in figures
            else []
        ),
        Section(
            "Grafting",
            [
                "The model before training with some parameters of the trained one: how few of them keep "
                f"{settings['keep']:.0%} of its exact match on QA-ID? Parameters are taken by the size of their "
                "change, or by gradient × change. Sizes are upper bounds: a better search may find smaller grafts.",
            ],
            grafts_table(summary),
            figures.get("grafts"),
        ),
        Section(
            "Are the top heads enough?",
            [
                "Only the top n heads of a ranking have their trained weights, the other heads those before training. "
                f"{everything_else(settings)} Area: under exact match on QA-ID against n, from 0 to 1; larger is "
                "better. n: the smallest number that reaches 95 % of the whole model. The figure is of the mixed "
                "model; those of the two-stage model and of neurons lie in the folder figures.",
            ],
            rankings_table(tables["ranking_summary"], "sufficient", "n95"),
            figures["sufficient_heads_mixed"],
        ),
        Section(
            "Are the top heads needed?",
            [
                "The top n heads of a ranking go back to their weights before training. Area: smaller is better. n: "
                "the smallest number that leaves less than half of the whole model's accuracy.",
            ],
            rankings_table(tables["ranking_summary"], "revert", "n50"),
            figures["critical_heads_mixed"],
        ),
        Section(
            "How far rankings agree",
            ["Spearman's correlation between the scores that two rankings give the heads of the mixed model."],
            None,
            figures["agreement_heads_mixed"],
        ),
        Section(
            "Every head ablated",
            [
                "Change of the answer's log-probability (QA-ID, nats) with one head's output set to zero. "
                f"{heads_in_words(tables['heads'])}",
            ],
            None,
            figures["heads_zero"],
        ),
        Section(
            "Every head patched from another person",
            [
                "Change of the right answer's log-probability (QA-OOD, nats) with one head's output taken from the "
                "same question about somebody else."
            ],
            None,
            figures["patch_person"],
        ),
        Section(
            "Every head patched from the biography",
            [
                "The same with the head's output taken from the biography of the same person, at the subject, the "
                "relation and the last token."
            ],
            None,
            figures["patch_bio"],
        ),
    ]
    for head, figure in attention.items():
        reasons = {
            "top_head": "has the largest Shared Size",
            "attending_head": "shows subject linking or relation focusing most in both formats",
        }
        why = " and ".join(reason for name, reason in reasons.items() if summary[name] == head)
        sections.append(
            Section(f"What {head} attends to", [f"Of the mixed model's heads, {head} {why}."], None, figure)
        )
    source = summary["provenance"]
    write_report(
        path,
        "Does mixed training let a model recall facts where two-stage training does not?",
        f"{start[0].upper()}{start[1:]} of {settings['data']['people']} made-up people. Trained on biographies and "
        f"questions together, it answers {mixed['qa_ood']:.1%} of the questions it never saw; trained on one "
        f"after the other, {two['qa_ood']:.1%}; with a gentle second stage, {gentle['qa_ood']:.1%}.",
        sections,
        f"circuits {source['library_version']} · commit {source['git_commit']} · dataset {source['dataset']} · "
        f"seed {settings['seed']} · {summary['seconds']['total']:.0f} seconds",
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
    recall = pandas.DataFrame(
        [
            {"model": LABELS.get(name, name)}
            | {
                LABELS[split]: _with_interval([summary["accuracy"][name][split] for summary in summaries], ".1%")
                for split in _SPLITS
            }
            for name in summaries[0]["accuracy"]
        ]
    )
    grafts = pandas.DataFrame(
        [
            {
                "model": LABELS[name],
                "graft": LABELS[method],
                "size": _with_interval([summary["graft"][name]["by"][method]["size"] for summary in summaries], ",.0f"),
                "fraction": _with_interval(
                    [summary["graft"][name]["by"][method]["fraction"] for summary in summaries], ".1%"
                ),
            }
            for name, found in summaries[0]["graft"].items()
            for method in found["by"]
        ]
    )
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
    over = (
        f"Means over the seeds {', '.join(map(str, seeds))}, with the 95 % interval of the mean (Student's t; of "
        "a share within 0 and 1)."
    )
    write_report(
        path,
        "Does mixed training let a model recall facts where two-stage training does not?",
        f"{start[0].upper()}{start[1:]} of {settings['data']['people']} made-up people, {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'}, each with people, weights and draws of its own. {over}",
        [
            Section(
                "What holds",
                [
                    "Each claim is tested on its differences, one for each seed (Student's t): the two models of a "
                    "seed are a pair. Each seed's own page tests the same claims on its questions.",
                    ABOUT_VERDICTS,
                ],
                claims_table(
                    findings_over_seeds([findings(*one) for one in zip(summaries, tables, strict=True)]),
                    "differences, seed by seed",
                ),
            ),
            Section("Recall", ["Exact match under greedy decoding."], recall),
            Section("Grafting", [f"The smallest grafts that keep {settings['keep']:.0%} of QA-ID."], grafts),
            Section(
                "Are the top heads enough?",
                ["Heads of the mixed models; the band is the interval over seeds."],
                None,
                ranking_curves_figure(heads[heads["condition"] == "sufficient"], units="heads"),
            ),
            Section(
                "Are the top heads needed?",
                [],
                None,
                ranking_curves_figure(heads[heads["condition"] == "revert"], units="heads"),
            ),
        ],
        f"circuits {summaries[0]['provenance']['library_version']} · "
        f"{sum(summary['seconds']['total'] for summary in summaries):.0f} seconds",
    )
