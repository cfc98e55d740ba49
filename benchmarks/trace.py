"""The per-example gradient trace against the loop of single-example backward passes, on the study's model.

Run with ``python -m benchmarks.trace``; writes ``runs/bench/trace.json``.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.place import study_model, study_task
from circuits.models import HookedTransformer, parameters_of
from circuits.storage import provenance, write_json
from circuits.tracing import example_losses, trace_gradients
from circuits.units import layout_of


def naive(model: HookedTransformer, task) -> dict[str, torch.Tensor]:
    parameters = {name: value for name, value in parameters_of(model).items() if layout_of(name).unit is not None}
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for example in range(len(task)):
        loss = example_losses(model, task.select([example]))[0]
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            sums[name] += gradient.abs()
    return {name: value / len(task) for name, value in sums.items()}


def best(work: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    torch.set_flush_denormal(True)
    model, task = study_model(), study_task().sample(128)
    slow, fast = naive(model, task), trace_gradients(model, task).gradients
    difference = max(float((fast[name] - slow[name]).abs().max() / slow[name].max()) for name in slow)
    ratio = best(lambda: naive(model, task)) / best(lambda: trace_gradients(model, task))
    found = {
        "per_example_ratio_study": round(ratio, 2),
        "largest_difference": difference,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    write_json(Path("runs/bench/trace.json"), found)
    print(f"trace, 128 examples: {ratio:.1f} times as fast as a backward pass each, apart by {difference:.1e} at most")


if __name__ == "__main__":
    main()
