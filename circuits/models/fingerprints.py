"""Names for models by their content, and what a model keeps its name through."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedConfig

from circuits.errors import CircuitsError
from circuits.models.checkpoint import checkpoint_of
from circuits.models.huggingface import load_huggingface
from circuits.models.uninterrupted import uninterrupted
from circuits.storage import digest, read_json

#: Settings of a config that do not change what the model computes.
_NO_PART_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def fingerprint_of(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """The `fingerprint` of a model with this config and these checkpoint tensors, tied ones once."""
    settings = config.to_diff_dict()
    shape = {name: value for name, value in settings.items() if name not in _NO_PART_OF_THE_MODEL}
    parts: list[Any] = [json.dumps(shape, sort_keys=True, default=str)]
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        parts.append(f"{name} {value.dtype} {tuple(value.shape)}")
        # a cryptographic hash would take seconds for each billion bytes
        parts.append(xxhash.xxh3_128_digest(value.view(torch.uint8).numpy().data))
    return digest(*parts)


def fingerprint_of_folder(folder: str | Path) -> str:
    """The `fingerprint` that the checkpoint in a folder has when it is loaded in float32.

    Raises:
        CircuitsError: the checkpoint is missing, damaged or not supported.
    """
    model = load_huggingface(folder)
    return fingerprint_of(model.config, dict(model.named_parameters()))


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal characters that name a model by the content of its parameters.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> one, two = (load_model(new_model("tiny-llama", word_tokenizer(), seed)) for seed in (0, 1))
        >>> fingerprint(one) == fingerprint(one) != fingerprint(two)
        True
    """
    checkpoint = checkpoint_of(model)
    return fingerprint_of(checkpoint.config, checkpoint.tensors)


#: Models that are being edited, and what they were before. Kept beside them: a copy made meanwhile has the values of
#: the moment, and not the name of those before.
_EDITED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@uninterrupted
def editing(model: nn.Module) -> Iterator[None]:
    """For the length of the block, the model keeps its `identity` while its parameters are changed and restored."""
    outermost = model not in _EDITED
    if outermost:
        _EDITED[model] = fingerprint(model)
    try:
        yield
    finally:
        if outermost:
            del _EDITED[model]


def identity(model: nn.Module) -> str:
    """The fingerprint of a model, or what it was before a block that is `editing` it began."""
    return _EDITED.get(model) or fingerprint(model)


def require_start(fine_tuned: nn.Module, pre: nn.Module) -> None:
    """Refuse a model that the fine-tuned one did not start from, as far as its checkpoint says what it started from.

    Checkpoints made by `circuits.training` say it in ``circuits.json``; others, and models in half precision, whose
    values are not those of the checkpoint, are taken on trust.

    Raises:
        CircuitsError: the checkpoint names another start.
    """
    source, start = Path(checkpoint_of(fine_tuned).source), checkpoint_of(pre)
    facts = source / "circuits.json"
    half = any(tensor.dtype != torch.float32 for tensor in start.tensors.values())
    if half or not facts.is_file():
        return
    started, found = read_json(facts).get("start_fingerprint"), identity(pre)
    if started is not None and started != found:
        raise CircuitsError(
            f"{source} was trained from model {started}, and {start.source} is {found}: give the model "
            "it started from, or waive this with check_start=False"
        )


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What a saved result says of the model it came from: fingerprint, dtype and device."""
    some = next(iter(checkpoint_of(model).tensors.values()))
    return {
        "model": fingerprint(model),
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": str(some.device),
    }
