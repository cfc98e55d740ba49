"""How long `circuits analyse` takes, and how much memory: SmolLM2-135M on two ready tasks of 32 prompts, the defaults.

1. The analysis runs in a process of its own, from an empty folder.
2. Its time is that of the whole process, imports and loading too. Its memory is the most that the process held, less
   the weights of the model.

Writes ``runs/bench/analyse.json``: ``minutes``, ``peak_over_weights_gb``, ``estimated`` (what it said before it began)
and the seconds of each step.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.smollm2 import smollm2
from circuits.analysis.running import seconds
from circuits.models import load_config
from circuits.storage import provenance, write_json

OUT = Path("runs/bench/analysis")
TASKS = ("ioi", "greater_than")


def main() -> None:
    folder = smollm2()
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # the checkpoint's bfloat16 is computed in float32
    weights *= 2 if str(load_config(folder).dtype) == "torch.bfloat16" else 1
    shutil.rmtree(OUT, ignore_errors=True)
    words = [sys.executable, "-m", "circuits", "analyse", str(folder), "--out", str(OUT)]
    begun = time.monotonic()
    done = subprocess.run(
        [*words, *(word for task in TASKS for word in ("--task", task))], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    minutes = (time.monotonic() - begun) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = {
        "minutes": round(minutes, 2),
        "peak_over_weights_gb": round((peak - weights) / 1e9, 2),
        "estimated": next(line for line in done.stdout.splitlines() if line.startswith("about")),
        "seconds": seconds(OUT),
    }
    write_json(Path("runs/bench/analyse.json"), found | {"provenance": provenance()})
    print(
        f"analyse: {minutes:.1f} minutes ({found['estimated']}), {found['peak_over_weights_gb']} GB above the weights"
    )


if __name__ == "__main__":
    main()
