"""The Trainer of a stage: rows in a given order, and the loss computed only where it is needed."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from circuits.training.rows import IGNORED


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
    counted = labels[:, 1:] != IGNORED
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


class StageTrainer(Trainer):
    """A Trainer that takes its rows in a given order, and may compute its loss compactly."""

    order: list[int]
    compact: bool = False

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or `compact_loss`."""
        if not self.compact:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.accelerator.autocast():
            return compact_loss(model, inputs["input_ids"], inputs["labels"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
        return self.order
