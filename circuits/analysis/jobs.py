"""What interventions do to each answer, computed here, or by workers that an analysis shares its work out to.

1. In the calling process they are run task by task.
2. For another executor they are cut into jobs, always at the same places, and only between what would be computed in
   one tensor: matrices of other sizes are rounded otherwise. A job runs its share on one thread, in a process that
   loads the model from its folder and makes sure that it is the same.
3. A finished job's rows are kept in the step's working folder, by the worker if it sees that folder. What is kept is
   not done again. When all are there they are put together in their order: the same table to the byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from circuits.analysis.case import Case
from circuits.analysis.running import workplace
from circuits.errors import CircuitsError
from circuits.executors import on_threads
from circuits.interventions import Engine, Intervention, run_interventions
from circuits.interventions.effects import answers_table
from circuits.models import Model, Place
from circuits.progress import bar, track
from circuits.storage import claim, digest, stamp, write_table
from circuits.tasks import Task

#: Interventions in a job, on average: the unchanged run that each job begins with is a tenth of its work.
_TOGETHER = 32
#: What says in a working folder what its rows are of.
_CLAIM = "jobs.json"


class Asked(NamedTuple):
    """What is done to one task.

    Attributes:
        task: its answers are scored.
        interventions: each in a run of its own.
        metrics: of each answer.
        source: the run that values are patched from.
    """

    task: Task
    interventions: Sequence[Intervention]
    metrics: Sequence[str]
    source: Task | None = None

    @property
    def shares(self) -> int:
        """Jobs that it is cut into; it must not depend on how many workers there are."""
        return -(-len(self.interventions) // _TOGETHER)

    def run(self, model: Model) -> pandas.DataFrame:
        """What the interventions do to each answer."""
        metrics = [*self.metrics]
        return run_interventions(
            model, self.task, self.interventions, source=self.source, metrics=metrics, per_answer=True
        )

    def run_share(self, model: Model, share: int) -> pandas.DataFrame:
        """The rows of one share, with their places among all in the column ``row``."""
        engine = Engine(model, self.task, self.interventions, source=self.source, metrics=[*self.metrics])
        clean, found = engine.run(share, self.shares)
        return answers_table(engine, clean, found).assign(row=range(engine.ran.size))[engine.ran.ravel()]

    def joined(self, shares: Sequence[pandas.DataFrame]) -> pandas.DataFrame:
        """What `run` gives, of all shares.

        Raises:
            CircuitsError: a row is missing, or is there twice.
        """
        # a share of what is computed in fewer tensors than there are shares is empty
        some = [share for share in shares if len(share)]
        table = pandas.concat(some, ignore_index=True).sort_values("row", kind="stable", ignore_index=True)
        if table.pop("row").tolist() != [*range(len(self.interventions) * len(self.task.answers))]:
            raise CircuitsError(
                f"memory was short in some jobs on {self.task.name} and not in others, which cut it up differently: "
                "delete what they left, and take fewer workers on a machine"
            )
        return table

    def identity(self) -> dict[str, Any]:
        """What tells it from others."""
        return {
            "task": self.task.identity(),
            "source": None if self.source is None else self.source.identity(),
            "interventions": digest(*map(str, self.interventions)),
            "metrics": [*self.metrics],
        }


class Job(NamedTuple):
    """A share of the interventions on one task.

    Attributes:
        asked: the place of its task.
        share: which.
        where: the stamp of the working folder; None if workers are not to look for it.
    """

    asked: int
    share: int
    where: tuple[int, int] | None


@dataclass
class InterventionWork:
    """Runs jobs, on one model that it loads once.

    Args:
        place: of the model.
        asked: of each task.
        folder: for rows.
        dtype: that the model is loaded in.
        device: that it is loaded to.
    """

    place: Place
    asked: list[Asked]
    folder: Path
    dtype: str
    device: str

    def __post_init__(self) -> None:
        self._model: Model | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __call__(self, job: Job) -> pandas.DataFrame | None:
        """Do a job: its rows, or None if they are kept."""
        seen = job.where is not None and stamp(self.folder / _CLAIM) == job.where
        if seen and self.file(job).is_file():
            return None
        if self._model is None:
            self._model = self.place.load(self.dtype, self.device)
        with on_threads(1):
            rows = self.asked[job.asked].run_share(self._model, job.share)
        if not seen:
            return rows
        self.keep(job, rows)
        return None

    def file(self, job: Job) -> Path:
        """Where the rows of a job are kept."""
        return self.folder / f"{job.asked:03d}-{job.share:05d}.parquet"

    def keep(self, job: Job, rows: pandas.DataFrame) -> None:
        """Keep the rows of a job."""
        write_table(self.file(job), rows, {})


def intervene(case: Case, step: str, asked: Mapping[str, Asked]) -> list[pandas.DataFrame]:
    """What interventions do to each answer.

    Args:
        case: whose executor runs them.
        step: that they belong to.
        asked: name → what is done to one task.

    Returns:
        For each name the table of `circuits.interventions.run_interventions`, one row for each intervention and answer,
        with the name as ``task``.
    """
    if case.serial:
        tables = [one.run(case.model) for one in track(asked.values(), step, len(asked), "task")]
    else:
        tables = _on_workers(case, step, [*asked.values()])
    return [table.assign(task=name) for name, table in zip(asked, tables, strict=True)]


def _on_workers(case: Case, step: str, asked: list[Asked]) -> list[pandas.DataFrame]:
    folder = workplace(case.folder, step)
    place = Place.of(case.model)
    work = InterventionWork(place, asked, folder, **case.placed)
    facts = {"model": place.model, "jobs_of": _TOGETHER, "asked": [one.identity() for one in asked]}
    claim(folder / _CLAIM, facts, f"the rows of a step {step}")
    where = stamp(folder / _CLAIM) if case.executor.shared else None
    jobs = [Job(number, share, where) for number, one in enumerate(asked) for share in range(one.shares)]
    missing = [job for job in jobs if not work.file(job).is_file()]
    if missing:
        with (
            case.executor.start(work, folder) as run,
            bar(step, len(jobs), " jobs", len(jobs) - len(missing)) as shown,
        ):
            for job, rows in run(missing):
                if rows is not None:
                    work.keep(job, rows)
                shown.update()
    return [
        one.joined([pandas.read_parquet(work.file(job)) for job in jobs if job.asked == number])
        for number, one in enumerate(asked)
    ]
