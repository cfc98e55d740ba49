"""Gradient consistency of all pairs of 600 facts in two formats, against explicit backward passes.

1. ``gram_seconds``: `gradient_consistency` over 600 questions and 600 biographies of the same facts, on a model of the
   study's shape, over all parameters, layers, components, heads and groups.
2. ``pairs_seconds``: two backward passes and a cosine for each of the 360,000 pairs, extrapolated from a few of them.
3. ``once_seconds``: one backward pass for each example, gradients kept, and the cosines of all parameters alone by one
   product: passes are extrapolated from a few, the product is timed on as many numbers.
4. The projection's error is the difference of its cosines from the exact ones.

Writes ``runs/bench/consistency.json``.
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.place import study_model
from circuits.consistency import gradient_consistency
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.interventions import pair_formats
from circuits.models import Model
from circuits.storage import provenance, write_json
from circuits.tasks import Task
from circuits.tracing import loss_gradients

THREADS, FACTS, SAMPLE, PROJECTION = 2, 600, 12, 1024


def facts() -> tuple[Task, Task]:
    with tempfile.TemporaryDirectory() as folder:
        dataset, tokenizer = make_dataset(folder, DatasetSettings(people=200)), word_tokenizer()
        task = dataset.task("qa_id", tokenizer).select(range(FACTS))
        return task, pair_formats(task, dataset.task("bio", tokenizer))


def gradient(model: Model, task: Task, example: int) -> torch.Tensor:
    found = loss_gradients(model, task.select([example]))
    return torch.cat([value.flatten() for name, value in found.items() if ".attn." in name or ".mlp." in name])


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    model, (task, other) = study_model(), facts()
    begun = time.perf_counter()
    found = gradient_consistency(model, task, other)
    gram = time.perf_counter() - begun
    exact = found.cosines["all"][0]
    gradient(model, task, 0)
    begun, kept = time.perf_counter(), []
    for example in range(SAMPLE):
        one, two = gradient(model, task, example), gradient(model, other, example + 1)
        torch.nn.functional.cosine_similarity(one, two, dim=0)
        kept.append((one, two))
    pair = (time.perf_counter() - begun) / SAMPLE
    # in float32 a cosine over as many numbers is itself off by 2e-5
    cosines = [torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0) for one, two in kept]
    difference = max(float((cosine - exact[i, i + 1]).abs()) for i, cosine in enumerate(cosines))
    begun = time.perf_counter()
    some = torch.randn(FACTS, len(one) // 16)
    drawn = time.perf_counter()
    some @ some.T
    product = 16 * (time.perf_counter() - drawn)
    begun = time.perf_counter()
    estimated = gradient_consistency(model, task, other, by=["all"], projection=PROJECTION).cosines["all"][0]
    projected = time.perf_counter() - begun
    errors = (estimated - exact).abs().flatten()
    result = {
        "gram_seconds": round(gram, 1),
        "ratio_over_pairs": round(pair * FACTS**2 / gram, 1),
        "ratio_over_once": round((pair * FACTS + product) / gram, 2),
        "pairs_seconds": round(pair * FACTS**2),
        "once_seconds": round(pair * FACTS + product, 1),
        "pairs_timed": SAMPLE,
        "largest_difference": difference,
        "projection": PROJECTION,
        "projection_seconds": round(projected, 1),
        "projection_error_95": float(errors[::7].quantile(0.95)),
        "projection_error_max": float(errors.max()),
    }
    write_json(Path("runs/bench/consistency.json"), {**result, "provenance": provenance(threads=THREADS, facts=FACTS)})
    print("consistency: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
