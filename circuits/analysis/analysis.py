"""One model on its tasks: what they share, what happens without it, and which heads and neurons it is.

1. The model, its tasks and the settings claim a folder: what is there is kept only if it was made from the same.
2. Steps run one after another; each that is there is skipped (`circuits.analysis.steps`).
3. ``summary.json`` and ``report.html`` are made anew from what is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from circuits.analysis import steps as made_by
from circuits.analysis.artifacts import MASKS
from circuits.analysis.case import AnalysisSettings, Case
from circuits.analysis.estimate import estimate
from circuits.analysis.figures import figures_of
from circuits.analysis.page import write_page
from circuits.analysis.readings import draw_heads
from circuits.analysis.running import choose, done, run_steps, seconds
from circuits.analysis.summary import summary_of, top_table
from circuits.errors import CircuitsError
from circuits.executors import Executor, Serial, choose_executor
from circuits.masks import Graft, ParameterMask
from circuits.models import Model, Place, checkpoint_of, facts_of, identity, refuse_hooks, require_start
from circuits.progress import duration
from circuits.storage import claim, provenance, read_json, write_json
from circuits.tasks import Task
from circuits.tracing import GradientTrace

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Tables(Mapping[str, pandas.DataFrame]):
    """The result tables of a folder by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> pandas.DataFrame:
        file = self._folder / f"{name}.parquet"
        if not file.is_file():
            raise KeyError(f"there is no table {name!r}: choose from {', '.join(self) or 'none'}")
        return pandas.read_parquet(file)

    def __contains__(self, name: object) -> bool:
        # a mapping's own way would read the whole table
        return isinstance(name, str) and (self._folder / f"{name}.parquet").is_file()

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self._folder.glob("*.parquet")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"Tables({', '.join(self)})"


class Analysis:
    """What was found about a model and its tasks, in a folder; shows itself in a notebook.

    Args:
        folder: what `analyse` or ``circuits analyse`` wrote.

    Attributes:
        folder: the folder.
        tables: the result tables by name.

    Raises:
        CircuitsError: the folder holds no analysis.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "analysis.json").is_file():
            raise CircuitsError(f"{self.folder} holds no analysis: it has no analysis.json")
        self.tables = Tables(self.folder / "tables")

    @property
    def facts(self) -> dict[str, Any]:
        """What the analysis was made from."""
        facts: dict[str, Any] = read_json(self.folder / "analysis.json")
        return facts

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        summary: dict[str, Any] = read_json(self.folder / "summary.json")
        return summary

    @property
    def masks(self) -> dict[str, ParameterMask]:
        """The shared parameters: ``global`` of the top of all parameters, ``tensor`` of the top of each tensor."""
        return MASKS.load(self.folder)

    @property
    def traces(self) -> Mapping[str, GradientTrace]:
        """The gradient trace of each task."""
        return made_by.TRACES.load(self.folder)

    @property
    def grafts(self) -> dict[str, Graft]:
        """The smallest graft that was found for each task."""
        return made_by.GRAFTS.load(self.folder)

    @property
    def figures(self) -> "dict[str, go.Figure]":
        """The figures by name, drawn from the tables."""
        return figures_of(self.tables)

    @property
    def report(self) -> Path:
        """The page of results."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        done = ", ".join(seconds(self.folder))
        return f"Analysis({str(self.folder)!r}, model={self.facts['model']['source']!r}, steps=[{done}])"

    def _repr_html_(self) -> str:
        accuracy = self.tables["accuracy"].round(3).to_html(index=False, border=0) if "accuracy" in self.tables else ""
        top = top_table(self.tables)
        shown = "" if top is None else top.to_html(index=False, border=0)
        return f"<b>{escape(str(self.facts['model']['source']))}</b>{accuracy}{shown}"


def analyse(
    model: Model,
    tasks: Task | Sequence[Task],
    pre: Model | None = None,
    *,
    out: str | Path,
    settings: AnalysisSettings | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    traces: Mapping[str, GradientTrace] | None = None,
    check_start: bool = True,
    say: Callable[[str], None] | None = None,
    executor: str | Executor = "serial",
) -> Analysis:
    """Analyse a model on one or more tasks, or do what is missing of an analysis.

    Args:
        model: loaded with `circuits.load_model`.
        tasks: one or several, each with a name of its own. Sharing needs two.
        pre: the model before fine-tuning, to revert to and to graft into; without it ablated weights become zero, and
            nothing is grafted.
        out: the folder for the results.
        settings: how; see `AnalysisSettings`.
        only: these steps of `circuits.analysis.STEPS`, and those they need; all if not given.
        skip: not these.
        traces: of the tasks that are traced, by name, made elsewhere: over checkpoints or along training, say, with
            this model as the last. Made here if not given.
        check_start: refuse a ``pre`` if the checkpoint of ``model`` says that it was trained from another model.
        say: called with a line when a step begins.
        executor: who does what takes longest, the steps ``trace``, ``sweep``, ``neurons`` and ``patch``: ``serial``,
            this process; ``processes``, ``ray`` or ``slurm``; or an executor of `circuits.executors` with its settings.
            Workers load the model from its folder, and compute on one thread each. All other steps are done in this
            process whoever does those. The executor is no part of the analysis: what one began another may go on with.

    Returns:
        The analysis: tables, masks, traces, figures, summary and report.

    Raises:
        CircuitsError: two tasks have one name or the same prompts, a task's name cannot be a file's, a step or a task
            that is named does not exist, functions are hooked into a model, ``pre`` is not the start, the traces are
            not those of these tasks or of this model, the folder holds something else, or workers are to load a model
            that is in memory alone, or was changed since it was loaded.

    Example:
        >>> import tempfile
        >>> from circuits import load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> model = load_model(new_model("tiny-llama", tokenizer), tokenizer=tokenizer)
        >>> tasks = [dataset.task(split, tokenizer) for split in ("bio", "qa_id")]
        >>> found = analyse(model, tasks, out=tempfile.mkdtemp() + "/analysis", only=["share"])
        >>> sorted(found.masks), "shared_heads" in found.tables
        (['global', 'tensor'], True)
        >>> analyse(model, tasks, out=tempfile.mkdtemp() + "/analysis", executor="processes")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: a model in memory cannot be sent to workers: save it, and give its folder
    """
    return analysed(
        model, tasks, pre, out=out, settings=settings, only=only, skip=skip, traces=traces, check_start=check_start,
        say=say, executor=executor,
    )  # fmt: skip


def analysed(
    model: Model,
    tasks: Task | Sequence[Task],
    pre: Model | None = None,
    *,
    out: str | Path,
    settings: AnalysisSettings | None,
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    traces: Mapping[str, GradientTrace] | None = None,
    check_start: bool,
    say: Callable[[str], None] | None,
    executor: str | Executor,
    anew: bool = True,
) -> Analysis:
    """As `analyse`; of an analysis that is finished and has its page, the page is left as it is if not ``anew``."""
    settings = settings or AnalysisSettings()
    case = Case(model, _by_name(tasks), pre, settings, Path(out), traces, choose_executor(executor))
    chosen = choose(made_by.STEPS, only, skip)
    _check_names(case)
    for one in (model, pre):
        if one is not None:
            refuse_hooks(one)
    if pre is not None and check_start:
        require_start(model, pre)
    check_place(model, case.executor)
    for one in chosen:
        if one.name in (only or ()) and (reason := one.lacking(case)):
            raise CircuitsError(f"the step {one.name} was asked for, but {reason}")
    facts: dict[str, Any] = {
        "model": {"source": str(checkpoint_of(model).source), **facts_of(model)},
        "pre": None if pre is None else {"source": str(checkpoint_of(pre).source), "model": identity(pre)},
        "tasks": {name: task.identity() for name, task in case.tasks.items()},
        "settings": asdict(settings),
    }
    if traces is not None:
        if traces.keys() != case.named("trace").keys():
            raise CircuitsError(
                f"traces are given of {', '.join(traces) or 'no task'}, but the tasks that are traced are "
                f"{', '.join(case.named('trace'))}: give one of each"
            )
        facts["traces"] = {name: _made(case, name, trace) for name, trace in traces.items()}
    _check_tasks(case)
    claim(case.folder / "analysis.json", facts, "an analysis", free=("model.source", "pre.source"))
    missing = [one for one in chosen if not done(case.folder, one) and one.lacking(case) is None]
    if say is not None and missing:
        say(f"about {duration(sum(estimate(case, missing).values()))} on this machine")
    left_out = run_steps(chosen, case, case.folder, provenance(**facts, seed=settings.seed), say)
    analysis = Analysis(out)
    if not (anew or missing) and analysis.report.is_file():
        return analysis
    if "attention" in analysis.tables:
        draw_heads(case, analysis.tables)
    write_json(case.folder / "summary.json", summary_of(analysis.tables, facts, left_out, seconds(case.folder)))
    write_page(analysis.report, analysis.summary, analysis.tables, analysis.figures)
    return analysis


def check_place(model: Model, executor: Executor) -> None:
    """Refuse a model that the workers of an executor cannot load.

    Raises:
        CircuitsError: it is in memory alone, or was changed since it was loaded.
    """
    if not isinstance(executor, Serial):
        Place.of(model).check(next(iter(checkpoint_of(model).tensors.values())).dtype)


def _made(case: Case, name: str, trace: GradientTrace) -> dict[str, Any]:
    """How a given trace was made; refuses one of another task or model."""
    made = trace.provenance
    if trace.task != name:
        raise CircuitsError(f"the trace given for {name} is of {trace.task}: give one of {name}")
    if made.get("model") != identity(case.model):
        raise CircuitsError(f"the trace of {name} is of the model {made.get('model')}, not of {identity(case.model)}")
    return {one: made.get(one) for one in ("statistic", "loss", "per", "steps", "checkpoints", "examples")}


def _check_names(case: Case) -> None:
    """Refuse settings that name steps or tasks that are not there."""
    by_step = case.settings.tasks_by_step
    choose(made_by.STEPS, [*by_step, *case.settings.examples_by_step], None)
    for step, names in by_step.items():
        for name in names:
            if name not in case.tasks:
                raise CircuitsError(f"the step {step} is to be done on {name!r}: choose from {', '.join(case.tasks)}")


def _check_tasks(case: Case) -> None:
    """Refuse a folder that holds an analysis of tasks of other names."""
    file = case.folder / "analysis.json"
    found = list(read_json(file).get("tasks", case.tasks)) if file.is_file() else list(case.tasks)
    if set(found) != set(case.tasks):
        raise CircuitsError(
            f"{case.folder} holds an analysis of {' and '.join(found)}, not of {' and '.join(case.tasks)}: "
            "give the same tasks, or choose another folder"
        )


def _by_name(tasks: Task | Sequence[Task]) -> dict[str, Task]:
    listed = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not listed:
        raise CircuitsError("there is nothing to analyse: give a task or several")
    found: dict[str, Task] = {}
    for task in listed:
        if Path(task.name).name != task.name:
            raise CircuitsError(f"the task {task.name!r} cannot name a file of results: give it another name")
        if task.name in found:
            raise CircuitsError(f"two tasks are called {task.name}: give each a name of its own")
        for other in found.values():
            if other.identity()["tokens"] == task.identity()["tokens"]:
                raise CircuitsError(f"the tasks {other.name} and {task.name} are the same prompts: nothing is compared")
        found[task.name] = task
    return found
