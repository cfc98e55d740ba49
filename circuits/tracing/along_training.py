"""What a callback does that measures something every few steps of a `transformers.Trainer`.

1. It measures after the optimizer's step, on a model of its own that borrows the training model's tensors for that
   time: not a copy, and nothing of the training model (its mode, its gradients, its hooks) is touched. No random number
   is drawn. So the run's losses and weights are the same to the bit as without it.
2. Just before the Trainer saves its state, what was measured so far is saved beside it, and a run that goes on from a
   state goes on from what was measured up to that step.
"""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from circuits.errors import CircuitsError
from circuits.models import LeanModel, lean_model, refuse_hooks
from circuits.storage import atomic_folder


class AlongTraining(TrainerCallback, ABC):
    """Measures something every few steps; what, its subclasses say.

    Args:
        every: steps between measurements; the first is after so many steps.

    Raises:
        CircuitsError: ``every`` is less than 1; in training, there are no steps to measure at, the run goes on from a
            state that was saved without this callback, or a function is hooked into the model.
    """

    #: What is measured, in the plural; saved folders are called after it.
    noun: ClassVar[str]

    def __init__(self, every: int) -> None:
        if every < 1:
            raise CircuitsError(f"{self.noun} every {every} steps are none: the least is 1")
        self.every = every

    @abstractmethod
    def begin(self, steps: list[int]) -> None:
        """Forget what was measured; ``steps`` are those that `load` will bring back."""

    @abstractmethod
    def measure(self, model: LeanModel, step: int) -> None:
        """Measure at the weights of this moment."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save what was measured so far."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    @abstractmethod
    def end(self, model: PreTrainedModel) -> None:
        """Make the result, now that training has ended."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Start from nothing, or from what was saved with the state that training goes on from."""
        if self.every > state.max_steps:
            raise CircuitsError(f"{self.noun} every {self.every} steps are none in {state.max_steps} steps of training")
        self.begin(list(range(self.every, state.global_step + 1, self.every)))
        if state.global_step:
            folder = self._folder(args, state)
            if not folder.is_dir():
                raise CircuitsError(
                    f"training goes on from step {state.global_step}, but there are no {self.noun} up to it in "
                    f"{folder}: start again with an empty folder, or go on without {self.noun}"
                )
            self.load(folder)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Measure if it is time, and save if the Trainer is about to save."""
        if state.global_step % self.every == 0:
            refuse_hooks(others["model"], f"{self.noun} are measured on a model of their own, without it")
            self.measure(lean_model(others["model"]), state.global_step)
        return self._save_if_due(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save if the Trainer is about to save."""
        return self._save_if_due(args, state, control)

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        if control.should_save:
            with atomic_folder(self._folder(args, state)) as folder:
                self.save(folder)
        return control

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"{self.noun}-{state.global_step}"

    def on_save(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Drop what belongs to states that the Trainer has dropped."""
        for folder in Path(args.output_dir).glob(f"{self.noun}-*"):
            step = folder.name.rpartition("-")[2]
            if not (folder.parent / f"checkpoint-{step}").is_dir():
                shutil.rmtree(folder)

    def on_train_end(self, *_: Any, **others: Any) -> None:
        """Make the result."""
        self.end(others["model"])
