"""The folder of a study: what it holds, and what its steps share."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import pandas

from circuits.errors import CircuitsError
from circuits.facts import SPLITS, FactDataset
from circuits.masks import ParameterMask
from circuits.models import Model, facts_of, fingerprint, load_model
from circuits.rankings import BEHAVIOURS
from circuits.storage import flatten, read_json, write_json, write_table
from circuits.study.settings import StudySettings
from circuits.tasks import Task
from circuits.tracing import GradientTrace
from circuits.units import Head

#: The models that are compared, and all that are evaluated.
COMPARED = ("mixed", "two_stage")
EVALUATED = ("pre", "stage_1", "mixed", "two_stage", "two_stage_gentle")
TRACED = ("bio", "qa_id")


class StudyFolder:
    """What a study has written so far.

    Args:
        out: the folder.
        settings: of the study.
    """

    def __init__(self, out: Path, settings: StudySettings) -> None:
        self.out, self.settings = out, settings
        self.checkpoints, self.tables, self.figures = out / "checkpoints", out / "tables", out / "figures"
        self._models: dict[str, Model] = {}

    def claim(self) -> None:
        """Write down what this study is, or check that the folder's study is the same."""
        plan = self.out / "plan.json"
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if self.settings.model is not None:
            wanted["model_fingerprint"] = fingerprint(load_model(self.settings.model))
        if not plan.is_file():
            if self.out.exists() and any(not path.name.startswith(".") for path in self.out.iterdir()):
                raise CircuitsError(f"{self.out} holds something that is no study: choose another folder")
            write_json(plan, wanted)
            return
        # a setting that the plan does not know of had its default
        found = flatten(json.loads(json.dumps(asdict(StudySettings())))) | flatten(read_json(plan))
        for name, value in flatten(wanted).items():
            before = found.get(name)
            if before != value:
                raise CircuitsError(
                    f"{self.out} holds a study with {name} {before}, not {value}: choose another folder or delete it"
                )

    def check_answers(self) -> None:
        """Refuse what an earlier version evaluated: it kept no answers to compare models by."""
        if not (self.tables / "answers.parquet").is_file():
            raise CircuitsError(
                f"{self.out} was evaluated by an earlier version, which kept no answers: delete all of its steps but "
                "data.json and train.json, and run the study again"
            )

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

    def traces(self, name: str) -> list[GradientTrace]:
        """A model's traces of both tasks."""
        return [GradientTrace.load(self.out / "traces" / name / f"{split}.safetensors") for split in TRACED]

    def mask_file(self, name: str, scope: str) -> Path:
        """Where a model's shared parameters lie."""
        return self.out / "masks" / f"{name}{'' if scope == 'global' else f'-{scope}'}.safetensors"

    def mask(self, name: str, scope: str = "global") -> ParameterMask:
        """A model's shared parameters."""
        return ParameterMask.load(self.mask_file(name, scope))

    def table(self, name: str) -> pandas.DataFrame:
        """One of the result tables."""
        return pandas.read_parquet(self.tables / f"{name}.parquet")

    def all_tables(self) -> dict[str, pandas.DataFrame]:
        """The result tables by name."""
        return {path.stem: pandas.read_parquet(path) for path in sorted(self.tables.glob("*.parquet"))}

    def write(self, name: str, table: pandas.DataFrame) -> None:
        """Write a result table, with where it comes from."""
        facts = {
            "dataset": self.dataset.fingerprint,
            "models": {model: facts_of(loaded) for model, loaded in self._models.items()},
            "settings": read_json(self.out / "plan.json"),
            "seed": self.settings.seed,
        }
        write_table(self.tables / f"{name}.parquet", table, facts)

    def best_graft(self, name: str) -> str | None:
        """The score that gave the smallest graft of a model; None if there is nothing to graft."""
        table = self.table("grafts")
        rows = table[(table["model"] == name) & table["chosen"].astype(bool)]
        return None if rows.empty else str(rows.sort_values("size", kind="stable")["score"].iloc[0])

    def top_head(self) -> Head:
        """The head of the mixed model with the largest Shared Size."""
        table = self.table("shared_heads")
        rows = table[table["model"] == "mixed"].sort_values("size", ascending=False, kind="stable")
        return Head.parse(rows["unit"].iloc[0])

    def attending_head(self) -> Head:
        """The head of the mixed model whose attention shows a behaviour in both formats most."""
        table = self.table("attention")
        rows = table[table["model"] == "mixed"]
        best = (
            rows[[behaviour.name for behaviour in BEHAVIOURS]]
            .max(axis="columns")
            .sort_values(ascending=False, kind="stable")
            .index[0]
        )
        return Head.parse(rows["unit"][best])
