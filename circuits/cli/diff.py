"""``circuits diff``: where two checkpoints differ."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder
from circuits.cli.options import Csv
from circuits.cli.terminal import busy, say, say_csv, show


def diff(
    base: Annotated[Path, typer.Argument(help="Folder of the checkpoint before fine-tuning.", show_default=False)],
    tuned: Annotated[
        Path, typer.Argument(help="Folder of the checkpoint after it, or of an adapter.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables of all units and a page.")] = Path("runs/difference"),
    csv: Csv = False,
) -> None:
    """Say where two checkpoints differ, by layer, component, head, key/value group and neuron."""
    check_folder(out)
    with busy(f"comparing {base} and {tuned}"):
        from circuits.figures import write_difference
        from circuits.models import difference
        from circuits.storage import write_table

        table = difference(base, tuned)
        about = {"base": str(base), "tuned": str(tuned), "fingerprints": table.attrs}
        for kind, rows in table.groupby("kind", sort=False):
            write_table(out / f"{kind}s.parquet", rows, about, csv)
        write_difference(table, out / "difference.html", title=f"What changed from {base.name} to {tuned.name}")
    numbers = ["norm", "relative", "changed"]
    show(table[table["kind"] == "model"][["parameters", *numbers]], f"{tuned} against {base}")
    parts = table[table["kind"] == "component"]
    inside = parts[parts["layer"].notna()].pivot(index="layer", columns="component", values="relative")
    show(inside.reset_index(), "norm of the change / norm before", 100)
    if len(rest := parts[parts["layer"].isna()]):
        show(rest[["unit", "parameters", *numbers]], "Outside the layers")
    for kind in ("head", "group", "neuron"):
        if len(rows := table[table["kind"] == kind]):
            rows = rows.sort_values("relative", ascending=False, kind="stable")
            show(rows[["unit", "parameters", *numbers]], f"{kind}s, the largest relative changes first", 8)
    say(f"{out}: tables, and difference.html")
    say_csv(csv, *(out / f"{kind}s.parquet" for kind in table["kind"].unique()))
