"""Gradient traces against naive loops, and their memory.

Run with ``python -m benchmarks.trace``, or with the names of some pieces (``study``, ``smollm2``, ``memory_smollm2``,
``memory_3b_of_4_layers``): each runs in a process of its own, and what it finds replaces its part of
``runs/bench/trace.json``. Speeds on two threads, 16-token examples, the least of several turns:

- per example: the whole of `trace_gradients` with ``abs``, fingerprint and all, against a loop of single-example
  forward and backward passes of the Hugging Face model that accumulates ``.grad.abs()``, timed on some of the examples;
- per batch: `trace_gradients` per batch, against the plain forward and backward pass of the Hugging Face model on the
  same batches with the same loss; here and above, only the traced parameters need gradients;
- the bound: how much faster than the loop that plain pass is. It forms the same products as a trace, but adds them up
  before anyone sees an example's gradient: a trace per example does all of its work and more;
- memory: the most a process that loads a model and traces two tasks to files, one after the other, ever held (libraries
  and all), less the weights and the one accumulator that is in memory at a time.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.place import study_model
from benchmarks.smollm2 import smollm2
from circuits.models import Model, checkpoint_of, load_model
from circuits.storage import provenance, read_json, write_json
from circuits.tasks import Task
from circuits.tracing import trace_gradients

LENGTH = 16
THREADS = 2
LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=128256,
    num_hidden_layers=28,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
ANSWER = 2
PIECES = ("study", "smollm2", "memory_smollm2", "memory_3b_of_4_layers")


def made_up_task(vocabulary: int, examples: int, seed: int = 0, *, length: int = LENGTH) -> Task:
    """Random tokens; the last two are the answer."""
    tokens = torch.randint(vocabulary, (examples, length), generator=torch.Generator().manual_seed(seed))
    answers = pandas.DataFrame(
        [(example, length - ANSWER, length) for example in range(examples)],
        columns=["example", "start", "end"],
    )
    return Task("made_up", tokens, torch.ones_like(tokens, dtype=torch.bool), answers, [""] * examples)


def batch_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, -ANSWER - 1 : -1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, -ANSWER:].flatten())


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


def largest_difference(model: Model, reference: PreTrainedModel, task: Task, components: Sequence[str]) -> float:
    """How far an entry lies from the loop's, as a share of its tensor's largest."""
    slow, fast = naive(reference, task), trace_gradients(model, task, components=components).gradients
    found = 0.0
    for row in checkpoint_of(model).rows:
        if row.name in fast:
            expected = row.stored(slow[row.tensor]) / len(task)
            found = max(found, float((fast[row.name] - expected).abs().max() / expected.max()))
    return found


def best_in_turns(works: list[Callable[[], object]], times: int) -> list[float]:
    """The least seconds of each, taken in turns, so that a busy moment does not hit only one."""
    seconds = [[] for _ in works]
    for _ in range(times):
        for work, found in zip(works, seconds, strict=True):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
    return [min(found) for found in seconds]


def reference_of(model: Model, components: Sequence[str]) -> PreTrainedModel:
    """A plain model of the same values, with gradients at the parameters of some components."""
    checkpoint = checkpoint_of(model)
    reference = AutoModelForCausalLM.from_config(checkpoint.config)
    reference.load_state_dict(checkpoint.tensors, strict=False)
    wanted = {row.tensor for row in checkpoint.rows if row.component in components}
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in wanted)
    return reference.eval()


def speeds(model: Model, examples: int, looped: int, batch_size: int, turns: int) -> dict[str, float]:
    """Milliseconds an example."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(THREADS)
    components = ("attention", "mlp")
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
        ],
        turns,
    )
    return {
        "naive_ms": 1e3 * loop / looped,
        "per_example_ms": 1e3 * traced / examples,
        "per_example_ratio": loop / looped / (traced / examples),
        "per_batch_ms": 1e3 * batched / examples,
        "plain_pass_ms": 1e3 * one_pass / examples,
        "per_batch_ratio": batched / one_pass,
        "bound_of_per_example_ratio": loop / looped / (one_pass / examples),
        "largest_difference": difference,
        "examples": examples,
        "examples_looped": looped,
        "batch_size": batch_size,
    }


def three_billion_cut(folder: Path) -> Path:
    """A Llama-3.2-3B-shaped checkpoint of 4 layers in bfloat16, made in a process of its own."""
    config = LlamaConfig(**LLAMA_3B.to_dict() | {"num_hidden_layers": 4})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
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
        "peak_over_weights_and_accumulator_gb": (most - weights - accumulator) / 1e9,
    }


def piece(name: str) -> dict[str, float]:
    """One piece of the benchmark, in this process."""
    match name:
        case "study":
            return speeds(study_model(), examples=512, looped=32, batch_size=256, turns=5)
        case "smollm2":
            return speeds(load_model(smollm2()), examples=64, looped=4, batch_size=32, turns=2)
        case "memory_smollm2":
            return peak(smollm2(), "float32", 16, THREADS)
        case "memory_3b_of_4_layers":
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "-m", "benchmarks.trace", "make", folder], check=True)
                return peak(Path(folder), "bfloat16", 8, THREADS)
    raise SystemExit(f"there is no piece {name}: choose from {', '.join(PIECES)}")


def headline(found: dict[str, dict[str, float]]) -> dict[str, float | str]:
    """The numbers that are looked for first, of the pieces that have run."""
    over, numbers = "peak_over_weights_and_accumulator_gb", {}
    for name, source, key in (
        ("per_example_ratio_smollm2", "smollm2", "per_example_ratio"),
        ("per_example_ratio_study", "study", "per_example_ratio"),
        ("per_batch_ratio", "smollm2", "per_batch_ratio"),
        ("per_batch_ratio_study", "study", "per_batch_ratio"),
        ("peak_over_weights_gb", "memory_smollm2", over),
        ("peak_over_weights_gb_3b_of_4_layers", "memory_3b_of_4_layers", over),
    ):
        if source in found:
            numbers[name] = round(found[source][key], 2)
    return {**numbers, "peak_over_weights_subtracts": "weights and one accumulator"}


def main(names: Sequence[str]) -> None:
    out = Path("runs/bench/trace.json")
    earlier = read_json(out) if out.exists() else {}
    found = {name: earlier[name] for name in PIECES if name in earlier}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.trace", "piece", name]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(result.splitlines()[-1])
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()), flush=True)
        write_json(out, {**headline(found), **found, "provenance": provenance(threads=THREADS, tokens=LENGTH)})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["piece", name]:
            print(json.dumps(piece(name)))
        case ["make", folder]:
            three_billion_cut(Path(folder))
        case names:
            main(names or PIECES)
