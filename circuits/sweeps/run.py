"""Running a sweep: the jobs that are missing, and then the table.

1. A worker loads the plan's models and makes its tasks, and says what it found (`circuits.sweeps.work`); the folder is
   claimed for exactly this plan, models and data. This process loads nothing, unless it is the worker.
2. Jobs whose parts are missing run, stage by stage; each is on the disk as soon as it is finished. A job that another
   process is at is waited for, and taken over if that process dies.
3. When no part is missing, the table is made of the parts alone, so that it is the same to the byte however often the
   sweep was killed and whoever ran its jobs.
"""

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from circuits.errors import CircuitsError
from circuits.executors import Executor, Run, choose_executor
from circuits.interventions.effects import with_corrections
from circuits.progress import bar
from circuits.storage import git_commit, library_version, read_json
from circuits.sweeps.folder import SweepFolder
from circuits.sweeps.jobs import DONE, largest
from circuits.sweeps.pace import SweepPace, sweep_pace
from circuits.sweeps.plan import STAGES, Job, SweepPlan
from circuits.sweeps.work import Assignment, Done, Look, SweepWork, facts_digest, keep


def run_sweep(
    plan: SweepPlan, out: str | Path, executor: str | Executor = "serial", *, workers: int | None = None
) -> pandas.DataFrame:
    """Run a sweep, or what is missing of one.

    Several processes may run the same sweep in one folder at once; they share its jobs. After an interruption, of any
    kind and at any moment, the same call goes on, and ends in the same table to the byte.

    Args:
        plan: what to do.
        out: the sweep's folder: ``plan.json``, ``parts``, and at the end ``table.parquet`` and ``table.csv``. If the
            plan has ``per_answer``, the folder ``answers`` too: ``pandas.read_parquet`` reads it as one table, with
            the columns that `circuits.interventions.run_interventions` has for each answer.
        executor: who runs its jobs: ``serial``, this process; ``processes``, several on this machine; ``ray``, a Ray
            cluster; ``slurm``, a Slurm job array; or an executor of `circuits.executors` with its settings. Each worker
            has the plan's models in memory.
        workers: how many; if not given, as many as there is room for with the plan's threads each.

    Returns:
        The table: one row for each task and intervention, as `circuits.interventions.run_interventions` gives them,
        and for single units their ``layer`` and ``index``. After a screen also ``estimate`` and ``exact``: rows that
        are not exact have no metrics. ``attrs`` tells what it came from.

    Raises:
        CircuitsError: the plan does not fit its model or data, the folder holds another sweep, there is no such
            executor or what it needs, workers keep dying, or the disk is full.

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
    folder, jobs = SweepFolder(out), list[Job]()
    chosen = choose_executor(executor, workers=workers)
    try:
        with chosen.start(SweepWork(plan, folder), folder.path, threads=plan.threads) as run:
            with bar(f"load {plan.model}", 1, " sweep"):
                [(_, found)] = run([Look()])
            jobs = plan.jobs(found.interventions)
            facts = {"plan": _plain(plan), **found.facts, "interventions": found.interventions}
            record = folder.claim({**facts, "library_version": library_version(), "git_commit": git_commit()})
            where = folder.stamp() if chosen.shared else None
            for stage in STAGES:
                some = [job for job in jobs if job.stage == stage]
                _complete(_assigned(plan, jobs, some, folder, facts_digest(found.facts), where), run, folder)
        if not folder.is_finished():
            folder.finish(_table(plan, jobs, folder), _provenance(record))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CircuitsError(
            f"the disk of {folder.path} is full: {_so_far(folder, jobs)} and kept; make room, and {_AGAIN}"
        ) from None
    except KeyboardInterrupt as error:
        error.add_note(f"{_so_far(folder, jobs)}; {_AGAIN}")
        raise
    return pandas.read_parquet(folder.table)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = "the same command goes on from there"


def _so_far(folder: SweepFolder, jobs: Sequence[Job]) -> str:
    return f"{sum(map(folder.is_done, jobs))} of {len(jobs)} jobs are finished"


def _assigned(
    plan: SweepPlan,
    jobs: Sequence[Job],
    some: Sequence[Job],
    folder: SweepFolder,
    facts: str,
    where: tuple[int, int] | None,
) -> list[Assignment]:
    """Some of the jobs, with what workers must be told of each."""
    if plan.screen is None or not some or some[0].stage == "estimate":
        return [Assignment(job, None, facts, where) for job in some]
    found = {}
    for task in plan.tasks:
        estimates = folder.read_part(_estimating(task, jobs))["estimate"]
        found[task] = largest(estimates, plan.exact_count(len(estimates)))
    return [Assignment(job, tuple(found[job.task][job.start : job.stop]), facts, where) for job in some]


def _estimating(task: str, jobs: Sequence[Job]) -> Job:
    return next(job for job in jobs if job.stage == "estimate" and job.task == task)


def _complete(assigned: Sequence[Assignment], run: Run, folder: SweepFolder) -> None:
    """Run jobs until the parts of all are there."""
    missing = [one for one in assigned if not folder.is_done(one.job)]
    if not missing:
        return
    total = sum(len(one.job) for one in assigned)
    before = total - sum(len(one.job) for one in missing)
    with bar(f"sweep, {missing[0].job.stage}", total, " interventions", before) as shown:
        while missing:
            held = []
            for one, result in run(missing):
                if isinstance(result, Done):
                    # of a worker that does not see the folder
                    result = keep(folder, one.job, partial(_same, result))
                if result:
                    shown.update(len(one.job))
                else:
                    held.append(one)
            # another process is at these: it finishes them, or dies and leaves them to us
            missing = held
            if missing:
                time.sleep(0.2)


def _same(done: Done) -> Done:
    return done


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
        pace: how fast it goes on.
    """

    plan: SweepPlan
    facts: dict[str, Any]
    jobs: int
    done: int
    interventions: int
    table: pandas.DataFrame
    pace: SweepPace


def sweep_state(out: str | Path, *, rows: bool = True) -> SweepState:
    """How far the sweep in a folder is; reads what is there and runs nothing.

    Args:
        out: the sweep's folder.
        rows: False leaves the table empty, which is quicker where there are many jobs.

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
    if not rows:
        table = pandas.DataFrame()
    elif folder.is_finished():
        table = pandas.read_parquet(folder.table)
    else:
        parts = [folder.read_part(job) for job in done if job.stage == "exact"]
        table = pandas.DataFrame()
        if parts:
            table = _with_positions(with_corrections(pandas.concat(parts, ignore_index=True)), plan)
    facts = {name: value for name, value in record.items() if name not in ("plan", "interventions")}
    finished = set(done)
    pace = sweep_pace(folder, [job for job in jobs if job not in finished])
    return SweepState(plan, facts, len(jobs), len(done), sum(record["interventions"].values()), table, pace)
