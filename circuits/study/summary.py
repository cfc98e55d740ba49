"""What ``summary.json`` holds: the numbers of a study, read from its tables."""

import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch

from circuits.facts import SPLITS
from circuits.masks import SCORES
from circuits.metrics import METRICS
from circuits.statistics import intervals
from circuits.storage import read_json
from circuits.study.folder import COMPARED, EVALUATED, StudyFolder
from circuits.units import Head


def summarise(study: StudyFolder, steps: Sequence[str]) -> dict[str, Any]:
    """What ``summary.json`` holds; without what steps that are not done would say.

    Args:
        study: whose tables are read.
        steps: the names of all steps, in their order.
    """
    folder = study.out / "steps"
    done = [name for name in steps if name != "report" and (folder / f"{name}.json").is_file()]
    seconds = {name: read_json(folder / f"{name}.json")["seconds"] for name in done}
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "accuracy": ("evaluate", lambda: _accuracy(study)),
        "shared": ("share", lambda: _shared(study, "global")),
        "shared_per_tensor": ("share", lambda: _shared(study, "tensor")),
        "ablation": ("ablate", lambda: {name: _ablation(study, name, "global") for name in COMPARED}),
        "ablation_per_tensor": ("ablate", lambda: {name: _ablation(study, name, "tensor") for name in COMPARED}),
        "graft": ("graft", lambda: {name: _graft(study, name) for name in COMPARED}),
        "rankings": ("rank", lambda: _rankings(study)),
        "top_head": ("share", lambda: str(study.top_head())),
        "attending_head": ("attend", lambda: str(study.attending_head())),
    }
    return {
        **{name: part() for name, (step, part) in parts.items() if step in done},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "settings": read_json(study.out / "plan.json"),
        "seeds": [study.settings.seed],
        "versions": _versions(),
        "machine": _machine(),
    }


def _accuracy(study: StudyFolder) -> dict[str, dict[str, float]]:
    accuracy = study.table("accuracy").set_index(["model", "split"])["exact_match"]
    by_model: dict[str, dict[str, float]] = {
        name: {split: round(float(accuracy[name, split]), 4) for split in SPLITS} for name in EVALUATED
    }
    for name in ("two_stage", "two_stage_gentle"):
        by_model[name]["bio_after_stage_1"] = by_model["stage_1"]["bio"]
    return by_model


def _shared(study: StudyFolder, scope: str) -> dict[str, Any]:
    table = study.table("shared")
    by_model: dict[str, Any] = table[table["scope"] == scope].set_index("model").to_dict("index")
    return by_model


def _ablation(study: StudyFolder, name: str, scope: str) -> dict[str, Any]:
    """Exact match under each condition, with an interval over people that has all draws of a question in it."""
    table = study.table("ablation_answers")
    table = table[(table["model"] == name) & (table["scope"] == scope)]
    found: dict[str, Any] = {}
    for condition, rows in table.groupby("condition", sort=False):
        by_task = dict(list(rows.groupby("task", sort=False)))
        found[str(condition)] = {task: round(float(part["exact_match"].mean()), 4) for task, part in by_task.items()}
        found[f"{condition}_interval_95"] = {task: share_interval(part) for task, part in by_task.items()}
    return found


def _graft(study: StudyFolder, name: str) -> dict[str, Any]:
    """The smallest graft of a model, and that of each score; None where there is nothing to graft."""
    table, grafted = study.table("grafts"), study.table("grafted")
    table = table[(table["model"] == name) & table["chosen"].astype(bool)].set_index("score")
    grafted = grafted[grafted["model"] == name].set_index(["score", "split"])["exact_match"]

    def numbers(score: str | None) -> dict[str, Any]:
        if score not in table.index:
            return {"size": None, "fraction": None, "accuracy": None, "splits": dict.fromkeys(SPLITS)}
        row = table.loc[score]
        return {
            "size": int(row["size"]),
            "fraction": round(float(row["fraction"]), 6),
            "accuracy": round(float(row["exact_match"]), 4),
            "splits": {split: round(float(grafted[score, split]), 4) for split in SPLITS},
        }

    best = study.best_graft(name)
    return {**numbers(best), "score": best, "by": {score: numbers(score) for score in SCORES}}


def _rankings(study: StudyFolder) -> dict[str, dict[str, float | None]]:
    """One number for each curve of the mixed model's heads on QA-ID; None for an n that is never reached."""
    table = study.table("ranking_summary")
    table = table[(table["model"] == "mixed") & (table["kind"] == Head.NOUN) & (table["task"] == "qa_id")]
    table = table.set_index(["metric", "condition"])
    columns = {
        "sufficient_auc": ("sufficient", "auc"),
        "critical_auc": ("revert", "auc"),
        "n95": ("sufficient", "n95"),
        "n50": ("revert", "n50"),
    }
    found: dict[str, dict[str, float | None]] = {}
    for metric in dict.fromkeys(table.index.get_level_values("metric")):
        values = {name: float(table.loc[(metric, row), column]) for name, (row, column) in columns.items()}
        found[metric] = {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
    return found


def share_interval(answers: pandas.DataFrame) -> list[float]:
    """The 95 % interval of exact match: answers of one person are not independent."""
    values = answers["exact_match"].to_numpy(float)
    low, high = intervals(values, answers["group"].to_numpy(), kind="share")
    return [round(float(low), 4), round(float(high), 4)]


def accuracies(answers: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """Means of each metric on each split, and the interval of exact match."""
    rows = []
    for values, part in answers.groupby([*keys, "split"], sort=False):
        low, high = share_interval(part)
        of = dict(zip([*keys, "split"], values, strict=True))
        means = part[list(METRICS)].astype(float).mean()
        rows.append({**of, "answers": len(part), **means, "exact_match_low": low, "exact_match_high": high})
    columns = [*keys, "split", "answers", *METRICS, "exact_match_low", "exact_match_high"]
    return pandas.DataFrame(rows, columns=columns)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "transformer-lens", "datasets", "accelerate", "pandas", "plotly")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _machine() -> dict[str, Any]:
    """What this runs on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": processor, "cores": os.cpu_count(), "gpu": device, "threads": torch.get_num_threads()}
