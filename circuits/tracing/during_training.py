"""Gradient traces along the course of training (docs/method.md, section 1).

Every few steps the probe examples of each task are traced at the weights of that moment, and the traces are added up,
without disturbing the run and across its interruptions (`circuits.tracing.along_training`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from circuits.errors import CircuitsError
from circuits.models import LeanModel, fingerprint_of, lean_model
from circuits.tasks import Task
from circuits.tracing.along_training import AlongTraining
from circuits.tracing.running_trace import RunningTrace
from circuits.tracing.settings import TraceSettings
from circuits.tracing.trace import GradientTrace


class TraceCallback(AlongTraining):
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

    noun: ClassVar[str] = "traces"

    def __init__(
        self,
        tasks: Sequence[Task],
        every: int,
        out: str | Path | None = None,
        *,
        statistic: str = "abs",
        loss: str = "answer",
        batch_size: int = 32,
        per: str = "example",
        components: Sequence[str] = ("attention", "mlp"),
    ) -> None:
        if len({task.name for task in tasks}) < len(tasks) or not tasks:
            raise CircuitsError("the tasks to trace during training must have names of their own, and be one at least")
        super().__init__(every)
        self.tasks, self.out = list(tasks), None if out is None else Path(out)
        self.settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
        #: Task → its trace, once training has ended.
        self.traces: dict[str, GradientTrace] = {}
        self._running: dict[str, RunningTrace] = {}
        self._steps: list[int] = []

    def begin(self, steps: list[int]) -> None:
        """Empty sums."""
        self._running = {task.name: RunningTrace(self.settings) for task in self.tasks}
        self._steps, self.traces = steps, {}

    def measure(self, model: LeanModel, step: int) -> None:
        """Add every task's trace."""
        self._steps.append(step)
        for task in self.tasks:
            for batch in task.batches(self.settings.batch_size):
                self._running[task.name].add(model, batch)

    def save(self, folder: Path) -> None:
        """Save the sums."""
        for task in self.tasks:
            self._running[task.name].save(folder / f"{task.name}.safetensors", self._identity(task))

    def load(self, folder: Path) -> None:
        """Load the sums."""
        for task in self.tasks:
            self._running[task.name].load(folder / f"{task.name}.safetensors", self._identity(task))

    def end(self, model: PreTrainedModel) -> None:
        """Turn the sums into traces; they belong to the model as it is now."""
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
