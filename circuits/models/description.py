"""What a checkpoint is, in one table."""

import json
from pathlib import Path
from typing import Any

import torch

from circuits.adapter_config import is_adapter
from circuits.models.checkpoint import shape_of
from circuits.models.families import family_of
from circuits.models.fingerprints import fingerprint
from circuits.models.folder import weights_of
from circuits.models.huggingface import model_folder
from circuits.models.loading import load_model
from circuits.storage import read_json


def describe(
    folder: str | Path, dtype: str = "float32", device: str | torch.device | None = None, *, adapter: str | None = None
) -> dict[str, Any]:
    """What a checkpoint is: architecture, sizes, tokenizer, origin, and what its loading measured.

    Args:
        folder: of a checkpoint, or of an adapter that names its base.
        dtype: as in `load_model`.
        device: as in `load_model`.
        adapter: as in `load_model`.

    Returns:
        What is said of it, by what it is called; what does not apply is left out. ``parity …`` is the largest
        difference of a logit from the Hugging Face model's, for each way we compute logits.

    Raises:
        CircuitsError: it does not load.
    """
    model = load_model(folder, dtype, device, adapter=adapter)
    checkpoint, shape = model.checkpoint, shape_of(model)
    config, layout = checkpoint.config, checkpoint.layout
    stored = weights_of(model_folder(folder)).dtypes.values()
    facts: dict[str, Any] = {
        "architecture": family_of(config).ARCHITECTURE,
        "base" if checkpoint.adapter else "folder": checkpoint.source,
    }
    if checkpoint.adapter:
        method = read_json(Path(checkpoint.adapter) / "adapter_config.json")["peft_type"]
        facts["adapter"] = f"{checkpoint.adapter} ({method}, merged)"
    facts |= {
        "fingerprint": fingerprint(model),
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "stored as": ", ".join(sorted(set(stored))),
        "loaded as": dtype,
        "hookable model": "TransformerBridge" if hasattr(model, "original_model") else "HookedTransformer",
        "layers": shape.n_layers,
        "heads": shape.n_heads,
        "key/value groups": shape.n_key_value_heads,
        "neurons in a layer": shape.d_mlp,
        "residual stream": layout.d_model,
        "head size": layout.d_head,
        "positions": layout.n_ctx,
        "vocabulary": layout.d_vocab,
        "embeddings": "tied" if layout.tied else "not tied",
    }
    tokenizer = model.tokenizer
    if tokenizer is None:
        facts["tokenizer"] = "none"
    else:
        begins = tokenizer.convert_ids_to_tokens(tokenizer("").input_ids)
        facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"
        facts["every text begins with"] = " ".join(begins) if begins else "nothing: the tokenizer adds no token"
        facts["chat template"] = "yes" if tokenizer.chat_template else "no"
    card = (Path(folder) if is_adapter(folder) else model_folder(folder)) / "circuits.json"
    for name, value in (read_json(card) if card.is_file() else {}).items():
        if name in ("start", "dataset", "data", "recipe", "stage", "seed", "source", "library_version", "git_commit"):
            facts[f"made with {name}"] = value if isinstance(value, str | int) else json.dumps(value)
    if checkpoint.parity is not None:
        facts["parity probe"] = f"{checkpoint.parity.tokens} tokens, {checkpoint.parity.allowed:.2g} allowed"
        if checkpoint.parity.window is not None:
            facts["parity probe"] += f"; too short to leave the sliding window of {checkpoint.parity.window:,}"
        facts |= {f"parity {name}": float(value) for name, value in checkpoint.parity.differences.items()}
    return facts
