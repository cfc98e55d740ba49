"""Checkpoint or adapter → the model a user holds.

1. The Hugging Face config and weights are read from a local folder or taken from a model in memory; the folder's name
   plays no part, nothing is fetched, and every tensor the config asks for must be there in the right shape.
2. An adapter is merged into the weights before anything else sees them.
3. The family of the architecture says which tensor is which parameter, and what layers are made of. Tensors and config
   keys that it does not know are refused.
4. The hookable model holds views of the checkpoint's tensors: nothing is folded or centred, tied embeddings stay tied,
   and memory holds the weights once.
5. Before it is handed out, everything that computes with it is compared with the checkpoint (``parity.py``), and a
   change at each hook point must reach the logits.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuits.adapter_config import is_adapter
from circuits.errors import CircuitsError
from circuits.models.adapters import merge_adapter
from circuits.models.checkpoint import IN_MEMORY, Checkpoint, Model, lean_model
from circuits.models.families import family_of
from circuits.models.folder import first_line
from circuits.models.forward import refuse_hooks
from circuits.models.hookable import hookable
from circuits.models.huggingface import (
    check_finite,
    check_tokenizer,
    has_tokenizer,
    load_huggingface,
    load_tokenizer,
    model_folder,
)
from circuits.models.quiet import quiet

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@quiet()
def load_model(
    source: str | Path | PreTrainedModel,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    *,
    adapter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str | None = None,
) -> Model:
    """Load a checkpoint into a hookable model, unprocessed, and check that all we compute with gives its logits.

    Args:
        source: a local Hugging Face folder, a folder with a PEFT adapter that names its base, or a Hugging Face model
            in memory (which is copied).
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where the model goes; CUDA if there is any, else the CPU.
        adapter: a local PEFT folder (LoRA, DoRA, …), merged into the weights in that dtype.
        tokenizer: for a model in memory; a folder brings its own, an adapter its own or its base's.
        backend: ``hooked_transformer`` (default where TransformerLens 3 is installed and has what the model computes)
            or ``bridge``.

    Returns:
        A `HookedTransformer` or a `TransformerBridge` in evaluation mode. It has ``model.checkpoint`` (a `Checkpoint`)
        and ``model.tokenizer``. Its parameters are views of the checkpoint's tensors: change them in place.

    Raises:
        CircuitsError: the checkpoint is missing, damaged, unsafe or not supported, the adapter does not fit or cannot
            be merged, the tokenizer has tokens that the model does not embed, its logits differ, a change at a hook
            point has no effect, the installed TransformerLens lacks the backend, or functions are hooked into the model
            in memory.

    Example:
        >>> from circuits.training import new_model
        >>> from circuits.facts import word_tokenizer
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()))
        >>> model.cfg.n_layers, model.cfg.n_key_value_heads
        (4, 2)
    """
    if dtype not in DTYPES:
        raise CircuitsError(f"the dtype {dtype!r} is not supported: choose from {', '.join(DTYPES)}")
    chosen = _device(device)
    if isinstance(source, PreTrainedModel):
        refuse_hooks(source)
        name, reference = IN_MEMORY, copy.deepcopy(source).to(dtype=DTYPES[dtype]).eval()
        reference.config.architectures = [type(source).__name__]
        with torch.no_grad():
            # dynamic rotary angles are those of the longest prompt so far, until a short one comes
            reference(torch.zeros(1, 1, dtype=torch.long, device=reference.device), use_cache=False)
        check_finite(reference, "the model in memory")
        if adapter is not None:
            reference = merge_adapter(reference, adapter)
            check_finite(reference, f"the model in memory with the adapter {adapter}")
    else:
        reference = load_huggingface(source, DTYPES[dtype], adapter)
        name = str(model_folder(source))
        if is_adapter(source):
            adapter = source
    family = family_of(reference.config)
    if tokenizer is None:
        places = [Path(place) for place in (adapter, name) if place is not None]
        tokenizer = next((load_tokenizer(place) for place in places if has_tokenizer(place)), None)
    if tokenizer is not None:
        check_tokenizer(tokenizer, reference.config.vocab_size, str(source if name != IN_MEMORY else name))
    reference = reference.to(chosen)
    model: Any = hookable(reference, tokenizer, backend=backend)
    model.checkpoint = Checkpoint(
        name,
        reference.config,
        tuple(family.rows(reference.config)),
        family.layout(reference.config),
        dict(reference.named_parameters()),
        None if adapter is None else str(adapter),
    )
    try:
        lean_model(model)
    except CircuitsError as error:
        raise CircuitsError(f"{name} cannot be loaded: {error}") from None
    from circuits.models.parity import check_parity  # which builds on this module

    model.checkpoint = replace(model.checkpoint, parity=check_parity(model, reference))
    return model


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CircuitsError(f"the device {str(name)!r} cannot be used here: {first_line(error)}") from None
    return device
