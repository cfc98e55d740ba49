"""Checkpoint → `HookedTransformer` and back.

1. The Hugging Face config and weights are read from a local folder or taken from a model in memory; the folder's name
   plays no part, nothing is fetched, and every tensor the config asks for must be there in the right shape.
2. The hooked model is configured from the Hugging Face config. Its parameters are views of the checkpoint's tensors:
   nothing is folded or centred, tied embeddings stay tied, and memory holds the weights once.
3. An adapter is merged into the weights before anything else sees them.
4. Before it is handed out, everything that computes with it is compared with the checkpoint (``parity.py``).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from circuits.errors import CircuitsError
from circuits.models.adapters import merge_adapter
from circuits.models.architectures import ParameterSource, architecture_of, checkpoint_tensors
from circuits.models.fingerprints import fingerprint_of
from circuits.models.folder import checksums, first_line, is_adapter
from circuits.models.forward import refuse_hooks
from circuits.models.huggingface import (
    check_finite,
    check_tokenizer,
    empty_huggingface,
    has_tokenizer,
    lending,
    load_huggingface,
    load_tokenizer,
    model_folder,
)
from circuits.models.quiet import quiet
from circuits.models.uninterrupted import uninterrupted
from circuits.storage import atomic_folder, provenance, read_json, write_json
from circuits.units import TIED, ModelShape

with quiet():
    from transformer_lens import HookedTransformer as HookedTransformer
    from transformer_lens import HookedTransformerConfig

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Parity:
    """How far the ways to compute a model's logits lie apart, measured when it was loaded.

    Attributes:
        tokens: the length of the probe.
        allowed: the largest difference of a logit that is let through.
        differences: the largest difference of a logit from the Hugging Face model's, for each way.
    """

    tokens: int
    allowed: float
    differences: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """What a hooked model was loaded from; found at ``model.checkpoint``.

    Attributes:
        source: the folder, or ``memory``; of an adapter, its base.
        config: the Hugging Face config.
        sources: which tensor of the checkpoint each parameter is.
        adapter: the folder of the adapter that was merged.
        parity: what was found when the logits were compared.
    """

    source: str
    config: PreTrainedConfig = field(repr=False)
    sources: tuple[ParameterSource, ...] = field(repr=False)
    adapter: str | None = None
    parity: Parity | None = None


def load_model(
    source: str | Path | PreTrainedModel,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    *,
    adapter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> HookedTransformer:
    """Load a checkpoint into a `HookedTransformer`, unprocessed, and check that all we compute with gives its logits.

    Args:
        source: a local Hugging Face folder, a folder with a PEFT adapter that names its base, or a Hugging Face model
            in memory (which is copied).
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where the model goes; CUDA if there is any, else the CPU.
        adapter: a local PEFT folder (LoRA, DoRA, …), merged into the weights in that dtype.
        tokenizer: for a model in memory; a folder brings its own, an adapter its own or its base's.

    Returns:
        The model in evaluation mode, without gradients on parameters that TransformerLens invents. It has
        ``model.checkpoint`` (a `Checkpoint`) and ``model.tokenizer``.

    Raises:
        CircuitsError: the checkpoint is missing, damaged, unsafe or not supported, the adapter does not fit or cannot
            be merged, the tokenizer has tokens that the model does not embed, its logits differ, or
            functions are hooked into the model in memory.

    Example:
        >>> from circuits.training import new_model
        >>> from circuits.datasets import word_tokenizer
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> model.cfg.n_layers, model.cfg.n_key_value_heads
        (4, 2)
    """
    if dtype not in DTYPES:
        raise CircuitsError(f"the dtype {dtype!r} is not supported: choose from {', '.join(DTYPES)}")
    chosen = _device(device)
    if isinstance(source, PreTrainedModel):
        refuse_hooks(source)
        name, reference = "memory", copy.deepcopy(source).to(dtype=DTYPES[dtype]).eval()
        reference.config.architectures = [type(source).__name__]
        check_finite(reference, "the model in memory")
        if adapter is not None:
            reference = merge_adapter(reference, adapter)
            check_finite(reference, f"the model in memory with the adapter {adapter}")
    else:
        reference = load_huggingface(source, DTYPES[dtype], adapter)
        name = str(model_folder(source))
        if is_adapter(source):
            adapter = source
    if tokenizer is None:
        places = [Path(place) for place in (adapter, name) if place is not None]
        tokenizer = next((load_tokenizer(place) for place in places if has_tokenizer(place)), None)
    if tokenizer is not None:
        check_tokenizer(tokenizer, reference.config.vocab_size, str(source if name != "memory" else name))
    reference = reference.to(chosen)
    model = _hooked(name, reference, tokenizer)
    _SHELLS[model] = reference
    from circuits.models.parity import check_parity  # which builds on this module

    model.checkpoint = replace(
        model.checkpoint, adapter=None if adapter is None else str(adapter), parity=check_parity(model, reference)
    )
    return model


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CircuitsError(f"the device {str(name)!r} cannot be used here: {first_line(error)}") from None
    return device


def _hooked(name: str, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> HookedTransformer:
    config = reference.config
    architecture = architecture_of(config)
    sources = architecture.sources(config)
    settings = architecture.settings(config)
    with quiet():
        model = HookedTransformer(
            HookedTransformerConfig(
                **settings,
                dtype=reference.dtype,
                device=str(reference.device),
                original_architecture=architecture.name,
                default_prepend_bos=False,
                init_weights=False,
            )
        )
    tensors = dict(reference.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    for source in sources:
        if source.checkpoint not in tensors:
            raise CircuitsError(f"the checkpoint {name} has no tensor {source.checkpoint}")
        value = source.to_hooked(tensors[source.checkpoint].detach())
        if value.shape != parameters[source.hooked].shape:
            raise CircuitsError(f"{source.checkpoint} has shape {tuple(value.shape)} in {name}, which does not fit")
        parameters[source.hooked].data = value
    taken = {source.checkpoint for source in sources}
    for left in sorted(set(tensors) - taken):
        raise CircuitsError(f"the checkpoint {name} has a tensor {left} that HookedTransformer cannot represent")
    for invented in parameters.keys() - {source.hooked for source in sources}:
        parameters[invented].data = torch.zeros_like(parameters[invented])
        parameters[invented].requires_grad_(False)
    model.checkpoint = Checkpoint(name, config, tuple(sources))
    if tokenizer is not None:
        model.tokenizer = tokenizer
        prepends = len(tokenizer("").input_ids) > 0
        model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends
    return model.eval()


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """What a hooked model was loaded from.

    Raises:
        CircuitsError: it was not loaded with `load_model`.
    """
    checkpoint = getattr(model, "checkpoint", None)
    if not isinstance(checkpoint, Checkpoint):
        raise CircuitsError("this model was not loaded by circuits: load it with circuits.load_model(folder)")
    return checkpoint


def parameters_of(model: HookedTransformer) -> dict[str, nn.Parameter]:
    """The parameters that the checkpoint has, under their names in the hooked model.

    Raises:
        CircuitsError: the model was not loaded with `load_model`.
    """
    named = dict(model.named_parameters())
    return {source.hooked: named[source.hooked] for source in checkpoint_of(model).sources}


#: A Hugging Face model for each hooked one: at first the one it was loaded from, and empty while it is not used.
_SHELLS: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


@uninterrupted
def huggingface_view(model: HookedTransformer) -> Iterator[PreTrainedModel]:
    """Inside the block, the hooked model's parameters as a Hugging Face model, which computes the same, but faster.

    Parameters are shared wherever the two layouts allow it (all but fused ones): the view costs no memory.

    Raises:
        CircuitsError: the model was not loaded with `load_model`, or functions are hooked into it, which the view
            would not run.
    """
    checkpoint = checkpoint_of(model)
    refuse_hooks(model)
    if model not in _SHELLS:
        _SHELLS[model] = empty_huggingface(checkpoint.config, model.cfg.dtype)
    parameters = {name: value.detach() for name, value in parameters_of(model).items()}
    with lending(_SHELLS[model], checkpoint_tensors(list(checkpoint.sources), parameters)) as view:
        yield view


def shape_of(model: HookedTransformer) -> ModelShape:
    """How many layers, heads, key/value groups and neurons a hooked model has."""
    cfg = model.cfg
    return ModelShape(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_mlp)


def fingerprint(model: HookedTransformer) -> str:
    """Sixteen hexadecimal characters that name a model by the content of its parameters.

    Example:
        >>> from circuits.datasets import word_tokenizer
        >>> from circuits.training import new_model
        >>> one, two = (load_model(new_model("tiny-llama", word_tokenizer(), seed)) for seed in (0, 1))
        >>> fingerprint(one) == fingerprint(one) != fingerprint(two)
        True
    """
    checkpoint = checkpoint_of(model)
    return fingerprint_of(checkpoint.config, checkpoint.sources, parameters_of(model))


#: Models that are being edited, and what they were before. Kept beside them: a copy made meanwhile has the values of
#: the moment, and not the name of those before.
_EDITED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@uninterrupted
def editing(model: HookedTransformer) -> Iterator[None]:
    """For the length of the block, the model keeps its `identity` while its parameters are changed and restored."""
    outermost = model not in _EDITED
    if outermost:
        _EDITED[model] = fingerprint(model)
    try:
        yield
    finally:
        if outermost:
            del _EDITED[model]


def identity(model: HookedTransformer) -> str:
    """The fingerprint of a model, or what it was before a block that is `editing` it began."""
    return _EDITED.get(model) or fingerprint(model)


def require_start(fine_tuned: HookedTransformer, pre: HookedTransformer) -> None:
    """Refuse a model that the fine-tuned one did not start from, as far as its checkpoint says what it started from.

    Checkpoints made by `circuits.training` say it in ``circuits.json``; others, and models in half precision, whose
    values are not those of the checkpoint, are taken on trust.

    Raises:
        CircuitsError: the checkpoint names another start.
    """
    source = Path(checkpoint_of(fine_tuned).source)
    facts = source / "circuits.json"
    if pre.cfg.dtype != torch.float32 or not facts.is_file():
        return
    started, found = read_json(facts).get("start_fingerprint"), identity(pre)
    if started is not None and started != found:
        raise CircuitsError(
            f"{source} was trained from model {started}, and {checkpoint_of(pre).source} is {found}: give the model "
            "it started from, or waive this with check_start=False"
        )


def facts_of(model: HookedTransformer) -> dict[str, Any]:
    """What a saved result says of the model it came from: fingerprint, dtype and device."""
    return {
        "model": fingerprint(model),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(model.cfg.device),
    }


def save_model(
    model: HookedTransformer,
    folder: str | Path,
    facts: dict[str, Any] | None = None,
    *,
    max_shard_size: str | None = None,
) -> None:
    """Save a hooked model as an ordinary Hugging Face checkpoint, tokenizer included, in the dtype it was loaded in.

    An adapter that was merged stays merged. ``circuits.json`` keeps the weights' checksums, so that a file that is
    damaged later is refused when it is loaded.

    Args:
        model: loaded with `load_model`, its parameters changed at will.
        folder: where the checkpoint goes.
        facts: provenance for ``circuits.json`` in the folder.
        max_shard_size: how large one file may become, such as ``5GB``; as Hugging Face decides if not given.

    Raises:
        CircuitsError: the embeddings are tied in the config, but were given different values.
    """
    checkpoint = checkpoint_of(model)
    if checkpoint.config.tie_word_embeddings:
        embedding, unembedding = (parameters_of(model)[name] for name in TIED)
        if not torch.equal(embedding, unembedding.T):
            raise CircuitsError("the checkpoint ties its embeddings, but W_E and W_U differ: change both alike")
    about = {"source": checkpoint.source, **({} if checkpoint.adapter is None else {"adapter": checkpoint.adapter})}
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    parameters: dict[str, Tensor] = {name: value.detach() for name, value in parameters_of(model).items()}
    tensors = checkpoint_tensors(list(checkpoint.sources), parameters)
    with quiet(), atomic_folder(Path(folder)) as temporary:
        with lending(empty_huggingface(checkpoint.config, model.cfg.dtype), tensors) as target:
            target.tie_weights()
            target.save_pretrained(temporary, **sharding)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        write_json(
            temporary / "circuits.json",
            provenance(**facts_of(model), **about, weights=checksums(temporary), **facts or {}),
        )
