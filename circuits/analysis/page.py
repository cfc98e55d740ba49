"""The page of an analysis: what was found, in the order in which one asks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.analysis.summary import top_table
from circuits.figures import Number, Section, write_report
from circuits.figures.consistency import ACT_WORDS
from circuits.figures.style import label

#: The two ways to take the top parameters, in words.
SCOPE_WORDS = {"global": "of all parameters", "tensor": "of each tensor"}

SEE_ALIKE = (
    "Layer by layer: solid lines are pairs that tell the same fact, dashed ones pairs that do not; the wider the gap, "
    "the more alike the tasks are."
)
SEE_SIGNATURE = "The longer a part of a bar, the more of the answer is lost when those tokens are somebody else's."
#: Figure → what there is to see in it.
_SEE = {
    "sharing": "The wider the gap between the solid line and the dashed control, the more is shared beyond what the "
    "choice of tensors alone explains.",
    "ablation": "Compare the red bars with the grey ones of as many random parameters; where there are light red ones, "
    "compare these.",
    "sweep": "Red: the answer becomes less likely; blue: more likely.",
    "attention": "The darker a head, the more of its attention goes there.",
    "inside": "Where the shared parameters lie above the random ones, the agreement is theirs.",
    "localisation": "The agreement hangs on the shared parameters if it falls further without them than without as "
    "many random ones.",
}


def named_tasks(table: pandas.DataFrame) -> pandas.DataFrame:
    """A table with its tasks as figures name them."""
    return table.assign(**{name: table[name].map(label) for name in ("task", "other") if name in table})


def write_page(
    path: Path, summary: Mapping[str, Any], tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]
) -> None:
    """Write the report of an analysis."""
    sections = [
        *_tasks(summary),
        *_shared(summary, figures),
        *_without(summary, figures),
        *_grafts(summary),
        *_heads(tables, figures),
        *_patched(figures),
        *_rankings(figures),
        *_attention(figures),
        *consistency_sections(tables, figures),
        *localisation_sections(tables, figures),
        *_signature(tables, figures),
    ]
    if summary["left_out"]:
        reasons = [f"{name}: {reason}." for name, reason in summary["left_out"].items()]
        sections.append(Section("What was not done", reasons))
    tasks = " · ".join(map(label, summary["tasks"]))
    source = Path(summary["model"]["source"]).name
    seconds = sum(summary["seconds"].values())
    write_report(
        path,
        f"{source}: {tasks}",
        _lead(summary),
        sections=sections,
        footer=f"{seconds / 60:.1f} minutes; circuits analyse",
        numbers=_numbers(summary, tables),
        setting={"model": source, "tasks": tasks, "before fine-tuning": Path(summary["pre"]["source"]).name}
        if summary["pre"]
        else {"model": source, "tasks": tasks},
    )


def _numbers(summary: Mapping[str, Any], tables: Mapping[str, pandas.DataFrame]) -> list[Number]:
    """What is shared, what that does, and which head matters most; those that were measured."""
    found = []
    shared = next((row for row in summary.get("shared", ()) if row["scope"] == "global"), None)
    if shared is not None:
        what = f"parameters that the tasks share, of {shared['total']:,}"
        found.append(Number(f"{shared['size']:,}", what, f"permuted: {_percent(shared['permuted_share'])} of the top"))
    dropped = [row for row in summary.get("ablation", ()) if row["scope"] == "global"]
    if dropped:
        row = max(dropped, key=lambda row: row["before"] - row["after"])
        what = f"exact match on {label(row['task'])} without them, from {_percent(row['before'])}"
        control = f"without as many random ones it falls by {_percent(row['random_drop'])}"
        found.append(Number(_percent(row["after"]), what, control))
    top = top_table(tables, 1)
    if top is not None:
        found.append(Number(str(top["head"][0]), "the head that changes answers most", "of all heads, one at a time"))
    return found


def _lead(summary: Mapping[str, Any]) -> str:
    shared = {row["scope"]: row for row in summary.get("shared", ())}
    if "global" not in shared:
        return "What one task needs of the model."
    row = shared["global"]
    return (
        f"The tasks share {row['size']:,} of {row['total']:,} parameters: {row['share']:.0%} of the top "
        f"{row['influenced'] / row['total']:.2%} of each. With one task's gradients shuffled within each tensor it "
        f"would be {row['permuted_share']:.0%}."
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1%}"


def _two(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"


def _signed(written: Callable[[float | None], str]) -> Callable[[float | None], str]:
    """The same with a plus sign where there is no minus."""

    def signed(value: float | None) -> str:
        return f"{'+' * (value is not None and value >= 0)}{written(value)}"

    return signed


def _interval(row: Mapping[str, Any], name: str, written: Callable[[float | None], str]) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return written(row[name]) + ("" if low is None or low != low else f" ({written(low)} to {written(high)})")


def _tasks(summary: Mapping[str, Any]) -> Sequence[Section]:
    scored = summary.get("tasks_scored", ())
    foils = any(row.get("logit_diff") is not None for row in scored)
    rows = [
        {
            "task": label(row["task"]),
            "answers": row["answers"],
            "exact match": _interval(row, "exact_match", _percent),
            "log-probability (nats)": _interval(row, "log_prob", _two),
            **(
                {"logit difference": "" if row.get("logit_diff") is None else _interval(row, "logit_diff", _two)}
                if foils
                else {}
            ),
        }
        for row in scored
    ]
    text = "Means over answers and their 95% intervals."
    if foils:
        text += " The logit difference is that of the answer and its foil."
    return [Section("What the model says", [text], pandas.DataFrame(rows))] if rows else []


def _shared(summary: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    rows = [
        {
            "the top": SCOPE_WORDS[row["scope"]],
            "shared": f"{row['size']:,}",
            "share": _percent(row["share"]),
            "permuted": _percent(row["permuted_share"]),
            "lift over chance": f"{row['lift']:.1f}",
            "permuted lift": f"{row['permuted_lift']:.1f}",
            "Gini over heads": "–" if row["gini"] is None else f"{row['gini']:.2f}",
            "random": "–" if row["random_gini"] is None else f"{row['random_gini']:.2f}",
        }
        for row in summary.get("shared", ())
    ]
    if not rows:
        return []
    text = (
        "Parameters with a large gradient in every task. The control permutes one task's gradients within each tensor; "
        "random is a set of the same size."
    )
    found = [Section("What the tasks share", [text], pandas.DataFrame(rows), figures.get("sharing"), _SEE["sharing"])]
    if "shared_heads" in figures:
        found.append(
            Section(
                "Where it is",
                ["Shared Size: how many of a head's parameters are shared."],
                None,
                figures["shared_heads"],
                "Each cell is a head; the darker, the more of its parameters are shared.",
            )
        )
    return found


def _random_drop(row: Mapping[str, Any]) -> str:
    """With its interval, unless that holds every drop that there can be."""
    low, high = row["random_drop_low"], row["random_drop_high"]
    if low is not None and low <= row["before"] - 1 and high >= row["before"]:
        return f"{_percent(row['random_drop'])} (too few draws to tell)"
    return _interval(row, "random_drop", _percent)


def _without(summary: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    rows = [
        {
            "the top": SCOPE_WORDS[row["scope"]],
            "task": label(row["task"]),
            "parameters": f"{row['parameters']:,}",
            "before": _percent(row["before"]),
            "without them": _percent(row["after"]),
            "drop, thinned": _percent(row["thinned_drop"]),
            "drop, random": _random_drop(row),
            **{
                f"log-prob, {words}": f"{row[f'log_prob_{name}']:.2f}"
                for name, words in (("before", "before"), ("thinned", "thinned"), ("random", "random"))
            },
        }
        for row in summary.get("ablation", ())
    ]
    if not rows:
        return []
    what = "go back to what they were before fine-tuning" if summary["pre"] else "become zero"
    text = (
        f"Exact match when the shared parameters {what}, beside as many random ones outside them; where a tensor has "
        "too little room for these, both are thinned, and compared as such. The answers' mean log-probability (nats) "
        "tells more where few answers are right to begin with."
    )
    return [
        Section(
            "What happens without it", [text], pandas.DataFrame(rows), figures.get("ablation_global"), _SEE["ablation"]
        )
    ]


def _grafts(summary: Mapping[str, Any]) -> Sequence[Section]:
    rows = [
        {
            "task": label(row["task"]),
            "parameters": f"{row['size']:,}",
            "of all": _percent(row["fraction"]),
            "taken by": row["score"].replace("_x_", " × ").replace("_", " "),
            **{f"exact match on {label(task)}": _percent(value) for task, value in row["on"].items()},
        }
        for row in summary.get("grafts", ())
    ]
    text = (
        "The fewest fine-tuned parameters that were found to keep a task in the model before fine-tuning, and what "
        "that model then answers."
    )
    return [Section("What is enough of the fine-tuning", [text], pandas.DataFrame(rows))] if rows else []


def _heads(tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    top = top_table(tables)
    if top is None:
        return []
    text = (
        "The heads whose ablation or patching changes most, relative to the largest change of each column: change of "
        "the logit difference where tasks have foils, else of the log-probability (nats), with its 95% interval (of "
        "each head alone, not corrected for their number; the tables have corrected p-values)."
    )
    shown = top.rename(columns=lambda name: ": ".join(map(label, name.split(": "))) if ": " in name else name)
    return [Section("Which heads", [text], shown, figures.get("sweep"), _SEE["sweep"])]


def _patched(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    text = (
        "Change of the answer's log-probability (nats), or of its logit less the foil's, when one head's output is "
        "taken from the run on the changed prompt: below zero where the head carries what was changed."
    )
    return (
        [Section("Which heads carry what was changed", [text], None, figures["patches"], _SEE["sweep"])]
        if "patches" in figures
        else []
    )


def _rankings(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    found = []
    for name, figure in figures.items():
        condition, _, kind = name.rpartition("_")
        if kind in ("heads", "neurons") and condition in ("zero", "revert", "sufficient"):
            if condition == "sufficient":
                see = "The sooner a line rises, the better its ranking finds what is enough."
                title, text = "Are the top ones enough", f"Exact match when only the top {kind} are fine-tuned"
            else:
                see = "The sooner a line falls, the better its ranking finds what is needed."
                become = "zero" if condition == "zero" else "what they were before fine-tuning"
                title, text = "Are the top ones needed", f"Exact match when the top {kind} become {become}"
            found.append(Section(f"{title}? {kind.capitalize()}", [f"{text}, along each ranking."], None, figure, see))
    return found


def _attention(figures: Mapping[str, go.Figure]) -> Sequence[Section]:
    text = "Mean attention to each span of a task. The heads that stand out are drawn in the folder figures."
    title = "What heads attend to"
    return [Section(title, [text], None, figures["attention"], _SEE["attention"])] if "attention" in figures else []


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
    "cosine": ("activations: cosine", _two),
    "retrieved": ("facts retrieved", _percent),
    "exact_match": ("{other}: right", _percent),
    "task_exact_match": ("{task}: right", _percent),
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
                "difference": _interval(ends, "difference", _signed(written)),
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
        written = _percent if row.measure == "retrieval" else _two
        ends = {"difference_low": row.low, "difference_high": row.high, "difference": row.difference}
        shown.append(
            {
                "measure": measures[str(row.measure)],
                "where": SCOPE_WORDS.get(row.scope, row.unit.replace(".resid_post", "")),
                "facts": row.facts,
                "same fact": written(row.value),
                "against": than.get(row.than, row.than.replace("_", " ")),
                "there": written(row.control),
                "difference": _interval(ends, "difference", _signed(written)),
                "q": f"{row.q:.2g}",
            }
        )
    return pandas.DataFrame(shown)


def _signature(tables: Mapping[str, pandas.DataFrame], figures: Mapping[str, go.Figure]) -> Sequence[Section]:
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
        effect: [_interval(row, "effect", _two) for row in table.to_dict("records")],
        "share": [_interval(row, "share", _percent) for row in table.to_dict("records")],
        "answers": table["answers"],
    }
    last = (
        {"left out": table["left_out"]}
        if "delta" not in table
        else {"missed, nats": table["delta"].map("{:.2g}".format)}
    )
    return pandas.DataFrame(shown | last)
