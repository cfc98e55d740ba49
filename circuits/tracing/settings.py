"""What is traced, and by what a trace on disk is known again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.storage import digest
from circuits.tasks import Task
from circuits.tracing.accumulation import STATISTICS
from circuits.tracing.losses import LOSSES
from circuits.units import COMPONENTS

PER: tuple[str, ...] = ("example", "batch")


@dataclass(frozen=True)
class TraceSettings:
    """What is traced: see `trace_gradients`."""

    statistic: str = "abs"
    loss: str = "answer"
    batch_size: int = 32
    per: str = "example"
    components: tuple[str, ...] = ("attention", "mlp")

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("statistic", self.statistic, tuple(STATISTICS)),
            ("loss", self.loss, LOSSES),
            ("gradient per", self.per, PER),
            *(("component", component, COMPONENTS) for component in self.components),
        ):
            if value not in choices:
                raise CircuitsError(f"there is no {name} {value!r}: choose from {', '.join(choices)}")
        if not self.components:
            raise CircuitsError(f"no component is to be traced: choose from {', '.join(COMPONENTS)}")
        if self.batch_size < 1:
            raise CircuitsError(f"the batch size is {self.batch_size}: the least is 1")

    def identity(self, task: Task) -> dict[str, Any]:
        """What a trace with these settings depends on besides the model."""
        components = [name for name in COMPONENTS if name in self.components]
        facts: dict[str, Any] = {
            "statistic": self.statistic,
            "loss": self.loss,
            "per": self.per,
            "components": components,
        }
        if self.per == "batch":
            facts["batch_size"] = self.batch_size
        examples = (task.tokens, task.attention_mask, task.answer_mask)
        return facts | {"examples": digest(*(value.numpy().tobytes() for value in examples))}

    def count(self, task: Task) -> int:
        """How many gradients a trace of the task takes the mean of."""
        return len(task) if self.per == "example" else -(-len(task) // self.batch_size)


def check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a file that was made of something else or with other settings."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CircuitsError(
                f"{path} was made with {name} {found.get(name)}, not {value}: choose another file or delete it"
            )
