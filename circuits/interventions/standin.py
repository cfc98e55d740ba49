"""The slow obvious way to run interventions on heads: one hooked forward pass for each."""

from collections.abc import Sequence

import pandas
import torch
from torch import Tensor

from circuits.datasets import Role, Task
from circuits.errors import CircuitsError
from circuits.interventions.heads import mean_head_outputs, patched_outputs, replace_heads
from circuits.interventions.intervention import Intervention
from circuits.metrics import evaluate
from circuits.models import HookedTransformer, shape_of
from circuits.units import Head

_ROLES = {"subject": Role.SUBJECT, "relation": Role.RELATION, "answer": Role.ANSWER}


def run_interventions(
    model: HookedTransformer,
    task: Task,
    interventions: Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    pre: HookedTransformer | None = None,
    metrics: Sequence[str] = ("exact_match", "log_prob"),
    seed: int = 0,
    per_answer: bool = False,
) -> pandas.DataFrame:
    """One row for each intervention."""
    own = evaluate(model, task)
    patched = patched_outputs(model, source, task) if source is not None else None
    means = mean_head_outputs(model, reference) if reference is not None else None
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for intervention in interventions:
        values = {}
        for unit in intervention.units:
            if not isinstance(unit, Head) or intervention.site not in (None, "z"):
                raise CircuitsError(f"{intervention}: not yet")
            unit.check(shape_of(model))
            values[unit] = _value(model, task, intervention, unit, means, patched)
        with replace_heads(model, values):
            scores = evaluate(model, task, len(task))
        row: dict[str, object] = {
            "units": "+".join(map(str, intervention.units)),
            "mode": intervention.mode,
            "site": intervention.site,
            "positions": intervention.positions,
            "task": task.name,
            "answers": len(scores),
        }
        for metric in metrics:
            effects = torch.as_tensor((scores[metric] * 1.0 - own[metric]).to_numpy(copy=True))
            picks = torch.randint(len(effects), (200, len(effects)), generator=generator.manual_seed(seed))
            low, high = effects[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=effects.dtype)).tolist()
            row[metric] = float(scores[metric].mean())
            row[f"{metric}_effect"] = float(effects.mean())
            row |= {f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row)
    return pandas.DataFrame(rows)


def _value(
    model: HookedTransformer,
    task: Task,
    intervention: Intervention,
    unit: Head,
    means: Tensor | None,
    patched: Tensor | None,
) -> Tensor:
    count, length = task.tokens.shape
    if intervention.mode == "zero":
        value = torch.zeros(count, length, model.cfg.d_head)
    elif intervention.mode == "mean" and means is not None:
        value = means[unit.layer, unit.index].expand(count, length, -1).clone()
    elif intervention.mode == "patch" and patched is not None:
        value = patched[unit.layer, :, :, unit.index].clone()
    else:
        raise CircuitsError(f"{intervention}: not yet")
    if isinstance(intervention.positions, int):
        keep = (torch.arange(length) != intervention.positions).expand(count, -1)
    elif intervention.positions == "last":
        starts = torch.as_tensor(task.answers.groupby("example")["start"].min().to_numpy(copy=True))
        keep = torch.arange(length) != starts[:, None] - 1
    elif intervention.positions == "all":
        keep = torch.zeros(count, length, dtype=torch.bool)
    else:
        keep = task.roles != _ROLES[intervention.positions]
    value[keep] = float("nan")
    return value


def screen_interventions(
    model: HookedTransformer,
    task: Task,
    interventions: Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    pre: HookedTransformer | None = None,
    seed: int = 0,
) -> pandas.DataFrame:
    """Estimates from fewer examples."""
    table = run_interventions(
        model,
        task.select([0, 1]),
        interventions,
        source=None if source is None else source.select([0, 1]),
        reference=reference,
        pre=pre,
        seed=seed,
    )
    columns = ["units", "mode", "site", "positions", "task"]
    return table[columns].assign(answers=len(task.answers), estimate=table["log_prob_effect"])
