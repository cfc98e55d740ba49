"""Several recipes at once, each in a process of its own with one thread: the fastest layout for small models on a CPU.

1. Jobs start in the order given, at most ``workers`` at a time; a job waits for the one it names as ``after``.
2. Workers report steps through a queue, and the caller shows one bar for each stage.
3. A worker ends itself when its parent has died or wants to stop, so that nothing goes on writing unseen; what was
   saved is taken up again by the next call.
"""

import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from circuits.errors import CircuitsError
from circuits.facts import FactDataset
from circuits.progress import bar
from circuits.training.recipes import Optimisation
from circuits.training.train import save_start, train

#: Recipe → stage → callbacks.
Callbacks = Callable[[str], Mapping[str, Sequence[TrainerCallback]]]

_worker: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """A recipe to train, once the job of another recipe is done."""

    recipe: str
    after: str | None = None


def train_side_by_side(
    jobs: Sequence[Job],
    dataset: FactDataset,
    out: str | Path,
    start: str | Path = "tiny-llama",
    optimisation: Optimisation | None = None,
    seed: int = 0,
    workers: int = 2,
    evaluate_every: int = 100,
    callbacks: Callbacks | None = None,
) -> None:
    """Train several recipes from the same start, as `circuits.training.train` does, in processes of one thread each.

    Args:
        jobs: recipes and what they wait for.
        dataset: what to learn.
        out: gets the checkpoints.
        start: a configuration or the folder of a checkpoint.
        optimisation: steps, rows, rates.
        seed: of new weights and of the order of rows.
        workers: processes at a time.
        evaluate_every: steps between points of the curves and between saved states.
        callbacks: a function that can be pickled; called in a job's own process with the recipe, it gives the callbacks
            of its stages, as `circuits.training.train` takes them.

    Raises:
        CircuitsError: as `circuits.training.train`, or a job waits for one that is not there.
    """
    for job in jobs:
        if job.after is not None and job.after not in {other.recipe for other in jobs if other is not job}:
            raise CircuitsError(f"the job {job.recipe} waits for {job.after}, which is not among the jobs")
    save_start(dataset, Path(out), start, seed)
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    waiting, running, done = list(jobs), dict[Future[None], str](), set[str]()
    bars: dict[str, Any] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (reports, stop, os.getpid())) as pool:
        try:
            while waiting or running:
                for job in [job for job in waiting if job.after is None or job.after in done]:
                    arguments = (
                        job.recipe,
                        str(dataset.folder),
                        str(out),
                        str(start),
                        optimisation,
                        seed,
                        evaluate_every,
                        callbacks,
                    )
                    running[pool.submit(_train, *arguments)] = job.recipe
                    waiting.remove(job)
                finished, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                _show(reports, bars)
                for future in finished:
                    future.result()
                    done.add(running.pop(future))
        except BaseException:
            stop.set()
            raise
        finally:
            for shown in bars.values():
                shown.close()
            if bars and sys.stderr.isatty():
                # bars that end one above the other leave the cursor at the end of a line
                sys.stderr.write("\r")
                sys.stderr.flush()


def _show(reports: Any, bars: dict[str, Any]) -> None:
    while True:
        try:
            stage, step, steps = reports.get_nowait()
        except queue.Empty:
            return
        if stage not in bars:
            bars[stage] = bar(f"train {stage}", steps, "step")
        bars[stage].update(step - bars[stage].n)
        if step == steps:
            bars[stage].close()


def _start_worker(reports: Any, stop: Any, parent: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # weights that fade towards zero would slow small models down several times
    torch.set_flush_denormal(True)
    _worker.update(reports=reports, stop=stop, parent=parent)


def _report(stage: str, step: int, steps: int) -> None:
    if _worker["stop"].is_set() or os.getppid() != _worker["parent"]:
        os._exit(1)
    if step % 10 == 0 or step == steps:
        _worker["reports"].put((stage, step, steps))


def _train(
    recipe: str,
    data: str,
    out: str,
    start: str,
    optimisation: Optimisation | None,
    seed: int,
    evaluate_every: int,
    callbacks: Callbacks | None,
) -> None:
    more = None if callbacks is None else callbacks(recipe)
    train(recipe, FactDataset(data), out, start, optimisation, seed, evaluate_every, _report, more)
