"""Consistency and signature of two models on the same facts, pair by pair and answer by answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas

from circuits.analysis.consistency import PARTS
from circuits.analysis.differences import ABOUT_Q, SIDES, paired_differences, shown_differences
from circuits.analysis.fact_sections import SEE_ALIKE, SEE_SIGNATURE
from circuits.analysis.figures import consistency_figures
from circuits.analysis.words import SCOPE_WORDS, named_tasks
from circuits.consistency import mismatched_kind
from circuits.figures import Section
from circuits.figures.consistency import ACT_WORDS
from circuits.figures.style import label

if TYPE_CHECKING:
    import plotly.graph_objects as go

Frames = Mapping[str, pandas.DataFrame]
#: Measures of a fact beside the cosine of its activations.
RECALLED = ("retrieved", "exact_match", "log_prob")
#: What is compared: the table that has a row for each pair or answer, what makes its rows, and the numbers.
_COMPARED = {
    "gradient_consistency": (
        "gradient_consistency_pairs",
        ("task", "other", *(name for name in PARTS if name != "draw"), "kind"),
        ("cosine",),
    ),
    "representation_consistency": (
        "representation_consistency_pairs",
        ("task", "other", "site", "span", "unit", "layer", "index", "kind"),
        ("cosine", "retrieved"),
    ),
    "localisation": ("localisation_facts", ("task", "other", "scope", "act", "condition"), ("cosine", *RECALLED)),
    "signature": ("signature_answers", ("task", "span"), ("effect", "share")),
}
#: Where gradients are compared, for a reader.
_PLACES = {"all": "all parameters", "random": "random ones", "rest": "all outside"}
#: Matched less mismatched, fact by fact.
EXCESS = "matched_less_mismatched"


def consistency_differences(a: Frames, b: Frames) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Each table of differences, b less a, that both have what is needed for, as `paired_differences` gives it.

    Draws of random parameters are averaged first. Among the kinds of pairs is ``matched_less_mismatched``. Beside what
    each model's shared parameters do to its agreement about facts stands what as many random ones do.
    """
    for name, (source, keys, metrics) in _COMPARED.items():
        sides = [tables.get(source, pandas.DataFrame()) for tables in (a, b)]
        if not all(map(len, sides)):
            continue
        one, other = (_one_row_each(side, keys, metrics) for side in sides)
        # a gradient or an activation that is nothing in one model has no cosine there
        names = [*dict.fromkeys([*keys, "example", "group", "start"])]
        both = one[names].merge(other[names])
        one, other = (side.merge(both) for side in (one, other))
        if len(both):
            found = paired_differences(one, other, keys, metrics=metrics)
            yield name, _with_controls(found, a, b) if name == "localisation" else found


def _with_controls(found: pandas.DataFrame, a: Frames, b: Frames) -> pandas.DataFrame:
    """With ``cosine_random_a`` and ``…_b``: the means with as many random parameters, the mask not thinned."""
    keys = ["task", "other", "scope", "act"]
    for side, tables in zip(SIDES, (a, b), strict=True):
        means = tables["localisation"]
        random = means[means["condition"] == "random"].set_index(keys)["cosine"]
        found = found.join(random.rename(f"cosine_random_{side}"), on=keys)
    return found


def _one_row_each(table: pandas.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> pandas.DataFrame:
    if "share" in table:
        return table.dropna(subset="share")
    if "draw" in table:
        # how a mask was thinned is one model's own
        table = table[table["condition"] != "shared_thinned"]
    if "act" in table:
        return table[table["condition"] != "random"].dropna(subset="cosine").assign(start=0)
    names = [*keys, "example", "group"]
    means = table.groupby(names, sort=False, dropna=False)[[*metrics]].mean().dropna(subset="cosine").reset_index()
    return pandas.concat([means, excess(means)], ignore_index=True).assign(start=0)


def excess(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of the kind ``matched_less_mismatched``: how far each fact's cosine lies above that of mismatched pairs."""
    kinds = ["matched", mismatched_kind(pairs["kind"].unique())]
    names = [name for name in pairs if name not in ("kind", "cosine", "retrieved", "chance", "other_example", "draw")]
    one, other = (pairs[pairs["kind"] == kind].groupby(names, dropna=False)["cosine"].mean() for kind in kinds)
    return (one - other).dropna().rename("cosine").reset_index().assign(kind=EXCESS)


def _both(a: Frames, b: Frames, names: tuple[str, str]) -> dict[str, pandas.DataFrame]:
    """The tables of figures of both, with the column ``model``."""
    tables = [name for name in _COMPARED if len(a.get(name, ())) and len(b.get(name, ()))]
    return {
        table: pandas.concat(
            [side[table].assign(model=name) for side, name in zip((a, b), names, strict=True)], ignore_index=True
        )
        for table in tables
    }


def figures_of_both(a: Frames, b: Frames, names: tuple[str, str]) -> "dict[str, go.Figure]":
    """The figures of both analyses in one."""
    return consistency_figures(_both(a, b, names))


def sections_of_both(tables: Frames, figures: "Mapping[str, go.Figure]", names: tuple[str, str]) -> list[Section]:
    """What the page of a comparison says of consistency and signature."""
    found = []
    if "gradient_consistency" in tables:
        table = tables["gradient_consistency"]
        rows = table[table["by"].isin(["all", "mask"]) & table["kind"].isin(["matched", EXCESS])]
        for (task, other), part in rows.groupby(["task", "other"], sort=False):
            one, two = label(task), label(other)
            text = (
                f"Cosines of the gradients of {one} and {two}, fact by fact: of matched pairs, and how far these "
                "lie above mismatched ones; over all parameters, over the shared ones, over as many random ones "
                "outside them (fewer where there is too little room), and over all that lie outside. The difference "
                f"is that of {names[1]} less {names[0]}. {ABOUT_Q}"
            )
            part = _in_words(part)
            shown = shown_differences(part, ["the top", "where", "kind"], names, metrics=["cosine"], digits=3)
            figure = figures.get(f"consistency_{task}_{other}")
            found.append(Section(f"Where are {one} and {two} alike?", [text], shown, figure, SEE_ALIKE))
    if "representation_consistency" in tables:
        table = tables["representation_consistency"]
        last = table[(table["span"] == "last") & (table["layer"] == table["layer"].max())]
        last = last[last["kind"].isin(["matched", EXCESS])]
        for (task, other), part in last.groupby(["task", "other"], sort=False):
            text = (
                f"Cosines of the activations of {label(task)} and {label(other)}, of the last layer at the token that "
                "predicts the answer, and how many facts are nearest to themselves in the other task (retrieved)."
            )
            shown = shown_differences(_in_words(part), ["kind"], names, metrics=["cosine", "retrieved"])
            found.append(Section("Are facts in the same place?", [text], shown))
    if "localisation" in tables:
        table = tables["localisation"].replace({"act": ACT_WORDS}).rename(columns={"act": "parameters"})
        controls = {"cosine": {"random ones": "cosine_random"}}
        for (task, other), part in table.groupby(["task", "other"], sort=False):
            text = (
                f"Facts of {label(task)} and {label(other)} after the shared parameters went back to their values "
                "before fine-tuning (reverted), and with these alone as after it: how alike the activations of both "
                "tasks are at the token that predicts the answer, how many facts are retrieved, and how many answers "
                f"of {label(other)} are right. Below the cosine: the same with as many random parameters outside them "
                "in their place (fewer where there is too little room)."
            )
            keys, metrics = ["the top", "parameters"], ["cosine", *RECALLED[:2]]
            shown = shown_differences(_in_words(part), keys, names, metrics=metrics, controls=controls)
            found.append(Section("Does the agreement hang on the shared parameters?", [text], shown))
    if "signature" in tables:
        text = (
            "How far an answer's log-probability falls when the tokens of a span are replaced by those of another "
            "group's prompt, and what share of the falls of all spans that is; context is all other tokens."
        )
        shown = shown_differences(
            named_tasks(tables["signature"]), ["task", "span"], names, metrics=["effect", "share"]
        )
        found.append(Section("What the answers rest on", [text], shown, figures.get("signature"), SEE_SIGNATURE))
    return found


def _in_words(table: pandas.DataFrame) -> pandas.DataFrame:
    """With what a reader calls scopes, places and kinds of pairs."""
    words = {name: table[name].str.replace("_", " ").replace(_PLACES) for name in ("kind", "unit") if name in table}
    shown = named_tasks(table).assign(**words).rename(columns={"unit": "where"})
    return shown.assign(**{"the top": table["scope"].map(SCOPE_WORDS).fillna("–")}) if "scope" in table else shown
