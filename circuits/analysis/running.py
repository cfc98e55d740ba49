"""Running steps: each once, in order, resumed where they were.

1. A step is a function of a case and of what earlier steps left, which it names as artifacts, and it gives back the
   artifacts that it says it writes.
2. A step whose record is there is not run again. One that cannot be, because of what the case lacks or because what it
   needs was left out, is left out with a reason.
3. What a step gives is saved before its record is written: a step that was interrupted is run again as a whole, and
   saves nothing twice. What workers finished of it lies in its working folder until the record is there.
"""

import ctypes
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.analysis.artifacts import Artifact
from circuits.errors import CircuitsError
from circuits.storage import read_json, write_json


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of the step.
        does: what it does, in a line.
        needs: what it takes from earlier steps, in the order of its arguments after the case.
        uses: what it takes after these if it is there; it runs without.
        writes: what it gives, in the order of what it returns.
        lacking: says what a case lacks for it; None if nothing.
        run: the function.
    """

    name: str
    does: str
    needs: tuple[Artifact, ...]
    uses: tuple[Artifact, ...]
    writes: tuple[Artifact, ...]
    lacking: Callable[[Any], str | None]
    run: Callable[..., Sequence[Any]]


def step(
    *writes: Artifact,
    needs: Sequence[Artifact] = (),
    uses: Sequence[Artifact] = (),
    lacking: Callable[[Any], str | None] = lambda case: None,  # noqa: ARG005
) -> Callable[[Callable[..., Sequence[Any]]], Step]:
    """Make a step of a function; its name and the first line of its text are the step's."""

    def decorate(function: Callable[..., Sequence[Any]]) -> Step:
        does = (function.__doc__ or "").splitlines()[0].rstrip(".")
        return Step(function.__name__, does, tuple(needs), tuple(uses), writes, lacking, function)

    return decorate


def choose(steps: Sequence[Step], only: Sequence[str] | None, skip: Sequence[str] | None) -> list[Step]:
    """The steps that are asked for, and those they need.

    Raises:
        CircuitsError: there is no such step, or one is asked for that needs one to be skipped.
    """
    names = [one.name for one in steps]
    for name in (*(only or ()), *(skip or ())):
        if name not in names:
            raise CircuitsError(f"there is no step {name!r}: choose from {', '.join(names)}")
    chosen = set(only or names) - set(skip or ())
    makers = {artifact: one for one in steps for artifact in one.writes}
    for one in reversed(steps):
        if one.name in chosen and only is not None:
            needed = {makers[artifact].name for artifact in one.needs}
            if missing := sorted(needed & set(skip or ())):
                raise CircuitsError(
                    f"the step {one.name} needs {missing[0]}, which is to be skipped: leave out one of them"
                )
            chosen |= needed
    return [one for one in steps if one.name in chosen]


def run_steps(
    steps: Sequence[Step], case: Any, folder: Path, facts: dict[str, Any], say: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Run what is missing of the steps.

    Args:
        steps: in an order in which each comes after those it needs.
        case: given to each.
        folder: for what they write.
        facts: where their results come from, kept with each.
        say: called with a line when a step begins.

    Returns:
        The steps that were left out, each with its reason.
    """
    left_out: dict[str, str] = {}
    made = {artifact for one in steps for artifact in one.writes if done(folder, one)}
    for one in steps:
        if done(folder, one):
            continue
        missing = [artifact.name for artifact in one.needs if artifact not in made]
        reason = one.lacking(case) or (f"{missing[0]} is not there" if missing else None)
        if reason is not None:
            left_out[one.name] = reason
            if say is not None:
                say(f"{one.name} is left out: {reason}")
            continue
        if say is not None:
            say(f"{one.name}: {one.does}")
        begun = time.monotonic()
        found = one.run(case, *(artifact.load(folder) for artifact in (*one.needs, *one.uses)))
        for artifact, value in zip(one.writes, found, strict=True):
            artifact.save(folder, value, facts)
        found = value = ()
        give_back()
        write_json(_record(folder, one), {"seconds": round(time.monotonic() - begun, 1)})
        shutil.rmtree(workplace(folder, one.name), ignore_errors=True)
        made |= set(one.writes)
    return left_out


def give_back() -> None:
    """Give the system the memory that was freed: glibc keeps what models and traces took, beside what comes next."""
    with suppress(AttributeError, OSError):  # other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)


def done(folder: Path, one: Step) -> bool:
    """Whether a step is finished."""
    return _record(folder, one).is_file()


def workplace(folder: Path, name: str) -> Path:
    """Where what was finished of a step lies as long as the step is not."""
    return folder / "steps" / name


def seconds(folder: Path) -> dict[str, float]:
    """How long each finished step took."""
    return {file.stem: read_json(file)["seconds"] for file in sorted((folder / "steps").glob("*.json"))}


def _record(folder: Path, one: Step) -> Path:
    return folder / "steps" / f"{one.name}.json"
