"""What steps leave in a folder for each other: an artifact knows its file, and how it is saved and loaded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from circuits.masks import Graft, ParameterMask
from circuits.storage import write_table
from circuits.tracing import GradientTrace


@dataclass(frozen=True)
class Artifact:
    """A result by name.

    Attributes:
        name: unique among all of them.
    """

    name: str

    def path(self, folder: Path) -> Path:
        """Where it lies."""
        raise NotImplementedError

    def save(self, folder: Path, value: Any, facts: Mapping[str, Any]) -> None:
        """Write it; ``facts`` is where it came from."""
        raise NotImplementedError

    def load(self, folder: Path) -> Any:
        """Read what `save` wrote."""
        raise NotImplementedError


class Table(Artifact):
    """A result table."""

    def path(self, folder: Path) -> Path:
        """Where it lies."""
        return folder / "tables" / f"{self.name}.parquet"

    def save(self, folder: Path, value: pandas.DataFrame, facts: Mapping[str, Any]) -> None:
        """Write it as parquet and CSV."""
        write_table(self.path(folder), value, facts, csv=True)

    def load(self, folder: Path) -> pandas.DataFrame:
        """Read what `save` wrote."""
        return pandas.read_parquet(self.path(folder))


class Masks(Artifact):
    """Parameter masks by name."""

    def path(self, folder: Path) -> Path:
        """The folder they lie in."""
        return folder / self.name

    def save(self, folder: Path, value: Mapping[str, ParameterMask], facts: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Write each to a file of its name."""
        for name, mask in value.items():
            mask.save(self.path(folder) / f"{name}.safetensors")

    def load(self, folder: Path) -> dict[str, ParameterMask]:
        """Read what `save` wrote."""
        return {file.stem: ParameterMask.load(file) for file in sorted(self.path(folder).glob("[!.]*.safetensors"))}


#: The shared parameters, which several steps take.
MASKS = Masks("masks")


class Traces(Artifact):
    """Gradient traces by task; the step that makes them saves them as it goes."""

    def path(self, folder: Path) -> Path:
        """The folder they lie in."""
        return folder / self.name

    def save(self, folder: Path, value: Mapping[str, GradientTrace], facts: Mapping[str, Any]) -> None:
        """Nothing is left to do: tracing wrote each file, so that it can go on in the middle."""

    def load(self, folder: Path) -> "TracesOnDisk":
        """Give them by task, in the order of their names; each is as large as the model, and read when asked for."""
        return TracesOnDisk({file.stem: file for file in sorted(self.path(folder).glob("[!.]*.safetensors"))})


class TracesOnDisk(Mapping[str, GradientTrace]):
    """Gradient traces by task, each read whenever it is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def of(self, tasks: Iterable[str]) -> "TracesOnDisk":
        """Those of these tasks, in their order."""
        return TracesOnDisk({name: self._files[name] for name in tasks})

    def __getitem__(self, name: str) -> GradientTrace:
        return GradientTrace.load(self._files[name])

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Grafts(Artifact):
    """The smallest graft of each task."""

    def path(self, folder: Path) -> Path:
        """The folder they lie in."""
        return folder / self.name

    def save(self, folder: Path, value: Mapping[str, Graft], facts: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Write each to a folder of its task's name."""
        for name, graft in value.items():
            graft.save(self.path(folder) / name)

    def load(self, folder: Path) -> dict[str, Graft]:
        """Read what `save` wrote."""
        return {
            file.parent.name: Graft.load(file.parent) for file in sorted(self.path(folder).glob("*/mask.safetensors"))
        }
