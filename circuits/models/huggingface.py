"""Local Hugging Face checkpoints and tokenizers, refused unless they are complete."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from circuits.errors import CircuitsError
from circuits.models.adapters import merge_adapter
from circuits.models.families import family_of, named_family
from circuits.models.folder import base_of, check_config, check_folder, first_line, is_adapter, weights_of
from circuits.models.quiet import quiet
from circuits.storage import read_json

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Load the config of a local Hugging Face checkpoint, or of an adapter's base.

    Raises:
        CircuitsError: the folder is missing, is no checkpoint, or holds another architecture or quantised weights.
    """
    folder = model_folder(folder)
    settings = check_config(folder)
    try:
        named_family(settings.get("architectures"), settings.get("model_type"))
    except CircuitsError as error:
        if "auto_map" not in settings:
            raise
        raise CircuitsError(f"{error}; the code that {folder} brings along (auto_map) is never run") from None
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config's own checks raise many kinds; each means that it cannot be used
        raise CircuitsError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from None
    try:
        family_of(config)
    except CircuitsError as error:
        raise CircuitsError(f"{folder} is not supported: {error}") from None
    return config


def model_folder(source: str | Path) -> Path:
    """The folder of the model: the one given, or the base of the adapter in it.

    Raises:
        CircuitsError: there is no such folder, or the adapter's base is not on this machine.
    """
    folder = check_folder(source)
    return check_folder(base_of(folder)) if is_adapter(folder) else folder


def load_huggingface(
    folder: str | Path, dtype: torch.dtype = torch.float32, adapter: str | Path | None = None
) -> PreTrainedModel:
    """Load a local Hugging Face checkpoint, refusing one that is incomplete or holds numbers that are not finite.

    Args:
        folder: of the checkpoint, or of a PEFT adapter that names it as its base.
        dtype: of the weights.
        adapter: a PEFT folder, to be merged.

    Raises:
        CircuitsError: the folder is missing or is no checkpoint, a weight file is damaged or unsafe, a tensor is
            missing, has another shape, is not expected or is not finite, or the adapter does not fit.
    """
    if is_adapter(check_folder(folder)):
        if adapter is not None:
            raise CircuitsError(f"{folder} is an adapter itself: name the base, and one adapter")
        adapter = folder
    folder = model_folder(folder)
    config = load_config(folder)
    weights_of(folder)
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
    check_finite(model, str(folder))
    if adapter is not None:
        model = merge_adapter(model, adapter, folder)
        check_finite(model, f"{folder} with the adapter {adapter}")
    return model.eval()


@torch.no_grad()
def check_finite(model: PreTrainedModel, source: str) -> None:
    """Raise a `CircuitsError` unless every parameter is a finite number."""
    for name, parameter in model.named_parameters():
        # the extremes carry what is not finite, and need no memory
        if parameter.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter)):
            bad = int((~torch.isfinite(parameter)).sum())
            raise CircuitsError(
                f"{name} in {source} has {bad:,} of {parameter.numel():,} numbers that are not finite: the checkpoint "
                f"is damaged, or too large for {str(parameter.dtype).removeprefix('torch.')}"
            )


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer is saved in a folder."""
    return any((Path(folder) / file).exists() for file in _TOKENIZERS)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local checkpoint; it pads on the right. An adapter without one has its base's.

    Raises:
        CircuitsError: there is none, it is damaged, or it is not a fast one.
    """
    folder = check_folder(folder)
    if is_adapter(folder) and not has_tokenizer(folder):
        folder = model_folder(folder)
    try:
        with quiet():
            tokenizer = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers' library raises plain exceptions
        raise CircuitsError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise CircuitsError(f"the tokenizer in {folder} is no fast tokenizer: spans need its offset mapping")
    tokenizer.padding_side = "right"
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """What reads the tokenizer as it was saved: transformers would rebuild some architectures' own in its place."""
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("tokenizer_class") if file.is_file() else None
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend") and (folder / "tokenizer.json").is_file()
    return PreTrainedTokenizerFast if plain else AutoTokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, source: str) -> None:
    """Raise a `CircuitsError` if text could become a token that the model has no embedding for.

    Tokens that stand for images and sounds may lie beyond the vocabulary: no text becomes one.
    """
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= vocabulary]
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    text = sorted(set(beyond) - media)
    if text:
        raise CircuitsError(
            f"the tokenizer of {source} has {len(text):,} tokens beyond the {vocabulary:,} that the model embeds, "
            f"such as {text[0]!r}: give the model's own, or the model with its embedding extended"
        )


def empty_huggingface(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Hugging Face model whose parameters have shapes but no memory."""
    from accelerate import init_empty_weights

    with quiet(), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
