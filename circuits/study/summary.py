"""What ``summary.json`` holds: the numbers of a study, read from its tables."""

import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas
import torch

from circuits.analysis import STEPS
from circuits.analysis.running import seconds
from circuits.analysis.summary import consistency_numbers
from circuits.facts import SPLITS
from circuits.masks import SCORES
from circuits.rankings import BEHAVIOURS
from circuits.statistics import intervals
from circuits.study.folder import COMPARED, EVALUATED, Study
from circuits.units import Head

Frames = Mapping[str, pandas.DataFrame]


def summarise(study: Study, tables: Frames) -> dict[str, Any]:
    """What ``summary.json`` holds; without what steps that are not done would say.

    Args:
        study: for its settings, and for how long its steps took.
        tables: of the study, as far as it has come.
    """
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "accuracy": ("accuracy", lambda: _accuracy(tables["accuracy"])),
        "shared": ("shared", lambda: _shared(tables["shared"], "global")),
        "shared_per_tensor": ("shared", lambda: _shared(tables["shared"], "tensor")),
        "updated": ("updated", lambda: _updated(tables)),
        "ablation": ("ablation", lambda: _ablation(tables["ablation_answers"], "global")),
        "ablation_per_tensor": ("ablation", lambda: _ablation(tables["ablation_answers"], "tensor")),
        "graft": ("grafts", lambda: {name: _graft(tables, name) for name in COMPARED}),
        "rankings": ("ranking_summary", lambda: _rankings(tables["ranking_summary"])),
        "consistency": ("gradient_consistency", lambda: _consistency(tables)),
        "signature": ("signature", lambda: _signature(tables["signature"])),
        "integrated_signature": ("integrated_signature", lambda: _signature(tables["integrated_signature"])),
        "top_head": ("shared_heads", lambda: _first(tables["shared_heads"], ["size"])),
        "attending_head": ("attention", lambda: _first(tables["attention"], [one.name for one in BEHAVIOURS])),
    }
    return {
        **{name: part() for name, (table, part) in parts.items() if table in tables},
        "seconds": _seconds(study),
        "settings": study.plan,
        "seeds": [study.settings.seed],
        "versions": _versions(),
        "machine": _machine(),
    }


def _seconds(study: Study) -> dict[str, float]:
    """How long each step took, those of all analyses together, which are made side by side; and the whole of it."""
    spent: Counter[str] = Counter()
    whole = ("analyse", "compare", "updated", "report")
    for folder in (study.out, *study.arms.values(), study.full_rate, *study.updated.values()):
        spent.update({name: took for name, took in seconds(folder).items() if name not in whole})
    order = ["data", "train", "rates", *(one.name for one in STEPS if one.name != "attend"), "patch_people", "attend"]
    named = {name: round(spent[name], 1) for name in order if name in spent}
    return {**named, "total": round(sum(seconds(study.out).values()), 1)}


def _first(table: pandas.DataFrame, columns: list[str]) -> str:
    """The head of the mixed model with the largest number in any of these columns."""
    rows = table[table["model"] == "mixed"]
    most = rows[columns].max(axis="columns").sort_values(ascending=False, kind="stable")
    return str(rows["unit"][most.index[0]])


def _accuracy(table: pandas.DataFrame) -> dict[str, dict[str, float]]:
    accuracy = table.set_index(["model", "split"])["exact_match"]
    by_model: dict[str, dict[str, float]] = {
        name: {split: round(float(accuracy[name, split]), 4) for split in SPLITS} for name in EVALUATED
    }
    for name in ("two_stage", "two_stage_gentle"):
        by_model[name]["bio_after_stage_1"] = by_model["stage_1"]["bio"]
    return by_model


def _shared(table: pandas.DataFrame, scope: str) -> dict[str, Any]:
    by_model: dict[str, Any] = table[table["scope"] == scope].set_index("model").to_dict("index")
    return by_model


def _updated(tables: Frames) -> dict[str, Any]:
    """What is shared by the gradients along training, by scope and model, and the cosines inside it and outside."""
    found: dict[str, Any] = {}
    for (scope, model), rows in tables["updated"].groupby(["scope", "model"], sort=False):
        found.setdefault(str(scope), {})[str(model)] = rows.drop(columns=["scope", "model"]).iloc[0].to_dict()
    return found


def _ablation(answers: pandas.DataFrame, scope: str) -> dict[str, Any]:
    """Exact match under each condition, with an interval over people that has all draws of a question in it."""
    found: dict[str, Any] = {name: {} for name in COMPARED}
    of = answers[answers["scope"] == scope].groupby(["model", "condition", "task"], sort=False)
    for (model, condition, task), part in of:
        values = part["exact_match"].to_numpy(float)
        ends = intervals(values, part["group"].to_numpy(), kind="share")
        found[model].setdefault(condition, {})[task] = round(float(values.mean()), 4)
        found[model].setdefault(f"{condition}_interval_95", {})[task] = [round(float(end), 4) for end in ends]
    return found


def _graft(tables: Frames, name: str) -> dict[str, Any]:
    """The smallest graft of a model, and that of each score; None where there is nothing to graft."""
    by: dict[str, dict[str, Any]] = {
        score: {"size": None, "fraction": None, "accuracy": None, "splits": dict.fromkeys(SPLITS)} for score in SCORES
    }
    table = tables["grafts"]
    if len(table):
        kept = tables["graft_accuracy"].set_index(["model", "score", "task"])["exact_match"]
        for row in table[(table["model"] == name) & table["chosen"].astype(bool)].itertuples():
            by[row.score] = {
                "size": int(row.size),
                "fraction": round(float(row.fraction), 6),
                "accuracy": round(float(row.exact_match), 4),
                "splits": {split: round(float(kept[name, row.score, split]), 4) for split in SPLITS},
            }
    made = [score for score in SCORES if by[score]["size"] is not None]
    best = min(made, key=lambda score: by[score]["size"], default=None)
    return {**by[best or SCORES[0]], "score": best, "by": by}


def _rankings(table: pandas.DataFrame) -> dict[str, dict[str, float | None]]:
    """One number for each curve of the mixed model's heads on QA-ID; None for an n that is never reached."""
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


def _consistency(tables: Frames) -> dict[str, dict[str, Any]]:
    """``gradient`` and ``representation`` of BIO and QA-OOD, by arm."""
    found: dict[str, dict[str, Any]] = {}
    for model in tables["gradient_consistency"]["model"].unique():
        own = {
            name: tables[name][tables[name]["model"] == model]
            for name in ("gradient_consistency", "representation_consistency")
        }
        for measure, numbers in consistency_numbers(own, "bio", "qa_ood").items():
            found.setdefault(measure, {})[str(model)] = numbers
    return found


def _signature(table: pandas.DataFrame) -> dict[str, Any]:
    """The share of each span in BIO by arm, and what it comes to in nats; of integrated gradients also delta."""
    found: dict[str, Any] = {}
    for model, rows in table[table["task"] == "bio"].groupby("model", sort=False) if len(table) else ():
        shares, effects = (rows.set_index("span")[name].astype(float).round(4) for name in ("share", "effect"))
        told = {str(span): None if math.isnan(share) else share for span, share in shares.items()}
        found[str(model)] = {**told, "nats": effects.to_dict()}
        if "delta" in rows:
            found[str(model)]["delta"] = round(float(rows["delta"].iloc[0]), 4)
    return found


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
