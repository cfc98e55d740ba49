"""Sections of an analysis' page about facts that several tasks tell: where they agree, and what answers rest on."""

from collections.abc import Mapping, Sequence

import pandas
import plotly.graph_objects as go

from circuits.analysis.words import SCOPE_WORDS, interval, percent, signed, two
from circuits.figures import Section
from circuits.figures.consistency import ACT_WORDS
from circuits.figures.style import label

SEE_ALIKE = (
    "Layer by layer: solid lines are pairs that tell the same fact, dashed ones pairs that do not; the wider the gap, "
    "the more alike the tasks are."
)
SEE_SIGNATURE = "The longer a part of a bar, the more of the answer is lost when those tokens are somebody else's."
_SEE = {
    "inside": "Where the shared parameters lie above the random ones, the agreement is theirs.",
    "localisation": "The agreement hangs on the shared parameters if it falls further without them than without as "
    "many random ones.",
}


def consistency_sections(tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    """The sections of the step ``consistency``, two for each pair of tasks."""
    found: list[Section] = []
    if "consistency_tests" not in tables:
        return found
    for (task, other), tests in tables["consistency_tests"].groupby(["task", "other"], sort=False):
        whole = tests[(tests["measure"] == "gradient") & (tests["unit"] == "all")]
        last = tests[tests["measure"].isin(["representation", "retrieval"]) & (tests["span"] == "last")]
        last = last[last["layer"] == last["layer"].max()]
        text = (
            f"Pairs of answers of {label(task)} and {label(other)} that tell the same fact, beside pairs that do not: "
            "the cosines of the gradients of their losses, of their activations (centred) at the token that predicts "
            "the answer, linear CKA, and how often a fact's activation is nearest to its own in the other task. The "
            "table has activations of the last layer. Intervals and tests are paired, by group; q is corrected for "
            "all comparisons of this step (Benjamini–Hochberg)."
        )
        figure = figures.get(f"consistency_{task}_{other}")
        found.append(
            Section(
                f"Are {label(task)} and {label(other)} alike inside?",
                [text],
                _tests(pandas.concat([whole, last])),
                figure,
                SEE_ALIKE,
            )
        )
        inside = tests[tests["measure"] == "inside"]
        if len(inside):
            text = (
                "Cosines of the gradients of matched pairs over the shared parameters alone, beside those over as many "
                "random ones outside them in each tensor (where a tensor has too little room for these, both are "
                "thinned), and over all that lie outside."
            )
            figure = figures.get(f"inside_{task}_{other}")
            found.append(
                Section("Is it the shared parameters where they agree?", [text], _tests(inside), figure, _SEE["inside"])
            )
    return found


def localisation_sections(
    tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]
) -> Sequence[Section]:
    """The section of the step ``localise``, for each pair of tasks."""
    found: list[Section] = []
    if "localisation" not in tables:
        return found
    for (task, other), _ in tables["localisation"].groupby(["task", "other"], sort=False):
        text = (
            f"Facts of {label(task)} and {label(other)} after the shared parameters went back to their values before "
            "fine-tuning, and with these alone as after it, beside as many random parameters outside them: how alike "
            "the activations of both tasks are at the token that predicts the answer, how many facts are nearest to "
            f"themselves in the other task, and how many answers of both are right. If the agreement hangs on the "
            "shared parameters, it falls without them and stays with them alone."
        )
        tests = tables.get("localisation_tests")
        shown = None if tests is None or tests.empty else _localisation(tests, task, other)
        figure = figures.get(f"localisation_{task}_{other}")
        found.append(
            Section("Does their agreement hang on the shared parameters?", [text], shown, figure, _SEE["localisation"])
        )
    return found


_MEASURED = {
    "cosine": ("activations: cosine", two),
    "retrieved": ("facts retrieved", percent),
    "exact_match": ("{other}: right", percent),
    "task_exact_match": ("{task}: right", percent),
}


def _localisation(tests: pandas.DataFrame, task: str, other: str) -> pandas.DataFrame:
    rows = tests[(tests["task"] == task) & (tests["other"] == other) & tests["measure"].isin(_MEASURED)]
    shown = []
    for row in rows.itertuples():
        name, written = _MEASURED[str(row.measure)]
        ends = {"difference": row.difference, "difference_low": row.low, "difference_high": row.high}
        shown.append(
            {
                "top of": SCOPE_WORDS[row.scope],
                "parameters": ACT_WORDS[row.act],
                "measure": name.format(task=label(task), other=label(other)),
                "shared": written(row.shared),
                "random": written(row.random),
                "difference": interval(ends, "difference", signed(written)),
                "q": f"{row.q:.2g}",
            }
        )
    return pandas.DataFrame(shown)


def _tests(tests: pandas.DataFrame) -> pandas.DataFrame:
    measures = {
        "representation": "activations: cosine",
        "gradient": "gradients: cosine",
        "inside": "gradients: cosine",
        "retrieval": "facts retrieved",
    }
    than = {"rest": "all outside", "random": "random ones"}
    shown = []
    for row in tests.itertuples():
        written = percent if row.measure == "retrieval" else two
        ends = {"difference_low": row.low, "difference_high": row.high, "difference": row.difference}
        shown.append(
            {
                "measure": measures[str(row.measure)],
                "where": SCOPE_WORDS.get(row.scope, row.unit.replace(".resid_post", "")),
                "facts": row.facts,
                "same fact": written(row.value),
                "against": than.get(row.than, row.than.replace("_", " ")),
                "there": written(row.control),
                "difference": interval(ends, "difference", signed(written)),
                "q": f"{row.q:.2g}",
            }
        )
    return pandas.DataFrame(shown)


def signature_sections(tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    """The sections of the steps ``signature`` and ``integrate``."""
    found = []
    if "signature" in figures:
        text = (
            "How far an answer's log-probability falls when the tokens of a span are replaced by those of another "
            "group's prompt; context is all other tokens before the answer. Answers for which a span has no such donor "
            "are left out."
        )
        rows = _of_spans(tables["signature"], "fall, nats")
        found.append(Section("What the answers rest on", [text], rows, figures["signature"], SEE_SIGNATURE))
    if "integrated_signature" in tables:
        text = (
            "Integrated gradients from a prompt of mean embeddings to the prompt itself: what each span adds to an "
            "answer's log-probability. They are no experiment, as replacing tokens is: where the two disagree, "
            "trust the replacement. Missed is how far they are from adding up to the whole change, mean over "
            "answers."
        )
        rows = _of_spans(tables["integrated_signature"], "adds, nats")
        found.append(Section("What integrated gradients say the answers rest on", [text], rows))
    return found


def _of_spans(table: pandas.DataFrame, effect: str) -> pandas.DataFrame:
    shown = {
        "task": table["task"].map(label),
        "span": table["span"],
        effect: [interval(row, "effect", two) for row in table.to_dict("records")],
        "share": [interval(row, "share", percent) for row in table.to_dict("records")],
        "answers": table["answers"],
    }
    last = (
        {"left out": table["left_out"]}
        if "delta" not in table
        else {"missed, nats": table["delta"].map("{:.2g}".format)}
    )
    return pandas.DataFrame(shown | last)
