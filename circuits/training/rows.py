"""The rows of a stage: tokenised once, drawn in an order that the seed decides, padded into batches."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuits.facts import FactDataset
from circuits.tasks import tokenise
from circuits.training.recipes import Optimisation, Stage

#: The label of a token that is not counted.
IGNORED = -100


class TokenisedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
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
                labels = [IGNORED] * len(tokens)
                for start, end in example.answers:
                    labels[start:end] = tokens[start:end]
            yield {"input_ids": tokens, "labels": labels}


class Collator:
    """Pads rows on the right. Causal attention keeps padding out of sight of tokens, so no mask is needed."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows → ``input_ids`` and ``labels``, each ``[row, pos]``."""
        length = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {
            name: torch.tensor([example[name] + [value] * (length - len(example[name])) for example in examples])
            for name, value in fill.items()
        }
