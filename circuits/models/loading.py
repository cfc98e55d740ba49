"""Checkpoint → `HookedTransformer` and back.

1. The Hugging Face config and weights are read from a local folder or taken from a model in memory; the folder's name
   plays no part, nothing is fetched, and every tensor the config asks for must be there in the right shape.
2. The hooked model is configured from the Hugging Face config. Its parameters are views of the checkpoint's tensors:
   nothing is folded or centred, tied embeddings stay tied, and memory holds the weights once.
3. Both models read the same random tokens; their logits must agree: in float32 to 1e-4, or to 1e-5 of the largest logit
   where that is more. If they do not, the residual streams are compared and the first layer that departs is named.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from circuits.errors import CircuitsError
from circuits.models.architectures import ParameterSource, architecture_of, checkpoint_tensors
from circuits.models.fingerprints import fingerprint_of
from circuits.models.huggingface import empty_huggingface, first_line, lending, load_huggingface, load_tokenizer
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

#: How far logits may lie apart, as a share of the largest one. In half precision the two libraries round attention
#: scores at different places: 6 % apart in bfloat16 after the 30 layers of SmolLM2-135M; wrong weights are 100 % apart.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Checkpoint:
    """What a hooked model was loaded from; found at ``model.checkpoint``.

    Attributes:
        source: the folder, or ``memory``.
        config: the Hugging Face config.
        sources: which tensor of the checkpoint each parameter is.
    """

    source: str
    config: PreTrainedConfig = field(repr=False)
    sources: tuple[ParameterSource, ...] = field(repr=False)


def load_model(
    source: str | Path | PreTrainedModel,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> HookedTransformer:
    """Load a checkpoint into a `HookedTransformer`, unprocessed, and check that both give the same logits.

    Args:
        source: a local Hugging Face folder, or a Hugging Face model in memory (which is copied).
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where the model goes; CUDA if there is any, else the CPU.
        tokenizer: for a model in memory; a folder brings its own.

    Returns:
        The model in evaluation mode, without gradients on parameters that TransformerLens invents. It has
        ``model.checkpoint`` (a `Checkpoint`) and ``model.tokenizer``.

    Raises:
        CircuitsError: the checkpoint is missing, damaged or not supported, or its logits differ.

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
        name, reference = "memory", copy.deepcopy(source).to(dtype=DTYPES[dtype]).eval()
        reference.config.architectures = [type(source).__name__]
    else:
        name, reference = str(source), load_huggingface(source, DTYPES[dtype])
        if tokenizer is None and any((Path(source) / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            tokenizer = load_tokenizer(source)
    reference = reference.to(chosen)
    model = _hooked(name, reference, tokenizer)
    _check_parity(model, reference)
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


@torch.no_grad()
def _check_parity(model: HookedTransformer, reference: PreTrainedModel) -> None:
    vocabulary = int(model.cfg.d_vocab)
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(reference.device)
    with quiet():
        expected = reference(tokens, output_hidden_states=True, use_cache=False)
        logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_pre"))
    dtype = reference.dtype
    allowed = max(1e-4, _TOLERANCE[dtype] * float(expected.logits.abs().max()))
    difference = float((logits - expected.logits).abs().max())
    if difference <= allowed:
        return
    departed = next(
        (
            f"layer {layer - 1}" if layer else "the embedding"
            for layer in range(model.cfg.n_layers)
            if not torch.allclose(
                cache[f"blocks.{layer}.hook_resid_pre"], expected.hidden_states[layer], atol=allowed, rtol=1e-3
            )
        ),
        "the last layer, the final norm or the unembedding",
    )
    raise CircuitsError(
        f"the hooked model's logits differ from the checkpoint's by {difference:.2g} ({allowed:.2g} is allowed): "
        f"they first depart at {departed}"
    )


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


#: A Hugging Face model for each hooked one, empty while it is not used.
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
    for name, point in model.hook_dict.items():
        if point.fwd_hooks:
            raise CircuitsError(f"a function is hooked into the model at {name}: it would have no effect here")
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


def save_model(model: HookedTransformer, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
    """Save a hooked model as an ordinary Hugging Face checkpoint, tokenizer included.

    Args:
        model: loaded with `load_model`, its parameters changed at will.
        folder: where the checkpoint goes.
        facts: provenance for ``circuits.json`` in the folder.

    Raises:
        CircuitsError: the embeddings are tied in the config, but were given different values.
    """
    checkpoint = checkpoint_of(model)
    parameters: dict[str, Tensor] = {name: value.detach() for name, value in parameters_of(model).items()}
    tensors = checkpoint_tensors(list(checkpoint.sources), parameters)
    if checkpoint.config.tie_word_embeddings:
        embedding, unembedding = (parameters[name] for name in TIED)
        if not torch.equal(embedding, unembedding.T):
            raise CircuitsError("the checkpoint ties its embeddings, but W_E and W_U differ: change both alike")
    with quiet():
        with torch.random.fork_rng(devices=[]):
            target = AutoModelForCausalLM.from_config(checkpoint.config).to(model.cfg.dtype)
        with torch.no_grad():
            for name, parameter in target.named_parameters(remove_duplicate=False):
                parameter.copy_(tensors[name])
        with atomic_folder(Path(folder)) as temporary:
            target.save_pretrained(temporary)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(temporary)
            write_json(
                temporary / "circuits.json", provenance(**facts_of(model), source=checkpoint.source, **facts or {})
            )
