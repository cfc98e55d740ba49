"""Interventions and traces on a GPU; writes ``runs/bench/gpu.json``.

Run with ``python -m benchmarks.gpu`` on a machine with a CUDA device; ``--tiny`` runs it on the CPU with tiny
models, which shows only that it runs. Models have random weights in the shapes of Llama-3.2-3B and Pythia-2.8B, in
float32 and in bfloat16; the task is 64 prompts of 16 made-up tokens.

- heads: every head zeroed alone, against one ``run_with_hooks`` a head, timed on a sample of them;
- share of peak: the floating-point operations of that in a second, as a share of one large matrix product's;
- traces: per example, against a loop of single-example backward passes of the Hugging Face model;
- deviations: of a small model's effects and traces on the device from those in double precision on the CPU.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel

from benchmarks.sweep import operations
from benchmarks.trace import ANSWER, LLAMA_3B, batch_loss, made_up_task, naive
from circuits.interventions import run_interventions, single
from circuits.models import Model, checkpoint_of, hook_name, load_model, shape_of
from circuits.storage import provenance, write_json
from circuits.tasks import Task
from circuits.tracing import trace_gradients
from circuits.units import Head

OUT = Path("runs/bench/gpu.json")
COMPONENTS = ("attention", "mlp")

PYTHIA_3B = GPTNeoXConfig(
    hidden_size=2560,
    num_attention_heads=32,
    intermediate_size=10240,
    vocab_size=50304,
    num_hidden_layers=32,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)


def cut_down(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same family, tiny."""
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 500,
        "num_hidden_layers": 3,
    }
    if config.model_type == "llama":
        settings |= {"num_key_value_heads": 2, "head_dim": 16}
    return type(config)(**{**config.to_diff_dict(), **settings})


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Hugging Face model with random weights, made where it is to be."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def seconds_of(work: Callable[[], Any], times: int = 2) -> tuple[float, Any]:
    """The least seconds of some runs, and what the last returned; the device is waited for."""
    least = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - begun)
    return least, result


@torch.inference_mode()
def hooked_log_prob(model: Model, task: Task, head: Head) -> float:
    """The mean log-probability of the answers with a head zeroed by a hook."""

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head.index] = 0
        return z

    device = next(iter(checkpoint_of(model).tensors.values())).device
    tokens = task.tokens.to(device)
    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name(model, (head.layer, "z")), zero)])
    found = logits[:, -ANSWER - 1 : -1].float().log_softmax(-1).gather(2, tokens[:, -ANSWER:, None])
    return float(found.sum() / len(task))


def matrix_peak(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations a second of one large matrix product."""
    one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds, _ = seconds_of(lambda: [one @ two for _ in range(10)], 3)
    return 20 * size**3 / seconds


def on_device(reference: PreTrainedModel, device: str, tiny: bool) -> dict[str, Any]:
    """Heads and traces of one model in one dtype."""
    dtype = next(reference.parameters()).dtype
    model = load_model(reference, str(dtype).removeprefix("torch."), device)
    examples = 8 if tiny else 64
    task = made_up_task(reference.config.vocab_size, examples)
    heads = list(shape_of(model).heads())
    plan = single(heads)
    sampled = list(range(0, len(heads), max(1, len(heads) // 12)))
    fast, table = seconds_of(lambda: run_interventions(model, task, plan, metrics=["log_prob"]))
    slow, looped = seconds_of(lambda: [hooked_log_prob(model, task, heads[index]) for index in sampled])
    difference = max(abs(float(table["log_prob"][place]) - one) for place, one in zip(sampled, looped, strict=True))
    peak = matrix_peak(dtype, device, 64 if tiny else 8192)
    few = task.select(range(4 if tiny else 8))
    traced, _ = seconds_of(lambda: trace_gradients(model, task, batch_size=16, components=COMPONENTS))
    wanted = {row.tensor for row in checkpoint_of(model).rows if row.component in COMPONENTS}
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in wanted)
    moved = Task(few.name, few.tokens.to(device), few.attention_mask, few.answers, few.texts)
    single_passes, _ = seconds_of(lambda: naive(reference, moved))
    return {
        "heads": len(heads),
        "heads_seconds": fast,
        "heads_ratio": slow / len(sampled) * len(heads) / fast,
        "heads_max_difference": difference,
        "share_of_peak": operations(model, task, plan) / fast / peak,
        "peak_tflops": peak / 1e12,
        "trace_ms_per_example": 1e3 * traced / len(task),
        "trace_ratio": single_passes / len(few) / (traced / len(task)),
    }


@torch.inference_mode()
def exact_effects(reference: PreTrainedModel, task: Task, heads: list[Head]) -> list[float]:
    """Mean log-probabilities with each head's columns of the output matrix zeroed, in double precision."""
    llama = reference.config.model_type == "llama"
    layers = reference.model.layers if llama else reference.gpt_neox.layers
    width = reference.config.hidden_size // reference.config.num_attention_heads
    found = []
    for head in heads:
        attention = layers[head.layer].self_attn.o_proj if llama else layers[head.layer].attention.dense
        own = attention.weight[:, head.index * width : (head.index + 1) * width]
        before = own.clone()
        own.zero_()
        found.append(-ANSWER * float(batch_loss(reference, task.tokens)))
        own.copy_(before)
    return found


def deviations(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> dict[str, float]:
    """How far a small model's numbers on the device lie from those in double precision on the CPU."""
    small = cut_down(config)
    exact = random_model(small, torch.float64, "cpu")
    model = load_model(random_model(small, torch.float32, "cpu"), str(dtype).removeprefix("torch."), device)
    # the same values on both sides
    named = dict(exact.named_parameters())
    with torch.no_grad():
        for name, value in checkpoint_of(model).tensors.items():
            named[name].copy_(value.double().cpu())
    task = made_up_task(small.vocab_size, 8)
    heads = list(shape_of(model).heads())
    table = run_interventions(model, task, single(heads), metrics=["log_prob"])
    expected = exact_effects(exact, task, heads)
    trace = trace_gradients(model, task, components=COMPONENTS).gradients
    sums, furthest = naive_double(exact, task), 0.0
    for row in checkpoint_of(model).rows:
        if row.name in trace:
            by_hand = row.stored(sums[row.tensor]) / len(task)
            furthest = max(furthest, float((trace[row.name].double() - by_hand).abs().max() / by_hand.max()))
    return {
        "log_prob": max(abs(one - two) for one, two in zip(table["log_prob"], expected, strict=True)),
        "trace_over_largest_entry": furthest,
    }


def naive_double(reference: PreTrainedModel, task: Task) -> dict[str, torch.Tensor]:
    """The loop's traces; its loss is taken in double precision too."""
    sums = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    for tokens in task.tokens:
        reference.zero_grad()
        hidden = reference.base_model(tokens[None], use_cache=False).last_hidden_state
        logits = reference.get_output_embeddings()(hidden[:, -ANSWER - 1 : -1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[-ANSWER:]).backward()
        for name, value in reference.named_parameters():
            sums[name] += value.grad.abs()
    return sums


def main(tiny: bool = False) -> dict[str, Any]:
    device = "cpu" if tiny else "cuda"
    found: dict[str, Any] = {"device": "cpu" if tiny else torch.cuda.get_device_name()}
    for name, config in (("llama-3.2-3b", LLAMA_3B), ("pythia-2.8b", PYTHIA_3B)):
        for dtype in (torch.float32, torch.bfloat16):
            reference = random_model(cut_down(config) if tiny else config, dtype, device)
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = {
                **on_device(reference, device, tiny),
                "deviations": deviations(config, dtype, device),
            }
            del reference
            gc.collect()
            if not tiny:
                torch.cuda.empty_cache()
    return found


def command(words: list[str]) -> int:
    """What the command line asks for; its exit code."""
    tiny = "--tiny" in words
    if not tiny and not torch.cuda.is_available():
        sys.stderr.write("benchmarks.gpu: there is no CUDA device here: run it where there is one, or with --tiny\n")
        return 2
    results = main(tiny)
    for name, value in results.items():
        print(f"{name:24} {value}", flush=True)
    if not tiny:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        write_json(OUT, {**results, "provenance": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
