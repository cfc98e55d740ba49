"""What a study measures while its models learn: both formats' gradients, and how alike those of a fact are.

Every so many steps of every stage, some biographies and some questions of people whose questions are learned are
traced, and the traces are added up. Those of a format in the stage that learns it say what the format changed, and the
largest of both are the parameters updated by both (docs/method.md, section 2). At the same steps, the gradients of some
facts' two formats are compared (section 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas
from transformers import TrainerCallback

from circuits.consistency import ConsistencyCallback
from circuits.facts import FactDataset
from circuits.models import identity, load_tokenizer
from circuits.study.folder import EVALUATED, Study
from circuits.tasks import pair_facts
from circuits.tracing import GradientTrace, TraceCallback
from circuits.training import Optimisation, stages

#: The formats whose gradients are added up, and those whose facts are compared.
TRACED = ("bio", "qa_id")
_COMPARED = ("bio", "qa_ood")
#: Examples of each format that are traced, and facts that are compared: at every step that is measured.
_EXAMPLES, _FACTS = 100, 60


def callbacks_along(study: Study) -> partial[Mapping[str, Sequence[TrainerCallback]]]:
    """The callbacks of each recipe's stages, as `circuits.training.train_side_by_side` takes them."""
    settings = study.settings
    every = min(settings.evaluate_every, settings.optimisation.steps)
    places = study.out / "data", study.checkpoints, study.along
    return partial(_callbacks, *places, settings.optimisation, settings.seed, every)


def _callbacks(
    data: Path, checkpoints: Path, along: Path, optimisation: Optimisation, seed: int, every: int, recipe: str
) -> Mapping[str, Sequence[TrainerCallback]]:
    dataset, tokenizer = FactDataset(data), load_tokenizer(checkpoints / "pre")
    probes = [dataset.task(split, tokenizer).sample(_EXAMPLES, seed) for split in TRACED]
    bio, asked = (dataset.task(split, tokenizer) for split in _COMPARED)
    facts = pair_facts(bio, asked, _FACTS, seed=seed)
    return {
        stage.name: [
            TraceCallback(probes, every, along / stage.name),
            ConsistencyCallback(*facts, every, out=along / stage.name / "consistency.parquet"),
        ]
        for stage in stages(recipe, optimisation)
    }


def consistency_along(study: Study) -> pandas.DataFrame:
    """The cosines of every stage, by ``model`` (the checkpoint that the stage leaves) and ``step``."""
    tables = [
        pandas.read_parquet(study.along / name / "consistency.parquet").assign(model=name)
        for name in EVALUATED
        if name != "pre"
    ]
    joined = pandas.concat(tables, ignore_index=True)
    return joined[["model", *(name for name in joined if name != "model")]]


def updated_traces(study: Study, arm: str) -> dict[str, GradientTrace]:
    """The gradients of each format, summed along the stage of an arm's training that learns it."""
    learned = {"bio": "mixed" if arm == "mixed" else "stage_1", "qa_id": arm}
    found = {split: GradientTrace.load(study.along / learned[split] / f"{split}.safetensors") for split in TRACED}
    # the first stage is a part of the arm's training: what it changed was changed on the way to this model
    of = {"model": identity(study.model(arm))}
    return {split: replace(trace, provenance=trace.provenance | of) for split, trace in found.items()}
