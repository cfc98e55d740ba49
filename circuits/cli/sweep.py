"""``circuits sweep``: many interventions as one job; ``ablate`` and ``patch`` into a folder are sweeps too."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.inputs import executor_of
from circuits.cli.options import Address, CpusPerWorker, Executor, GpusPerWorker, Sbatch, Workers
from circuits.cli.terminal import busy, effects, resumable, say, show

if TYPE_CHECKING:
    from pandas import DataFrame

    from circuits import executors
    from circuits.sweeps import SweepPlan

sweep = typer.Typer(help="Run many interventions as one job that survives interruption.", no_args_is_help=True)


@sweep.command()
def run(
    plan: Annotated[
        Path, typer.Argument(help="YAML or TOML file with the settings of circuits.SweepPlan.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder: plan.json, parts, and at the end table.parquet and table.csv.")
    ] = Path("runs/sweep"),
    executor: Executor = "serial",
    workers: Workers = None,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    sbatch: Sbatch = None,
) -> None:
    """Run a sweep, or what is missing of one. Several of this command may share one folder."""
    with busy(f"reading {plan}"):
        from circuits.sweeps import SweepPlan

        read = SweepPlan.read(plan)
    placed = {"gpus_per_worker": gpus_per_worker, "cpus_per_worker": cpus_per_worker}
    run_into(read, out, executor_of(executor, workers, address, **placed, sbatch=sbatch))


@sweep.command("show")
def show_state(
    out: Annotated[Path, typer.Argument(help="Folder of a sweep.", show_default=False)],
    most: Annotated[int, typer.Option(help="Rows to show.", min=0)] = 12,
) -> None:
    """Tell how far a sweep is, what it does, and the largest effects so far."""
    with busy(f"reading {out}"):
        import pandas

        from circuits.sweeps import sweep_state

        state = sweep_state(out)
    say(f"{out}: {state.done} of {state.jobs} jobs finished, {len(state.table):,} of {state.interventions:,} rows")
    unused = () if state.plan.screen else ("verify",)
    settings = {name: value for name, value in vars(state.plan).items() if value is not None and name not in unused}
    settings |= {f"{name} (content)": state.facts.get(name) for name in ("model", "dataset")}
    settings |= {name: state.facts.get(name) for name in ("device", "arithmetic")}
    shown = [", ".join(value) if isinstance(value, tuple) else str(value) for value in settings.values()]
    show(pandas.DataFrame({"setting": list(settings), "value": shown}), "", len(settings))
    if len(state.table):
        show(_largest(state.table), "largest effects", most)


def run_into(plan: "SweepPlan", out: Path, executor: "str | executors.Executor" = "serial") -> None:
    """Run a plan in a folder and show the largest effects."""
    with busy("starting"):
        from circuits.sweeps import run_sweep
    with resumable():
        table = run_sweep(plan, out, executor)
    show(_largest(table), f"{out / 'table.parquet'}: {len(table):,} rows, the largest effects first", 12)


def _largest(table: "DataFrame") -> "DataFrame":
    """What a sweep's table says first: the largest effects."""
    found = [column for column in table if column.endswith("_effect")]
    order = "log_prob_effect" if "log_prob_effect" in found else found[-1]
    return effects(table, ["unit", "mode", "site", "positions", "task"], order, largest=True)
