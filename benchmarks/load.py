"""Loading a model against ``AutoModelForCausalLM.from_pretrained``, on SmolLM2-135M in float32.

Run with ``python -m benchmarks.load``. Each loading happens in a process of its own that has imported all it needs,
taken in turns, on one thread (two wait for each other on a busy machine), with the files in the page cache; the least
seconds of several turns count.

- time over transformers: all of `load_model` (files judged, weights, hooked model, tokenizer, the parity check's three
  forward passes, the backward pass of the hook points' probe) against ``from_pretrained`` of the model and the
  tokenizer, which maps the weights and reads none;
- peak over weights: the most memory the process ever held, less what it held after its imports, over the bytes of the
  weights in the file (tied ones once).
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.smollm2 import smollm2
from circuits.storage import provenance, read_json, write_json

OUT = Path("runs/bench/load.json")
TURNS = 5

_ONE = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
if sys.argv[1] == "circuits":
    from circuits.models import load_model
    # as is TransformerLens, which takes a second
    import circuits.models.hooked_transformer
else:
    # what transformers imports at its first model is a library too
    from transformers import LlamaForCausalLM
def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()
before, begun = held(), time.perf_counter()
if sys.argv[1] == "circuits":
    model = load_model(sys.argv[2], device="cpu")
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak - before}))
"""


def loaded(way: str, folder: Path) -> dict[str, float]:
    """What a process that loads the folder in one way took."""
    command = [sys.executable, "-c", _ONE, way, str(folder)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    folder = smollm2()
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {"circuits": [], "transformers": []}
    for _ in range(TURNS):
        for way, found in runs.items():
            found.append(loaded(way, folder))
    seconds = {way: min(one["seconds"] for one in found) for way, found in runs.items()}
    peaks = {way: min(one["peak"] for one in found) / weights for way, found in runs.items()}
    results = {
        "peak_over_weights": peaks["circuits"],
        "time_over_transformers": seconds["circuits"] / seconds["transformers"],
        "seconds": seconds,
        "peaks_over_weights": peaks,
        "weights_bytes": weights,
        "turns": TURNS,
        "provenance": provenance(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_json(OUT, results)
    shown = read_json(OUT)
    print(
        f"peak over weights {shown['peak_over_weights']:.2f} (transformers {peaks['transformers']:.2f}), time over "
        f"transformers {shown['time_over_transformers']:.2f} ({seconds['circuits']:.2f} s, "
        f"{seconds['transformers']:.2f} s)"
    )


if __name__ == "__main__":
    main()
