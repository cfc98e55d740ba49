"""A trace whose examples are shared out among workers.

1. The examples are cut into shards, each some whole batches, always at the same places for the same number of shards.
2. A job sums the statistic over one shard at one checkpoint, from zero (`circuits.tracing.running_trace`). The sums are
   kept in a file of their own beside the trace, by the worker if it sees that folder. What is kept is not done again.
   It computes on one thread, so that rounding does not depend on where.
3. When all sums are there, they are added in the order of checkpoints, and at each in the order of shards. So the trace
   is the same to the bit whoever computed what, and when.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from circuits.errors import CircuitsError
from circuits.executors import Executor, cut, on_threads
from circuits.models import Model, Place, Row, check_task, checkpoint_of, facts_of, lean_model
from circuits.progress import bar
from circuits.storage import claim, stamp
from circuits.tasks import Task
from circuits.tracing.running_trace import RunningTrace
from circuits.tracing.settings import TraceSettings, check_identity
from circuits.tracing.trace import GradientTrace

#: Shards, where their number is not given: it must not depend on how many workers there are.
SHARDS = 8
#: What says in a folder of sums what they are of.
_CLAIM = "trace.json"


class Shard(NamedTuple):
    """Some examples at one checkpoint.

    Attributes:
        checkpoint: its place among the sources.
        start: the first example.
        stop: the one after the last.
        where: the stamp of the folder for sums; None if workers are not to look for it.
    """

    checkpoint: int
    start: int
    stop: int
    where: tuple[int, int] | None


class Look(NamedTuple):
    """The job to say what the last checkpoint is."""


@dataclass
class TraceWork:
    """Sums shards; holds one checkpoint at a time.

    Args:
        places: of the checkpoints.
        task: all examples.
        settings: what is traced.
        identity: what the trace is of.
        folder: for the sums.
        dtype: that checkpoints are loaded in.
        device: that they are loaded to.
    """

    places: list[Place]
    task: Task
    settings: TraceSettings
    identity: dict[str, Any]
    folder: Path
    dtype: str
    device: str | None

    def __post_init__(self) -> None:
        self._held: tuple[int, Model] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __call__(self, job: Shard | Look) -> "RunningTrace | tuple[tuple[Row, ...], dict[str, Any]] | None":
        """Do a job.

        Returns:
            The sums of a shard, or None if they are kept; what was found by a look.
        """
        if isinstance(job, Look):
            model = self._model(len(self.places) - 1)
            return checkpoint_of(model).rows, facts_of(model)
        seen = job.where is not None and stamp(self.folder / _CLAIM) == job.where
        if seen and self.file(job).exists():
            return None
        model = self._model(job.checkpoint)
        check_task(model, self.task)
        running, lean = RunningTrace(self.settings), lean_model(model)
        size = self.settings.batch_size
        with on_threads(1):
            for first in range(job.start, job.stop, size):
                running.add(lean, self.task.select(range(first, min(first + size, job.stop))))
        if not seen:
            return running.to("cpu")
        self.keep(job, running)
        return None

    def file(self, job: Shard) -> Path:
        """Where the sums of a shard are kept."""
        return self.folder / f"{job.checkpoint:03d}-{job.start:07d}.safetensors"

    def keep(self, job: Shard, running: RunningTrace) -> None:
        """Keep the sums of a shard."""
        running.save(self.file(job), self.identity)

    def _model(self, checkpoint: int) -> Model:
        if self._held is None or self._held[0] != checkpoint:
            self._held = None
            self._held = checkpoint, self.places[checkpoint].load(self.dtype, self.device)
        return self._held[1]


def trace_in_shards(
    sources: Sequence[str | Path | Model],
    task: Task,
    settings: TraceSettings,
    *,
    out: Path,
    identity: dict[str, Any],
    dtype: str,
    device: str | None,
    shards: int | None,
    executor: Executor,
) -> GradientTrace:
    """Trace a task at checkpoints, on an executor; the arguments are those of `circuits.tracing.trace_checkpoints`."""
    if shards is not None and shards < 1:
        raise CircuitsError(f"there are to be {shards} shards: 1 is the least")
    batches = range(-(-len(task) // settings.batch_size))
    cuts = cut(batches, shards or SHARDS)
    wanted = identity | settings.identity(task)
    if out.exists():
        finished = GradientTrace.load(out)
        check_identity(out, finished.provenance, wanted)
        return finished
    folder = out.with_name(f"{out.name}.shards")
    places = [Place.of(source) for source in sources]
    work = TraceWork(places, task, settings, wanted, folder, dtype, device)
    claim(folder / _CLAIM, wanted | {"shards": len(cuts)}, "a trace")
    where = stamp(folder / _CLAIM) if executor.shared else None
    jobs = [
        Shard(number, some[0] * settings.batch_size, min((some[-1] + 1) * settings.batch_size, len(task)), where)
        for number in range(len(places))
        for some in cuts
    ]
    with executor.start(work, folder) as run:
        missing = [job for job in jobs if not work.file(job).exists()]
        with bar(f"trace {task.name}", len(jobs), " shards", len(jobs) - len(missing)) as shown:
            for job, running in run(missing):
                if running is not None:
                    work.keep(job, running)
                shown.update()
        [(_, (rows, facts))] = run([Look()])
    total = RunningTrace(settings)
    for job in jobs:
        total.add_sums(work.file(job), wanted)
    trace = total.finish(rows, task, identity | facts)
    trace.save(out)
    shutil.rmtree(folder)
    del trace, total
    return GradientTrace.load(out)
