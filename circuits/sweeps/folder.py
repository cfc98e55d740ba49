"""The folder of a sweep: what is finished, who is at what, and that nothing is there by halves.

1. ``plan.json`` says what the sweep is: the plan, the fingerprints of what it names, the library. A sweep that is not
   the same in all of these does not go on in the folder.
2. ``parts/0003.parquet`` holds the rows of job 3. It takes its name when it is whole and on the disk. Where the plan
   keeps answers, ``answers/0003.parquet`` is there before it.
3. Who runs a job holds its lock, ``.locks/0003``; the operating system takes the lock back when the process ends, also
   by SIGKILL. What such a process left half written goes when the job is taken up again. Locks stay where they are:
   whoever waits for one that is removed could share it with nobody.
4. ``.workers`` and ``.lost`` hold notes of who finished what and what was lost, for people who look.
5. When all parts are there, ``table.parquet`` and ``table.csv`` are made of them.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas
from filelock import BaseFileLock, FileLock, Timeout

from circuits.errors import CircuitsError
from circuits.executors.tries import LOST
from circuits.storage import atomic_file, read_json, stamp, with_plain_columns, write_json, write_table
from circuits.sweeps.plan import Job


class Computed(NamedTuple):
    """What came of a job.

    Attributes:
        rows: one for each intervention.
        answers: one for each intervention and answer, if the plan keeps them.
    """

    rows: pandas.DataFrame
    answers: pandas.DataFrame | None = None


class Note(NamedTuple):
    """What a worker noted of a job that it finished.

    Attributes:
        at: seconds since 1970.
        job: its index.
        interventions: in it.
        seconds: that it took.
    """

    at: float
    job: int
    interventions: int
    seconds: float


class SweepFolder:
    """A sweep on disk.

    Args:
        path: the folder; it need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = self.path / "plan.json"
        self.parts = self.path / "parts"
        self.answers = self.path / "answers"
        self.table = self.path / "table.parquet"
        self._csv = self.path / "table.csv"
        self._locks = self.path / ".locks"
        self._workers = self.path / ".workers"

    def claim(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write down what the sweep is, or check that the folder's sweep is the same.

        Returns:
            The record that was written when the sweep began.

        Raises:
            CircuitsError: the folder holds something else, or a sweep that differs; the first difference is named.
        """
        if self.path.is_file():
            raise CircuitsError(f"{self.path} is a file: name a folder for the sweep")
        held = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        if "plan.json" not in held and any(not name.startswith(".") for name in held):
            raise CircuitsError(f"{self.path} holds something that is no sweep: choose another folder")
        with self._lock("plan"):
            self._clear(self.path, "plan.json")
            if not self.plan.is_file():
                write_json(self.plan, record)
            found: dict[str, Any] = read_json(self.plan)
        if not {"plan", "interventions"} <= set(found):
            raise CircuitsError(f"{self.path} holds something that is no sweep: choose another folder")
        for name, (before, now) in _differences(found, record).items():
            raise CircuitsError(
                f"{self.path} holds a sweep with {name} {before}, not {now}: choose another folder or delete it"
            )
        return found

    def stamp(self) -> tuple[int, int]:
        """What tells the folder from one of the same name on another machine; zeros if there is no sweep in it."""
        return stamp(self.plan)

    def part(self, job: Job) -> Path:
        """Where the rows of a job are."""
        return self.parts / f"{job.index:04d}.parquet"

    def is_done(self, job: Job) -> bool:
        """Whether the rows of a job are there, all of them."""
        from pyarrow import ArrowException, parquet

        try:
            return bool(parquet.read_metadata(self.part(job)).num_rows == len(job))
        except (FileNotFoundError, ArrowException):
            return False

    @contextmanager
    def claimed(self, job: Job) -> Iterator[bool]:
        """Inside the block nobody else runs the job; False if somebody does."""
        lock = self._lock(f"{job.index:04d}")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            for folder in (self.parts, self.answers):
                self._clear(folder, self.part(job).name)
            yield True
        finally:
            lock.release()

    def keep(self, job: Job, computed: Computed) -> None:
        """Keep what a job computed: it is done when its own rows are there, after those for each answer."""
        if computed.answers is not None:
            self._write(self.answers / self.part(job).name, computed.answers)
        self.write_part(job, computed.rows)

    def write_part(self, job: Job, rows: pandas.DataFrame) -> None:
        """Keep the rows of a job."""
        self._write(self.part(job), rows)

    @staticmethod
    def _write(path: Path, rows: pandas.DataFrame) -> None:
        rows = with_plain_columns(rows)
        rows.attrs = {}
        with atomic_file(path) as temporary:
            rows.to_parquet(temporary, index=False)

    def note(self, worker: str, job: Job, seconds: float) -> None:
        """Note that a worker finished a job just now."""
        self._workers.mkdir(exist_ok=True)
        with (self._workers / worker).open("a") as file:
            file.write(f"{time.time():.3f} {job.index} {len(job)} {seconds:.3f}\n")

    def notes(self) -> dict[str, list[Note]]:
        """What each worker noted."""
        found = {}
        for file in sorted(self._workers.glob("*")):
            lines = [line.split() for line in file.read_text().splitlines()]
            found[file.name] = [Note(float(at), int(job), int(size), float(s)) for at, job, size, s in lines]
        return found

    def lost(self) -> int:
        """How many jobs were lost with their worker, so far."""
        file = self.path / LOST
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def read_part(self, job: Job) -> pandas.DataFrame:
        """The rows of a job that is done."""
        return pandas.read_parquet(self.part(job))

    def finish(self, rows: pandas.DataFrame, facts: Mapping[str, Any]) -> None:
        """Make the table, or what is missing of it."""
        with self._lock("table"):
            for path in (self.table, self._csv):
                self._clear(self.path, path.name)
            if not self.table.is_file():
                write_table(self.table, rows, facts)
            if not self._csv.is_file():
                with atomic_file(self._csv) as temporary:
                    rows.to_csv(temporary, index=False)

    def is_finished(self) -> bool:
        """Whether the table is there."""
        return self.table.is_file() and self._csv.is_file()

    def _lock(self, name: str) -> BaseFileLock:
        self._locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self._locks / name)

    @staticmethod
    def _clear(folder: Path, name: str) -> None:
        """Remove what processes that were killed left half written."""
        for left in folder.glob(f".{name}.*"):
            left.unlink(missing_ok=True)


#: What changes no number: names of places, whose contents are compared by their fingerprints, and a waiver.
_ASIDE = ("model", "dataset", "pre", "check_start")


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings and facts that are not the same: name → before, now."""
    pairs = {
        name: (found.get("plan", {}).get(name), value) for name, value in wanted["plan"].items() if name not in _ASIDE
    }
    pairs |= {name: (found.get(name), wanted[name]) for name in wanted if name not in ("plan", "git_commit")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
