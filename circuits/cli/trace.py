"""``circuits trace``: gradients of tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.executors import with_executor
from circuits.cli.inputs import check_folder, facts, load, open_tasks
from circuits.cli.options import (
    Chat,
    Csv,
    Data,
    Device,
    DropBad,
    Dtype,
    Examples,
    Model,
    Seed,
    task_option,
)
from circuits.cli.terminal import resumable, say

if TYPE_CHECKING:
    from circuits.executors import Executor


@with_executor
def trace(
    model: Model,
    data: Data = None,
    task: Annotated[list[str] | None, task_option("What to trace", "May be repeated; default: bio and qa_id.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for a trace file and hook-point tables per task.")] = Path(
        "runs/traces"
    ),
    statistic: Annotated[str, typer.Option(help="Of each gradient: abs, square or signed.")] = "abs",
    loss: Annotated[str, typer.Option(help="Over answer tokens, or all tokens.")] = "answer",
    examples: Examples = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    per: Annotated[str, typer.Option(help="Statistic of each example's gradient, or of each batch's.")] = "example",
    components: Annotated[
        list[str] | None,
        typer.Option(help="attention, mlp, embeddings or norms; may be repeated. Default: attention and mlp."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Earlier checkpoint of the same training, to add to the trace; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one pass.", min=1)] = 32,
    dtype: Dtype = "float32",
    device: Device = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="Parts that the examples are cut into; default: 1, and 8 with another executor than serial.",
            min=1,
            show_default=False,
        ),
    ] = None,
    executor: "Executor | str" = "serial",
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Trace a task's gradients at every parameter of heads and neurons."""
    check_folder(out)
    names = task or ["bio", "qa_id"]
    opened = open_tasks(model, names, data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    loaded = load(model, dtype, device)
    from circuits.storage import write_table
    from circuits.tracing import trace_checkpoints
    from circuits.units import Head, Neuron

    parts = components or ["attention", "mlp"]
    sources = [*(checkpoint or []), loaded]
    settings = {"examples": examples, "statistic": statistic, "loss": loss, "per": per, "components": parts}
    for one in opened.tasks:
        file = out / f"{one.name}.safetensors"
        with resumable():
            traced = trace_checkpoints(
                sources,
                one,
                statistic,
                loss=loss,
                batch_size=batch_size,
                per=per,
                components=parts,
                out=file,
                dtype=dtype,
                device=device,
                shards=shards,
                executor=executor,
            )
        about = facts(loaded, opened, seed, **settings, checkpoints=[str(source) for source in checkpoint or []])
        for kind in (Head, Neuron):
            write_table(out / f"{one.name}_{kind.NOUN}s.parquet", traced.units(kind), about, csv)
        say(f"{file}: {traced!r}")
