"""The page of the paper's study: which claims hold here, with the tables and figures that say so."""

from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.analysis.figures import consistency_figures
from circuits.figures import (
    LABELS,
    Number,
    Section,
    ablation_figure,
    accuracy_figure,
    agreement_figure,
    consistency_along_figure,
    curves_figure,
    graft_figure,
    heads_figure,
    ranking_curves_figure,
    rates_figure,
    sharing_figure,
    write_report,
)
from circuits.study.claims import claims_table, findings, formatted
from circuits.study.page_tables import (
    ABOUT_LOCALISATION,
    ABOUT_MECHANISM,
    ABOUT_RATES,
    ABOUT_UPDATED,
    SEE,
    SHOWN_SPLITS,
    WHAT_UPDATED_DO,
    controls_in_words,
    controls_table,
    everything_else,
    grafts_table,
    heads_in_words,
    in_first_layer,
    mechanism_table,
    rankings_table,
    recall_table,
    setting_in_words,
    start_of,
    updated_table,
)
from circuits.verdicts import ABOUT_VERDICTS

_ARMS = ("mixed", "two_stage", "two_stage_gentle")


def study_figures(tables: dict[str, pandas.DataFrame], keep: float | None = None) -> dict[str, go.Figure]:
    """The study's figures by name.

    Args:
        tables: its result tables by name; figures whose tables are not there are left out.
        keep: the share of accuracy that grafts had to keep, for the title of their figure.
    """
    figures: dict[str, go.Figure] = {}
    if "accuracy" in tables:
        accuracy = tables["accuracy"]
        chosen = accuracy[accuracy["model"].isin(_ARMS) & accuracy["split"].isin(SHOWN_SPLITS)]
        figures["accuracy"] = accuracy_figure(chosen)
    if "curves" in tables:
        figures["curves"] = curves_figure(tables["curves"])
    if "rates" in tables and tables["rates"]["rate"].nunique() > 2:
        mixed = tables["accuracy"][tables["accuracy"]["model"] == "mixed"]
        figures["rates"] = rates_figure(tables["rates"], mixed)
    if "consistency_along" in tables:
        figures["consistency_along"] = consistency_along_figure(tables["consistency_along"])
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
    if "sweep" in tables:
        heads = tables["sweep"].query("mode == 'zero' and task == 'qa_id'")
        figures["heads_zero"] = heads_figure(heads, "log_prob_effect", title=change)
    for name, table in {"patch_person": "patches_from_people", "patch_bio": "patches"}.items():
        if table in tables:
            figures[name] = heads_figure(tables[table], "log_prob_effect", title=change)
    return figures | consistency_figures(tables)


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


def _mechanism(
    summary: dict[str, Any], tables: dict[str, pandas.DataFrame], figures: dict[str, go.Figure]
) -> list[Section]:
    """How alike both formats are inside, and what answers rest on."""
    if "consistency" not in summary:
        return []
    found = [
        Section(
            "Are both formats alike inside?",
            [ABOUT_MECHANISM],
            mechanism_table(summary),
            figures.get("consistency_bio_qa_ood"),
            SEE["consistency_bio_qa_ood"],
        )
    ]
    if "consistency_along" in figures:
        text = "The cosine of the gradients of one fact's two formats, and of other facts', along every stage."
        found.append(
            Section("When do they come to agree?", [text], None, figures["consistency_along"], SEE["consistency_along"])
        )
    if "inside_bio_qa_ood" in figures:
        text = "The cosine of the gradients of one fact's two formats over the shared parameters and outside them."
        found.append(
            Section(
                "Do they agree in the shared parameters?",
                [text],
                None,
                figures["inside_bio_qa_ood"],
                SEE["inside_bio_qa_ood"],
            )
        )
    if "localisation_bio_qa_ood" in figures:
        found.append(
            Section(
                "Does the agreement hang on the shared parameters?",
                [ABOUT_LOCALISATION],
                None,
                figures["localisation_bio_qa_ood"],
                SEE["localisation_bio_qa_ood"],
            )
        )
    if "signature" in figures:
        found.append(Section("What answers rest on", [], None, figures["signature"], SEE["signature"]))
    if "updated" in summary:
        found.append(
            Section("Parameters updated by both formats", [ABOUT_UPDATED, WHAT_UPDATED_DO], updated_table(tables), None)
        )
    return found


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
    forgotten = two["bio"] < two["bio_after_stage_1"]
    sections = [
        Section(
            "What holds in this run",
            [
                f"This is one seed ({settings['seed']}) of {start}. What holds here holds for these models and these "
                "questions; whether it holds for other models trained in the same way, only several seeds can tell. "
                + (
                    "The control under Recall shows how much of the gap is forgetting."
                    if forgotten
                    else "No gap is forgetting here: the second stage lowers no recall of biographies."
                ),
                ABOUT_VERDICTS,
            ],
            claims_table(findings(summary, tables)),
        ),
        Section(
            "Recall",
            [
                "Exact match under greedy decoding. QA-ID questions were in training; QA-OOD people had their "
                "questions held out. Unseen wordings are forms of question that were never trained on.",
                "A second stage can fail because the first did not store the facts so that questions find them, or "
                f"because it forgets them. With a peak rate of {gentle_rate:g} in the second stage, recall of "
                f"biographies goes from {gentle['bio_after_stage_1']:.1%} to {gentle['bio']:.1%}, and QA-OOD is "
                f"{gentle['qa_ood']:.1%}; this is the model that is compared with the mixed one below. With "
                f"{rate:g}, the rate of the first stage, biographies go to {two['bio']:.1%} and QA-OOD is "
                f"{two['qa_ood']:.1%}. Mixed training: {mixed['qa_ood']:.1%}.",
            ],
            recall_table(tables["accuracy"]),
            figures["accuracy"],
            SEE["accuracy"],
        ),
        Section(
            "Training",
            ["Exact match along training, on up to 600 answers of each split."],
            None,
            figures["curves"],
            SEE["curves"],
        ),
        *(
            [
                Section(
                    "Recall after second stages at several rates", [ABOUT_RATES], None, figures["rates"], SEE["rates"]
                )
            ]
            if "rates" in figures
            else []
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
                f"{in_first_layer(tables['shared_heads'], tables['shared_neurons'])}",
            ],
            controls_table(tables["shared"]),
            figures["shared_heads"],
            SEE["shared_heads"],
        ),
        Section(
            "Shared parameters of each tensor",
            [],
            None,
            figures["shared_heads_per_tensor"],
            SEE["shared_heads_per_tensor"],
        ),
        Section(
            "Shared parameters at every fraction",
            [
                "What share of the influenced parameters is shared, for influenced sets of every size k; dashed, the "
                "same with one task's set shuffled within each tensor.",
            ],
            None,
            figures["sharing"],
            SEE["sharing"],
        ),
        Section(
            "The same with the top of each tensor", [], None, figures["sharing_per_tensor"], SEE["sharing_per_tensor"]
        ),
        Section(
            "Without them",
            [
                "Shared parameters back at their values before training, against random parameters outside them with "
                f"the same count in each tensor (mean and range of {settings['draws']} draws).",
                controls_in_words(tables["ablation"], settings["draws"]),
            ],
            None,
            figures["ablation"],
            SEE["ablation"],
        ),
        *(
            [
                Section(
                    "Without those of each tensor", [], None, figures["ablation_per_tensor"], SEE["ablation_per_tensor"]
                )
            ]
            if "ablation_per_tensor" in figures
            else []
        ),
        *_mechanism(summary, tables, figures),
        Section(
            "Grafting",
            [
                "The model before training with some parameters of the trained one: how few of them keep "
                f"{settings['keep']:.0%} of its exact match on QA-ID? Parameters are taken by the size of their "
                "change, or by gradient × change. Sizes are upper bounds: a better search may find smaller grafts.",
            ],
            grafts_table(summary),
            figures.get("grafts"),
            SEE["grafts"],
        ),
        Section(
            "Are the top heads enough?",
            [
                "Only the top n heads of a ranking have their trained weights, the other heads those before training. "
                f"{everything_else(settings)} Area: under exact match on QA-ID against n, from 0 to 1; larger is "
                "better. n: the smallest number that reaches 95% of the whole model. The figure is of the mixed "
                "model; those of the two-stage model and of neurons lie in the folder figures.",
            ],
            rankings_table(tables["ranking_summary"], "sufficient", "n95"),
            figures["sufficient_heads_mixed"],
            SEE["sufficient_heads_mixed"],
        ),
        Section(
            "Are the top heads needed?",
            [
                "The top n heads of a ranking go back to their weights before training. Area: smaller is better. n: "
                "the smallest number that leaves less than half of the whole model's accuracy.",
            ],
            rankings_table(tables["ranking_summary"], "revert", "n50"),
            figures["critical_heads_mixed"],
            SEE["critical_heads_mixed"],
        ),
        Section(
            "How far rankings agree",
            ["Spearman's correlation between the scores that two rankings give the heads of the mixed model."],
            None,
            figures["agreement_heads_mixed"],
            SEE["agreement_heads_mixed"],
        ),
        Section(
            "Every head ablated",
            [
                "Change of the answer's log-probability (QA-ID, nats) with one head's output set to zero. "
                f"{heads_in_words(tables['sweep'])}",
            ],
            None,
            figures["heads_zero"],
            SEE["heads_zero"],
        ),
        Section(
            "Every head patched from another person",
            [
                "Change of the right answer's log-probability (QA-OOD, nats) with one head's output taken from the "
                "same question about somebody else."
            ],
            None,
            figures["patch_person"],
            SEE["patch_person"],
        ),
        Section(
            "Every head patched from the biography",
            [
                "The same with the head's output taken from the biography of the same person, at the subject, the "
                "relation and the last token."
            ],
            None,
            figures["patch_bio"],
            SEE["patch_bio"],
        ),
    ]
    for head, figure in attention.items():
        reasons = {
            "top_head": "has the largest Shared Size",
            "attending_head": "shows subject linking or relation focusing most in both formats",
        }
        why = " and ".join(reason for name, reason in reasons.items() if summary[name] == head)
        sections.append(
            Section(
                f"What {head} attends to",
                [f"Of the mixed model's heads, {head} {why}."],
                None,
                figure,
                SEE["attention"],
            )
        )
    source = summary["provenance"]
    shared, graft = summary["shared"], summary["graft"]
    write_report(
        path,
        "Does mixed training let a model recall facts where two-stage training does not?",
        f"{start[0].upper()}{start[1:]} of {settings['data']['people']} made-up people. Trained on biographies and "
        f"questions together, it answers {mixed['qa_ood']:.1%} of the questions it never saw; trained on one "
        f"after the other, {gentle['qa_ood']:.1%} with a small second rate and {two['qa_ood']:.1%} with the full one.",
        sections=sections,
        footer=f"circuits {source['library_version']} · commit {source['git_commit']} · dataset {source['dataset']} · "
        f"seed {settings['seed']} · {summary['seconds']['total']:.0f} seconds",
        numbers=[
            Number(
                f"{mixed['qa_ood']:.1%}",
                "of the questions that were held out, answered after mixed training",
                f"two-stage training with a small second rate: {gentle['qa_ood']:.1%}",
            ),
            Number(
                f"{shared['mixed']['size']:,}",
                f"parameters that both formats share after mixed training, of {shared['mixed']['total']:,}",
                f"shuffled: {shared['mixed']['permuted']:,.0f}; two-stage: {shared['two_stage_gentle']['size']:,} "
                f"(shuffled: {shared['two_stage_gentle']['permuted']:,.0f})",
            ),
            Number(
                formatted(graft["mixed"]["fraction"], ".1%"),
                f"of the changes keep {settings['keep']:.0%} of the mixed model's answers: the smallest graft found",
                f"two-stage: {formatted(graft['two_stage_gentle']['fraction'], '.1%')}",
            ),
        ],
        setting=setting_in_words(settings),
    )
