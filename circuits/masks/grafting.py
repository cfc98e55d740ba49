"""Grafting: how few fine-tuned parameters carry a task (docs/method.md, section 4).

By a score of each parameter, or by optimising a relaxed mask; `circuits.masks.graft_search` says how.
"""

from collections.abc import Iterable

from circuits.errors import CircuitsError
from circuits.masks.graft_search import GraftSearch
from circuits.masks.grafts import Graft
from circuits.models import Model
from circuits.tasks import Task
from circuits.units import Head, KVGroup, Neuron

SCORES: tuple[str, ...] = ("change", "gradient_x_change")


def graft_by_score(
    pre: Model,
    fine_tuned: Model,
    task: Task,
    *,
    score: str = "change",
    keep: float = 0.95,
    units: Iterable[Head | KVGroup | Neuron] | None = None,
    batch_size: int = 64,
    check_start: bool = True,
) -> Graft:
    """The smallest graft, by a score of each parameter, that keeps a share of the fine-tuned accuracy.

    Deterministic. Accuracy need not rise evenly with size; the graft is the smallest of those tried that keeps the
    share, and the curve shows all that were tried.

    Args:
        pre: θ_pre; changed on the way and restored.
        fine_tuned: θ_ft.
        task: what must be kept, by exact match.
        score: ``change`` (``|Δ|``), or ``gradient_x_change`` (``|g · Δ|``); see `circuits.masks.graft_search`.
        keep: r, the share of the fine-tuned accuracy.
        units: graft only parameters of these; heads bring their own weights, and those of their key/value groups if
            `with_groups` adds them.
        batch_size: examples in one backward pass.
        check_start: refuse a ``pre`` if the checkpoint of ``fine_tuned`` says that it was trained from another model.

    Raises:
        CircuitsError: there is no such score or unit, the share is not between 0 and 1, the models are not of one
            shape, ``pre`` is not the start, the fine-tuned model gets nothing right, or even the largest graft keeps
            less.

    Source:
        docs/method.md, section 4; arXiv 2505.16178, Fig. 3.

    Example:
        The grafted model is an ordinary one; inside the block it can be saved for good:

        >>> from circuits import load_model, save_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.masks import graft
        >>> from circuits.training import Optimisation, train
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> (trained,) = train("mixed", dataset, folder, optimisation=Optimisation(steps=40, rows=12, warmup_steps=5))
        >>> pre, fine_tuned = load_model(folder / "pre"), load_model(trained)
        >>> found = graft_by_score(pre, fine_tuned, dataset.task("qa_id", pre.tokenizer))
        >>> 0 < found.fraction < 1
        True
        >>> with graft(pre, found.mask, fine_tuned):
        ...     save_model(pre, folder / "grafted")
    """
    if score not in SCORES:
        raise CircuitsError(f"there is no score {score!r}: choose from {', '.join(SCORES)}")
    if batch_size < 1:
        raise CircuitsError(f"the batch size is {batch_size}: the least is 1")
    search = GraftSearch(pre, fine_tuned, task, keep, units, check_start)
    with search.started():
        scores = search.changes() if score == "change" else search.gradients_x_changes(batch_size)
        return search.result(*search.by_size(scores, score), score=score)


def graft_by_optimisation(
    pre: Model,
    fine_tuned: Model,
    task: Task,
    *,
    keep: float = 0.95,
    units: Iterable[Head | KVGroup | Neuron] | None = None,
    steps: int = 60,
    step_size: float = 0.2,
    sparsity: float = 3.0,
    batch_size: int = 64,
    seed: int = 0,
    check_start: bool = True,
) -> Graft:
    """The smallest graft, by optimising a relaxed mask, that keeps a share of the fine-tuned accuracy.

    Never larger than ``graft_by_score(..., "change")``, from which it starts. Beside the two models, memory holds
    θ_pre, the relaxed mask and its gradient, each as large as the model in float32.

    Args:
        pre: θ_pre; changed on the way and restored.
        fine_tuned: θ_ft.
        task: what must be kept, by exact match.
        keep: r, the share of the fine-tuned accuracy.
        units: as for `graft_by_score`.
        steps: of gradient descent.
        step_size: root mean square of the change of the mask's logits s in one step.
        sparsity: λ, what the whole base patch costs, in nats of the task's loss.
        batch_size: examples in one step.
        seed: of the examples of each step, where the task has more.
        check_start: as for `graft_by_score`.

    Raises:
        CircuitsError: as `graft_by_score`, or the loss is not finite on the way.

    Source:
        Panigrahi et al. 2023 (arXiv 2302.06600), with the choices that `circuits.masks.graft_search` names.
    """
    if min(steps, step_size, batch_size) <= 0 or sparsity < 0:
        raise CircuitsError("steps, step size and batch size must be positive, and the sparsity not negative")
    search = GraftSearch(pre, fine_tuned, task, keep, units, check_start)
    with search.started():
        base, row = search.by_size(search.changes(), "change")
        relaxed = search.relax(base, steps, step_size, sparsity, batch_size, seed)
        found, last = search.by_size(relaxed, "optimised")
        if search.rows[last]["size"] > search.rows[row]["size"]:
            found, last = base, row
        settings = {"steps": steps, "step_size": step_size, "sparsity": sparsity, "batch_size": batch_size}
        return search.result(found, last, score=search.rows[last]["score"], seed=seed, **settings)
