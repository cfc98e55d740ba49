"""What a job computes: a pure function of the plan, and of what a screen chose if there is one.

1. A prepared sweep has the plan's models loaded and its tasks, sources and reference set tokenised.
2. A job of the stage ``estimate`` estimates all interventions of a task by attribution.
3. A job of the stage ``exact`` computes its share of a task's interventions in one call. With a screen, these are the
   ones with the largest estimates, in the order of the plan; the job is told which.
4. A job computes on the plan's number of threads and takes numbers too small for full precision as zero, whoever runs
   it, so that every executor gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from circuits.errors import CircuitsError
from circuits.executors import on_threads
from circuits.facts import check_held_out, check_task_names, needs_people, open_task, people_of
from circuits.interventions import (
    Engine,
    Intervention,
    arithmetic,
    matching_positions,
    pair_counterfactuals,
    pair_formats,
    pair_people,
    screen_interventions,
)
from circuits.interventions.effects import answers_table, means_table
from circuits.masks import ParameterMask
from circuits.models import Model, fingerprint, load_model, require_start, shape_of
from circuits.storage import digest
from circuits.sweeps.folder import Computed
from circuits.sweeps.plan import Job, SweepPlan
from circuits.tasks import Task

#: The columns that say what was done, before those that say what came of it.
DONE: tuple[str, ...] = ("unit", "layer", "index", "mode", "site", "positions", "task", "answers")


class PreparedSweep:
    """A plan with its models loaded and its tasks made.

    Args:
        plan: what to do.

    Attributes:
        plan: the plan.
        model: the plan's model.
        pre: the model before fine-tuning, if the plan names one.
        dataset: of the people, if the plan's tasks or its reference ask them.
        tasks: name in the plan → task.
        sources: name → the run that values are patched from, if the plan patches.
        reference: the set that means and resampled values come from, if the plan needs one.
        interventions: name → the interventions on it, in the order of the table.

    Raises:
        CircuitsError: a model, dataset, ranking or mask cannot be read, the plan does not fit them, or its ``pre``
            is not what its model was trained from.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        model = Path(plan.model)
        if not model.is_dir():
            raise CircuitsError(f"there is no folder {model}: give the path of a checkpoint on this machine")
        check_task_names(plan.tasks)
        others = [plan.reference, "bio" if plan.source == "formats" else None]
        self.dataset = people_of([*plan.tasks, *filter(None, others)], model, plan.dataset)
        self.model = load_model(model, plan.dtype, plan.device)
        if plan.mask is not None:
            ParameterMask.load(plan.mask).check(self.model)
        self.pre: Model | None = None
        if plan.pre is not None:
            self.pre = load_model(plan.pre, plan.dtype, plan.device)
            if shape_of(self.pre) != shape_of(self.model):
                raise CircuitsError(f"the models {plan.pre} and {plan.model} have other sizes: revert needs equal ones")
            if plan.check_start:
                require_start(self.model, self.pre)
        self.tasks = {name: self._task(name, plan.examples) for name in plan.tasks}
        self.sources = self._sources()
        self.reference = self._reference()
        shape = shape_of(self.model)
        self.interventions: dict[str, list[Intervention]] = {
            name: plan.interventions(shape, int(task.answers["start"].max()), self._matched(name))
            for name, task in self.tasks.items()
        }

    def _task(self, name: str, examples: int | None = None) -> Task:
        if self.model.tokenizer is None:
            raise CircuitsError(f"the checkpoint {self.plan.model} has no tokenizer: save one beside its weights")
        return open_task(name, self.model.tokenizer, self.dataset, examples=examples, seed=self.plan.seed)

    def _sources(self) -> Mapping[str, Task | None]:
        plan = self.plan
        if plan.source is None:
            return {name: task.counterfactuals if "patch" in plan.modes else None for name, task in self.tasks.items()}
        if plan.source == "counterfactuals":
            return {name: pair_counterfactuals(task) for name, task in self.tasks.items()}
        if plan.source == "people":
            return {name: pair_people(task, plan.seed, self._task(name)) for name, task in self.tasks.items()}
        biographies = self._task("bio")
        return {name: pair_formats(task, biographies) for name, task in self.tasks.items()}

    def _matched(self, name: str) -> set[int] | None:
        """Positions that have a match in the source, in some example."""
        source = self.sources[name]
        if source is None or "patch" not in self.plan.modes:
            return None
        return set(matching_positions(source, self.tasks[name])[:, 2].tolist())

    def check(self) -> None:
        """Raise a `CircuitsError` if a job would, or if what it calls held out is not: nothing is computed."""
        if self.dataset is not None:
            check_held_out(self.plan.model, self.dataset, self.plan.tasks)
        for name, task in self.tasks.items():
            Engine(
                self.model,
                task,
                self.interventions[name],
                source=self.sources[name],
                reference=self.reference,
                pre=self.pre,
                metrics=tuple(self.plan.metrics),
                seed=self.plan.seed,
                check_start=False,  # done above, and once is enough
            )

    def _reference(self) -> Task | None:
        if self.plan.reference is not None:
            return self._task(self.plan.reference, self.plan.examples)
        return self.tasks[self.plan.tasks[0]] if self.plan.needs_reference else None

    @property
    def counts(self) -> dict[str, int]:
        """Interventions on each task."""
        return {name: len(interventions) for name, interventions in self.interventions.items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Fingerprints of everything the plan names by a path, and where the models are."""
        ranking = self.plan.unit_names() if self.plan.ranking or self.plan.mask else None
        used = dict(self.tasks)
        if self.plan.reference is not None and self.reference is not None:
            used[self.plan.reference] = self.reference
        # of people the dataset's fingerprint says it
        prompts = {task.name: task.provenance.get("prompts") for name, task in used.items() if not needs_people(name)}
        return {
            "model": fingerprint(self.model),
            "pre": None if self.pre is None else fingerprint(self.pre),
            "dataset": None if self.dataset is None else self.dataset.fingerprint,
            "ranking": None if ranking is None else digest(*ranking),
            "device": str(self.model.cfg.device),
            "arithmetic": str(arithmetic(self.model)).removeprefix("torch."),
            **({"prompts": prompts} if prompts else {}),
        }

    def run(self, job: Job, places: Sequence[int] | None = None) -> Computed:
        """What comes of a job.

        Args:
            job: one of the plan's.
            places: of its interventions among all on its task, if a screen chose them.
        """
        plan, task, source = self.plan, self.tasks[job.task], self.sources[job.task]
        interventions = self.interventions[job.task]
        chosen = interventions[job.start : job.stop] if places is None else [interventions[place] for place in places]
        with on_threads(plan.threads):
            if job.stage == "estimate":
                options: dict[str, Any] = {"source": source, "reference": self.reference, "seed": plan.seed}
                return Computed(screen_interventions(self.model, task, chosen, metric=plan.screened, **options))
            engine = Engine(
                self.model,
                task,
                chosen,
                source=source,
                reference=self.reference,
                pre=self.pre,
                metrics=tuple(plan.metrics),
                seed=plan.seed,
                check_start=False,
            )
            clean, found = engine.run()
            return Computed(
                means_table(engine, clean, found),
                answers_table(engine, clean, found) if plan.per_answer else None,
            )


def prepare(plan: SweepPlan) -> PreparedSweep:
    """Load a plan's models and make its tasks, on as many threads as its jobs have."""
    with on_threads(plan.threads):
        return PreparedSweep(plan)


def largest(estimates: pandas.Series, count: int) -> list[int]:
    """The places of the largest absolute estimates, in their old order; the first of equal ones.

    Example:
        >>> largest(pandas.Series([0.1, -3.0, 0.2, 2.0]), 2)
        [1, 3]
    """
    order = estimates.abs().reset_index(drop=True).sort_values(ascending=False, kind="stable", na_position="first")
    return sorted(order.index[:count].tolist())
