"""The fast engine against the tools it replaces, in one run; writes ``runs/bench/sweep.json``.

Run with ``python -m benchmarks.sweep``. The prompts are 16 questions of 16 tokens with answers of one token, such as
"Question: In which city was Ada Lovelace born? Answer: London".

- heads: every head of SmolLM2-135M zeroed alone, against one ``run_with_hooks`` a head, timed on every fifth head; in
  turns.
- bf16: the same from bfloat16 weights. On a processor without bfloat16 instructions the engine computes in float32.
- positions: every head patched at every position, against ``get_act_patch_attn_head_out_by_pos``; both on layers spread
  over the depth, the peer on a sample of their heads and positions.
- study: every head of the study's model, all its questions.
- screen: attribution of every head, against the engine's exact sweep.
- share of peak: the engine's floating-point operations in a second, as a share of what plain matrix products of the
  same shapes reach.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.place import study_model, study_task
from benchmarks.smollm2 import smollm2
from circuits.facts import DatasetSettings, example_of, make_dataset
from circuits.interventions import Intervention, pair_people, run_interventions, screen_interventions, single
from circuits.interventions.engine import Engine, Prompts
from circuits.interventions.forward import Forward
from circuits.interventions.memory import arithmetic
from circuits.models import Model, hook_name, load_model, shape_of
from circuits.storage import provenance, write_json
from circuits.tasks import Task
from circuits.units import Head

TOKENS, PROMPTS = 16, 16
TURNS, LOOPED = 3, 5
LAYERS = (3, 11, 19, 27)


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """The least of some durations in seconds, and what the work returned."""
    seconds, result = [], None
    for _ in range(times):
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds), result


def prompts(model: Model) -> tuple[Task, Task]:
    """Questions of 16 tokens with answers of one token, and for each the same question about someone else."""
    opening, middle = "Question: ", "Answer: "
    with tempfile.TemporaryDirectory() as folder:
        rows = list(make_dataset(folder, DatasetSettings(people=200)).rows("qa_id"))
    moved = []
    for row in rows:
        (start, end) = row["answer"][0]
        text = f"{opening}{row['text'][:start]}{middle}{row['text'][start:end]}"
        shift = len(opening) + len(middle)
        moved.append(
            row
            | {
                "text": text,
                "subject": [[left + len(opening), right + len(opening)] for left, right in row["subject"]],
                "relation": [[left + len(opening), right + len(opening)] for left, right in row["relation"]],
                "answer": [[start + shift, end + shift]],
            }
        )
    task = Task.from_examples("questions", map(example_of, moved), model.tokenizer)
    lengths = task.attention_mask.sum(1).numpy()
    short = (task.answers["end"] - task.answers["start"]).to_numpy() == 1
    task = task.select(numpy.flatnonzero((lengths == TOKENS) & short).tolist())
    forms = pandas.Series([text.split("?")[0].split(" ")[-1] for text in task.texts])
    common = forms[forms.isin(forms.value_counts().index[:4])].index[: 4 * PROMPTS]
    task = task.select(list(common))
    chosen = list(range(0, len(task), len(task) // PROMPTS))[:PROMPTS]
    return task.select(chosen), pair_people(task).select(chosen)


def answer_log_probs(logits: Tensor, task: Task) -> Tensor:
    where = task.answer_mask.nonzero()
    targets = task.tokens[where[:, 0], where[:, 1]]
    return logits.float().log_softmax(-1)[where[:, 0], where[:, 1] - 1].gather(1, targets[:, None])[:, 0]


@torch.inference_mode()
def loop(model: Model, task: Task, heads: Iterable[Head]) -> list[float]:
    """One hooked forward pass for each head."""
    found = []
    for head in heads:

        def zero(z, hook, index=head.index):
            z[:, :, index] = 0
            return z

        logits = model.run_with_hooks(task.tokens, fwd_hooks=[(hook_name(model, (head.layer, "z")), zero)])
        found.append(float(answer_log_probs(logits, task).sum()) / len(task))
    return found


def operations(model: Model, task: Task, interventions: list[Intervention]) -> float:
    """Floating-point operations in the matrix products of the engine's layers and unembedding."""
    cfg = model.cfg
    engine = Engine(model, task, interventions)
    prompts = Prompts(engine, list(range(len(task))))
    forward = Forward(engine.lean, prompts.tree("all", "zero"), prompts.clean)
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + engine.lean.n_groups)
    output, mlp = 2 * cfg.d_model * cfg.d_head * cfg.n_heads, (6 if cfg.gated_mlp else 4) * cfg.d_model * cfg.d_mlp
    layer = 2 * cfg.d_model * cfg.d_head * engine.lean.n_groups + attention + output + mlp
    active, last = len(forward.active), int(forward.answers.sum())
    total = 0.0
    for one in interventions:
        whole = max(0, cfg.n_layers - 2 - one.layer)
        total += active * (whole * layer + (output + mlp if one.layer < cfg.n_layers - 1 else 0)) + last * layer
        total += 2 * last * cfg.d_model * cfg.d_vocab
    return total


def plain_rate(model: Model, tokens: int) -> float:
    """Operations a second of one layer's matrix products and nothing else, on as many tokens as the engine takes."""
    cfg = model.cfg
    groups = cfg.n_key_value_heads or cfg.n_heads
    shapes = [(cfg.d_model, cfg.d_model)] * 2 + [(groups * cfg.d_head, cfg.d_model)] * 2
    shapes += [(cfg.d_mlp, cfg.d_model)] * 2 + [(cfg.d_model, cfg.d_mlp)]
    pairs = [(torch.randn(tokens, inputs), torch.randn(outputs, inputs)) for outputs, inputs in shapes]
    work = sum(2 * tokens * outputs * inputs for outputs, inputs in shapes)

    def products() -> None:
        for x, weight in pairs:
            linear(x, weight)

    return work * 20 / timed(lambda: [products() for _ in range(20)])[0]


@torch.inference_mode()
def positions(model: Model, task: Task, source: Task) -> tuple[float, float]:
    """How many times faster every head is patched at every position, and the largest difference."""
    from transformer_lens.patching import generic_activation_patch, layer_pos_head_vector_patch_setter

    heads = [head for head in shape_of(model).heads() if head.layer in LAYERS]
    last = int(task.answers["start"].iloc[0]) - 1
    plan = [one for position in range(last + 1) for one in single(heads, "patch", positions=position)]
    fast, table = timed(lambda: run_interventions(model, task, plan, source=source, metrics=["log_prob"]))
    sample = list(range(0, len(plan), 23))
    rows = [(plan[index].units[0].layer, plan[index].positions, plan[index].units[0].index) for index in sample]
    index = pandas.DataFrame(rows, columns=["layer", "pos", "head"])
    _, cache = model.run_with_cache(source.tokens)

    def peer() -> Tensor:
        return generic_activation_patch(
            model,
            task.tokens,
            cache,
            lambda logits: answer_log_probs(logits, task).mean(),
            layer_pos_head_vector_patch_setter,
            "z",
            index_df=index,
        )

    with contextlib.redirect_stderr(io.StringIO()):
        slow, found = timed(peer)
    difference = max(abs(float(one) - two) for one, two in zip(found, table["log_prob"][sample], strict=True))
    return slow * len(plan) / len(sample) / fast, difference


def main() -> None:
    torch.set_flush_denormal(True)
    model = load_model(smollm2())
    task, source = prompts(model)
    heads = list(shape_of(model).heads())
    plan = single(heads)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}

    def tell(**numbers: Any) -> None:
        found.update(numbers)
        for name, value in numbers.items():
            print(f"{name:24} {value}", flush=True)

    def sweep(model: Model) -> pandas.DataFrame:
        return run_interventions(model, task, plan, metrics=["log_prob"])

    # in turns, so that a busy moment of the machine does not hit only one
    engine = Engine(model, task, plan, metrics=["log_prob"])
    fast, slow, rates, expected = 0.0, 0.0, [], {}
    for turn in range(TURNS):
        seconds, table = timed(lambda: sweep(model))
        fast += seconds / TURNS
        rates.append(plain_rate(model, engine.tokens))
        looped = range(LOOPED * turn, len(heads), LOOPED * TURNS)
        seconds, values = timed(lambda looped=looped: loop(model, task, [heads[index] for index in looped]))
        slow += seconds * len(heads) / len(looped) / TURNS
        rates.append(plain_rate(model, engine.tokens))
        expected |= dict(zip(looped, values, strict=True))
    sampled = sorted(expected)
    rate = operations(model, task, plan) / fast
    naive = numpy.array([expected[index] for index in sampled])
    tell(
        heads_float32_ratio=round(slow / fast, 2),
        heads_float32_seconds=round(fast, 1),
        heads_float32_max_diff=float(numpy.abs(table["log_prob"][sampled] - naive).max()),
        share_of_peak=round(rate / float(numpy.mean(rates)), 3),
        gflops=round(rate / 1e9),
    )
    with torch.inference_mode():
        effects = pandas.Series(naive) - float(answer_log_probs(model(task.tokens), task).mean())

    def agreement(values: pandas.Series) -> float:
        return round(float(values[sampled].reset_index(drop=True).corr(effects, "spearman")), 4)

    screen, estimates = timed(lambda: screen_interventions(model, task, plan), 2)
    tell(screen_ratio=round(fast / screen, 1), screen_spearman=agreement(estimates["estimate"]))
    small, questions = study_model(), study_task()
    plan_of_small = single(shape_of(small).heads())
    small_loop = timed(lambda: loop(small, questions, shape_of(small).heads()), 3)[0]
    small_sweep = timed(lambda: run_interventions(small, questions, plan_of_small, metrics=["log_prob"]), 3)[0]
    tell(study_ratio=round(small_loop / small_sweep, 2))
    by_position, position_difference = positions(model, task, source)
    tell(positions_ratio=round(by_position, 2), positions_max_diff=position_difference)
    half = load_model(smollm2(), dtype="bfloat16")
    half_seconds, half_table = timed(lambda: sweep(half))
    tell(
        heads_bf16_ratio=round(slow / half_seconds, 2),
        heads_bf16_spearman=agreement(half_table["log_prob_effect"]),
        heads_bf16_arithmetic=str(arithmetic(half)).removeprefix("torch."),
    )
    write_json(Path("runs/bench/sweep.json"), {**found, "provenance": provenance()})


if __name__ == "__main__":
    main()
