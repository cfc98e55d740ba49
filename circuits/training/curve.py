"""How training goes: its progress, and exact match on some rows of each split along the way."""

import itertools
from collections.abc import Callable
from typing import Any

import pandas
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from circuits.facts import FactDataset
from circuits.metrics import evaluate
from circuits.tasks import Task
from circuits.training.recipes import Stage

#: Called with the stage's name, the steps done, and all its steps.
Progress = Callable[[str, int, int], None]

#: Splits followed during training, and how many rows of each.
_FOLLOWED = {"bio": 600, "qa_id": 300, "qa_ood": 300}


def followed_tasks(dataset: FactDataset, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The first rows of each split that is followed, as tasks."""
    return [
        Task.from_examples(split, itertools.islice(dataset.examples(split), count), tokenizer)
        for split, count in _FOLLOWED.items()
    ]


class Follower(TrainerCallback):
    """Reports progress and scores the followed tasks along the way; the scores live in the Trainer's log."""

    def __init__(
        self, model: PreTrainedModel, tasks: list[Task], stage: Stage, every: int, progress: Progress | None
    ) -> None:
        self.model, self.tasks, self.stage, self.every, self.progress = model, tasks, stage, every, progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Report the step; score if it is time."""
        if self.progress is not None:
            self.progress(self.stage.name, state.global_step, state.max_steps)
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self.model.eval()
            scores = {task.name: float(evaluate(self.model, task)["exact_match"].mean()) for task in self.tasks}
            self.model.train()
            state.log_history.append({"step": state.global_step, **scores})
            control.should_log = True
        return control

    def curve(self, state: TrainerState) -> pandas.DataFrame:
        """One row for each scored step: ``stage``, ``step``, ``loss``, ``learning_rate``, and exact match by split."""
        points: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            points.setdefault(entry["step"], {"stage": self.stage.name, "step": entry["step"]}).update(
                {key: entry[key] for key in ("loss", "learning_rate", *_FOLLOWED) if key in entry}
            )
        return pandas.DataFrame(points.values())
