"""Running a hooked or a Hugging Face model: logits at the positions that matter."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuits.datasets import Task
from circuits.errors import CircuitsError

#: Where torch keeps the functions hooked into a module; those of TransformerLens' hook points are among them.
_HOOKED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refuse_hooks(model: nn.Module, why: str = "it would have no effect here", parts: Sequence[str] = ("",)) -> None:
    """Raise a `CircuitsError` if a function is hooked into a model, forward or backward, by whatever means.

    What computes with a model's weights, and does not run the model itself, asks this first.

    Args:
        model: the model.
        why: what would become of the function; the end of the sentence.
        parts: only hooks inside these modules; the whole model if not given.

    Example:
        >>> from circuits import Head, ablate_heads, load_model
        >>> from circuits.datasets import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> refuse_hooks(model)
        >>> with ablate_heads(model, [Head(2, 1)]):
        ...     refuse_hooks(model)
        Traceback (most recent call last):
        circuits.errors.CircuitsError: a function is hooked into the model at blocks.2.attn.hook_z: it would have no \
effect here
    """
    for part in parts:
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if any(getattr(module, kind) for kind in _HOOKED):
                where = f" at {name}" if name else ""
                raise CircuitsError(f"a function is hooked into the model{where}: {why}")


def final_residual(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The stream that the unembedding reads: before the final norm for a hooked model, after it for Hugging Face's."""
    if isinstance(model, PreTrainedModel):
        hidden: Tensor = model.base_model(tokens.to(model.device), use_cache=False).last_hidden_state
        return hidden
    hooked: Any = model
    residual: Tensor = hooked(tokens.to(hooked.cfg.device), stop_at_layer=hooked.cfg.n_layers)
    return residual


def embed(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The stream that enters the first layer of a hooked model."""
    hooked: Any = model
    residual: Tensor = hooked(tokens.to(hooked.cfg.device), stop_at_layer=0)
    return residual


def run_layer(
    model: nn.Module, layer: int, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """The stream that leaves a layer of a hooked model, given the one that enters it."""
    hooked: Any = model
    after: Tensor = hooked(residual, start_at_layer=layer, stop_at_layer=layer + 1)
    return after


def unembed(model: nn.Module, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
    """Logits from `final_residual`, at any selection of positions.

    Raises:
        CircuitsError: a function is hooked into the final norm or the unembedding of a hooked model: it would not find
            the positions that it may count on.
    """
    if isinstance(model, PreTrainedModel):
        logits: Tensor = model.get_output_embeddings()(residual)
        return logits
    refuse_hooks(model, "it would not see the positions in their places", ("ln_final", "unembed"))
    hooked: Any = model
    flat = residual.reshape(1, -1, residual.shape[-1])
    rows: Tensor = hooked.unembed(hooked.ln_final(flat))
    return rows.reshape(*residual.shape[:-1], -1)


def answer_logits(model: nn.Module, task: Task) -> Float[Tensor, "answer_token d_vocab"]:
    """Logits that predict each answer token: read one position before it; only these positions are unembedded.

    The order is that of ``task.answer_mask.nonzero()``. Padding is moved to the right, so that no token sees it.
    """
    task = task.right_padded()
    where = task.answer_mask.nonzero()
    residual = final_residual(model, task.tokens)
    return unembed(model, residual[where[:, 0].to(residual.device), where[:, 1].to(residual.device) - 1])
