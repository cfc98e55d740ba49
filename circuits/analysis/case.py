"""What is analysed: a model, its tasks, the model before fine-tuning if there is one, and how it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from circuits.errors import CircuitsError
from circuits.models import Model
from circuits.rankings import RESTS
from circuits.tasks import Task


@dataclass(frozen=True)
class AnalysisSettings:
    """How a model is analysed.

    Attributes:
        fraction: k: top fraction of parameters in each influenced set.
        fractions: the k that sharing is measured at beside it.
        draws: random masks, permutations and rankings to compare with.
        keep: share of the accuracy that a graft must keep.
        examples: as many of each task are scored under each intervention; whole models and traces see all of them.
        rest: where all parameters of no ranked unit come from when only the top ones are fine-tuned: ``pre``, or
            ``fine_tuned`` for a model that was trained from scratch.
        neurons: as many neurons with the largest Shared Size are ablated alone.
        drawn: as many heads have their attention drawn.
        seed: of every draw.
    """

    fraction: float = 0.01
    fractions: tuple[float, ...] = (0.001, 0.01, 0.1)
    draws: int = 5
    keep: float = 0.95
    examples: int = 16
    rest: str = "pre"
    neurons: int = 20
    drawn: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fraction", "keep"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise CircuitsError(f"{name} is {value}: it must be more than 0 and at most 1")
        if self.rest not in RESTS:
            raise CircuitsError(f"there is no rest {self.rest!r}: choose from {', '.join(RESTS)}")
        for name, least in {"draws": 2, "examples": 1, "neurons": 0, "drawn": 0}.items():
            value = getattr(self, name)
            if value < least:
                raise CircuitsError(f"{name} is {value}: it must be {least} or more")


@dataclass(frozen=True)
class Case:
    """A model on its tasks.

    Attributes:
        model: what is analysed.
        tasks: name → task.
        pre: the model before fine-tuning.
        settings: how.
        folder: for what is too large to keep in memory.
    """

    model: Model
    tasks: Mapping[str, Task]
    pre: Model | None
    settings: AnalysisSettings
    folder: Path
    _sampled: dict[str, Task] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """What ablated weights become: as they were before fine-tuning, or zero where that is not known."""
        return "zero" if self.pre is None else "revert"

    def scored(self) -> dict[str, Task]:
        """The examples that are scored, by task."""
        count = self.settings.examples
        if not self._sampled:
            found = {
                name: task if count >= len(task) else task.sample(count, self.settings.seed)
                for name, task in self.tasks.items()
            }
            self._sampled.update(found)
        return self._sampled
