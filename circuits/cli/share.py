"""``circuits share``: the parameters that tasks share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import check_folder
from circuits.cli.options import Csv, Seed
from circuits.cli.terminal import between, busy, cell, say, say_csv, show
from circuits.errors import CircuitsError
from circuits.progress import counted

if TYPE_CHECKING:
    from pandas import DataFrame


def share(
    traces: Annotated[list[Path], typer.Argument(help="Trace files of two or more tasks.", show_default=False)],
    fraction: Annotated[float, typer.Option(help="k: top fraction of parameters in each influenced set.")] = 0.01,
    out: Annotated[Path, typer.Option(help="Folder for mask.safetensors, sharing.json and tables.")] = Path(
        "runs/shared"
    ),
    draws: Annotated[int, typer.Option(help="Permutations of the control.", min=1)] = 5,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Find the parameters that tasks share, and how many each head and neuron has."""
    check_folder(out)
    with busy("reading traces"):
        from circuits.masks import shared_parameters, shared_size, sharing
        from circuits.storage import write_json, write_table
        from circuits.tracing import GradientTrace
        from circuits.units import Head, Neuron

        if len({path.resolve() for path in traces}) < len(traces):
            raise CircuitsError("a trace was given twice: sharing takes traces of different tasks")
        loaded = [GradientTrace.load(path) for path in traces]
        mask = shared_parameters(loaded, fraction)
        report = sharing(loaded, fraction, draws, seed=seed)
        heads, neurons = shared_size(mask, Head), shared_size(mask, Neuron)
    mask.save(out / "mask.safetensors")
    write_json(out / "sharing.json", {**report, "provenance": mask.provenance})
    for name, table in {"heads": heads, "neurons": neurons}.items():
        write_table(out / f"{name}.parquet", table, {"model": mask.model, "seed": seed, "mask": mask.provenance}, csv)
    names = " and ".join(trace.task for trace in loaded)
    show(_beside_controls(report), f"{out}: {mask.size:,} of {mask.total:,} parameters are shared by {names}")
    say(f"Beside each measure its controls, {counted(draws, 'draw')} each: traces permuted, and random sets as large.")
    show(heads.sort_values("size", ascending=False), "Shared Size of heads", 10)
    say_csv(csv, out / "heads.parquet", out / "neurons.parquet")


def _beside_controls(report: "dict[str, Any]") -> "DataFrame":
    """One row for each measure, with the same measure of each control beside it."""
    import pandas

    names = [name for name in report if not name.startswith(("permuted", "random_"))]
    rows = []
    for name in names:
        row: dict[str, Any] = {"measure": name.replace("_", " "), "value": cell(report[name])}
        for control in ("permuted", "random"):
            column = "permuted" if (control, name) == ("permuted", "size") else f"{control}_{name}"
            if column in report:
                ends = between(report[f"{column}_low"], report[f"{column}_high"])
                row |= {control: cell(report[column]), f"{control} 95 %": ends}
        rows.append(row)
    return pandas.DataFrame(rows).fillna("")
