"""The head sweep against `run_with_hooks` with logits at every position, on the study's model.

Run with ``python -m benchmarks.sweep``; writes ``runs/bench/sweep.json``.
"""

from pathlib import Path

import torch

from benchmarks.place import study_model, study_task
from benchmarks.trace import best
from circuits.models import HookedTransformer, HookPoints, shape_of
from circuits.storage import provenance, write_json
from circuits.sweeps import sweep_heads


@torch.no_grad()
def naive(model: HookedTransformer, task) -> list[float]:
    found = []
    where = task.answer_mask.nonzero()
    for head in shape_of(model).heads():

        def zero(z, hook, index=head.index):
            z[:, :, index] = 0
            return z

        logits = model.run_with_hooks(task.tokens, fwd_hooks=[(HookPoints(head.layer).z, zero)])
        log_probs = logits[where[:, 0], where[:, 1] - 1].log_softmax(-1)
        targets = task.tokens[where[:, 0], where[:, 1]]
        found.append(float(log_probs.gather(1, targets[:, None]).sum()) / len(task))
    return found


def main() -> None:
    torch.set_flush_denormal(True)
    model, task = study_model(), study_task().sample(256)
    slow, fast = naive(model, task), sweep_heads(model, [task], ["zero"])["log_prob"].tolist()
    difference = max(abs(one - two) for one, two in zip(slow, fast, strict=True))
    ratio = best(lambda: naive(model, task)) / best(lambda: sweep_heads(model, [task], ["zero"]))
    found = {
        "study_ratio": round(ratio, 2),
        "largest_difference": difference,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    write_json(Path("runs/bench/sweep.json"), found)
    print(
        f"sweep, 16 heads, 256 examples: {ratio:.1f} times as fast as run_with_hooks, apart by {difference:.1e} at most"
    )


if __name__ == "__main__":
    main()
