"""``circuits share``: the parameters that tasks share."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder
from circuits.cli.options import Csv, Seed
from circuits.cli.terminal import busy, cell, show
from circuits.errors import CircuitsError


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
        import pandas

        from circuits.masks import shared_parameters, shared_size, sharing
        from circuits.storage import write_json, write_table
        from circuits.tracing import GradientTrace
        from circuits.units import Head, Neuron

        if len({path.resolve() for path in traces}) < len(traces):
            raise CircuitsError("a trace was given twice: sharing takes traces of different tasks")
        loaded = [GradientTrace.load(path) for path in traces]
        mask = shared_parameters(loaded, fraction)
        report = sharing(loaded, fraction, draws, seed)
        heads, neurons = shared_size(mask, Head), shared_size(mask, Neuron)
    mask.save(out / "mask.safetensors")
    write_json(out / "sharing.json", {**report, "provenance": mask.provenance})
    for name, table in {"heads": heads, "neurons": neurons}.items():
        write_table(out / f"{name}.parquet", table, {"model": mask.model, "seed": seed, "mask": mask.provenance}, csv)
    show(pandas.DataFrame({"": list(report), "value": [cell(value) for value in report.values()]}), str(mask))
    show(heads.sort_values("size", ascending=False), "Shared Size of heads", 10)
