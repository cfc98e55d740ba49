"""Second stages at several rates: what each keeps of the biographies, and what questions find."""

from dataclasses import replace
from pathlib import Path

import pandas

from circuits.analysis import accuracies
from circuits.facts import FactDataset
from circuits.metrics import evaluate
from circuits.models import load_model
from circuits.processes import Call, side_by_side
from circuits.progress import stages
from circuits.storage import read_json
from circuits.study.folder import FULL_RATE, Study
from circuits.study.settings import settings_of
from circuits.training import train

_SPLITS = ("bio", "qa_id", "qa_ood")


def recall_by_rate(study: Study, accuracy: pandas.DataFrame) -> pandas.DataFrame:
    """Train the second stage at each of the settings' ``rates``, and score it as all models are.

    Args:
        study: whose first stage and two-stage models are trained.
        accuracy: of these, from the step ``evaluate``.

    Returns:
        One row for each rate, the gentle one and the full one among them, and split, by rising rate: ``rate``,
        ``split``, and what `circuits.analysis.accuracies` says.
    """
    rates = study.settings.rates
    side_by_side([Call(f"{rate:g}", _second_stage, {"out": study.out, "rate": rate}) for rate in rates])
    tasks = {split: study.sample(split, study.settings.evaluate_examples) for split in _SPLITS}
    optimisation = study.settings.optimisation
    trained = {"two_stage_gentle": optimisation.gentle_learning_rate, FULL_RATE: optimisation.learning_rate}
    own = accuracy[accuracy["model"].isin(trained) & accuracy["split"].isin(_SPLITS)]
    parts = [own.assign(rate=own["model"].map(trained)).drop(columns="model")]
    for rate in rates:
        model = load_model(_folder(study.out, rate) / "qa_only")
        answers = [evaluate(model, task).assign(split=split) for split, task in tasks.items()]
        parts.append(accuracies(pandas.concat(answers, ignore_index=True), ["split"]).assign(rate=rate))
    joined = pandas.concat(parts, ignore_index=True).sort_values("rate", kind="stable", ignore_index=True)
    return joined[["rate", *own.columns.drop("model")]]


def _folder(out: Path, rate: float) -> Path:
    return out / "rates" / f"{rate:g}"


def _second_stage(out: Path, rate: float) -> None:
    settings = settings_of(read_json(out / "plan.json"))
    train(
        "qa-only",
        FactDataset(out / "data"),
        _folder(out, rate),
        start=out / "checkpoints" / "stage_1",
        optimisation=replace(settings.optimisation, learning_rate=rate),
        seed=settings.seed,
        evaluate_every=settings.evaluate_every,
        progress=stages(f"at a rate of {rate:g}: train"),
    )
