"""How far each family's numbers are from those of Hugging Face's model: deviations as shares of the largest number.

- lean, hookable: logits of what all our numbers come from, and of the model a user explores with, in float32.
- bfloat16: the lean model's logits. The loss of Hugging Face's own bfloat16 is beside it.
- trace: `trace_gradients` of every parameter, against a loop of backward passes through Hugging Face's model.
- ablation: every head taken out by `run_interventions`, against a function hooked into the user's model: the largest
  difference of an answer's log-probability, as a share of the largest effect.
- round trip: entries that are not the same to the bit when a model is saved and read again.

The backend is that of the installed TransformerLens. ``--real`` takes real sizes, at 2 layers and with a vocabulary of
1000: up to six gigabytes and some minutes.
"""

import argparse
import copy
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.trace import ANSWER, made_up_task
from circuits.interventions import run_interventions, single
from circuits.metrics import evaluate
from circuits.models import Model, hook_name, hooked, lean_model, load_model, save_model, shape_of
from circuits.models.hookable import backends
from circuits.tasks import Task
from circuits.tracing import trace_gradients
from circuits.units import COMPONENTS, Head
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
_PROMPTS, _LENGTH = 3, 19


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


@torch.no_grad()
def logits_apart(reference: PreTrainedModel, model: Model, tokens: Tensor) -> list[float]:
    def lean_logits(model: Model) -> Tensor:
        lean = lean_model(model)
        return lean.unembed(lean.run(tokens))

    expected = reference(tokens).logits
    half = copy.deepcopy(reference).to(torch.bfloat16)
    theirs, ours = half(tokens).logits, lean_logits(load_model(half, dtype="bfloat16"))
    return [
        share(lean_logits(model), expected),
        share(model(tokens), expected),
        share(ours, theirs),
        share(theirs, expected),
    ]


def traces_apart(reference: PreTrainedModel, model: Model, task: Task) -> float:
    sums = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    for tokens in task.tokens:
        reference.zero_grad()
        logits = reference(tokens[None]).logits[0, -ANSWER - 1 : -1]
        torch.nn.functional.cross_entropy(logits, tokens[-ANSWER:]).backward()
        for name, value in reference.named_parameters():
            sums[name] += value.grad.abs() / _PROMPTS
    reference.zero_grad()
    found = trace_gradients(model, task, components=COMPONENTS).gradients
    rows = [row for row in model.checkpoint.rows if row.name in found]
    assert {row.tensor for row in rows} == sums.keys()
    # of the whole tensor's largest: without rotary positions the gradient of keys' biases is zero but for rounding
    apart = {row: float((found[row.name] - row.stored(sums[row.tensor])).abs().max()) for row in rows}
    return max(apart[row] / float(sums[row.tensor].max()) for row in rows)


def ablations_apart(model: Model, task: Task) -> float:
    heads = list(shape_of(model).heads())
    table = run_interventions(model, task, single(heads, "zero"), metrics=["log_prob"])
    expected = []
    for head in heads:

        def zero(z: Tensor, hook: Any, head: Head = head) -> Tensor:
            z = z.clone()
            z[:, :, head.index] = 0
            return z

        with hooked(model, {hook_name(model, (head.layer, "z")): zero}):
            expected.append(evaluate(model, task)["log_prob"].mean())
    apart = (table["log_prob"] - pandas.Series(expected)).abs().max()
    return float(apart / table["log_prob_effect"].abs().max())


def entries_lost(model: Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "saved")
        again = load_model(Path(folder) / "saved").checkpoint.tensors
        assert again.keys() == model.checkpoint.tensors.keys()
        return sum(int((again[name] != tensor).sum()) for name, tensor in model.checkpoint.tensors.items())


def main() -> None:
    # these configurations are meant to be unusual
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", action="store_true")
    names = REAL if parser.parse_args().real else CONFIGURATIONS
    columns = ("lean", "hookable", "bfloat16", "its own loss", "trace", "ablation", "round trip")
    table = Table("family", *columns, title=f"TransformerLens {version('transformer-lens')}, {backends()[0]}")
    default = type(load_model(random_model("llama")))
    for name in names:
        reference = real_model(name) if names is REAL else random_model(name)
        model = load_model(reference)
        task = made_up_task(reference.config.vocab_size, _PROMPTS, 1, length=_LENGTH)
        numbers = logits_apart(reference, model, task.tokens)
        numbers += [traces_apart(reference, model, task), ablations_apart(model, task)]
        shown = name if isinstance(model, default) else f"{name} (bridge)"
        table.add_row(shown, *(f"{number:.1e}" for number in numbers), str(entries_lost(model)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
