"""A PEFT adapter, merged into the model it was trained on.

1. adapter_config.json is judged first: a method that this peft does not know, a setting it would ignore, a setting that
   would import a module or start from changed base weights, layers that are repeated: each is refused.
2. The adapter's layers are put into the base; their names and shapes must be those of adapter_model.safetensors, no
   more and no fewer. Copies of whole modules (``modules_to_save``) and trained tokens belong to them.
3. The layers are merged into the weights, in the dtype the base was loaded in, and are gone.

Where an adapter names as its base a folder on this machine, and another one was given, both must hold the same weights.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from circuits.adapter_config import base_of, read_settings
from circuits.errors import CircuitsError
from circuits.models.folder import ADAPTER, check_folder, first_line, weights_of
from circuits.models.quiet import quiet

#: Ways to begin an adapter's own weights; the others begin by changing the base's.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


def merge_adapter(model: PreTrainedModel, adapter: str | Path, base: str | Path | None = None) -> PreTrainedModel:
    """Merge an adapter into a model, in place.

    Args:
        model: the base.
        adapter: a PEFT folder, such as a LoRA's.
        base: the folder the model came from, if it came from one.

    Raises:
        CircuitsError: the adapter is missing, damaged, of another base or of a kind that cannot be merged, or peft is
            not installed.
    """
    folder = check_folder(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise CircuitsError(f"{folder} is no adapter: it has no adapter_config.json")
    try:
        import peft
    except ImportError:
        raise CircuitsError(f"the adapter {folder} needs the package peft: install fact-circuits[adapters]") from None
    config = _config(folder)
    weights = weights_of(folder, ADAPTER)
    tensors = {name: weights[name] for name in weights.files}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CircuitsError(f"{name} in {folder / ADAPTER} holds numbers that are not finite: it is damaged")
    if base is not None:
        _check_base(folder, Path(base))
    shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    other = f"the adapter {folder} is of another base"
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            wrapped = peft.get_peft_model(model, config)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CircuitsError(f"{other}: {first_line(error)}") from None
    if not hasattr(wrapped.base_model, "merge_and_unload") or config.is_prompt_learning:
        raise CircuitsError(f"the adapter {folder} ({config.peft_type.value}) changes no weights and cannot be merged")
    _fill(wrapped, tensors, other)
    try:
        with quiet():
            merged: PreTrainedModel = wrapped.merge_and_unload()
    except Exception as error:  # each method has its own reasons
        raise CircuitsError(
            f"the adapter {folder} ({config.peft_type.value}) cannot be merged: {first_line(error)}"
        ) from None
    if {name: value.shape for name, value in merged.named_parameters(remove_duplicate=False)} != shapes:
        raise CircuitsError(f"the adapter {folder} adds parameters to its base, which a checkpoint of it cannot hold")
    return merged.requires_grad_(True).eval()


def _config(folder: Path) -> Any:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / "adapter_config.json"
    settings = read_settings(file)
    kinds = {str(getattr(kind, "value", kind)): one for kind, one in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(settings.get("peft_type"))
    if kind not in kinds:
        raise CircuitsError(f"{file} is of the method {kind}, which the installed peft does not know")
    known = {one.name for one in fields(kinds[kind])} | {"peft_version"}
    for name in sorted(set(settings) - known):
        raise CircuitsError(f"{file} has a setting {name} that the installed peft does not know: install a later one")
    for name in ("layer_replication", "megatron_config", "loftq_config", "corda_config", "lora_ga_config"):
        if settings.get(name):
            raise CircuitsError(f"{file} sets {name}, which is not supported: save the merged model as a checkpoint")
    if settings.get("init_lora_weights", True) not in _BEGINNINGS:
        raise CircuitsError(
            f"{file} begins with {settings['init_lora_weights']}, which changes the base's weights: save the adapter "
            "converted to an ordinary one (path_initial_model_for_weight_conversion)"
        )
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a method's settings raise, they cannot be read
        raise CircuitsError(f"{file} cannot be read: {first_line(error)}") from None
    config.inference_mode = True
    return config


def _fill(wrapped: Any, tensors: dict[str, Tensor], other: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    with quiet():
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    everything = wrapped.state_dict()
    for name in sorted(set(expected) - set(tensors)):
        raise CircuitsError(f"{other}, or damaged: its weights have no {name}")
    for name, tensor in tensors.items():
        # peft saves embeddings whole beside an adapter of them
        place = expected[name] if name in expected else everything.get(name)
        if place is None:
            raise CircuitsError(f"{other}, or damaged: nothing in the base takes its {name}")
        if place.shape != tensor.shape:
            raise CircuitsError(
                f"{other}: its {name} has the shape {tuple(tensor.shape)}, and the base takes {tuple(place.shape)}"
            )
    try:
        with quiet():
            set_peft_model_state_dict(wrapped, tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CircuitsError(f"{other}: {first_line(error)}") from None


def _check_base(adapter: Path, given: Path) -> None:
    try:
        named = base_of(adapter)
    except CircuitsError:
        return  # a name that means nothing here tells nothing
    if named.resolve() == given.resolve():
        return
    one, two = weights_of(named), weights_of(given)
    if one.shapes != two.shapes or not all(torch.equal(one[name].double(), two[name].double()) for name in one.files):
        raise CircuitsError(f"the adapter {adapter} is of the base {named}, and {given} has other weights")
