"""Training on `transformers.Trainer`: checkpoints in, checkpoints out, resumable after a kill.

1. The starting weights are saved as ``pre``: θ_pre.
2. Each stage of the recipe starts from its predecessor's checkpoint with a fresh optimizer. The order of its rows is
   drawn once from the seed, and the state is saved every few steps; so a run that was killed and started again ends
   with the same weights as one that was not.
3. What a stage leaves is an ordinary Hugging Face checkpoint, with ``circuits.json`` (provenance) and
   ``curve.parquet`` (loss, learning rate and exact match along the way) beside the weights.
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from circuits.errors import CircuitsError
from circuits.facts import FactDataset, word_tokenizer
from circuits.models import (
    checksums,
    fingerprint_of_folder,
    load_huggingface,
    load_tokenizer,
    quiet,
)
from circuits.storage import atomic_folder, flatten, provenance, read_json, write_json
from circuits.tasks import tokenise
from circuits.training.configurations import CONFIGURATIONS, new_model
from circuits.training.curve import Follower, Progress, followed_tasks
from circuits.training.recipes import Optimisation, Stage, stages
from circuits.training.rows import Collator, TokenisedRows
from circuits.training.trainer import StageTrainer


def train(
    recipe: str,
    dataset: FactDataset,
    out: str | Path,
    *,
    start: str | Path = "tiny-llama",
    optimisation: Optimisation | None = None,
    seed: int = 0,
    evaluate_every: int = 100,
    progress: Progress | None = None,
    callbacks: Mapping[str, Sequence[TrainerCallback]] | None = None,
) -> list[Path]:
    """Train a model on biographies and questions.

    Args:
        recipe: ``mixed``, ``two-stage``, ``two-stage-gentle``, ``bio-only``, or ``qa-only``: the second stage alone.
        dataset: what to learn; held-out questions (``qa_ood``) are only evaluated.
        out: gets a checkpoint for each stage (``mixed``; ``stage_1`` and ``two_stage``; ``stage_1`` and
            ``two_stage_gentle``; ``qa_only``) and ``pre``. A stage that is finished there is not run again.
        start: one of `CONFIGURATIONS`, trained from scratch, or the folder of a checkpoint.
        optimisation: steps, rows, rates.
        seed: of new weights and of the order of rows.
        evaluate_every: steps between points of the curve and between saved states.
        progress: called after every step.
        callbacks: name of a stage → more callbacks of its Trainer, such as `circuits.tracing.TraceCallback`.

    Returns:
        The checkpoint folders of the recipe's stages.

    Raises:
        CircuitsError: there is no such recipe, start or stage, or ``out`` holds stages made with other settings.

    Example:
        >>> import tempfile
        >>> from circuits.facts import DatasetSettings, make_dataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> [path.name for path in train("two-stage", dataset, folder, optimisation=Optimisation(steps=2))]
        ['stage_1', 'two_stage']
    """
    out, optimisation = Path(out), optimisation or Optimisation()
    planned = stages(recipe, optimisation)
    callbacks = callbacks or {}
    for name in callbacks.keys() - {stage.name for stage in planned}:
        named = ", ".join(stage.name for stage in planned)
        raise CircuitsError(f"there are callbacks for a stage {name!r}, but the stages of {recipe} are {named}")
    facts = save_start(dataset, out, start, seed)
    for stage in planned:
        settings = facts | {"stage": asdict(stage), "optimisation": json.loads(json.dumps(asdict(optimisation)))}
        if _missing(out / stage.name, settings):
            more = callbacks.get(stage.name, ())
            _run_stage(stage, dataset, out, optimisation, seed, settings, evaluate_every, progress, more)
    return [out / stage.name for stage in planned]


def save_start(dataset: FactDataset, out: Path, start: str | Path, seed: int) -> dict[str, Any]:
    """Save the starting weights as ``out/pre`` unless they are there, and return the facts that every stage shares.

    Raises:
        CircuitsError: there is no such start, or ``out/pre`` is another one.
    """
    facts = {
        "start": str(start),
        "seed": seed,
        "dataset": dataset.fingerprint,
        "data": os.path.relpath(dataset.folder.resolve(), (out / "pre").resolve()),
    }
    if _missing(out / "pre", facts):
        if str(start) in CONFIGURATIONS:
            tokenizer = word_tokenizer(dataset.settings.pools)
            model = new_model(str(start), tokenizer, seed)
        else:
            model, tokenizer = load_huggingface(start), load_tokenizer(start)
        # a tokenizer that does not fit is refused before anything is written
        for split in ("bio", "qa_id"):
            tokenise(list(itertools.islice(dataset.examples(split), 1000)), tokenizer)
        _save(model, tokenizer, out / "pre", facts)
    # what a stage started from, so that no other model is taken for its θ_pre; not compared with what finished stages
    # say, because those of earlier versions say nothing
    return facts | {"start_fingerprint": fingerprint_of_folder(out / "pre")}


def _missing(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint has still to be made; refuses one made with other settings."""
    if not folder.exists():
        return True
    found = flatten(read_json(folder / "circuits.json"))
    for name, value in flatten(settings).items():
        if found.get(name, value if name == "start_fingerprint" else None) != value:
            raise CircuitsError(
                f"{folder} was made with {name} {found.get(name)}, not {value}: choose another folder or delete it"
            )
    return False


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: dict[str, Any],
    curve: pandas.DataFrame | None = None,
) -> None:
    with atomic_folder(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "circuits.json", provenance(**settings, weights=checksums(temporary)))
        if curve is not None:
            curve.to_parquet(temporary / "curve.parquet", index=False)


def _run_stage(
    stage: Stage,
    dataset: FactDataset,
    out: Path,
    optimisation: Optimisation,
    seed: int,
    settings: dict[str, Any],
    evaluate_every: int,
    progress: Progress | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    if torch.cuda.device_count() > 1:
        raise CircuitsError("training uses one GPU, and several are visible: choose one with CUDA_VISIBLE_DEVICES")
    work = out / f".training-{stage.name}"
    if work.exists() and (not (work / "settings.json").is_file() or read_json(work / "settings.json") != settings):
        shutil.rmtree(work)
    write_json(work / "settings.json", settings)
    model, tokenizer = load_huggingface(out / stage.start), load_tokenizer(out / stage.start)
    if optimisation.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    rows = TokenisedRows(dataset, tokenizer, optimisation, work / "rows")
    follower = Follower(model, followed_tasks(dataset, tokenizer), stage, evaluate_every, progress)
    with quiet():
        trainer = StageTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(work),
                max_steps=optimisation.steps,
                per_device_train_batch_size=stage.bio_rows + stage.qa_rows,
                learning_rate=stage.learning_rate,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": optimisation.final_rate},
                warmup_steps=min(optimisation.warmup_steps, optimisation.steps),
                weight_decay=optimisation.weight_decay,
                adam_beta1=optimisation.betas[0],
                adam_beta2=optimisation.betas[1],
                max_grad_norm=optimisation.clip,
                bf16=optimisation.dtype == "bfloat16",
                seed=seed,
                save_steps=evaluate_every,
                save_total_limit=1,
                logging_steps=evaluate_every,
                disable_tqdm=True,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id or 0),
            callbacks=[follower, *callbacks],
        )
        trainer.compact = optimisation.compact
        trainer.order = rows.order(stage, optimisation.steps, seed)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_state(work))
    model.eval()
    _save(model, tokenizer, out / stage.name, settings, follower.curve(trainer.state))
    shutil.rmtree(work)


def _last_state(work: Path) -> str | None:
    """The newest state that was written whole: the Trainer writes ``trainer_state.json`` last."""
    saved = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in saved:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            return str(folder)
    return None
