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
from circuits.models.checkpoint import IN_MEMORY, Checkpoint, checkpoint_of, parameters_of
from circuits.models.forward import refuse_hooks
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

    Checkpoints made by `circuits.training` say it in ``circuits.json``; an adapter that says nothing there started from
    its base. Others, what was merged into a model in memory, and models in half precision, whose values are not those
    of the checkpoint, are taken on trust.

    Raises:
        CircuitsError: the checkpoint names another start.
    """
    tuned, start = checkpoint_of(fine_tuned), checkpoint_of(pre)
    if any(tensor.dtype != torch.float32 for tensor in start.tensors.values()):
        return
    if fine_tuned not in _STARTS:
        _STARTS[fine_tuned] = _start_of(tuned)
    started = _STARTS[fine_tuned]
    if started is None:
        return
    found = identity(pre)
    if started != found:
        merged = "" if start.adapter is None else f" with the adapter {start.adapter}"
        raise CircuitsError(
            f"{tuned.adapter or tuned.source} was trained from model {started}, and {start.source}{merged} is {found}: "
            "give the model it started from, or waive this with check_start=False"
        )


#: What models started from, as far as it is known: to name an adapter's base takes reading it.
_STARTS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def _start_of(tuned: Checkpoint) -> str | None:
    folder = tuned.adapter or tuned.source
    if folder == IN_MEMORY:
        return None
    card = Path(folder) / "circuits.json"
    started: str | None = read_json(card).get("start_fingerprint") if card.is_file() else None
    if started is None and tuned.adapter is not None and tuned.source != IN_MEMORY and Path(tuned.source).is_dir():
        return fingerprint_of_folder(tuned.source)
    return started


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What a saved result says of the model it came from: fingerprint, dtype and device."""
    some = next(iter(checkpoint_of(model).tensors.values()))
    return {
        "model": fingerprint(model),
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": str(some.device),
    }


def same_parameters(model: nn.Module, other: nn.Module, values_of: nn.Module | None = None) -> dict[str, Tensor]:
    """The parameters of ``values_of`` (default ``other``), after checking that both models have the same ones.

    Raises:
        CircuitsError: one lacks a parameter or has it in another shape, only one ties its embeddings, or a function is
            hooked into ``values_of``, whose weights alone are taken.
    """
    refuse_hooks(values_of or other, "only the weights of that model are taken")
    one, two = parameters_of(model), parameters_of(other)
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two or one[name].shape != two[name].shape:
            raise CircuitsError(
                f"{checkpoint_of(model).source} and {checkpoint_of(other).source} are not the same kind of model: "
                f"{name} has another shape or is missing in one of them"
            )
    if checkpoint_of(model).tied != checkpoint_of(other).tied:
        raise CircuitsError(
            f"of {checkpoint_of(model).source} and {checkpoint_of(other).source} only one ties its embeddings: "
            "both must, or neither"
        )
    return {name: value.detach() for name, value in parameters_of(values_of or other).items()}
