"""A model → an ordinary Hugging Face checkpoint: the tensors as they are, in the dtype they were loaded in."""

from pathlib import Path
from typing import Any

import torch

from circuits.models.checkpoint import Model, check_views, checkpoint_of
from circuits.models.fingerprints import facts_of
from circuits.models.folder import checksums
from circuits.models.forward import refuse_hooks
from circuits.models.huggingface import empty_huggingface
from circuits.models.quiet import quiet
from circuits.storage import atomic_folder, provenance, write_json


def save_model(
    model: Model,
    folder: str | Path,
    facts: dict[str, Any] | None = None,
    *,
    max_shard_size: str | None = None,
) -> None:
    """Save a model as an ordinary Hugging Face checkpoint, tokenizer included, in the dtype it was loaded in.

    An adapter that was merged stays merged. ``circuits.json`` keeps the weights' checksums, so that a file that is
    damaged later is refused when it is loaded.

    Args:
        model: loaded with `circuits.load_model`, its parameters changed at will, in place.
        folder: where the checkpoint goes.
        facts: provenance for ``circuits.json`` in the folder.
        max_shard_size: how large one file may become, such as ``5GB``; as Hugging Face decides if not given.

    Raises:
        CircuitsError: the model was not loaded with `circuits.load_model`, one of its parameters was replaced, or a
            function is hooked into it.

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.models import fingerprint
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> model, folder = load_model(new_model("tiny-llama", word_tokenizer())), tempfile.mkdtemp() + "/saved"
        >>> save_model(model, folder)
        >>> fingerprint(load_model(folder)) == fingerprint(model)
        True
    """
    checkpoint = checkpoint_of(model)
    refuse_hooks(model, "a checkpoint holds weights, and would be another model")
    check_views(model)
    about = {"source": checkpoint.source, **({} if checkpoint.adapter is None else {"adapter": checkpoint.adapter})}
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    tensors = {name: tensor.detach() for name, tensor in checkpoint.tensors.items()}
    target: Any = empty_huggingface(checkpoint.config, next(iter(tensors.values())).dtype)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    target.tie_weights()
    tokenizer: Any = model.tokenizer
    with quiet(), atomic_folder(Path(folder)) as temporary:
        target.save_pretrained(temporary, **sharding)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(
            temporary / "circuits.json",
            provenance(**facts_of(model), **about, weights=checksums(temporary), **facts or {}),
        )
