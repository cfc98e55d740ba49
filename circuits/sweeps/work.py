"""What a worker of a sweep does, wherever it runs.

1. Its first job may be a `Look`: it loads the plan's models, makes its tasks, and says how many interventions there
   are, and what the numbers depend on.
2. A job that is assigned to it carries what was found then: a worker that finds something else, because a file was
   changed or another machine has another one, refuses.
3. A worker that sees the sweep's folder keeps what it computed there, if nobody else is at the job. Whether it does is
   told by the folder's stamp: another machine may have a folder of the same name. Otherwise it hands the rows over.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from circuits.errors import CircuitsError
from circuits.storage import digest
from circuits.sweeps.folder import Computed, SweepFolder
from circuits.sweeps.jobs import PreparedSweep, prepare
from circuits.sweeps.plan import Job, SweepPlan


class Look(NamedTuple):
    """The job to look what there is to do."""


class Found(NamedTuple):
    """What was found.

    Attributes:
        interventions: on each task.
        facts: fingerprints of everything the plan names by a path, and where the models are.
    """

    interventions: dict[str, int]
    facts: dict[str, Any]


class Assignment(NamedTuple):
    """A job, and what a worker must be told to do it.

    Attributes:
        job: one of the plan's.
        places: of its interventions among all on its task, if a screen chose them.
        facts: the digest of what was found first.
        where: the stamp of the sweep's folder; None if workers are not to look for it.
    """

    job: Job
    places: tuple[int, ...] | None
    facts: str
    where: tuple[int, int] | None


class Done(NamedTuple):
    """What came of a job, where it cannot be kept.

    Attributes:
        computed: its rows.
        worker: that did it.
        seconds: that it took.
    """

    computed: Computed
    worker: str
    seconds: float


class SweepWork:
    """Does the jobs of a sweep; in another process it loads the plan's models itself.

    Args:
        plan: what to do.
        folder: of the sweep.
    """

    def __init__(self, plan: SweepPlan, folder: SweepFolder) -> None:
        self.plan, self.folder = plan, folder
        self._prepared: PreparedSweep | None = None
        self._facts = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    @property
    def prepared(self) -> PreparedSweep:
        """The plan with its models loaded."""
        if self._prepared is None:
            self._prepared = prepare(self.plan)
            self._facts = facts_digest(self._prepared.facts)
        return self._prepared

    def __call__(self, job: Look | Assignment) -> "Found | Done | bool":
        """Do a job.

        Returns:
            What a look found; rows that cannot be kept here; or whether the job is done: False if another process is
            at it.
        """
        if isinstance(job, Look):
            self.prepared.check()
            return Found(self.prepared.counts, self.prepared.facts)
        prepared = self.prepared
        if self._facts != job.facts:
            raise CircuitsError(
                f"{self.plan.model} or its data are not the same as when the sweep began, or another machine has "
                "others: start it again"
            )

        def compute() -> Done:
            begun = time.monotonic()
            computed = prepared.run(job.job, job.places)
            return Done(computed, f"{socket.gethostname()}-{os.getpid()}", time.monotonic() - begun)

        if job.where is None or self.folder.stamp() != job.where:
            return compute()
        return keep(self.folder, job.job, compute)


def keep(folder: SweepFolder, job: Job, compute: Callable[[], Done]) -> bool:
    """Compute a job and keep what comes of it, unless that is done; False if another process is at it."""
    with folder.claimed(job) as mine:
        if mine and not folder.is_done(job):
            done = compute()
            folder.keep(job, done.computed)
            folder.note(done.worker, job, done.seconds)
    return mine


def facts_digest(facts: Mapping[str, Any]) -> str:
    """What tells facts from others."""
    return digest(json.dumps(facts, sort_keys=True))
