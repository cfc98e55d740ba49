"""``circuits sweep``: many interventions as one job; ``ablate`` and ``patch`` into a folder are sweeps too."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.executors import with_executor
from circuits.cli.terminal import busy, effects, resumable, say, show
from circuits.progress import counted, duration

if TYPE_CHECKING:
    from pandas import DataFrame

    from circuits.executors import Executor
    from circuits.sweeps import SweepPlan, SweepState

sweep = typer.Typer(help="Run many interventions as one job that survives interruption.", no_args_is_help=True)


@sweep.command()
@with_executor
def run(
    plan: Annotated[
        Path, typer.Argument(help="YAML or TOML file with the settings of circuits.SweepPlan.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder: plan.json, parts, and at the end table.parquet and table.csv.")
    ] = Path("runs/sweep"),
    executor: "Executor | str" = "serial",
) -> None:
    """Run a sweep, or what is missing of one. Several of this command may share one folder."""
    with busy(f"reading {plan}"):
        from circuits.sweeps import SweepPlan

        read = SweepPlan.read(plan)
    run_into(read, out, executor)


@sweep.command("plan")
def show_plan(
    plan: Annotated[
        Path, typer.Argument(help="YAML or TOML file with the settings of circuits.SweepPlan.", show_default=False)
    ],
) -> None:
    """Tell what a plan will take, from two short jobs; writes nothing."""
    with busy(f"reading {plan}"):
        import pandas

        from circuits.sweeps import SweepPlan, estimate_sweep

        read = SweepPlan.read(plan)
    with busy("computing two short jobs"):
        found = estimate_sweep(read)
    total = sum(found.interventions.values())
    rows = {
        "interventions": counted(total, "intervention") + (f", {found.exact:,} of them exactly" if read.screen else ""),
        "jobs": f"{counted(found.jobs, 'job')} of up to {read.job_size:,}",
        "tokens": f"{found.tokens:,}",
        "memory per worker": f"{found.memory / 2**30:.1f} GiB",
        "time of one worker": duration(found.seconds),
        f"time of {counted(found.workers, 'worker')}, on this machine": duration(found.seconds / found.workers),
    }
    show(pandas.DataFrame({"estimate": list(rows), "value": list(rows.values())}), str(plan), len(rows))


@sweep.command("show")
def show_state(
    out: Annotated[Path, typer.Argument(help="Folder of a sweep.", show_default=False)],
    most: Annotated[int, typer.Option(help="Rows to show.", min=0)] = 12,
    watch: Annotated[
        bool, typer.Option("--watch", help="Tell rate, time left, workers and lost jobs, until the sweep is done.")
    ] = False,
) -> None:
    """Tell how far a sweep is, what it does, and the largest effects so far."""
    if watch:
        _watch(out)
        return
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


def _watch(out: Path) -> None:
    import time

    with busy(f"reading {out}"):
        from rich.console import Console
        from rich.live import Live

        from circuits.sweeps import sweep_state
    console, told = Console(highlight=False), ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            begun = time.monotonic()
            state = sweep_state(out, rows=False)
            line = pace_line(state)
            if console.is_terminal:
                live.update(line, refresh=True)
            elif line != told:
                # where nobody looks, such as in a file: a line for each change
                say(line)
            told = line
            if state.done == state.jobs:
                break
            # of many jobs a look takes long: it must not take most of the time
            time.sleep(max(_LOOK_EVERY, 5 * (time.monotonic() - begun)))
    if console.is_terminal:
        say(told)


#: Seconds between two looks at a sweep that is watched.
_LOOK_EVERY = 2.0


def pace_line(state: "SweepState") -> str:
    """How far a sweep is and how fast it goes on, in a line."""
    told = f"{state.done:,} of {state.jobs:,} jobs finished"
    if state.done < state.jobs:
        pace = state.pace
        told += f", {pace.rate:,.1f} interventions a second, {duration(pace.left)} left"
        told += f", {counted(pace.workers, 'worker')}"
    return told + f", {counted(state.pace.lost, 'loss', 'losses')}"


def run_into(plan: "SweepPlan", out: Path, executor: "Executor | str" = "serial") -> None:
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
