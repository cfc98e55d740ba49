"""The folder of a study: what it holds, and what its steps share."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from circuits.analysis import STEPS, Tables
from circuits.analysis.artifacts import Table
from circuits.analysis.consistency import consistency, integrate, signature
from circuits.analysis.differences import SIDES
from circuits.analysis.running import done
from circuits.facts import SPLITS, FactDataset
from circuits.models import Model, facts_of, fingerprint, load_model
from circuits.storage import claim, read_json
from circuits.study.settings import StudySettings
from circuits.tasks import Task

#: The models that are compared, of two-stage training the one that forgets little; the other one, of which less is
#: measured; and all that are evaluated.
COMPARED = ("mixed", "two_stage_gentle")
FULL_RATE = "two_stage"
EVALUATED = ("pre", "stage_1", "mixed", "two_stage", "two_stage_gentle")
#: Steps of an analysis that the study does without, or in its own way.
LEFT_OUT = ("neurons", "attend")
#: Tables about the parameters updated by both formats.
_OF_UPDATED = (
    "ablation",
    "ablation_answers",
    "gradient_consistency",
    "gradient_consistency_pairs",
    "localisation",
    "localisation_facts",
)
#: Tables of an analysis that no page shows: those with one row for each unit and answer.
_LONG = ("sweep_answers", "patch_answers", "ranking_answers")


class Study:
    """A study in a folder, as its steps see it.

    Args:
        out: the folder.
        settings: of the study.
        say: called with a line when a step of an analysis begins.
    """

    def __init__(self, out: Path, settings: StudySettings, say: Callable[[str], None] | None = None) -> None:
        self.out, self.settings, self.say = out, settings, say
        self.checkpoints, self.figures, self.along = (out / name for name in ("checkpoints", "figures", "along"))
        self.comparison, self.full_rate = out / "comparison", out / "full_rate"
        self.arms = {name: self.comparison / side for name, side in zip(COMPARED, SIDES, strict=True)}
        self.updated = {name: out / "updated" / name for name in COMPARED}
        self._models: dict[str, Model] = {}

    def claim(self) -> None:
        """Write down what this study is, or check that the folder's study is the same."""
        wanted = asdict(self.settings)
        if self.settings.model is not None:
            wanted["model_fingerprint"] = fingerprint(load_model(self.settings.model))
        claim(self.out / "plan.json", wanted, "a study")

    @property
    def plan(self) -> dict[str, Any]:
        """What `claim` wrote."""
        plan: dict[str, Any] = read_json(self.out / "plan.json")
        return plan

    @property
    def facts(self) -> dict[str, Any]:
        """Where the results of steps come from."""
        models = {name: facts_of(self.model(name)) for name in EVALUATED}
        return {
            "dataset": self.dataset.fingerprint,
            "models": models,
            "settings": self.plan,
            "seed": self.settings.seed,
        }

    @property
    def start(self) -> str:
        """What the models were before training, for a reader."""
        model = self.settings.model
        return f"tiny-{self.settings.family}" if model is None else Path(model).resolve().name

    @cached_property
    def dataset(self) -> FactDataset:
        """The people."""
        return FactDataset(self.out / "data")

    def model(self, name: str) -> Model:
        """One of the trained models, kept once it is loaded."""
        if name not in self._models:
            self._models[name] = load_model(self.checkpoints / name)
        return self._models[name]

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The task of every split."""
        tokenizer = self.model("pre").tokenizer
        return {split: self.dataset.task(split, tokenizer) for split in SPLITS}

    def sample(self, split: str, count: int | None) -> Task:
        """So many examples of a split; all if no number is given."""
        return self.tasks[split] if count is None else self.tasks[split].sample(count, self.settings.seed)

    def missing(self) -> list[str]:
        """The steps of the analyses that one arm or the other is still to do."""
        steps = [one for one in STEPS if one.name not in LEFT_OUT]
        return [one.name for one in steps if not all(done(folder, one) for folder in self.arms.values())]

    def tables(self) -> dict[str, pandas.DataFrame]:
        """The study's own tables by name, and those of both arms with the column ``model``, as far as they are done."""
        found = dict(Tables(self.out / "tables"))
        missing = self.missing()
        arms = {model: Tables(folder / "tables") for model, folder in self.arms.items()}
        third = Tables(self.full_rate / "tables")
        own = {made.name for one in (consistency, signature, integrate) for made in one.writes}
        for name in (
            made.name for one in STEPS if one.name not in missing for made in one.writes if isinstance(made, Table)
        ):
            if name in found or name in _LONG or not all(name in tables for tables in arms.values()):
                continue
            more = {FULL_RATE: third} if name in own and name in third else {}
            parts = [tables[name].assign(model=model) for model, tables in (arms | more).items()]
            joined = pandas.concat([part for part in parts if len(part)] or parts, ignore_index=True)
            found[name] = _as_in_the_paper(joined)
        return found | self._updated_tables()

    def _updated_tables(self) -> dict[str, pandas.DataFrame]:
        """Those of the parameters updated by both formats, their names beginning with ``updated_``."""
        arms = {model: Tables(folder / "tables") for model, folder in self.updated.items()}
        return {
            f"updated_{name}": pandas.concat(
                [tables[name].assign(model=model) for model, tables in arms.items()], ignore_index=True
            )
            for name in _OF_UPDATED
            if all(name in tables for tables in arms.values())
        }


def _as_in_the_paper(table: pandas.DataFrame) -> pandas.DataFrame:
    """With the name that the paper's figures have for the ranking by the trace of questions."""
    named = [name for name in ("metric", "other") if name in table]
    return table.assign(**{name: table[name].replace("qa_id_trace", "qa_trace") for name in named})
