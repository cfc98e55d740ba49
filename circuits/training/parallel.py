"""Several recipes at once, each in a process of its own (`circuits.processes`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from circuits.facts import FactDataset
from circuits.processes import Call, check_order, side_by_side
from circuits.progress import stages
from circuits.training.recipes import Optimisation
from circuits.training.train import save_start, train

#: Recipe → stage → callbacks.
Callbacks = Callable[[str], Mapping[str, Sequence[TrainerCallback]]]


@dataclass(frozen=True)
class Job:
    """A recipe to train, once the job of another recipe is done."""

    recipe: str
    after: str | None = None


def train_side_by_side(
    jobs: Sequence[Job],
    dataset: FactDataset,
    out: str | Path,
    *,
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
    shared = {
        "data": str(dataset.folder),
        "out": str(out),
        "start": str(start),
        "optimisation": optimisation,
        "seed": seed,
        "evaluate_every": evaluate_every,
        "callbacks": callbacks,
    }
    calls = [Call(job.recipe, _train, shared | {"recipe": job.recipe}, job.after) for job in jobs]
    check_order(calls)
    save_start(dataset, Path(out), start, seed)
    side_by_side(calls, workers)


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
    train(
        recipe,
        FactDataset(data),
        out,
        start=start,
        optimisation=optimisation,
        seed=seed,
        evaluate_every=evaluate_every,
        progress=stages("train"),
        callbacks=more,
    )
