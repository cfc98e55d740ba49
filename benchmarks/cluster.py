"""A sweep on Ray workers against the same jobs without them; writes ``runs/bench/cluster.json``.

Run with ``python -m benchmarks.cluster``; with ``--tiny`` on few and short jobs, which shows only that it runs. Workers
are on this machine, of one thread each, and have their models loaded before anything is timed. All take turns on the
same jobs, which end as parts in a folder; the least seconds of several turns count.

- speed of two: the seconds of one worker over those of two;
- overhead: the seconds of one worker over those of the same jobs in this process, less one; and, from what workers say
  that their jobs took, the share of two workers' time in which they were at none.

The machine must have two cores to itself: with anything else running, two workers wait for it and for each other.
"""

import logging
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from circuits.executors import Ray, Run, Serial
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.storage import provenance, write_json
from circuits.sweeps import SweepPlan
from circuits.sweeps.folder import SweepFolder
from circuits.sweeps.work import Assignment, Look, SweepWork, facts_digest
from circuits.training import new_model

OUT = Path("runs/bench/cluster.json")
TURNS = 5


def made_up_plan(folder: Path, tiny: bool) -> SweepPlan:
    """Neurons of a model of the study's shape."""
    make_dataset(folder / "facts", DatasetSettings(people=12 if tiny else 100))
    new_model("tiny-llama", word_tokenizer()).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    settings: dict[str, Any] = {"examples": 2, "job_size": 8} if tiny else {"examples": 64, "job_size": 64}
    units = [f"L{layer}N{index}" for layer in range(4) for index in range(8 if tiny else 320)]
    return SweepPlan(folder / "model", dataset=folder / "facts", units=units, **settings)


def timed(run: Run, jobs: list[Assignment], folder: SweepFolder) -> tuple[float, float]:
    """Seconds until all jobs are done, and how many of them workers were at jobs."""
    shutil.rmtree(folder.path / ".workers", ignore_errors=True)
    begun = time.perf_counter()
    done = [finished for _, finished in run(jobs)]
    seconds = time.perf_counter() - begun
    assert all(finished is True for finished in done)
    busy = sum(note.seconds for notes in folder.notes().values() for note in notes)
    for part in folder.parts.glob("*.parquet"):
        part.unlink()
    return seconds, busy


def main(tiny: bool = False) -> dict[str, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = Path(name)
        plan = made_up_plan(place, tiny)
        folder = SweepFolder(place / "sweep")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=128 << 20, **quiet)
        stack.callback(ray.shutdown)
        work = SweepWork(plan, folder)
        runs = {
            "here": stack.enter_context(Serial().start(work, folder.path)),
            "one": stack.enter_context(Ray(workers=1).start(work, folder.path)),
            "two": stack.enter_context(Ray(workers=2).start(work, folder.path)),
        }
        [(_, found)] = runs["here"]([Look()])
        folder.claim({"plan": {}, "interventions": found.interventions})
        facts, where = facts_digest(found.facts), folder.stamp()
        jobs = [Assignment(job, None, facts, where) for job in plan.jobs(found.interventions)]
        for name, run in runs.items():
            # until every worker has its models
            timed(run, jobs, folder)
            while name == "two" and len(folder.notes()) < 2:
                timed(run, jobs, folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        busy: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(1 if tiny else TURNS):
            for name, run in runs.items():
                whole, at_jobs = timed(run, jobs, folder)
                seconds[name].append(whole)
                busy[name].append(at_jobs)
        parts = {"jobs": len(jobs), "interventions": sum(found.interventions.values())}
    least = {name: min(some) for name, some in seconds.items()}
    idle = min(1 - at_jobs / (2 * whole) for at_jobs, whole in zip(busy["two"], seconds["two"], strict=True))
    return {
        "speed_of_two": round(least["one"] / least["two"], 3),
        "overhead_of_a_job": round(least["one"] / least["here"] - 1, 4),
        "share_of_time_at_no_job": round(idle, 4),
        "seconds_of_a_job": round(least["here"] / len(jobs), 3),
        **parts,
        "seconds": seconds,
        "seconds_at_jobs": busy,
    }


if __name__ == "__main__":
    tiny = "--tiny" in sys.argv[1:]
    results = main(tiny)
    for name, value in results.items():
        print(f"{name:24} {value}", flush=True)
    if not tiny:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        write_json(OUT, {**results, "provenance": provenance()})
