"""The page of the paper's study: which claims hold here, with the tables and figures that say so."""

from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.figures.charts import LABELS, ablation_figure, accuracy_figure, curves_figure, heads_figure
from circuits.figures.report import Section, write_report

_ARMS = ("mixed", "two_stage", "two_stage_gentle")
_SPLITS = ("bio", "qa_id", "qa_ood")


def study_figures(tables: dict[str, pandas.DataFrame]) -> dict[str, go.Figure]:
    """The study's figures by name, from its result tables by name."""
    accuracy, curves, heads, patches = (tables[name] for name in ("accuracy", "curves", "heads", "patches"))
    heads = heads.rename(columns={"head": "index"})
    change = "change of<br>log-prob"
    return {
        "accuracy": accuracy_figure(accuracy[accuracy["model"].isin(_ARMS) & accuracy["split"].isin(_SPLITS)]),
        "curves": curves_figure(curves),
        "shared_heads": heads_figure(tables["shared_heads"], "size", title="shared<br>parameters", digits=0),
        "ablation": ablation_figure(tables["ablation"]),
        "heads_zero": heads_figure(heads[heads["mode"] == "zero"], "log_prob_effect.qa_id", title=change),
        "patch_person": heads_figure(patches[patches["mode"] == "person"], "log_prob_effect", title=change),
        "patch_bio": heads_figure(patches[patches["mode"] == "bio"], "log_prob_effect", title=change),
    }


def _claims(summary: dict[str, Any]) -> pandas.DataFrame:
    """Each claim of the paper, the numbers here, and whether it holds."""
    accuracy, shared, ablation = summary["accuracy"], summary["shared"], summary["ablation"]

    def drop(name: str, condition: str) -> float:
        return float(ablation[name]["none"]["qa_id"] - ablation[name][condition]["qa_id"])

    rows = [
        (
            "Mixed training recalls held-out questions, two-stage training does not (QA-OOD)",
            *(accuracy[name]["qa_ood"] for name in ("mixed", "two_stage")),
            ".1%",
        ),
        ("The mixed model shares more parameters", *(shared[name]["size"] for name in ("mixed", "two_stage")), ",.0f"),
        (
            "Its shared parameters sit in fewer heads (Gini)",
            shared["mixed"]["gini"],
            shared["two_stage"]["gini"],
            ".3f",
        ),
        (
            "Reverting them costs the mixed model more (drop of QA-ID)",
            drop("mixed", "shared"),
            drop("two_stage", "shared"),
            ".1%",
        ),
        (
            "Reverting them costs the mixed model more than reverting random ones (drop of QA-ID)",
            drop("mixed", "shared"),
            drop("mixed", "random"),
            ".1%",
        ),
    ]
    return pandas.DataFrame(
        [
            (claim, f"{one:{form}} against {other:{form}}", "yes" if one > other else "no")
            for claim, one, other, form in rows
        ],
        columns=["claim of the paper", "here", "holds in this run"],
    )


def _recall(accuracy: pandas.DataFrame) -> pandas.DataFrame:
    table = accuracy.pivot(index="model", columns="split", values="exact_match")
    table = table.loc[accuracy["model"].unique(), accuracy["split"].unique()].map(lambda value: f"{value:.1%}")
    table.index = [LABELS.get(name, name) for name in table.index]
    table.columns = [LABELS[split] for split in table.columns]
    return table.reset_index(names="model")


def _controls(shared: pandas.DataFrame) -> pandas.DataFrame:
    columns = ["model", "size", "influenced", "total", "share", "jaccard", "lift", "permuted_lift", "gini", "top_tenth"]
    table = shared[columns].assign(model=shared["model"].map(LABELS))
    table = table.rename(columns={"permuted_lift": "permuted lift", "top_tenth": "top tenth"})
    return table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)


def _in_first_layer(heads: pandas.DataFrame, neurons: pandas.DataFrame) -> str:
    """Where the shared parameters are, in words."""
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
    settings = summary["settings"]
    mixed, two, gentle = (summary["accuracy"][name] for name in _ARMS)
    rate, gentle_rate = (settings["optimisation"][name] for name in ("learning_rate", "gentle_learning_rate"))
    sections = [
        Section(
            "What holds in this run",
            [
                f"One seed ({settings['seed']}) of a small model: a close call here may fall the other way with the "
                "next. How much of the recall gap is forgetting, the control under Recall shows."
            ],
            _claims(summary),
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
            _recall(tables["accuracy"]),
            figures["accuracy"],
        ),
        Section(
            "Training", ["Exact match along training, on up to 600 answers of each split."], None, figures["curves"]
        ),
        Section(
            "Shared parameters",
            [
                f"The parameters in the top {settings['fraction']:.1%} by gradient for both BIO and QA-ID. Lift: "
                "how many there are for each one that independent sets would share. Permuted lift: the same with one "
                "task's set shuffled within each tensor; what it reaches is owed to which tensors matter, and only the "
                "rest to which of their parameters do. No lift can exceed one over the fraction. Top tenth: the share "
                "that the top tenth of heads holds. The map shows Shared Size by head; "
                f"{_in_first_layer(tables['shared_heads'], tables['shared_neurons'])}",
            ],
            _controls(tables["shared"]),
            figures["shared_heads"],
        ),
        Section(
            "Without them",
            [
                "Shared parameters back at their values before training, against random parameters with the same "
                f"count in each tensor (mean and range of {settings['draws']} draws).",
            ],
            None,
            figures["ablation"],
        ),
        Section(
            "Every head ablated",
            ["Change of the answer's log-probability (QA-ID, nats) with one head's output set to zero."],
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
        f"A small {settings['family']} model of {settings['data']['people']} made-up people. Trained on biographies "
        f"and questions together, it answers {mixed['qa_ood']:.1%} of the questions it never saw; trained on one "
        f"after the other, {two['qa_ood']:.1%}; with a gentle second stage, {gentle['qa_ood']:.1%}.",
        sections,
        f"circuits {source['library_version']} · commit {source['git_commit']} · dataset {source['dataset']} · "
        f"seed {settings['seed']} · {summary['seconds']['total']:.0f} seconds",
    )
