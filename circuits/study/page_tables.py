"""Tables and sentences of the study's pages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas

from circuits.figures import LABELS
from circuits.figures.rankings import RANKING_LABELS
from circuits.study.claims import SCOPE_LABELS, formatted
from circuits.study.settings import CONDITIONS

SHOWN_SPLITS = ("bio", "qa_id", "qa_ood")


def start_of(settings: dict[str, Any]) -> str:
    """What was trained, in words."""
    model = settings.get("model")
    return f"a small {settings['family']} model" if model is None else f"the model {Path(model).name}"


def condition_in_words(settings: dict[str, Any]) -> str:
    """How the people's facts are told."""
    data = settings["data"]
    if all(data[name] == value for name, value in CONDITIONS["single"].items()):
        return "facts told once"
    times = "biography" if data["biographies"] == 1 else "biographies"
    return f"facts told in {data['biographies']} {times} each, in {data['wordings']} wordings"


def setting_in_words(settings: dict[str, Any]) -> dict[str, str]:
    """What a study was made with: name → value."""
    data, training = settings["data"], settings["optimisation"]
    rates = f"{training['learning_rate']:g}; small second rate {training['gentle_learning_rate']:g}"
    return {
        "model": start_of(settings).removeprefix("a ").removeprefix("the model "),
        "people": f"{data['people']:,}, of whom {data['qa_id_fraction']:.0%} have questions in training",
        "told": condition_in_words(settings).removeprefix("facts told "),
        "steps of each stage": f"{training['steps']:,}",
        "learning rate": rates,
        "influenced": f"top {settings['fraction']:.1%} by gradient",
    }


#: Figure → what there is to see in it.
SEE = {
    "accuracy": "Compare QA-OOD, the questions that were held out: QA-ID and BIO were in training.",
    "curves": "Follow QA-OOD, the questions that were held out, from panel to panel.",
    "rates": "Where BIO stays up and QA-OOD does not, facts are stored and not found; where both fall, forgotten.",
    "shared_heads": "Each cell is a head; the darker, the more of its parameters are shared.",
    "shared_heads_per_tensor": "The same heads when every tensor gives its own top: no layer can take all places.",
    "sharing": "The wider the gap between a solid line and the dashed one of its colour, the more is shared beyond "
    "what the choice of tensors alone explains.",
    "sharing_per_tensor": "What lies above the dashed control and above chance (dotted) is a choice of parameters.",
    "ablation": "Compare the shared bars (red; light red where thinned) with the grey ones of random parameters.",
    "ablation_per_tensor": "Compare the shared bars with the grey ones of random parameters.",
    "consistency_bio_qa_ood": "Solid lines are pairs that tell the same fact, dashed ones pairs that do not: the wider "
    "the gap, the more alike the formats are.",
    "consistency_along": "Where a solid line leaves the dashed one of its colour, the formats come to agree.",
    "inside_bio_qa_ood": "Where the shared parameters lie above the random ones, the agreement is theirs.",
    "localisation_bio_qa_ood": "The agreement hangs on the shared parameters if it falls further without them than "
    "without as many random ones.",
    "signature": "The longer a part of a bar, the more of the answer is lost when those tokens are another person's.",
    "grafts": "Stars mark the smallest grafts found; the further to the left, the fewer parameters are needed.",
    "sufficient_heads_mixed": "The sooner a line rises, the better its ranking finds the heads that are enough.",
    "critical_heads_mixed": "The sooner a line falls, the better its ranking finds the heads that are needed.",
    "agreement_heads_mixed": "Dark blue: two rankings order the heads alike; red: in opposite order.",
    "heads_zero": "Red: the answer becomes less likely without the head.",
    "patch_person": "Red: the head carries what tells this person's answer from another's.",
    "patch_bio": "Near zero: the head does the same in the biography as in the question.",
    "attention": "Solid rectangles: more attention than uniform attention would give there; dotted ones: no more.",
}


def everything_else(settings: dict[str, Any]) -> str:
    """In which model everything stands that belongs to no ranked unit, where curves ask whether units are enough."""
    if settings.get("model") is None:
        return "What belongs to none is trained at every n, also at 0, and may be enough by itself."
    return "Everything else is as it was before training at every n, so that all of them together need not be enough."


def recall_table(accuracy: pandas.DataFrame) -> pandas.DataFrame:
    """Exact match of every model on every split."""
    table = accuracy.pivot(index="model", columns="split", values="exact_match")
    table = table.loc[accuracy["model"].unique(), accuracy["split"].unique()].map(lambda value: f"{value:.1%}")
    table.index = [LABELS.get(name, name) for name in table.index]
    table.columns = [LABELS[split] for split in table.columns]
    return table.reset_index(names="model")


def controls_table(shared: pandas.DataFrame) -> pandas.DataFrame:
    """Size and centralisation of the shared parameters, with the permuted control."""
    forms = {
        "size": ("shared", "{:,.0f}"),
        "share": ("of the top", "{:.1%}"),
        "lift": ("lift", "{:.1f}"),
        "permuted_lift": ("permuted lift", "{:.1f}"),
        "gini": ("Gini", "{:.2f}"),
        "random_gini": ("random Gini", "{:.2f}"),
        "permuted_gini": ("permuted Gini", "{:.2f}"),
        "top_tenth": ("top tenth", "{:.1%}"),
    }
    named = {"scope": shared["scope"].map(SCOPE_LABELS), "model": shared["model"].map(LABELS)}
    return pandas.DataFrame(named | {words: shared[name].map(form.format) for name, (words, form) in forms.items()})


def heads_in_words(heads: pandas.DataFrame) -> str:
    """How many heads matter beyond chance, when so many are looked at."""
    rows = heads[(heads["mode"] == "zero") & (heads["task"] == "qa_id")]
    each = []
    for model, part in rows.groupby("model", sort=False):
        told = part[part["log_prob_effect_q"] < 0.05]
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
                **{LABELS[split]: formatted(graft["splits"][split], ".1%") for split in SHOWN_SPLITS},
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


def in_first_layer(heads: pandas.DataFrame, neurons: pandas.DataFrame) -> str:
    """Where the shared parameters are, in words."""
    heads, neurons = (table[table["scope"] == "global"] for table in (heads, neurons))
    parts = []
    for model, rows in heads.groupby("model", sort=False):
        total = rows["size"].sum() + neurons[neurons["model"] == model]["size"].sum()
        first = rows[rows["layer"] == 0]["size"].sum()
        parts.append(f"{first / max(total, 1):.0%} of them ({LABELS[str(model)]})")
    return f"{' and '.join(parts)} lie in the attention of layer 0."


def mechanism_table(summary: dict[str, Any]) -> pandas.DataFrame:
    """How alike BIO and QA-OOD are inside each arm, and what BIO answers rest on."""
    return mechanism_rows([summary], lambda values, form: formatted(values[0], form))


#: Column of the table → where its number stands in a summary, and how it is written.
_MECHANISM = {
    "gradients, same fact": ("consistency", "gradient", "matched", "z.3f"),
    "gradients, other facts": ("consistency", "gradient", "mismatched", "z.3f"),
    "inside S": ("consistency", "gradient", "inside", "z.3f"),
    "random outside": ("consistency", "gradient", "outside", "z.3f"),
    "inside S, per tensor": ("consistency", "gradient", "inside_per_tensor", "z.3f"),
    "random outside, per tensor": ("consistency", "gradient", "outside_per_tensor", "z.3f"),
    "activations, same fact": ("consistency", "representation", "matched", "z.3f"),
    "activations, other facts": ("consistency", "representation", "mismatched", "z.3f"),
    "retrieved": ("consistency", "representation", "retrieval", ".1%"),
    "rests on subject": ("signature", None, "subject", "z.1%"),
    "relation": ("signature", None, "relation", "z.1%"),
    "context": ("signature", None, "context", "z.1%"),
    "context, integrated gradients": ("integrated_signature", None, "context", "z.1%"),
}


def mechanism_rows(
    summaries: Sequence[dict[str, Any]], written: Callable[[Sequence[float | None], str], str]
) -> pandas.DataFrame:
    """The same for several seeds.

    Args:
        summaries: the content of each seed's ``summary.json``.
        written: makes a cell of the seeds' numbers and a format.
    """
    rows = []
    for arm in summaries[0]["consistency"]["gradient"]:
        row = {"model": LABELS[arm]}
        for column, (part, measure, name, form) in _MECHANISM.items():
            parts = [summary.get(part, {}) for summary in summaries]
            arms = [one if measure is None else one.get(measure, {}) for one in parts]
            row[column] = written([one.get(arm, {}).get(name) for one in arms], form)
        rows.append(row)
    return pandas.DataFrame(rows).set_index("model").T.rename_axis("measure").reset_index()


ABOUT_RATES = (
    "Every point is a second stage from the same first one, with the same questions in the same order, at another peak "
    "learning rate. Dashed: mixed training."
)

ABOUT_LOCALISATION = (
    "The same facts after the shared parameters went back to their values before training, and with these alone as "
    "trained (of attention and MLPs; all else stays as the setting of curves has it), beside as many random parameters "
    "outside them: how alike the activations of both formats are at the token that predicts the answer (mean over "
    "layers), how many facts are nearest to themselves in the other format, and how many QA-OOD answers are right."
)


def updated_table(tables: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """The parameters updated by both formats: how many, how many the first definition has too, and what they do."""
    cosines = tables["updated_gradient_consistency"]
    cosines = cosines[(cosines["by"] == "mask") & (cosines["kind"] == "matched") & (cosines["other"] == "qa_ood")]
    recall = tables["updated_ablation_answers"].query("task == 'qa_ood'")
    rows = []
    for row in tables["updated"].itertuples():
        own = cosines[(cosines["model"] == row.model) & (cosines["scope"] == row.scope)]
        inside = own.groupby("condition")["mean"].mean()
        kept = recall[(recall["model"] == row.model) & (recall["scope"] == row.scope)]
        kept = kept.groupby("condition")["exact_match"].mean()
        mask = "shared_thinned" if "shared_thinned" in kept else "shared"
        rows.append(
            {
                "scope": SCOPE_LABELS[row.scope],
                "model": LABELS[row.model],
                "size": f"{row.size:,}",
                "shuffled": f"{row.permuted:,.0f}",
                "in S too": f"{row.both_with_shared:,} of {row.of_shared:,}",
                "lift": f"{row.lift_with_shared:.1f}",
                "cosine inside": formatted(inside.get(mask, inside.get("shared")), ".3f"),
                "random outside": formatted(inside.get("random"), ".3f"),
                "QA-OOD without them": formatted(kept.get(mask), ".1%"),
                "without random ones": formatted(kept.get("random"), ".1%"),
            }
        )
    return pandas.DataFrame(rows)


ABOUT_UPDATED = (
    "The second version speaks of parameters updated by both formats: here those in the top by each format's own "
    "gradients, taken at regular steps of the stage that learns it and added up, in place of the gradients after "
    "training (S). Shuffled: the size with one task's set shuffled within each tensor."
)
WHAT_UPDATED_DO = (
    "Lift: how many lie in S for each one that would by chance, with as many in each tensor. Cosine: of the gradients "
    "of one fact's two formats. QA-OOD: exact match with these parameters back at their values before training, and "
    "with as many random ones outside them; where there is too little room outside, both are thinned alike."
)

ABOUT_MECHANISM = (
    "BIO and QA-OOD questions that tell the same facts: cosines of the gradients of their losses over all parameters, "
    "beside those of the same attribute of other people; of the same fact inside the shared parameters S (thinned as "
    "their control where that has too little room) and in as many random parameters outside; cosines of the centred "
    "activations at the token that predicts the answer, mean over layers, and how many facts are nearest to themselves "
    "in the other format. What a BIO answer rests on: the share of each span in what the answer's log-probability "
    "falls by when its tokens are replaced by another person's; a two-stage model that has forgotten its biographies "
    "has little to lose."
)
