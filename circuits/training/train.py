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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from circuits.errors import CircuitsError
from circuits.facts import FactDataset, word_tokenizer
from circuits.metrics import evaluate
from circuits.models import (
    checksums,
    fingerprint_of_folder,
    load_huggingface,
    load_tokenizer,
    quiet,
)
from circuits.storage import atomic_folder, flatten, provenance, read_json, write_json
from circuits.tasks import Task, tokenise
from circuits.training.configurations import CONFIGURATIONS, new_model
from circuits.training.recipes import Optimisation, Stage, stages

#: Called with the stage's name, the steps done, and all its steps.
Progress = Callable[[str, int, int], None]

#: Splits followed during training, and how many rows of each.
_FOLLOWED = {"bio": 600, "qa_id": 300, "qa_ood": 300}
_IGNORED = -100


def train(
    recipe: str,
    dataset: FactDataset,
    out: str | Path,
    start: str | Path = "tiny-llama",
    optimisation: Optimisation | None = None,
    seed: int = 0,
    evaluate_every: int = 100,
    progress: Progress | None = None,
    callbacks: Mapping[str, Sequence[TrainerCallback]] | None = None,
) -> list[Path]:
    """Train a model on biographies and questions.

    Args:
        recipe: ``mixed``, ``two-stage``, ``two-stage-gentle`` or ``bio-only``.
        dataset: what to learn; held-out questions (``qa_ood``) are only evaluated.
        out: gets a checkpoint for each stage (``mixed``; ``stage_1`` and ``two_stage``; ``stage_1`` and
            ``two_stage_gentle``) and ``pre``. A stage that is finished there is not run again.
        start: ``tiny-llama`` or ``tiny-pythia``, trained from scratch, or the folder of a checkpoint.
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
    rows = _TokenisedRows(dataset, tokenizer, optimisation, work / "rows")
    follower = _Follower(model, _followed_tasks(dataset, tokenizer), stage, evaluate_every, progress)
    with quiet():
        trainer = _StageTrainer(
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
            data_collator=_Collator(tokenizer.pad_token_id or 0),
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


def _followed_tasks(dataset: FactDataset, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    return [
        Task.from_examples(split, itertools.islice(dataset.examples(split), count), tokenizer)
        for split, count in _FOLLOWED.items()
    ]


class _TokenisedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Biographies, then QA-ID questions, tokenised once into a memory-mapped Arrow table."""

    def __init__(
        self, dataset: FactDataset, tokenizer: PreTrainedTokenizerBase, optimisation: Optimisation, cache: Path
    ) -> None:
        import datasets

        values = datasets.List(datasets.Value("int32"))
        tables = []
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            for split, loss in (("bio", optimisation.bio_loss), ("qa_id", optimisation.qa_loss)):
                tables.append(
                    datasets.Dataset.from_generator(
                        _labelled_rows,
                        gen_kwargs={"dataset": dataset, "split": split, "tokenizer": tokenizer, "loss": loss},
                        features=datasets.Features({"input_ids": values, "labels": values}),
                        cache_dir=str(cache),
                        fingerprint=f"{dataset.fingerprint}-{split}-{loss}",
                    )
                )
        finally:
            if bars:
                datasets.enable_progress_bars()
        self.bio = len(tables[0])
        self.qa = len(tables[1])
        self.table = datasets.concatenate_datasets(tables)

    def order(self, stage: Stage, steps: int, seed: int) -> list[int]:
        """Row numbers of all steps, one after another: each format shuffled anew whenever it is used up."""
        generator = torch.Generator().manual_seed(seed)
        columns = []
        for first, count, each in ((0, self.bio, stage.bio_rows), (self.bio, self.qa, stage.qa_rows)):
            epochs = [torch.randperm(count, generator=generator) for _ in range(-(-steps * each // count))]
            drawn = torch.cat(epochs)[: steps * each] if epochs else torch.empty(0, dtype=torch.long)
            columns.append(first + drawn.view(steps, each))
        order: list[int] = torch.cat(columns, dim=1).flatten().tolist()
        return order

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example: dict[str, list[int]] = self.table[index]
        return example

    def __getitems__(self, indices: list[int]) -> list[dict[str, list[int]]]:
        columns = self.table[indices]
        return [
            {"input_ids": tokens, "labels": labels}
            for tokens, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]


def _labelled_rows(
    dataset: FactDataset, split: str, tokenizer: PreTrainedTokenizerBase, loss: str
) -> Iterator[dict[str, list[int]]]:
    examples = dataset.examples(split)
    while chunk := list(itertools.islice(examples, 1000)):
        for example in tokenise(chunk, tokenizer):
            tokens = labels = example.tokens
            if loss == "answer":
                labels = [_IGNORED] * len(tokens)
                for start, end in example.answers:
                    labels[start:end] = tokens[start:end]
            yield {"input_ids": tokens, "labels": labels}


class _Collator:
    """Pads rows on the right. Causal attention keeps padding out of sight of tokens, so no mask is needed."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": _IGNORED}
        return {
            name: torch.tensor([example[name] + [value] * (length - len(example[name])) for example in examples])
            for name, value in fill.items()
        }


def compact_loss(
    model: PreTrainedModel, tokens: Int[Tensor, "batch pos"], labels: Int[Tensor, "batch pos"], groups: int = 2
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the counted tokens, computed only where it is needed.

    A causal model's token has no part in predicting itself or what stands before it, so that a row may end before its
    last counted token. Rows of similar length run together, to pad less; only positions that predict a counted token
    are unembedded.

    Args:
        model: a Hugging Face model.
        tokens: padded on the right.
        labels: the tokens that are counted, and -100 elsewhere.
        groups: of rows that run together.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model, tokens = new_model("tiny-llama", word_tokenizer()), torch.arange(24).view(4, 6)
        >>> labels = tokens.where(tokens % 6 > 3, -100)
        >>> bool(torch.isclose(compact_loss(model, tokens, labels), model(tokens, labels=labels).loss))
        True
    """
    counted = labels[:, 1:] != _IGNORED
    lengths = (counted * torch.arange(1, labels.shape[1], device=labels.device)).amax(1)
    sums = []
    for rows in lengths.argsort(stable=True).chunk(groups):
        length = int(lengths[rows].max())
        where = counted[rows, :length]
        logits = _unembedded(model, model.base_model(tokens[rows, :length], use_cache=False).last_hidden_state[where])
        targets = labels[rows, 1 : length + 1][where]
        sums.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return torch.stack(sums).sum() / counted.sum()


def _unembedded(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


class _StageTrainer(Trainer):
    """A Trainer that takes its rows in a given order, and may compute its loss compactly."""

    order: list[int]
    compact: bool = False

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not self.compact:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.accelerator.autocast():
            return compact_loss(model, inputs["input_ids"], inputs["labels"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
        return self.order


class _Follower(TrainerCallback):
    """Reports progress and scores the followed tasks along the way; the scores live in the Trainer's log."""

    def __init__(
        self, model: PreTrainedModel, tasks: list[Task], stage: Stage, every: int, progress: Progress | None
    ) -> None:
        self.model, self.tasks, self.stage, self.every, self.progress = model, tasks, stage, every, progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Report the step; score if it is time."""
        if self.progress is not None:
            self.progress(self.stage.name, state.global_step, state.max_steps)
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self.model.eval()
            scores = {task.name: float(evaluate(self.model, task)["exact_match"].mean()) for task in self.tasks}
            self.model.train()
            state.log_history.append({"step": state.global_step, **scores})
            control.should_log = True
        return control

    def curve(self, state: TrainerState) -> pandas.DataFrame:
        """One row for each scored step: ``stage``, ``step``, ``loss``, ``learning_rate``, and exact match by split."""
        points: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            points.setdefault(entry["step"], {"stage": self.stage.name, "step": entry["step"]}).update(
                {key: entry[key] for key in ("loss", "learning_rate", *_FOLLOWED) if key in entry}
            )
        return pandas.DataFrame(points.values())
