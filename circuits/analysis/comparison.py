"""Two models on the same tasks: both analyses, then every number of one beside the other.

1. Both are analysed, each in a folder of its own; the same examples are asked of both.
2. What was measured answer by answer is compared answer by answer: paired differences, with intervals and tests over
   what belongs together (docs/method.md, section 9), corrected by Benjamini–Hochberg over the rows of each table.
3. Masks are compared by how many parameters they have in common, beside how many two independent sets of their sizes
   in each tensor would have. They can only be compared where both models have the same parameters.
4. Sizes (of shared sets, of grafts) stand beside each other without a test: one pair of models does not tell how much
   they vary.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from circuits.analysis.analysis import Analysis, Tables, analysed, check_place
from circuits.analysis.case import AnalysisSettings
from circuits.analysis.compared_consistency import consistency_differences, figures_of_both
from circuits.analysis.comparison_page import figures_of, largest, write_comparison_page
from circuits.analysis.differences import SIDES, paired_differences
from circuits.analysis.summary import records
from circuits.errors import CircuitsError
from circuits.executors import Executor, choose_executor
from circuits.masks import ParameterMask, ablation_means, ablation_summary
from circuits.models import Model
from circuits.storage import claim, provenance, read_json, write_json, write_table
from circuits.tasks import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Comparison:
    """Two models on the same tasks, in a folder; shows itself in a notebook.

    Args:
        folder: what `compare` or ``circuits compare`` wrote.

    Attributes:
        folder: the folder.
        a: the analysis of the first model.
        b: that of the second.
        tables: the tables of differences by name.

    Raises:
        CircuitsError: the folder holds no comparison.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "comparison.json").is_file():
            raise CircuitsError(f"{self.folder} holds no comparison: it has no comparison.json")
        self.a, self.b = (Analysis(self.folder / side) for side in SIDES)
        self.tables = Tables(self.folder / "tables")

    @property
    def names(self) -> tuple[str, str]:
        """What the models are called."""
        one, other = read_json(self.folder / "comparison.json")["names"]
        return one, other

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        summary: dict[str, Any] = read_json(self.folder / "summary.json")
        return summary

    @property
    def figures(self) -> "dict[str, go.Figure]":
        """The figures of differences by name; each analysis has its own."""
        return figures_of(self.tables, self.names) | figures_of_both(self.a.tables, self.b.tables, self.names)

    @property
    def report(self) -> Path:
        """The page of results."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        return f"Comparison({self.names[0]!r}, {self.names[1]!r}, {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        shown = self.tables["accuracy"].round(3).to_html(index=False, border=0) if "accuracy" in self.tables else ""
        return f"<b>{escape(self.names[0])}</b> (a) and <b>{escape(self.names[1])}</b> (b){shown}"


def compare(
    a: Model,
    b: Model,
    tasks: Task | Sequence[Task],
    *,
    out: str | Path,
    pre: Model | None = None,
    names: tuple[str, str] = ("a", "b"),
    settings: AnalysisSettings | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    check_start: bool = True,
    say: Callable[[str], None] | None = None,
    executor: str | Executor = "serial",
) -> Comparison:
    """Analyse two models on the same tasks, and compare them.

    Args:
        a: loaded with `circuits.load_model`.
        b: another one.
        tasks: as for `analyse`.
        out: the folder for the results; the analyses are in its folders ``a`` and ``b``, and those that are finished
            there keep the pages they have.
        pre: the model that both were fine-tuned from.
        names: what to call the models.
        settings: as for `analyse`.
        only: as for `analyse`.
        skip: as for `analyse`.
        check_start: as for `analyse`.
        say: as for `analyse`.
        executor: as for `analyse`.

    Returns:
        Both analyses, and their differences, b less a: ``accuracy``, ``ablation``, ``sweep``, ``patches`` (paired),
        ``masks``, ``heads`` (Shared Size), ``grafts``, ``areas``; of the same facts, and paired by them,
        ``gradient_consistency``, ``representation_consistency``, ``signature``.

    Raises:
        CircuitsError: as `analyse`; or the folder holds something else.
    """
    folder, chosen = Path(out), choose_executor(executor)
    for model in (a, b):  # before either is analysed
        check_place(model, chosen)
    claim_comparison(folder, names)
    analyses = []
    for side, name, model in zip(SIDES, names, (a, b), strict=True):
        analyses.append(
            analysed(
                model,
                tasks,
                pre,
                out=folder / side,
                settings=settings,
                only=only,
                skip=skip,
                check_start=check_start,
                say=None if say is None else lambda line, name=name: say(f"{name}: {line}"),  # type: ignore[misc]
                executor=chosen,
                anew=False,
            )
        )
    facts = provenance(**{side: one.facts for side, one in zip(SIDES, analyses, strict=True)}, names=list(names))
    tables = dict(_differences(*analyses))
    for name, table in tables.items():
        write_table(folder / "tables" / f"{name}.parquet", table, facts, csv=True)
    found = Comparison(folder)
    write_json(folder / "summary.json", {name: records(table.head(20)) for name, table in tables.items()})
    write_comparison_page(found.report, found.tables, found.figures, found.names)
    return found


def claim_comparison(folder: Path, names: tuple[str, str]) -> None:
    """Make a folder that of a comparison, or check that it is.

    Raises:
        CircuitsError: both models have one name, or the folder holds something else.
    """
    if names[0] == names[1]:
        raise CircuitsError(f"both models are called {names[0]}: give them names of their own")
    claim(folder / "comparison.json", {"names": list(names)}, "a comparison")


def _differences(a: Analysis, b: Analysis) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Every table of differences that both analyses have what is needed for."""

    def both(name: str) -> bool:
        return name in a.tables and name in b.tables

    if both("answers"):
        yield "accuracy", paired_differences(a.tables["answers"], b.tables["answers"], ["task"])
    if both("ablation_answers"):
        yield "ablation", _drops(a.tables["ablation_answers"], b.tables["ablation_answers"])
    for name, answers in (("sweep", "sweep_answers"), ("patches", "patch_answers")):
        if both(answers):
            keys = ["task", "unit", "mode"]
            table = paired_differences(a.tables[answers], b.tables[answers], keys, ending="_effect")
            yield name, _with_places(table, a.tables[name])
    if both("shared_heads"):
        yield "heads", _sizes(a.tables["shared_heads"], b.tables["shared_heads"])
        yield "masks", _overlaps(a, b)
    if both("grafts") and len(a.tables["grafts"]) and len(b.tables["grafts"]):
        yield "grafts", _smallest_grafts(a.tables["grafts"], b.tables["grafts"])
    if both("ranking_summary"):
        keys = ["kind", "condition", "metric", "task"]
        one, other = (side.tables["ranking_summary"].set_index(keys) for side in (a, b))
        joined = one.add_suffix("_a").join(other.add_suffix("_b")).reset_index()
        yield "areas", joined[[*keys, *(name for name in joined if name.startswith(("auc", "n95", "n50")))]]
    yield from consistency_differences(a.tables, b.tables)


def _drops(a: pandas.DataFrame, b: pandas.DataFrame) -> pandas.DataFrame:
    """What doing without the shared parameters costs each model, answer by answer; and without random ones."""

    def drops(answers: pandas.DataFrame) -> pandas.DataFrame:
        names = ["scope", "task", "example", "group", *(["attribute"] if "attribute" in answers else [])]
        before, after = (
            answers[answers["condition"] == condition].set_index(names)[["exact_match", "log_prob"]].astype(float)
            for condition in ("none", "shared")
        )
        dropped = (before - after).add_suffix("_drop").reset_index()
        # several answers of an example are told apart by their order
        return dropped.assign(start=dropped.groupby(["scope", "task", "example"]).cumcount())

    keys = ["scope", "task"]
    table = paired_differences(drops(a), drops(b), keys, ending="_drop")
    controls = [
        ablation_summary(ablation_means(answers)).set_index(keys)[["thinned_drop", "random_drop"]] for answers in (a, b)
    ]
    for side, control in zip(SIDES, controls, strict=True):
        table = table.join(control.add_prefix("exact_match_").add_suffix(f"_{side}"), on=keys)
    return table


def _with_places(table: pandas.DataFrame, measured: pandas.DataFrame) -> pandas.DataFrame:
    """The table with layer and index of its heads, the largest differences first."""
    places = measured.drop_duplicates("unit").set_index("unit")[["layer", "index"]]
    placed = table.join(places, on="unit")
    effect = largest(placed)
    return placed.sort_values(effect, key=abs, ascending=False, kind="stable", ignore_index=True)


def _sizes(a: pandas.DataFrame, b: pandas.DataFrame) -> pandas.DataFrame:
    keys = ["scope", "unit", "layer", "index"]
    joined = a[[*keys, "size"]].merge(b[[*keys, "size"]], on=keys, suffixes=("_a", "_b"), how="outer").fillna(0)
    joined["difference"] = joined["size_b"] - joined["size_a"]
    return joined.sort_values("difference", key=abs, ascending=False, kind="stable", ignore_index=True)


def _overlaps(a: Analysis, b: Analysis) -> pandas.DataFrame:
    rows = []
    masks, others = a.masks, b.masks
    for scope, mask in masks.items():
        other = others[scope]
        row: dict[str, Any] = {"scope": scope, "size_a": mask.size, "size_b": other.size}
        if {name: packed.shape for name, packed in mask.packed.items()} == {
            name: packed.shape for name, packed in other.packed.items()
        }:
            row |= overlap(mask, other)
        rows.append(row)
    return pandas.DataFrame(rows)


def overlap(mask: ParameterMask, other: ParameterMask) -> dict[str, float]:
    """How many parameters two masks of models of one kind share, and what sets with as many in each tensor would."""
    both, either = 0, 0
    chance = 0.0
    for name, packed in mask.packed.items():
        one, two = mask.masks[name], other.masks[name]
        both += int((one & two).sum())
        either += int((one | two).sum())
        chance += packed.count * other.packed[name].count / one.numel()
    return {
        "both": both,
        "jaccard": both / either if either else float("nan"),
        "chance": chance,
        "lift": both / chance if chance else float("nan"),
    }


def _smallest_grafts(a: pandas.DataFrame, b: pandas.DataFrame) -> pandas.DataFrame:
    chosen = [
        table[table["chosen"].astype(bool)].sort_values("size", kind="stable").drop_duplicates("task").set_index("task")
        for table in (a, b)
    ]
    columns = ["score", "size", "fraction", "exact_match"]
    return chosen[0][columns].add_suffix("_a").join(chosen[1][columns].add_suffix("_b"), how="outer").reset_index()
