"""Names for models by their content; training, which needs no TransformerLens, uses them too."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedConfig

from circuits.models.architectures import ParameterSource, architecture_of
from circuits.models.huggingface import load_huggingface
from circuits.storage import digest

#: Settings of a config that do not change what the model computes.
_NO_PART_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def fingerprint_of(
    config: PreTrainedConfig, sources: Sequence[ParameterSource], parameters: Mapping[str, Tensor]
) -> str:
    """The `fingerprint` of a hooked model with this config and these parameters."""
    settings = config.to_diff_dict()
    shape = {name: value for name, value in settings.items() if name not in _NO_PART_OF_THE_MODEL}
    parts: list[Any] = [json.dumps(shape, sort_keys=True, default=str)]
    for source in sources:
        value = parameters[source.hooked].detach().cpu()
        parts.append(f"{source.hooked} {value.dtype} {tuple(value.shape)}")
        # the checkpoint's own layout lies in memory in one piece and need not be copied
        value = (value if source.part is not None else source.to_checkpoint(value)).contiguous()
        # a cryptographic hash would take seconds for each billion bytes
        parts.append(xxhash.xxh3_128_digest(value.view(torch.uint8).numpy().data))
    return digest(*parts)


def fingerprint_of_folder(folder: str | Path) -> str:
    """The `fingerprint` that the checkpoint in a folder has when it is loaded in float32.

    Raises:
        CircuitsError: the checkpoint is missing, damaged or not supported.
    """
    model = load_huggingface(folder)
    sources = architecture_of(model.config).sources(model.config)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return fingerprint_of(
        model.config, sources, {source.hooked: source.to_hooked(tensors[source.checkpoint]) for source in sources}
    )
