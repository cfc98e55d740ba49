"""What a model was loaded from, and the one owner of its weights: the checkpoint's tensors.

Masks, grafts and training act on these tensors. The hookable model holds views of them, and the arithmetic that our
numbers come from (`lean_model`) reads them where they lie, so that a change in place is a change everywhere.
"""

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from circuits.errors import CircuitsError
from circuits.models.arithmetic import LeanModel
from circuits.models.families import family_of
from circuits.models.layout import Layout
from circuits.models.rows import Row
from circuits.units import ModelShape

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    #: What `circuits.load_model` gives: a `HookedTransformer`, or a `TransformerBridge`, which has the same names.
    Model = HookedTransformer
else:
    Model = nn.Module


#: The source of a model that was loaded from no folder.
IN_MEMORY = "memory"


@dataclass(frozen=True)
class Parity:
    """How far the ways to compute a model's logits lie apart, measured when it was loaded.

    Attributes:
        tokens: the length of the probe.
        allowed: the largest difference of a logit that is let through; in float32 of the lean model's, the hookable
            one's may be twice as large.
        differences: the largest difference of a logit from the Hugging Face model's, for each way.
        window: the shortest sliding window that the probe is too short to leave; None if it leaves them all.
    """

    tokens: int
    allowed: float
    differences: dict[str, float]
    window: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a hookable model was loaded from; found at ``model.checkpoint``.

    Attributes:
        source: the folder, or ``memory``; of an adapter, its base.
        config: the Hugging Face config.
        rows: which tensor of the checkpoint each parameter is.
        layout: what layers are made of.
        tensors: the checkpoint's tensors, by name; tied embeddings are one. Who changes them, in place, changes the
            model.
        adapter: the folder of the adapter that was merged.
        parity: what was found when the logits were compared.
    """

    source: str
    config: PreTrainedConfig = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    layout: Layout = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    adapter: str | None = None
    parity: Parity | None = None

    @property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one tensor."""
        return self.layout.tied


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """What a hookable model was loaded from.

    Raises:
        CircuitsError: it was not loaded with `circuits.load_model`.
    """
    checkpoint = getattr(model, "checkpoint", None)
    if not isinstance(checkpoint, Checkpoint):
        raise CircuitsError("this model was not loaded by circuits: load it with circuits.load_model(folder)")
    return checkpoint


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that the checkpoint has, under TransformerLens' names: views of its tensors, as they are stored.

    Grouped keys and values are ``W_K`` and ``W_V`` too. Where another number acts than the one stored (Gemma's 1 + w
    and √d · W_E), this is the one stored.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`.
    """
    checkpoint = checkpoint_of(model)
    return {row.name: row.stored(checkpoint.tensors[row.tensor].detach()) for row in checkpoint.rows}


def rows_of(model: nn.Module) -> dict[str, Row]:
    """What each parameter is, and whose.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`.
    """
    return {row.name: row for row in checkpoint_of(model).rows}


def shape_of(model: nn.Module) -> ModelShape:
    """How many layers, heads, key/value groups and neurons a model has.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`.
    """
    layout = checkpoint_of(model).layout
    return ModelShape(layout.n_layers, layout.n_heads, layout.n_groups, layout.d_mlp)


def check_views(model: Any) -> None:
    """Refuse a hookable model one of whose parameters was replaced: what computes with its tensors would ignore that.

    Raises:
        CircuitsError: one was.
    """
    for name in model.replaced():
        raise CircuitsError(
            f"the parameter {name} of the hooked model was replaced: change it in place instead "
            "(parameter.data.copy_(…)), so that everything that computes with the model sees it"
        )


#: For each model the arithmetic that was made last, and where the tensors lay.
_LEAN: WeakKeyDictionary[nn.Module, tuple[Any, LeanModel]] = WeakKeyDictionary()
#: What is known of Hugging Face models in memory.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[Row], Layout]] = WeakKeyDictionary()


def lean_model(model: nn.Module, dtype: torch.dtype | None = None) -> LeanModel:
    """The arithmetic over a model's own tensors, without gradients: what all our numbers come from.

    It does not run functions that are hooked into the model: who calls this asks `refuse_hooks` first.

    Args:
        model: loaded with `circuits.load_model`, or a Hugging Face model.
        dtype: of the arithmetic; the model's own if not given. Other than their own, the tensors are copied.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`, its architecture is not supported, or one of
            the hookable model's parameters was replaced instead of being changed in place.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model, tokens = load_model(new_model("tiny-llama", word_tokenizer())), torch.tensor([[5, 6, 7]])
        >>> lean = lean_model(model)
        >>> torch.allclose(lean.unembed(lean.run(tokens)), model(tokens), atol=1e-5)
        True
    """
    if isinstance(model, PreTrainedModel):
        if model not in _KNOWN:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            family = family_of(config)
            _KNOWN[model] = family.rows(config), family.layout(config)
        (rows, layout), tensors = _KNOWN[model], dict(model.named_parameters())
    else:
        checkpoint = checkpoint_of(model)
        rows, layout, tensors = list(checkpoint.rows), checkpoint.layout, checkpoint.tensors
    where = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors.values()]
    if not isinstance(model, PreTrainedModel):
        where += [(value.data_ptr(), value.dtype) for value in model.parameters()]
    if model in _LEAN and _LEAN[model][0] == where and dtype in (None, _LEAN[model][1].dtype):
        return _LEAN[model][1]
    if not isinstance(model, PreTrainedModel):
        check_views(model)
    lean = LeanModel({name: tensor.detach() for name, tensor in tensors.items()}, rows, layout, dtype=dtype)
    if all(tensor.dtype == lean.dtype for tensor in tensors.values()):
        _LEAN[model] = where, lean
    return lean
