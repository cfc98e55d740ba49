"""How far the lean forward is from Hugging Face's, for every family: deviations as shares of the largest number.

- float32, bfloat16: logits of both models in that type. The loss of Hugging Face's own bfloat16 is beside it.
- trace: every tensor's gradient from what taps tell, against autograd's.
- round trip: entries of the checkpoint that are not the same to the bit after the table is read forth and back, where
  what acts is what is stored.

``--real`` takes real sizes, at 2 layers and with a vocabulary of 1000: up to six gigabytes and some minutes.
"""

import argparse
import copy
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from circuits.models.arithmetic import LeanModel, Use
from circuits.models.families import family_of
from circuits.models.rows import checkpoint_tensors
from tests.models.test_families import CONFIGURATIONS, enliven, random_model

_SMALLER = {"vocab_size": 1000, "num_hidden_layers": 2, "pad_token_id": None}
_HIDDEN, _MLP = "hidden_size", "intermediate_size"
_HEADS, _GROUPS = "num_attention_heads", "num_key_value_heads"
#: Model → its class and sizes, as published.
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("Llama", {_HIDDEN: 576, _MLP: 1536, _HEADS: 9, _GROUPS: 3, "tie_word_embeddings": True}),
    "Llama 3.2 1B": ("Llama", {_HIDDEN: 2048, _MLP: 8192, _HEADS: 32, _GROUPS: 8, "head_dim": 64}),
    "Mistral 7B": ("Mistral", {_HIDDEN: 4096, _MLP: 14336, _HEADS: 32, _GROUPS: 8}),
    "Qwen2.5 0.5B": ("Qwen2", {_HIDDEN: 896, _MLP: 4864, _HEADS: 14, _GROUPS: 2, "tie_word_embeddings": True}),
    "Qwen3 0.6B": ("Qwen3", {_HIDDEN: 1024, _MLP: 3072, _HEADS: 16, _GROUPS: 8, "head_dim": 128}),
    "Gemma 2 2B": ("Gemma2", {_HIDDEN: 2304, _MLP: 9216, _HEADS: 8, _GROUPS: 4, "head_dim": 256, "sliding_window": 8}),
    "Gemma 3 270M": ("Gemma3Text", {_HIDDEN: 640, _MLP: 2048, _HEADS: 4, _GROUPS: 1, "head_dim": 256}),
    "Phi-3 mini": ("Phi3", {_HIDDEN: 3072, _MLP: 8192, _HEADS: 32, _GROUPS: 32}),
    "OLMo 2 1B": ("Olmo2", {_HIDDEN: 2048, _MLP: 8192, _HEADS: 16, _GROUPS: 16}),
    "Pythia 410M": ("GPTNeoX", {_HIDDEN: 1024, _MLP: 4096, _HEADS: 16}),
    "GPT-2": ("GPT2", {"n_embd": 768, "n_head": 12, "n_layer": 2}),
}


def lean_of(model: PreTrainedModel) -> LeanModel:
    family = family_of(model.config)
    return LeanModel(dict(model.named_parameters()), family.rows(model.config), family.layout(model.config))


def real_model(name: str) -> PreTrainedModel:
    kind, sizes = REAL[name]
    settings = _SMALLER | sizes
    if kind == "GPT2":
        del settings["num_hidden_layers"]
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    return enliven(model, 0.02)


def share(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def prompts(model: PreTrainedModel) -> Tensor:
    return torch.randint(model.config.vocab_size, (3, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_apart(model: PreTrainedModel) -> tuple[float, float, float]:
    tokens = prompts(model)
    expected, lean = model(tokens).logits, lean_of(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    theirs, ours = half(tokens).logits, lean_of(half)
    found = ours.unembed(ours.run(tokens))
    return share(lean.unembed(lean.run(tokens)), expected), share(found, theirs), share(theirs, expected)


def gradients_apart(model: PreTrainedModel) -> float:
    tokens = prompts(model)
    model.zero_grad()
    model(tokens).logits.logsumexp(-1).sum().backward()
    family = family_of(model.config)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    lean = LeanModel(tensors, family.rows(model.config), family.layout(model.config))
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}

    def receive(use: Use) -> None:
        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2)
            if use.kind in ("embedding", "position"):
                found[use.tensor].index_add_(0, use.read.flatten(), flat)
                return
            read = use.read.detach().flatten(0, -2)
            if use.kind in ("weight", "unembedding"):
                found[use.tensor].add_(read.T @ flat if use.inputs_first else flat.T @ read)
            else:
                found[use.tensor].add_((flat if use.kind == "bias" else flat * read).sum(0))

        use.written.register_hook(add)

    taps = dict.fromkeys(tensors, receive)
    lean.unembed(lean.run(tokens, taps=taps), taps).logsumexp(-1).sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert grads.keys() == found.keys()
    model.zero_grad()
    return max(share(found[name], gradient) for name, gradient in grads.items())


def entries_lost(model: PreTrainedModel) -> int:
    rows = family_of(model.config).rows(model.config)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    parameters = {row.name: row.to_hooked(tensors[row.tensor]) for row in rows}
    back = checkpoint_tensors(rows, parameters, {name: tuple(value.shape) for name, value in tensors.items()})
    exact = {row.tensor for row in rows} - {row.tensor for row in rows if not row.acts_as_stored}
    return sum(int((back[name] != tensors[name]).sum()) for name in exact)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", action="store_true")
    names = REAL if parser.parse_args().real else CONFIGURATIONS
    table = Table("family", "float32", "bfloat16", "its own loss", "trace", "round trip")
    for name in names:
        model = real_model(name) if names is REAL else random_model(name)
        float32, half, own = logits_apart(model)
        numbers = (f"{float32:.1e}", f"{half:.1e}", f"{own:.1e}", f"{gradients_apart(model):.1e}")
        table.add_row(name, *numbers, str(entries_lost(model)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
