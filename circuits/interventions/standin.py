"""For now: estimates from fewer examples."""

from collections.abc import Sequence

import pandas

from circuits.datasets import Task
from circuits.interventions.engine import run_interventions
from circuits.interventions.intervention import Intervention
from circuits.models import HookedTransformer


def screen_interventions(
    model: HookedTransformer,
    task: Task,
    interventions: Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    metric: str = "log_prob",
    seed: int = 0,
) -> pandas.DataFrame:
    """Estimates from two examples."""
    few = None if source is None else source.select([0, 1])
    table = run_interventions(
        model, task.select([0, 1]), interventions, source=few, reference=reference, metrics=[metric], seed=seed
    )
    columns = ["units", "mode", "site", "positions", "task"]
    return table[columns].assign(answers=len(task.answers), estimate=table[f"{metric}_effect"])
