"""Running a sweep: the jobs that are missing, and then the table.

1. The plan's models are loaded and its tasks made; the folder is claimed for exactly this plan, models and data.
2. Jobs whose parts are missing run, stage by stage; each is on the disk as soon as it is finished. A job that another
   process is at is waited for, and taken over if that process dies.
3. When no part is missing, the table is made of the parts alone, so that it is the same to the byte however often the
   sweep was killed and whoever ran its jobs.
"""

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas

from circuits.errors import CircuitsError
from circuits.interventions.effects import with_corrections
from circuits.progress import bar
from circuits.storage import git_commit, library_version, read_json
from circuits.sweeps.executors import EXECUTORS, Executor
from circuits.sweeps.folder import SweepFolder
from circuits.sweeps.jobs import DONE, PreparedSweep, largest, prepare
from circuits.sweeps.plan import STAGES, Job, SweepPlan


def run_sweep(
    plan: SweepPlan, out: str | Path, executor: str = "serial", workers: int | None = None
) -> pandas.DataFrame:
    """Run a sweep, or what is missing of one.

    Several processes may run the same sweep in one folder at once; they share its jobs. After an interruption, of any
    kind and at any moment, the same call goes on, and ends in the same table to the byte.

    Args:
        plan: what to do.
        out: the sweep's folder: ``plan.json``, ``parts``, and at the end ``table.parquet`` and ``table.csv``. If the
            plan has ``per_answer``, the folder ``answers`` too: ``pandas.read_parquet`` reads it as one table, with
            the columns that `circuits.interventions.run_interventions` has for each answer.
        executor: ``serial``, or ``processes``: several on this machine, each with the plan's models in memory.
        workers: of ``processes``; if not given, as many as the cores have room for with the plan's threads each.

    Returns:
        The table: one row for each task and intervention, as `circuits.interventions.run_interventions` gives them,
        and for single units their ``layer`` and ``index``. After a screen also ``estimate`` and ``exact``: rows that
        are not exact have no metrics. ``attrs`` tells what it came from.

    Raises:
        CircuitsError: the plan does not fit its model or data, the folder holds another sweep, there is no such
            executor, a worker was killed, or the disk is full.

    Example:
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> new_model("tiny-llama", word_tokenizer()).save_pretrained(folder / "model")
        >>> _ = word_tokenizer().save_pretrained(folder / "model")
        >>> plan = SweepPlan(folder / "model", dataset=folder / "facts", units=["L0H1", "L2H0"], modes=["zero", "mean"])
        >>> table = run_sweep(plan, folder / "sweep")
        >>> table[["unit", "mode", "layer", "index"]].to_numpy().tolist()
        [['L0H1', 'zero', 0, 1], ['L2H0', 'zero', 2, 0], ['L0H1', 'mean', 0, 1], ['L2H0', 'mean', 2, 0]]
        >>> sweep_state(folder / "sweep").done
        1
    """
    if executor not in EXECUTORS:
        raise CircuitsError(f"there is no executor {executor!r}: choose from {', '.join(EXECUTORS)}")
    folder = SweepFolder(out)
    with bar(f"load {plan.model}", 1, " sweep"):
        prepared = prepare(plan)
        prepared.check()
    jobs = plan.jobs(prepared.counts)
    work = _Work(plan, folder, prepared.facts)
    facts = {"plan": _plain(plan), **prepared.facts, "interventions": prepared.counts}
    if executor == "serial":
        work.prepared = prepared
    del prepared
    runner = EXECUTORS[executor](work, workers, plan.threads)
    try:
        record = folder.claim({**facts, "library_version": library_version(), "git_commit": git_commit()})
        for stage in STAGES:
            _complete([job for job in jobs if job.stage == stage], runner, folder)
        if not folder.is_finished():
            folder.finish(_table(plan, jobs, folder), _provenance(record))
    except OSError as error:
        runner.close(stop=True)
        if error.errno not in _FULL:
            raise
        raise CircuitsError(
            f"the disk of {folder.path} is full: {_so_far(folder, jobs)} and kept; make room, and {_AGAIN}"
        ) from None
    except BaseException as error:
        runner.close(stop=True)
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"{_so_far(folder, jobs)}; {_AGAIN}")
        raise
    runner.close()
    return pandas.read_parquet(folder.table)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = "the same command goes on from there"


def _so_far(folder: SweepFolder, jobs: Sequence[Job]) -> str:
    return f"{sum(map(folder.is_done, jobs))} of {len(jobs)} jobs are finished"


class _Work:
    """Runs a job if nobody else does, and keeps its rows. In another process it loads the plan's models itself."""

    def __init__(self, plan: SweepPlan, folder: SweepFolder, facts: dict[str, Any]) -> None:
        self.plan, self.folder, self.facts = plan, folder, facts
        self.prepared: PreparedSweep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": None}

    def __call__(self, job: Job) -> bool:
        if self.prepared is None:
            self.prepared = prepare(self.plan)
            if self.prepared.facts != self.facts:
                raise CircuitsError(f"{self.plan.model} or its data were changed while the sweep ran: start it again")
        with self.folder.claimed(job) as mine:
            if mine and not self.folder.is_done(job):
                rows, answers = self.prepared.run(job, self._estimates(job))
                if answers is not None:
                    self.folder.write_answers(job, answers)
                self.folder.write_part(job, rows)
        return mine

    def _estimates(self, job: Job) -> pandas.Series | None:
        if job.stage == "estimate" or self.plan.screen is None or self.prepared is None:
            return None
        return self.folder.read_part(_estimating(job.task, self.plan.jobs(self.prepared.counts)))["estimate"]


def _estimating(task: str, jobs: Sequence[Job]) -> Job:
    return next(job for job in jobs if job.stage == "estimate" and job.task == task)


def _complete(jobs: Sequence[Job], runner: Executor, folder: SweepFolder) -> None:
    """Run jobs until the parts of all are there."""
    missing = [job for job in jobs if not folder.is_done(job)]
    if not missing:
        return
    total = sum(map(len, jobs))
    with bar(f"sweep, {missing[0].stage}", total, " interventions", total - sum(map(len, missing))) as shown:
        while missing:
            held = []
            for job, finished in runner.run(missing):
                if finished:
                    shown.update(len(job))
                else:
                    held.append(job)
            # another process is at these: it finishes them, or dies and leaves them to us
            missing = held
            if missing:
                time.sleep(0.2)


def _table(plan: SweepPlan, jobs: Sequence[Job], folder: SweepFolder) -> pandas.DataFrame:
    tables = []
    for task in plan.tasks:
        exact = [job for job in jobs if job.stage == "exact" and job.task == task]
        rows = pandas.concat([folder.read_part(job) for job in exact], ignore_index=True)
        if plan.screen is not None:
            estimates = folder.read_part(_estimating(task, jobs))
            places = largest(estimates["estimate"], len(rows))
            # rows that were only estimated have no metrics
            done = [name for name in DONE if name in estimates]
            measured = rows.drop(columns=done).set_axis(places).reindex(estimates.index)
            rows = estimates[done].join(measured)
            rows["estimate"] = estimates["estimate"]
            rows["exact"] = rows.index.isin(places)
        tables.append(rows)
    return _with_positions(with_corrections(pandas.concat(tables, ignore_index=True)), plan)


def _with_positions(table: pandas.DataFrame, plan: SweepPlan) -> pandas.DataFrame:
    """The table with positions as numbers, for figures."""
    if plan.positions == "each" or isinstance(plan.positions, int):
        table["positions"] = table["positions"].astype(int)
    return table


def _plain(plan: SweepPlan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(plan).items()}


def _provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says it came from: what the sweep was when it began, whatever the library is by now."""
    settings = record["plan"]
    facts = {name: value for name, value in record.items() if name not in ("plan", "interventions")}
    return {**facts, "seed": settings["seed"], "dtype": settings["dtype"], "settings": settings}


@dataclass(frozen=True)
class SweepState:
    """How far a sweep is.

    Attributes:
        plan: what it does.
        facts: fingerprints, device and library version of when it began.
        jobs: how many there are.
        done: how many of them are finished.
        interventions: rows that the table will have.
        table: the table, or the rows that are computed so far.
    """

    plan: SweepPlan
    facts: dict[str, Any]
    jobs: int
    done: int
    interventions: int
    table: pandas.DataFrame


def sweep_state(out: str | Path) -> SweepState:
    """How far the sweep in a folder is; reads what is there and runs nothing.

    Raises:
        CircuitsError: the folder holds no sweep.
    """
    folder = SweepFolder(out)
    if not folder.plan.is_file():
        raise CircuitsError(f"{folder.path} holds no sweep: it has no plan.json")
    record = read_json(folder.plan)
    if not {"plan", "interventions"} <= set(record):
        raise CircuitsError(f"{folder.path} holds no sweep: its plan.json is of something else")
    try:
        plan = SweepPlan(**record["plan"])
        jobs = plan.jobs(record["interventions"])
    except (KeyError, TypeError, CircuitsError) as error:
        raise CircuitsError(f"{folder.plan} is no plan that this version reads: {error}") from None
    done = [job for job in jobs if folder.is_done(job)]
    if folder.is_finished():
        table = pandas.read_parquet(folder.table)
    else:
        parts = [folder.read_part(job) for job in done if job.stage == "exact"]
        table = pandas.DataFrame()
        if parts:
            table = _with_positions(with_corrections(pandas.concat(parts, ignore_index=True)), plan)
    facts = {name: value for name, value in record.items() if name not in ("plan", "interventions")}
    return SweepState(plan, facts, len(jobs), len(done), sum(record["interventions"].values()), table)
