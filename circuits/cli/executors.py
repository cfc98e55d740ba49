"""Who runs a command's jobs: the options that describe an executor, for every command that takes one."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.executors import Executor

Command = TypeVar("Command", bound=Callable[..., None])


def _described(
    executor: Annotated[
        str,
        typer.Option(
            help="Who runs the jobs: serial; processes: several on this machine; ray: a Ray cluster, or one that is "
            "started here; slurm: a Slurm job array."
        ),
    ] = "serial",
    workers: Annotated[
        int | None,
        typer.Option(help="Number of workers; default: as many as there is room for.", min=1, show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="With ray: a cluster that runs, such as auto or HOST:6379; default: one is started here.",
            show_default=False,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="With ray or slurm: GPUs of each worker; default: 0.", min=0, show_default=False),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            help="With ray or slurm: CPUs of each worker; default: the threads of a job.", min=1, show_default=False
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="With slurm: an option of sbatch as NAME=VALUE, such as partition=gpu or time=120 (minutes); may be "
            "repeated.",
            show_default=False,
        ),
    ] = None,
) -> "Executor":
    """The executor that the options describe."""
    from circuits.executors import choose_executor

    placed = {"gpus_per_worker": gpus_per_worker, "cpus_per_worker": cpus_per_worker}
    options = None if sbatch is None else dict(map(_sbatch_option, sbatch))
    return choose_executor(executor, workers=workers, address=address, **placed, sbatch=options)


def with_executor(command: Command) -> Command:
    """Give a command the options of an executor in place of its argument ``executor``: what they describe."""
    signature, options = inspect.signature(command), inspect.signature(_described).parameters

    @functools.wraps(command)
    def call(**given: Any) -> None:
        described = {name: given.pop(name) for name in options}
        command(**given, executor=_described(**described))

    own = [
        option
        for parameter in signature.parameters.values()
        for option in (options.values() if parameter.name == "executor" else [parameter])
    ]
    call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    # which typer would believe
    call.__annotations__ = {one.name: one.annotation for one in own}
    return call  # type: ignore[return-value]


def _sbatch_option(text: str) -> tuple[str, str | int]:
    name, given, value = text.partition("=")
    name = name.lstrip("-")
    if not (name and given):
        raise CircuitsError(f"--sbatch {text} is no option of sbatch: give NAME=VALUE, such as partition=gpu")
    if name == "time" and not value.isdigit():
        raise CircuitsError(f"--sbatch {text}: give the time in minutes, such as time=120")
    return name, int(value) if value.isdigit() else value
