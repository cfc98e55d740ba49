"""Gradient consistency along the course of training (docs/method.md, section 8).

1. Every few steps, after the optimizer's, the gradients of both tasks' examples are compared at the weights of that
   moment, on a model that borrows the training model's tensors, as `circuits.tracing.TraceCallback` does: losses and
   weights of the run are the same to the bit as without it.
2. Just before the Trainer saves its state, the rows so far are saved beside it, and a run that goes on from a state
   goes on from the rows of that step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from circuits.consistency.gradients import by_name, compared, wanted_parts
from circuits.consistency.pairs import GradientConsistency, groups_of, pair_kinds
from circuits.errors import CircuitsError
from circuits.masks import ParameterMask
from circuits.models import lean_model
from circuits.storage import write_table
from circuits.tasks import Task

_FILE = "consistency-{step}.parquet"


class ConsistencyCallback(TrainerCallback):
    """Measures gradient consistency while a `transformers.Trainer` trains, without disturbing it.

    Args:
        task: probe examples in one format.
        other: those in another; of facts in common, as `circuits.tasks.pair_facts` gives them.
        every: steps between measurements; the first is after so many steps.
        out: a parquet file for the table, written when training ends.
        by: as in `gradient_consistency`, and so are ``loss`` and ``batch_size``.
        mask: compare inside it and outside it too, whichever model it was made for; several by name.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass.

    Raises:
        CircuitsError: as `gradient_consistency`; in training, there are no steps to measure at, or the run goes on from
            a state that was saved without this callback.

    Source:
        arXiv 2505.16178, v2; docs/method.md, section 8.

    Example:
        >>> import tempfile
        >>> from circuits.tasks import pair_facts
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import Optimisation, train
        >>> folder, tokenizer = Path(tempfile.mkdtemp()), word_tokenizer()
        >>> dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> probes = pair_facts(*(dataset.task(split, tokenizer) for split in ("bio", "qa_id")), 6)
        >>> measuring = ConsistencyCallback(*probes, every=2)
        >>> _ = train("mixed", dataset, folder, optimisation=Optimisation(steps=4), callbacks={"mixed": [measuring]})
        >>> measuring.table.query("kind == 'matched'")["step"].tolist()
        [2, 4]
    """

    def __init__(
        self,
        task: Task,
        other: Task,
        every: int,
        *,
        out: str | Path | None = None,
        by: Sequence[str] = ("all",),
        mask: ParameterMask | Mapping[str, ParameterMask] | None = None,
        loss: str = "answer",
        batch_size: int = 64,
    ) -> None:
        if every < 1:
            raise CircuitsError(f"measurements every {every} steps are none: the least is 1")
        self.every, self.out = every, None if out is None else Path(out)
        self._kinds = pair_kinds(task, other)
        self._tasks = task.right_padded(), other.right_padded()
        self._masks = by_name(mask)
        self._by = wanted_parts(by, self._masks)
        self._loss, self._batch_size = loss, batch_size
        self._rows: list[pandas.DataFrame] = []

    @property
    def table(self) -> pandas.DataFrame:
        """The rows of `GradientConsistency.means` so far, with ``step`` and ``by``; empty before the first step."""
        return pandas.concat(self._rows, ignore_index=True) if self._rows else pandas.DataFrame()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Start from nothing, or from what was saved with the state that training goes on from."""
        if self.every > state.max_steps:
            raise CircuitsError(
                f"measurements every {self.every} steps are none in {state.max_steps} steps of training"
            )
        self._rows = []
        if state.global_step:
            file = Path(args.output_dir) / _FILE.format(step=state.global_step)
            if not file.is_file():
                raise CircuitsError(
                    f"training goes on from step {state.global_step}, but there is no {file} of the steps before: "
                    "start again with an empty folder, or go on without measuring"
                )
            self._rows = [pandas.read_parquet(file)]
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Measure if it is time, and save the rows if the Trainer is about to save."""
        if state.global_step % self.every == 0:
            self._measure(others["model"], state.global_step)
        return self._save_if_due(args, state, control)

    def _measure(self, model: PreTrainedModel, step: int) -> None:
        cosines, parts = compared(
            lean_model(model),
            *self._tasks,
            self._by,
            masks=self._masks,
            loss=self._loss,
            batch_size=self._batch_size,
        )
        found = GradientConsistency(cosines, parts, self._kinds, groups_of(*self._tasks))
        for name in cosines:
            means = found.means(name)
            self._rows.append(means.assign(step=step, by=name)[["step", "by", *means]])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save the rows if the Trainer is about to save."""
        return self._save_if_due(args, state, control)

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        if control.should_save:
            self._write(Path(args.output_dir) / _FILE.format(step=state.global_step))
        return control

    def on_save(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Drop rows that belong to states the Trainer has dropped."""
        for file in Path(args.output_dir).glob(_FILE.format(step="*")):
            step = file.stem.rpartition("-")[2]
            if not (file.parent / f"checkpoint-{step}").is_dir():
                file.unlink()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Write the table."""
        if self.out is not None:
            self._write(self.out)

    def _write(self, path: Path) -> None:
        facts = {"tasks": [task.provenance for task in self._tasks], "every": self.every, "loss": self._loss}
        write_table(path, self.table, facts)
