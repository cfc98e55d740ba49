"""Gradient traces against naive loops, and their memory.

Run with ``python -m benchmarks.trace``; writes ``runs/bench/trace.json``. Speeds on two threads, 16-token examples:

- per example: the whole of `trace_gradients` with ``abs``, fingerprint and all, against a loop of single-example
  forward and backward passes of the Hugging Face model that accumulates ``.grad.abs()``, timed on some of the examples;
- per batch: `trace_gradients` per batch, against the plain forward and backward pass of the Hugging Face model on the
  same batches with the same loss; here and above, only the traced parameters need gradients;
- memory: the most a process that loads a model and traces two tasks to files, one after the other, ever held, less the
  weights (and less the one accumulator that is in memory at a time).
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.place import study_model
from benchmarks.smollm2 import smollm2
from circuits.datasets import Role, Task
from circuits.models import (
    COMPONENTS,
    HookedTransformer,
    checkpoint_of,
    huggingface_view,
    load_model,
    projections_of,
)
from circuits.storage import provenance, write_json
from circuits.tracing import trace_gradients

LENGTH = 16
THREADS = 2
_ANSWER = 2


def made_up_task(vocabulary: int, examples: int, seed: int = 0) -> Task:
    """Random tokens; the last two are the answer."""
    tokens = torch.randint(vocabulary, (examples, LENGTH), generator=torch.Generator().manual_seed(seed))
    roles = torch.full_like(tokens, int(Role.OTHER))
    roles[:, -_ANSWER:] = int(Role.ANSWER)
    answers = pandas.DataFrame(
        [(example, example, "answer", "", LENGTH - _ANSWER, LENGTH) for example in range(examples)],
        columns=["example", "person", "attribute", "value", "start", "end"],
    )
    return Task("made_up", tokens, roles, answers, [""] * examples)


def batch_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, -_ANSWER - 1 : -1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, -_ANSWER:].flatten())


def naive(model: PreTrainedModel, task: Task) -> dict[str, torch.Tensor]:
    wanted = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for tokens in task.tokens:
        model.zero_grad()
        batch_loss(model, tokens[None]).backward()
        for name, value in wanted.items():
            sums[name] += value.grad.abs()
    model.zero_grad()
    return sums


def plain(model: PreTrainedModel, task: Task, batch_size: int) -> None:
    for tokens in task.tokens.split(batch_size):
        model.zero_grad()
        batch_loss(model, tokens).backward()


def largest_difference(
    model: HookedTransformer, reference: PreTrainedModel, task: Task, components: Sequence[str]
) -> float:
    """How far an entry lies from the loop's, as a share of its tensor's largest."""
    slow, fast = naive(reference, task), trace_gradients(model, task, components=components).gradients
    found = 0.0
    for source in checkpoint_of(model).sources:
        if source.hooked in fast:
            expected = source.to_hooked(slow[source.checkpoint]) / len(task)
            found = max(found, float((fast[source.hooked] - expected).abs().max() / expected.max()))
    return found


def best(work: Callable[[], object], times: int = 3) -> float:
    return best_in_turns([work], times)[0]


def best_in_turns(works: list[Callable[[], object]], times: int = 3) -> list[float]:
    """The least seconds of each, taken in turns, so that a busy moment does not hit only one."""
    seconds = [[] for _ in works]
    for _ in range(times):
        for work, found in zip(works, seconds, strict=True):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
    return [min(found) for found in seconds]


def reference_of(model: HookedTransformer, components: Sequence[str]) -> PreTrainedModel:
    """A plain model of the same values, with gradients at the parameters of some components."""
    with huggingface_view(model) as view:
        reference = type(view)(view.config)
        reference.load_state_dict(view.state_dict())
        wanted = {row.tensor for row in projections_of(view, checkpoint_of(model).sources, components)}
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in wanted)
    return reference.eval()


def speeds(
    model: HookedTransformer,
    examples: int,
    looped: int,
    batch_size: int,
    components: Sequence[str] = ("attention", "mlp"),
) -> dict[str, float]:
    """Milliseconds an example."""
    reference = reference_of(model, components)
    task = made_up_task(model.cfg.d_vocab, examples)
    few = task.select(range(looped))
    difference = largest_difference(model, reference, few, components)
    loop, traced, batched, one_pass = best_in_turns(
        [
            lambda: naive(reference, few),
            lambda: trace_gradients(model, task, batch_size=batch_size, components=components),
            lambda: trace_gradients(model, task, batch_size=batch_size, per="batch", components=components),
            lambda: plain(reference, task, batch_size),
        ]
    )
    return {
        "naive_ms": 1e3 * loop / looped,
        "per_example_ms": 1e3 * traced / examples,
        "per_example_ratio": loop / looped / (traced / examples),
        "per_batch_ms": 1e3 * batched / examples,
        "plain_pass_ms": 1e3 * one_pass / examples,
        "per_batch_ratio": batched / one_pass,
        "largest_difference": difference,
        "examples": examples,
        "examples_looped": looped,
        "batch_size": batch_size,
    }


def three_billion_cut(folder: Path) -> Path:
    """A Llama-3.2-3B-shaped checkpoint of 4 layers in bfloat16, made in a process of its own."""
    config = LlamaConfig(
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
        num_hidden_layers=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)
    return folder


def peak(folder: Path, dtype: str, batch_size: int, threads: int) -> dict[str, float]:
    """In this process: load, trace two tasks to files, and say how far memory went above weights and accumulator."""
    torch.set_num_threads(threads)
    model = load_model(folder, dtype)
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.requires_grad}.values())
    with tempfile.TemporaryDirectory() as out:
        for seed, name in enumerate(("one", "two")):
            task = made_up_task(model.cfg.d_vocab, 2 * batch_size, seed)
            trace = trace_gradients(model, task, batch_size=batch_size, out=Path(out) / f"{name}.safetensors")
            accumulator = sum(value.numel() * value.element_size() for value in trace.gradients.values())
            del trace
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "weights_gb": weights / 1e9,
        "accumulator_gb": accumulator / 1e9,
        "peak_gb": most / 1e9,
        "peak_over_weights_gb": (most - weights) / 1e9,
        "peak_over_weights_and_accumulator_gb": (most - weights - accumulator) / 1e9,
    }


def in_own_process(*arguments: str | int | Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.trace", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout or "{}")


def main() -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(THREADS)
    real = smollm2()
    found: dict[str, dict[str, float]] = {}
    study, smollm = study_model(), load_model(real)
    for name, model, size in (
        ("study", study, {"examples": 512, "looped": 64, "batch_size": 64}),
        ("study_all_components", study, {"examples": 512, "looped": 64, "batch_size": 64, "components": COMPONENTS}),
        ("smollm2", smollm, {"examples": 96, "looped": 8, "batch_size": 32}),
        ("smollm2_all_components", smollm, {"examples": 96, "looped": 8, "batch_size": 32, "components": COMPONENTS}),
    ):
        found[name] = row = speeds(model, **size)
        print(
            f"{name}: per example {row['per_example_ms']:.2f} ms, naive {row['naive_ms']:.2f} ms: "
            f"{row['per_example_ratio']:.1f} times as fast, apart by {row['largest_difference']:.0e} of the largest; "
            f"per batch {row['per_batch_ms']:.2f} ms, {row['per_batch_ratio']:.2f} times a plain pass",
            flush=True,
        )
    del study, smollm, model
    found["memory_smollm2"] = in_own_process("peak", real, "float32", 16, THREADS)
    with tempfile.TemporaryDirectory() as folder:
        in_own_process("make", folder)
        found["memory_3b_of_4_layers"] = in_own_process("peak", folder, "bfloat16", 8, THREADS)
    for name in ("memory_smollm2", "memory_3b_of_4_layers"):
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found[name].items()))
    headline = {
        "per_example_ratio_smollm2": round(found["smollm2"]["per_example_ratio"], 2),
        "per_example_ratio_study": round(found["study"]["per_example_ratio"], 2),
        "per_batch_ratio": round(found["smollm2"]["per_batch_ratio"], 2),
        "peak_over_weights_gb": round(found["memory_smollm2"]["peak_over_weights_gb"], 2),
    }
    facts = provenance(threads=THREADS, tokens=LENGTH)
    write_json(Path("runs/bench/trace.json"), {**headline, **found, "provenance": facts})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["peak", folder, dtype, batch_size, threads]:
            print(json.dumps(peak(Path(folder), dtype, int(batch_size), int(threads))))
        case ["make", folder]:
            three_billion_cut(Path(folder))
        case _:
            main()
