"""How fast a sweep goes on, who is at it, and how long before it starts it will take.

1. Whoever finishes a job notes it in ``.workers``, a file each: when, which job, how many interventions, how many
   seconds. Jobs that were lost with their worker are noted in ``.lost`` by whoever gave them out.
2. The rate is that of the last ten minutes; a worker counts as long as it may still be at a job like its last.
3. Before a sweep, two short jobs are computed, of few and of more interventions spread over all of the plan: their
   seconds are a + b·n, and the whole takes a for each job and b for each intervention.
"""

import math
import time
from dataclasses import dataclass, replace

from circuits.executors import cores
from circuits.sweeps.folder import SweepFolder
from circuits.sweeps.jobs import PreparedSweep, prepare
from circuits.sweeps.plan import Job, SweepPlan

#: Seconds that the rate is taken over.
_WINDOW = 600.0
#: Seconds that a worker counts after its last job, at least.
_SILENCE = 60.0
#: Interventions in the two jobs that are computed to estimate a plan.
_PROBES = (2, 16)


@dataclass(frozen=True)
class SweepPace:
    """How fast a sweep goes on.

    Attributes:
        rate: interventions a second, over the last ten minutes; zero if none was finished in them.
        left: seconds until all are done, at this rate; infinite if there is none.
        workers: that are at it.
        lost: jobs that were begun and lost with their worker, so far.
    """

    rate: float
    left: float
    workers: int
    lost: int


def sweep_pace(folder: SweepFolder, jobs: list[Job], now: float | None = None) -> SweepPace:
    """How fast the sweep in a folder goes on, from what its workers noted.

    Args:
        folder: of the sweep.
        jobs: that are not done.
        now: seconds since 1970; the present if not given.
    """
    now = time.time() if now is None else now
    notes = {worker: events for worker, events in folder.notes().items() if events}
    events = [event for worker in notes.values() for event in worker]
    begun = min((event.at - event.seconds for event in events), default=now)
    since = max(begun, now - _WINDOW)
    recent = sum(event.interventions for event in events if event.at > since)
    rate = recent / (now - since) if now > since else 0.0
    remaining = sum(map(len, jobs))
    at_it = sum(now - worker[-1].at < max(_SILENCE, 3 * worker[-1].seconds) for worker in notes.values())
    left = 0.0 if not remaining else remaining / rate if rate else math.inf
    return SweepPace(rate, left, at_it if remaining else 0, folder.lost())


@dataclass(frozen=True)
class SweepEstimate:
    """What a plan will take.

    Attributes:
        interventions: on each task.
        exact: interventions that are computed, not only estimated by a screen.
        jobs: that they are cut into.
        tokens: of prompts with their answers, each as often as there is an intervention on it.
        memory: bytes that a worker holds at most: this process did, after two short jobs.
        seconds: of one worker on this machine; a screen's estimates are not in it.
        workers: that this machine has cores for.
    """

    interventions: dict[str, int]
    exact: int
    jobs: int
    tokens: int
    memory: int
    seconds: float
    workers: int


def estimate_sweep(plan: SweepPlan) -> SweepEstimate:
    """Say what a plan will take, from two short jobs; nothing is written.

    Raises:
        CircuitsError: the plan does not fit its model or data.

    Example:
        >>> from pathlib import Path
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> new_model("tiny-llama", word_tokenizer()).save_pretrained(folder / "model")
        >>> _ = word_tokenizer().save_pretrained(folder / "model")
        >>> estimate = estimate_sweep(SweepPlan(folder / "model", dataset=folder / "facts", job_size=4))
        >>> estimate.interventions, estimate.jobs, estimate.seconds > 0
        ({'qa_ood': 16}, 4, True)
    """
    prepared = prepare(plan)
    prepared.check()
    jobs = [job for job in plan.jobs(prepared.counts) if job.stage == "exact"]
    seconds, tokens = 0.0, 0
    for name, task in prepared.tasks.items():
        own = [job for job in jobs if job.task == name]
        count = sum(map(len, own))
        tokens += count * int(task.attention_mask.sum())
        few, more = (min(size, prepared.counts[name]) for size in _PROBES)
        first, second = (_seconds(prepared, own[0], size) for size in (few, more))
        each = max(0.0, (second - first) / (more - few)) if more > few else first / few
        seconds += len(own) * max(0.0, first - few * each) + count * each
    exact = sum(map(len, jobs))
    workers = max(1, cores() // plan.threads)
    return SweepEstimate(prepared.counts, exact, len(jobs), tokens, _most_memory(), seconds, workers)


def _seconds(prepared: PreparedSweep, job: Job, size: int) -> float:
    """The seconds of a job of so many interventions, spread over all on its task."""
    count = prepared.counts[job.task]
    places = [count * number // size for number in range(size)]
    begun = time.perf_counter()
    prepared.run(replace(job, start=0, stop=size), places)
    return time.perf_counter() - begun


def _most_memory() -> int:
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
