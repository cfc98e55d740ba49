"""Workers on a Ray cluster, or on one that is started here for as long as it takes.

1. A worker is a Ray actor with its CPUs and GPUs. It is sent the work through the object store, which holds it once for
   each node, and keeps what the work loads.
2. There are as many workers as were asked for, or as the nodes have room for; nodes that join get workers too.
3. Only workers that answer are given jobs: each the one it is at and one more, so that it never waits. Results come
   back as they are ready.
4. A worker that dies, with its node or alone, loses its jobs. They go to others; the one it was at counts as tried
   (`circuits.executors.tries`). What a dead node had finished and not handed over is lost like what it was at.
"""

import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.errors import CircuitsError
from circuits.executors.local import cores
from circuits.executors.protocol import Run, Work
from circuits.executors.tries import Tries, check_placement, check_workers

if TYPE_CHECKING:
    from types import ModuleType

#: Jobs that a worker has at a time: the one it is at, and the next.
_AT_A_TIME = 2
#: Seconds between looks at which nodes there are.
_LOOK_EVERY = 2.0
#: Workers that may die in a row before one has answered.
_MOST_STILLBORN = 5
#: Seconds to wait for a worker when there is none.
_PATIENCE = 600.0
#: Seconds in which the head of a cluster must answer.
_CONNECTED_WITHIN = 10.0
#: Bytes of the object store of a cluster that is started here; what is more goes to the disk.
_STORE = 256 << 20


@dataclass(frozen=True)
class Ray:
    """Actors on a Ray cluster.

    Args:
        workers: how many at most; if not given, as many as the nodes have room for, also those that join later.
        address: of a cluster that runs, such as ``auto`` or ``10.0.0.1:6379``; if not given, one is started on this
            machine and ended with the block. Where this process is connected to a cluster already, that one is taken.
        gpus_per_worker: GPUs of each; parts of one are shared. Without any, a worker sees none.
        cpus_per_worker: CPUs of each; if not given, as many as a job has threads.
        shared: False if the nodes have folders of the same names that are not those of this machine.

    Raises:
        CircuitsError: a worker is to have what none can have, or the address is none.
    """

    workers: int | None = None
    address: str | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: int | None = None
    shared: bool = True

    def __post_init__(self) -> None:
        check_workers(self.workers)
        check_placement(self.gpus_per_worker, self.cpus_per_worker)
        if self.address not in (None, "auto") and not re.fullmatch(r"[^/]+:\d+", str(self.address)):
            raise CircuitsError(f"{self.address} is no address of a Ray cluster: give auto, or HOST:PORT")

    @contextmanager
    def start(self, work: Work, folder: Path, *, threads: int = 1) -> Iterator[Run]:
        """Connect to the cluster, or start one; workers begin with the first jobs.

        Raises:
            CircuitsError: Ray is not installed or cannot be started here, or there is no cluster at the address.
        """
        ray = _ray()
        cpus = self.cpus_per_worker or threads
        connected = ray.is_initialized()
        if not connected:
            self._connect(ray, cpus)
        crew = _Crew(ray, work, Tries(folder=folder), workers=self.workers, cpus=cpus, gpus=self.gpus_per_worker)
        try:
            yield crew.run
        finally:
            crew.dismiss()
            if not connected:
                ray.shutdown()

    def _connect(self, ray: "ModuleType", cpus: int) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if self.address is None:
            here = max(cores(), cpus * (self.workers or 1))
            try:
                ray.init(address="local", num_cpus=here, include_dashboard=False, object_store_memory=_STORE, **quiet)
            except Exception as error:
                ray.shutdown()
                raise CircuitsError(f"Ray could not be started on this machine: {_last_line(error)}") from None
            return
        try:
            if self.address != "auto":
                # Ray itself would try for minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), _CONNECTED_WITHIN).close()
            ray.init(address=self.address, **quiet)
        except (OSError, RuntimeError):
            raise CircuitsError(
                f"there is no Ray cluster at {self.address}: start one with 'ray start --head', or leave the address "
                "out"
            ) from None


def _ray() -> "ModuleType":
    """Ray, which says nothing and asks nobody for anything."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        # what nodes and workers say stays in Ray's own logs; the first pattern is of what is left out
        ("RAY_DEDUP_LOGS_SKIP_REGEX", "."),
        ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"),
    ):
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise CircuitsError("the executor ray needs Ray: pip install 'fact-circuits[cluster]'") from None
    return ray


class _Hand:
    """What a worker is: it does jobs."""

    def __init__(self, work: Work, gpus: float) -> None:
        self._work = work
        if not gpus:
            # Ray leaves all of the node's visible to those that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def node(self) -> str:
        """Where it is; answers when it is there."""
        ray = _ray()
        return str(ray.get_runtime_context().get_node_id())

    def do(self, job: Any) -> Any:
        return self._work(job)


@dataclass
class _Worker:
    actor: Any
    #: of its jobs, by what Ray knows them by, the one it is at first
    jobs: dict[Any, Any] = field(default_factory=dict)


class _Crew:
    """The workers of a sweep or a trace."""

    def __init__(
        self, ray: "ModuleType", work: Work, tries: Tries, *, workers: int | None, cpus: int, gpus: float
    ) -> None:
        self._ray, self._most, self._cpus, self._gpus = ray, workers, cpus, gpus
        self._work = ray.put(work)
        kind = ray.remote(_Hand)
        self._hire = kind.options(num_cpus=cpus, num_gpus=gpus, max_restarts=0).remote
        #: those that have not answered yet, by what they will answer
        self._coming: dict[Any, _Worker] = {}
        self._workers: list[_Worker] = []
        self._tries = tries
        self._stillborn = 0
        self._looked = self._seen = -1e9

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Run jobs, and give each back with what the work returned."""
        ray, waiting = self._ray, deque(jobs)
        self._seen = time.monotonic()
        while waiting or any(worker.jobs for worker in self._workers):
            self._grow()
            for worker in self._workers:
                while waiting and len(worker.jobs) < _AT_A_TIME:
                    job = waiting.popleft()
                    worker.jobs[worker.actor.do.remote(job)] = job
            owners = {ref: worker for worker in self._workers for ref in worker.jobs}
            for ref in self._ready([*self._coming, *owners]):
                if ref in self._coming:
                    self._arrived(ref)
                    continue
                worker = owners[ref]
                if ref not in worker.jobs:  # lost a moment ago, with another of its jobs
                    continue
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                except ray.exceptions.RayError as error:
                    waiting.extendleft(reversed(self._lose(worker, error)))
                    continue
                yield worker.jobs.pop(ref), result

    def _ready(self, refs: list[Any]) -> list[Any]:
        """Those of these that are there, or none after a while."""
        if not refs:
            time.sleep(_LOOK_EVERY)
            return []
        if not self._ray.wait(refs, num_returns=1, timeout=_LOOK_EVERY)[0]:
            return []
        return list(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def dismiss(self) -> None:
        """End all workers, in the middle of their jobs."""
        for worker in (*self._workers, *self._coming.values()):
            self._ray.kill(worker.actor)
        self._workers, self._coming = [], {}

    def _grow(self) -> None:
        """Get as many workers as there is room for, and see whether there are any."""
        now = time.monotonic()
        if self._workers:
            self._seen = now
        elif now - self._seen > _PATIENCE:
            raise CircuitsError(
                f"no worker of {self._asked} has been there for {_PATIENCE / 60:.0f} minutes; finished jobs are kept: "
                "see to the cluster, and the same command goes on"
            )
        if now - self._looked < _LOOK_EVERY:
            return
        first, self._looked = self._looked < 0, now
        room = sum(self._room(node) for node in self._ray.nodes() if node["Alive"])
        if first and not room:
            raise CircuitsError(f"no node of the cluster has room for a worker of {self._asked}: ask for less")
        wanted = room if self._most is None else min(self._most, room)
        for _ in range(wanted - len(self._workers) - len(self._coming)):
            worker = _Worker(self._hire(self._work, self._gpus))
            self._coming[worker.actor.node.remote()] = worker

    def _room(self, node: dict[str, Any]) -> int:
        has, needs = node["Resources"], {"CPU": self._cpus, "GPU": self._gpus}
        return int(min(has.get(name, 0) // need for name, need in needs.items() if need))

    @property
    def _asked(self) -> str:
        return f"{self._cpus} CPUs" + (f" and {self._gpus:g} GPUs" if self._gpus else "")

    def _arrived(self, ref: Any) -> None:
        worker = self._coming.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._stillborn += 1
            if self._stillborn >= _MOST_STILLBORN:
                raise CircuitsError(
                    f"{self._stillborn} workers died before they had begun: {_last_line(error)}"
                ) from None
            return
        self._stillborn = 0
        self._workers.append(worker)

    def _lose(self, worker: _Worker, why: Exception) -> list[Any]:
        """Let a worker go that died; its jobs."""
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        lost = list(worker.jobs.values())
        self._tries.lose(lost[0], _last_line(why))
        worker.jobs.clear()
        return lost


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()[:200]
