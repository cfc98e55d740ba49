"""What is analysed: a model, its tasks, the model before fine-tuning if there is one, and how it is done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from circuits.errors import CircuitsError
from circuits.executors import Executor, Serial
from circuits.interventions import ABLATIONS
from circuits.models import Model, facts_of
from circuits.rankings import RANKINGS, RESTS
from circuits.tasks import Task
from circuits.tracing import GradientTrace

#: Steps that look at all examples of their tasks, where no number is asked for.
_ON_ALL = ("evaluate", "trace", "graft")
#: Facts that consistency is measured on, and answers whose spans are replaced: all of these are compared in few passes.
_ON_FACTS = 64
#: Answers whose gradients are integrated, each along a path of many prompts.
_ON_PATHS = 16
#: Curves are what takes longest: as many examples of each task are scored at each of their points.
_ON_CURVES = 8


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
        modes: how each head is ablated alone.
        rankings: of `circuits.rankings.RANKINGS`, beside those by the traces and at random. ``graft_size`` and
            ``ablation``, of heads alone, are those of the first task that curves are scored on.
        ties: orders in which units that a ranking scores alike are drawn.
        halvings: curves over more than 32 units are measured at all of them and at so many halvings, at every doubling
            from 1 if None.
        tenths: and at every tenth of them, with halvings below the first alone.
        tasks_by_step: step → names of the tasks that it is done on, where these are not all. With the step ``trace`` it
            says which tasks the shared set is of; those held out of it are scored all the same.
        examples_by_step: step → as many examples of each task, in place of what ``examples`` says; of the steps
            ``consistency``, ``localise``, ``signature`` and ``integrate`` as many facts, 64 if nothing is said, of the
            last 16.
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
    modes: tuple[str, ...] = ("zero",)
    rankings: tuple[str, ...] = ("shared_size", "change", "gradient_x_activation")
    ties: int = 1
    halvings: int | None = 6
    tenths: bool = False
    tasks_by_step: Mapping[str, Sequence[str]] = field(default_factory=dict)
    examples_by_step: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("fraction", "keep"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise CircuitsError(f"{name} is {value}: it must be more than 0 and at most 1")
        for name, known in {"rest": RESTS, "modes": ABLATIONS, "rankings": (*RANKINGS,)}.items():
            chosen = getattr(self, name)
            for one in (chosen,) if isinstance(chosen, str) else chosen:
                if one not in known:
                    raise CircuitsError(f"there is no {name.removesuffix('s')} {one!r}: choose from {', '.join(known)}")
        if not self.modes:
            raise CircuitsError(f"there are no modes to ablate heads by: choose from {', '.join(ABLATIONS)}")
        least = {"draws": 2, "examples": 1, "neurons": 0, "drawn": 0, "ties": 1, "halvings": 1}
        counts = {name: getattr(self, name) for name in least}
        counts |= {f"the number of examples for {step}": count for step, count in self.examples_by_step.items()}
        for name, value in counts.items():
            if value is not None and value < least.get(name, 1):
                raise CircuitsError(f"{name} is {value}: it must be {least.get(name, 1)} or more")


@dataclass(frozen=True)
class Case:
    """A model on its tasks.

    Attributes:
        model: what is analysed.
        tasks: name → task.
        pre: the model before fine-tuning.
        settings: how.
        folder: for what is too large to keep in memory.
        traces: of the tasks, where they were made elsewhere.
        executor: who does what takes longest; no part of what the case is.
    """

    model: Model
    tasks: Mapping[str, Task]
    pre: Model | None
    settings: AnalysisSettings
    folder: Path
    traces: Mapping[str, GradientTrace] | None = None
    executor: Executor = field(default_factory=Serial)

    @property
    def serial(self) -> bool:
        """Whether all of it is done in this process."""
        return isinstance(self.executor, Serial)

    @property
    def placed(self) -> dict[str, str]:
        """How workers load the model: its dtype, and the kind of device it is on."""
        facts = facts_of(self.model)
        return {"dtype": facts["dtype"], "device": facts["device"].split(":")[0]}

    @property
    def mode(self) -> str:
        """What ablated weights become: as they were before fine-tuning, or zero where that is not known."""
        return "zero" if self.pre is None else "revert"

    def named(self, step: str) -> dict[str, Task]:
        """The tasks that a step is done on."""
        names = self.settings.tasks_by_step.get(step, [*self.tasks])
        return {name: task for name, task in self.tasks.items() if name in names}

    def count(self, step: str) -> int | None:
        """How many examples (or facts) of each task a step looks at; None: all."""
        settings = self.settings
        usual = None if step in _ON_ALL else settings.examples
        if step == "rank":
            usual = min(settings.examples, _ON_CURVES)
        elif step in ("consistency", "localise", "signature"):
            usual = _ON_FACTS
        elif step == "integrate":
            usual = min(settings.examples, _ON_PATHS)
        return settings.examples_by_step.get(step, usual)

    def of(self, step: str) -> dict[str, Task]:
        """The tasks that a step is done on, with the examples that it looks at."""
        count = self.count(step)
        return {
            name: task if count is None or count >= len(task) else task.sample(count, self.settings.seed)
            for name, task in self.named(step).items()
        }
