"""Cross-task gradient trace (arXiv 2505.16178, Fig. 1b; docs/method.md, section 1).

1. The examples of a task run in batches, and the statistic of each one's gradients is added to sums
   (`circuits.tracing.running_trace`); the trace is their mean. Over several checkpoints, their traces are added up.
2. If the trace goes to a file, its sums are saved beside it from time to time, whole or not at all, with the number of
   examples they hold; a trace that was interrupted goes on from there.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from circuits.errors import CircuitsError
from circuits.executors import Executor, Serial, choose_executor
from circuits.models import (
    Model,
    check_task,
    checkpoint_of,
    facts_of,
    fingerprint,
    lean_model,
    load_model,
    refuse_hooks,
    user_hooks,
)
from circuits.progress import track
from circuits.storage import digest
from circuits.tasks import Task
from circuits.tracing.running_trace import RunningTrace
from circuits.tracing.settings import TraceSettings, check_identity
from circuits.tracing.shards import trace_in_shards
from circuits.tracing.trace import GradientTrace

#: Seconds between two saves of an unfinished trace; more if saving takes long.
_SAVE_EVERY = 120.0
_NO_FILE = "a trace in shards needs a file for the trace: give out"


def trace_gradients(
    model: Model,
    task: Task,
    statistic: str = "abs",
    *,
    loss: str = "answer",
    batch_size: int = 32,
    per: str = "example",
    components: Sequence[str] = ("attention", "mlp"),
    out: str | Path | None = None,
    executor: str | Executor = "serial",
) -> GradientTrace:
    """Trace a task's gradients at the parameters of a model, slowly if functions are hooked into it, which are run.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        statistic: of each gradient: ``abs``, ``square`` (diagonal Fisher) or ``signed``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass. Per example it changes speed and memory, not the result.
        per: ``example``: the statistic of each example's gradient; ``batch``: of the gradient of each batch's mean
            loss.
        components: some of ``attention``, ``mlp`` (both with their biases), ``embeddings`` and ``norms``.
        out: a safetensors file for the trace. If tracing is interrupted, the same call goes on where it was; if the
            file is there already, it is read. The trace then stays on disk until it is looked at.
        executor: who does it; with another than ``serial`` it is done in shards, as in `trace_checkpoints`, by workers
            that load the model from its folder. That changes the trace by rounding alone, and not what it is of: a
            file that one executor made another reads.

    Raises:
        CircuitsError: there is no such statistic, loss, component or executor, the model was not loaded with
            `circuits.load_model`, or ``out`` holds another trace; workers are to trace without ``out``, or a model
            that is in memory alone, was changed since it was loaded, or has functions hooked into it.

    Source:
        arXiv 2505.16178, section 3 and Fig. 1b.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> task = dataset.task("qa_id", tokenizer)
        >>> trace_gradients(model, task)
        GradientTrace('qa_id', parameters=737,280, examples=12)
        >>> sorted(trace_gradients(model, task, per="batch", components=["norms"]).gradients)[:3]
        ['blocks.0.ln1.w', 'blocks.0.ln2.w', 'blocks.1.ln1.w']
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    checkpoint_of(model)
    check_task(model, task)
    facts = facts_of(model)
    identity = {name: facts[name] for name in ("model", "dtype")}
    chosen = choose_executor(executor)
    if not isinstance(chosen, Serial):
        if out is None:
            raise CircuitsError(_NO_FILE)
        refuse_hooks(model)
        placed: dict[str, Any] = {"dtype": facts["dtype"], "device": facts["device"].split(":")[0]}
        return trace_in_shards(
            [model], task, settings, out=Path(out), identity=identity, shards=None, executor=chosen, **placed
        )
    hooks = sorted(found.name for found in user_hooks(model))
    if hooks:
        # what was traced with other functions, or none, is another trace
        identity = facts = facts | {"hooks": hooks}
    return _trace([lambda: model], task, settings, identity, lambda _: facts, out)


def trace_checkpoints(
    sources: Sequence[str | Path | Model],
    task: Task,
    statistic: str = "abs",
    *,
    loss: str = "answer",
    batch_size: int = 32,
    per: str = "example",
    components: Sequence[str] = ("attention", "mlp"),
    out: str | Path | None = None,
    dtype: str = "float32",
    device: str | None = None,
    shards: int | None = None,
    executor: str | Executor = "serial",
) -> GradientTrace:
    """Trace a task's gradients at several checkpoints, and add the traces up.

    Args:
        sources: checkpoints of one model along its training, in order; folders are loaded one at a time.
        task: the examples.
        statistic: as in `trace_gradients`, and so are ``loss``, ``batch_size``, ``per``, ``components`` and ``out``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass.
        per: ``example`` or ``batch``.
        components: which parts of the model.
        out: a file for the trace.
        dtype: that folders are loaded in.
        device: that they are loaded to.
        shards: parts that the examples are cut into; with another executor than ``serial``, 8 if not given. They share
            out the work, and change the result by no more than rounding. Sums of finished shards wait beside ``out``,
            each as large as the trace, until all are there.
        executor: who sums the shards: ``serial``, ``processes``, ``ray``, ``slurm``, or one of `circuits.executors`
            with its settings. Workers load the checkpoints from their folders, and compute on one thread each.

    Returns:
        The sum over checkpoints. It belongs to the model of the last one: masks made from it act there.

    Raises:
        CircuitsError: as `trace_gradients`; no sources are given, or they are not the same kind of model; shards are
            to be summed without ``out``, or of a model that is in memory alone.

    Source:
        arXiv 2505.16178, section 3; docs/method.md, section 1.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> models = [load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1)]
        >>> trace_checkpoints(models, dataset.task("qa_id", tokenizer))
        GradientTrace('qa_id', parameters=737,280, examples=12)
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    if not sources:
        raise CircuitsError("no checkpoints are given: a trace needs one at least")
    chosen = choose_executor(executor)
    if shards is not None or not isinstance(chosen, Serial):
        if out is None:
            raise CircuitsError(_NO_FILE)
        identity = {"checkpoints": [_stamp(source, dtype) for source in sources]}
        placed: dict[str, Any] = {"dtype": dtype, "device": device, "shards": shards, "executor": chosen}
        return trace_in_shards(sources, task, settings, out=Path(out), identity=identity, **placed)
    visits = [partial(_visit, source, dtype, device) for source in sources]
    identity = {"checkpoints": [_stamp(source, dtype) for source in sources]}
    return _trace(visits, task, settings, identity, lambda last: identity | facts_of(last), out)


def _visit(source: str | Path | Model, dtype: str, device: str | None) -> Model:
    return source if isinstance(source, nn.Module) else load_model(source, dtype, device)


def _stamp(source: str | Path | Model, dtype: str) -> str:
    """What tells one source from another without loading it: a model's content, or the names and times of its files."""
    if isinstance(source, nn.Module):
        refuse_hooks(source)
        return fingerprint(source)
    files = sorted(Path(source).glob("*.safetensors"))
    stats = [(file.name, file.stat()) for file in files]
    return f"{source} {dtype} {digest(*(f'{name} {stat.st_size} {stat.st_mtime_ns}' for name, stat in stats))}"


def _trace(
    visits: Sequence[Callable[[], Model]],
    task: Task,
    settings: TraceSettings,
    identity: dict[str, Any],
    facts: Callable[[Model], dict[str, Any]],
    out: str | Path | None,
) -> GradientTrace:
    """Trace at each model in turn, on from where an earlier call was interrupted."""
    identity = identity | settings.identity(task)
    out = None if out is None else Path(out)
    unfinished = None if out is None else out.with_name(f"{out.name}.unfinished")
    if out is not None and out.exists():
        finished = GradientTrace.load(out)
        check_identity(out, finished.provenance, identity)
        return finished
    running = RunningTrace(settings)
    if unfinished is not None and unfinished.exists():
        running.load(unfinished, identity)
    saved, pause = time.monotonic(), _SAVE_EVERY
    for number, visit in enumerate(visits):
        begun = running.done - number * len(task)
        if begun >= len(task) and number < len(visits) - 1:
            continue
        model = visit()
        check_task(model, task)
        rows, hooked = checkpoint_of(model).rows, bool(user_hooks(model))
        rest = range(max(begun, 0), len(task))
        batches = [rest[first : first + settings.batch_size] for first in range(0, len(rest), settings.batch_size)]
        lean = lean_model(model)
        for batch in track(batches, f"trace {task.name}", len(batches), "batch"):
            if hooked:
                running.add_hooked(model, task.select(batch))
            else:
                running.add(lean, task.select(batch))
            if unfinished is not None and time.monotonic() - saved > pause:
                begun_saving = time.monotonic()
                running.save(unfinished, identity)
                saved = time.monotonic()
                pause = max(_SAVE_EVERY, 10 * (saved - begun_saving))
        if unfinished is not None and number < len(visits) - 1:
            running.save(unfinished, identity)
    trace = running.finish(rows, task, facts(model))
    if out is None or unfinished is None:
        return trace
    trace.save(out)
    unfinished.unlink(missing_ok=True)
    # the sums make room for the trace that is read
    del trace, running
    return GradientTrace.load(out)
