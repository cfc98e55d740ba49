"""Gradient traces along the course of training (docs/method.md, section 1).

1. Every few steps, after the optimizer's, the probe examples of each task are traced at the weights of that moment, and
   the traces are added up.
2. The trace runs on a model of its own that borrows the training model's tensors for that time: not a copy, and nothing
   of the training model (its mode, its gradients, its hooks) is touched. No random number is drawn. So the run's losses
   and weights are the same to the bit as without it.
3. Just before the Trainer saves its state, the sums are saved beside it, and a run that goes on from a state goes on
   from the sums of that step.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from circuits.errors import CircuitsError
from circuits.models import fingerprint_of, lean_model
from circuits.storage import atomic_folder
from circuits.tasks import Task
from circuits.tracing.running_trace import RunningTrace
from circuits.tracing.settings import TraceSettings
from circuits.tracing.trace import GradientTrace

_FOLDER = "traces-{step}"


class TraceCallback(TrainerCallback):
    """Traces tasks while a `transformers.Trainer` trains, without disturbing it.

    Args:
        tasks: probe examples of each task, with names of their own.
        every: steps between traces; the first is after so many steps.
        out: a folder that gets ``<task>.safetensors`` when training ends.
        statistic: as in `trace_gradients`, and so are ``loss``, ``batch_size``, ``per`` and ``components``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass.
        per: ``example`` or ``batch``.
        components: which parts of the model.

    Raises:
        CircuitsError: there is no such statistic, loss or component, or two tasks have the same name; in training, the
            run goes on from a state that was saved without this callback or with other tasks or settings.

    Source:
        arXiv 2505.16178, section 3; docs/method.md, section 1.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import Optimisation, train
        >>> folder, tokenizer = Path(tempfile.mkdtemp()), word_tokenizer()
        >>> dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> probes = [dataset.task(split, tokenizer).sample(8) for split in ("bio", "qa_id")]
        >>> tracing = TraceCallback(probes, every=2)
        >>> _ = train("mixed", dataset, folder, optimisation=Optimisation(steps=4), callbacks={"mixed": [tracing]})
        >>> tracing.traces["qa_id"], tracing.traces["qa_id"].provenance["steps"]
        (GradientTrace('qa_id', parameters=737,280, examples=8), [2, 4])
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        every: int,
        out: str | Path | None = None,
        statistic: str = "abs",
        loss: str = "answer",
        batch_size: int = 32,
        per: str = "example",
        components: Sequence[str] = ("attention", "mlp"),
    ) -> None:
        if len({task.name for task in tasks}) < len(tasks) or not tasks:
            raise CircuitsError("the tasks to trace during training must have names of their own, and be one at least")
        if every < 1:
            raise CircuitsError(f"traces every {every} steps are none: the least is 1")
        self.tasks, self.every, self.out = list(tasks), every, None if out is None else Path(out)
        self.settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
        #: Task → its trace, once training has ended.
        self.traces: dict[str, GradientTrace] = {}
        self._running: dict[str, RunningTrace] = {}
        self._steps: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Start from nothing, or from what was saved with the state that training goes on from."""
        if self.every > state.max_steps:
            raise CircuitsError(f"traces every {self.every} steps are none in {state.max_steps} steps of training")
        self._running = {task.name: RunningTrace(self.settings) for task in self.tasks}
        self._steps = list(range(self.every, state.global_step + 1, self.every))
        self.traces = {}
        if state.global_step:
            folder = Path(args.output_dir) / _FOLDER.format(step=state.global_step)
            if not folder.is_dir():
                raise CircuitsError(
                    f"training goes on from step {state.global_step}, but there are no traces up to it in {folder}: "
                    "start again with an empty folder, or go on without tracing"
                )
            for task in self.tasks:
                self._running[task.name].load(folder / f"{task.name}.safetensors", self._identity(task))
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Trace if it is time, and save the sums if the Trainer is about to save."""
        model: PreTrainedModel = others["model"]
        if state.global_step % self.every == 0:
            self._steps.append(state.global_step)
            lean = lean_model(model)
            for task in self.tasks:
                for batch in task.batches(self.settings.batch_size):
                    self._running[task.name].add(lean, batch)
        return self._save_if_due(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save the sums if the Trainer is about to save."""
        return self._save_if_due(args, state, control)

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        if control.should_save:
            with atomic_folder(Path(args.output_dir) / _FOLDER.format(step=state.global_step)) as folder:
                for task in self.tasks:
                    self._running[task.name].save(folder / f"{task.name}.safetensors", self._identity(task))
        return control

    def on_save(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Drop sums that belong to states the Trainer has dropped."""
        for folder in Path(args.output_dir).glob(_FOLDER.format(step="*")):
            step = folder.name.rpartition("-")[2]
            if not (folder.parent / f"checkpoint-{step}").is_dir():
                shutil.rmtree(folder)

    def on_train_end(self, *_: Any, **others: Any) -> None:
        """Turn the sums into traces; they belong to the model as it is now."""
        model: PreTrainedModel = others["model"]
        rows = lean_model(model).rows
        facts = {
            "model": fingerprint_of(model.config, dict(model.named_parameters())),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "steps": self._steps,
        }
        for task in self.tasks:
            trace = self._running.pop(task.name).finish(rows, task, facts)
            self.traces[task.name] = trace
            if self.out is not None:
                trace.save(self.out / f"{task.name}.safetensors")

    def _identity(self, task: Task) -> dict[str, Any]:
        return {"every": self.every, **self.settings.identity(task)}
