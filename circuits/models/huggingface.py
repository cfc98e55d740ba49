"""Local Hugging Face checkpoints and tokenizers, refused unless they are complete."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuits.errors import CircuitsError
from circuits.models.architectures import architecture_of
from circuits.models.quiet import quiet
from circuits.models.uninterrupted import uninterrupted


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Load the config of a local Hugging Face checkpoint, refusing an architecture that is not supported.

    Raises:
        CircuitsError: the folder is missing, is no checkpoint, or holds another architecture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CircuitsError(f"there is no folder {folder}: give the path of a checkpoint on this machine")
    if not (folder / "config.json").is_file():
        raise CircuitsError(f"{folder} is no checkpoint: it has no config.json")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CircuitsError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from None
    architecture_of(config)
    return config


def load_huggingface(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a local Hugging Face checkpoint, refusing one that is incomplete.

    Raises:
        CircuitsError: the folder is missing or is no checkpoint, a weight file is damaged, or a tensor is missing, has
            another shape or is not expected.
    """
    folder = Path(folder)
    config = load_config(folder)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors and transformers raise many kinds; each means the weights cannot be read
        raise CircuitsError(f"the weights in {folder} are missing or damaged: {first_line(error)}") from None
    for kind, meaning in {
        "mismatched_keys": "has another shape than config.json says",
        "missing_keys": "is missing from the weights",
        "unexpected_keys": "is in the weights but not in the model that config.json describes",
    }.items():
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CircuitsError(f"the checkpoint {folder} does not fit its config: {names[0]} {meaning}{more}")
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local checkpoint; it pads on the right.

    Raises:
        CircuitsError: there is none, or it is not a fast one.
    """
    if not Path(folder).is_dir():
        raise CircuitsError(f"there is no folder {folder}: give the path of a checkpoint on this machine")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(Path(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CircuitsError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise CircuitsError(f"the tokenizer in {folder} is no fast tokenizer: token roles need its offset mapping")
    tokenizer.padding_side = "right"
    return tokenizer


def empty_huggingface(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Hugging Face model whose parameters have shapes but no memory: to be used with `lending`."""
    from accelerate import init_empty_weights

    with quiet(), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@uninterrupted
def lending(shell: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
    """Inside the block, a Hugging Face model has these tensors as its parameters, without a copy and without gradients.

    Args:
        shell: made with `empty_huggingface`, or any other model that is not needed for itself.
        tensors: for every parameter, tied ones under both names.
    """

    def give(values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            setattr(shell.get_submodule(owner), leaf, nn.Parameter(value.detach(), requires_grad=False))

    device = next(iter(tensors.values())).device
    for module in shell.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    try:
        give(tensors)
        yield shell
    finally:
        give({name: torch.empty_like(value, device="meta") for name, value in tensors.items()})
