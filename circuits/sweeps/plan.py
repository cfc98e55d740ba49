"""A sweep as data: what is done to which units of which model on which tasks, and how that is cut into jobs.

1. A plan names everything that the numbers of a sweep depend on: model, data, units, modes, positions, metrics, seed,
   dtype, threads. It is written as a YAML or TOML file, or made in Python.
2. For each task the plan gives a list of interventions: for each mode, each unit (or set of units), each position.
3. The list is cut into jobs of ``job_size`` interventions, always at the same places. With a screen, one job for each
   task estimates all of its interventions first, and the jobs after them compute the largest ones exactly.
4. Nothing here reads the model: the same plan for models of one shape gives the same jobs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import PlainValidator, TypeAdapter
from pydantic.dataclasses import dataclass

from circuits.errors import CircuitsError
from circuits.interventions import MODES, Intervention, cumulative, pairs, single
from circuits.masks import ParameterMask, units_of
from circuits.metrics import NAMED_METRICS
from circuits.models import DTYPES
from circuits.sweeps.settings import (
    STRICT,
    Count,
    File,
    Flag,
    Folder,
    Name,
    Names,
    Seed,
    Share,
    in_one_sentence,
    must_be,
    one_of,
    read_settings,
)
from circuits.units import AnyUnit, Component, Head, KVGroup, ModelShape, Neuron, parse_unit

#: Kinds of units that a plan can name at once.
KINDS: dict[str, type[Head] | type[KVGroup] | type[Neuron]] = {"heads": Head, "groups": KVGroup, "neurons": Neuron}
#: Which units are changed in one run.
TOGETHER = {"single": single, "pairs": pairs, "cumulative": cumulative}
#: Where patched values come from: a task's own counterfactuals, another person's run, or the same person's biography.
SOURCES: tuple[str, ...] = ("counterfactuals", "people", "formats")
SCREENS: tuple[str, ...] = ("attribution",)
#: Each begins when the one before is done.
STAGES: tuple[str, ...] = ("estimate", "exact")

_TABLES = (".parquet", ".csv")
_OF_REFERENCE = ("mean", "mean_by_position", "resample")
#: Settings that some modes and metrics take values from, and what they must be, where there is no default.
_NEEDED = {
    "pre": (("revert",), "the folder of the checkpoint before fine-tuning"),
    "source": (("patch", "logit_diff", "source_exact_match"), ""),
    "reference": (_OF_REFERENCE, ""),
}
#: Units named in all interventions of a task, at most; more would not fit into memory.
_MOST = 10_000_000


@dataclass(frozen=True)
class Job:
    """Some interventions of one task, computed by one call.

    Attributes:
        index: its place among all jobs of the sweep.
        stage: ``estimate``, or ``exact``.
        task: as the plan names it.
        start: the first of the task's interventions (with a screen: of those that are computed exactly).
        stop: the one after the last.
    """

    index: int
    stage: str
    task: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@in_one_sentence
@dataclass(frozen=True, config=STRICT)
class _OfMask:
    """The units with the largest Shared Size in a saved mask."""

    mask: File
    kind: Annotated[Name, one_of(KINDS)] = "heads"
    top: Count | None = None


def _read_units(value: Any) -> "str | tuple[str, ...] | _OfMask":
    kinds = (*KINDS, *Component.NAMES)
    if isinstance(value, Mapping):
        return _OfMask(**{str(name): one for name, one in value.items()})
    if isinstance(value, _OfMask):
        return value
    if isinstance(value, Path) or (isinstance(value, str) and (value in kinds or Path(value).suffix in _TABLES)):
        return str(value)
    if isinstance(value, str) and not value.startswith("L"):
        raise CircuitsError(
            f"there are no units {value!r}: choose from {', '.join(kinds)}, list names such as L2H1, name the file of "
            "a ranking (.parquet, .csv), or take those of a mask: {mask: FILE, kind: heads}"
        )
    names = tuple(TypeAdapter(Names).validate_python(value))
    for name in names:
        parse_unit(name)
    return names


@in_one_sentence
@dataclass(frozen=True, config=STRICT)
class SweepPlan:
    """Many interventions on one model, as one resumable job.

    A single name may stand for a list of one. Relative paths start where the command is given.

    Attributes:
        model: folder of the checkpoint.
        dataset: folder of the dataset; a checkpoint made by ``circuits train`` knows its own.
        tasks: what to score: splits of the dataset, files of prompts (.jsonl, .json, .csv, .parquet), or ready sources
            such as ``ioi``; names are looked up when the sweep is prepared.
        examples: use so many of each task, drawn with the seed; all of them if not given.
        units: ``heads``, ``groups``, ``neurons``; ``attn_out``, ``mlp_out``, ``resid_pre``, ``resid_mid``,
            ``resid_post``; a list of names such as ``L2H1``; the file (.parquet, .csv) of a ranking, whose column
            ``unit`` is taken from top to bottom; or those with the largest Shared Size in a saved mask of the model,
            ``{mask: FILE, kind: heads, top: 20}``: kind as above, all that hold any of the mask without ``top``.
        together: which are changed in one run: each ``single``, all ``pairs``, or ``cumulative``: the first, the first
            two, and so on.
        modes: ``zero``, ``mean``, ``mean_by_position``, ``resample``, ``patch``, ``revert``.
        site: where heads (``z``, ``q``, ``k``, ``v``, ``pattern``) or groups (``kv``, ``k``, ``v``) are changed.
        positions: ``all``, ``each`` position of the longest prompt alone (where it is patched: each that has a match),
            one position counted from 0, ``answer``, ``last``, or any span of the tasks, such as ``subject``.
        pre: folder of the checkpoint before fine-tuning, for ``revert``.
        source: for ``patch`` and the metrics ``logit_diff`` and ``source_exact_match``: ``counterfactuals`` (of the
            tasks), ``people`` (another person's run) or ``formats`` (the same person's biography). If not given,
            patching takes the tasks' counterfactuals, and ``logit_diff`` their foils.
        reference: the task for ``mean``, ``mean_by_position`` and ``resample``; the first task if not given.
        metrics: of each answer: ``exact_match``, ``first_token``, ``log_prob``, ``logit_diff``, ``source_exact_match``,
            ``kl``.
        seed: of every draw.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where the model goes; CUDA if there is any, else the CPU.
        threads: of the CPU in each job; a part of the plan because numbers are rounded otherwise with more.
        screen: ``attribution`` estimates what every intervention does to the log-probability (or the logit difference)
            and computes only the largest exactly.
        verify: the share that is computed exactly after a screen.
        per_answer: keep what each intervention does to each answer too, for paired comparisons.
        check_start: refuse a ``pre`` if the checkpoint of ``model`` says that it was trained from another model.
        job_size: interventions in a job: so many are lost at most when a process is killed (but all of a task's
            estimates).

    Raises:
        CircuitsError: a setting is not one that the plan can have.

    Example:
        >>> plan = SweepPlan("runs/study/checkpoints/mixed", units=["L0H0", "L2H1"], together="pairs", modes="zero")
        >>> [str(one) for one in plan.interventions(ModelShape(4, 4, 2, 512), 12)]
        ['zero L0H0+L2H1']
    """

    model: Folder
    dataset: Folder | None = None
    tasks: Names = ("qa_ood",)
    examples: Count | None = None
    units: Annotated[str | Path | Sequence[str] | Mapping[str, Any] | _OfMask, PlainValidator(_read_units)] = "heads"
    together: Annotated[Name, one_of(TOGETHER)] = "single"
    modes: Annotated[Names, one_of(MODES)] = ("zero",)
    site: Name | None = None
    positions: Annotated[int | str, must_be("a number, or a name such as all, each or subject")] = "all"
    pre: Folder | None = None
    source: Annotated[Name, one_of(SOURCES)] | None = None
    reference: Name | None = None
    metrics: Annotated[Names, one_of(NAMED_METRICS)] = ("exact_match", "log_prob")
    seed: Seed = 0
    dtype: Annotated[Name, one_of(DTYPES)] = "float32"
    device: Name | None = None
    threads: Count = 1
    screen: Annotated[Name, one_of(SCREENS)] | None = None
    verify: Share = 0.2
    per_answer: Flag = False
    check_start: Flag = True
    job_size: Count = 64

    def __post_init__(self) -> None:
        compared = {"logit_diff", "source_exact_match"} & set(self.metrics)
        if compared and self.source == "formats":
            raise CircuitsError(
                f"{compared.pop()} compares with another answer, but the source formats has the same one: take people"
            )
        if self.screen is not None and self.site == "pattern":
            raise CircuitsError("attribution cannot estimate a pattern: leave the screen out")
        if self.screen is not None and self.together == "cumulative":
            raise CircuitsError("a screen picks single units or pairs to compute exactly, but together is cumulative")
        if self.screen is not None and "revert" in self.modes:
            raise CircuitsError("a screen cannot estimate what revert does: leave out one of them")
        for mode in self.modes:
            for unit in self._examples_of_units():
                Intervention((unit,), mode, self.site, "all" if self.positions == "each" else self.positions)
        for name, (users, hint) in _NEEDED.items():
            chosen = [user for user in (*self.modes, *self.metrics) if user in users]
            given = getattr(self, name) is not None
            if chosen and hint and not given:
                raise CircuitsError(f"{chosen[0]} needs {name}: {hint}")
            if given and not chosen:
                raise CircuitsError(f"{name} is given, but it is for {' or '.join(users)} alone")

    def _examples_of_units(self) -> list[AnyUnit]:
        """Units of every kind that the plan is known to name, before any model is seen."""
        if isinstance(self.units, tuple):
            return [parse_unit(name) for name in self.units]
        kind = self.units.kind if isinstance(self.units, _OfMask) else str(self.units)
        if kind in KINDS:
            return [KINDS[kind](0, 0)]
        return [] if self.ranking is not None else [Component(0, kind)]

    @property
    def ranking(self) -> Path | None:
        """The file of a ranking, if the units come from one."""
        named = isinstance(self.units, str) and Path(self.units).suffix in _TABLES
        return Path(str(self.units)) if named else None

    @property
    def mask(self) -> Path | None:
        """The file of a mask, if the units come from one."""
        return Path(self.units.mask) if isinstance(self.units, _OfMask) else None

    @classmethod
    def read(cls, path: str | Path) -> "SweepPlan":
        r"""Read a plan from a YAML or TOML file with the attributes as keys.

        Raises:
            CircuitsError: the file is missing or cannot be read, a key is unknown, or a setting is wrong.

        Example:
            >>> import tempfile
            >>> file = Path(tempfile.mkdtemp()) / "plan.yaml"
            >>> _ = file.write_text("model: runs/study/checkpoints/mixed\nmodes: [zero, mean]\nexamples: 100\n")
            >>> SweepPlan.read(file).modes
            ('zero', 'mean')
        """
        path = Path(path)
        settings = read_settings(path)
        if "model" not in settings:
            raise CircuitsError(f"{path} names no model: give the folder of a checkpoint as 'model'")
        try:
            return cls(**{str(name): value for name, value in settings.items()})
        except CircuitsError as error:
            raise CircuitsError(f"{path}: {error}") from None

    def _repr_html_(self) -> str:
        """What Jupyter shows: the settings that differ from their defaults, as a file of the plan has them."""
        chosen: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value == setting.default:
                continue
            if isinstance(value, _OfMask):
                value = {name: one for name, one in vars(value).items() if one is not None}
            chosen[setting.name] = list(value) if isinstance(value, tuple) else value
        return (
            f"<pre>{escape(yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, allow_unicode=True))}</pre>"
        )

    def unit_names(self) -> tuple[str, ...] | None:
        """The names of the units in the order of the list, ranking or mask; None if the plan names a whole kind.

        Raises:
            CircuitsError: the ranking is missing, has no column ``unit``, or names a unit twice; the mask is missing or
                holds no such units.
        """
        if isinstance(self.units, tuple):
            return self.units
        if isinstance(self.units, _OfMask):
            of = self.units
            return tuple(map(str, units_of(ParameterMask.load(of.mask), KINDS[of.kind], top=of.top)))
        return None if self.ranking is None else _read_ranking(self.ranking)

    @property
    def needs_reference(self) -> bool:
        """Whether a mode takes values from a reference set."""
        return any(mode in _OF_REFERENCE for mode in self.modes)

    def interventions(
        self, shape: ModelShape, prompt: int, matched: Collection[int] | None = None
    ) -> list[Intervention]:
        """All interventions on one task, in the order of the table.

        Args:
            shape: of the model.
            prompt: tokens of the longest prompt, for ``positions="each"``.
            matched: of these positions, the ones that can be patched; all if not given.

        Raises:
            CircuitsError: the model has no such unit, or there are too many interventions.
        """
        units = self._units(shape)
        positions: list[int | str] = list(range(prompt)) if self.positions == "each" else [self.positions]
        mentions = {
            "single": len(units),
            "pairs": len(units) * (len(units) - 1),
            "cumulative": len(units) * (len(units) + 1) // 2,
        }[self.together]
        if mentions == 0:
            raise CircuitsError(f"{self.together} of {len(units)} unit are no interventions: name two units or more")
        if mentions * len(positions) * len(self.modes) > _MOST:
            raise CircuitsError(
                f"{self.together} of {len(units):,} units are too many interventions: name fewer units, modes or "
                "positions"
            )
        return [
            replace(one, positions=position)
            for mode in self.modes
            for one in TOGETHER[self.together](units, mode, self.site)
            for position in positions
            if mode != "patch" or matched is None or self.positions != "each" or position in matched
        ]

    def _units(self, shape: ModelShape) -> list[AnyUnit]:
        names = self.unit_names()
        if names is not None:
            return [parse_unit(name, shape) for name in names]
        kind = KINDS.get(str(self.units))
        if kind is None:
            return [Component(layer, str(self.units)) for layer in range(shape.n_layers)]
        return [kind(layer, index) for layer in range(shape.n_layers) for index in range(kind.count(shape))]

    @property
    def screened(self) -> str:
        """The metric whose effect a screen estimates: the first that has a gradient."""
        return next((metric for metric in self.metrics if metric in ("log_prob", "logit_diff")), "log_prob")

    def exact_count(self, count: int) -> int:
        """How many of a task's interventions are computed exactly."""
        return count if self.screen is None else max(1, round(self.verify * count))

    def jobs(self, counts: Mapping[str, int]) -> list[Job]:
        """The jobs of the sweep, in order; those that estimate come before all others.

        Args:
            counts: how many interventions there are on each task.

        Example:
            >>> plan = SweepPlan("runs/study/checkpoints/mixed", tasks=["qa_id", "qa_ood"], job_size=10)
            >>> [(job.task, job.start, job.stop) for job in plan.jobs({"qa_id": 16, "qa_ood": 16})]
            [('qa_id', 0, 10), ('qa_id', 10, 16), ('qa_ood', 0, 10), ('qa_ood', 10, 16)]
        """
        cuts: list[tuple[str, str, int, int]] = []
        if self.screen is not None:
            cuts += [("estimate", task, 0, counts[task]) for task in self.tasks]
        for task in self.tasks:
            exact = self.exact_count(counts[task])
            cuts += [
                ("exact", task, start, min(start + self.job_size, exact)) for start in range(0, exact, self.job_size)
            ]
        return [Job(index, *cut) for index, cut in enumerate(cuts)]


def _read_ranking(path: Path) -> tuple[str, ...]:
    import pandas

    if not path.is_file():
        raise CircuitsError(f"there is no file {path}")
    try:
        table = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    except (ValueError, OSError) as error:
        raise CircuitsError(f"{path} is damaged or is no table: {str(error).splitlines()[0]}") from None
    if "unit" not in table or table.empty:
        raise CircuitsError(f"the ranking {path} has no {'rows' if 'unit' in table else 'column unit'}")
    names = tuple(table["unit"].astype(str))
    if len(set(names)) < len(names):
        raise CircuitsError(f"the ranking {path} names a unit twice: keep one row for each unit")
    return names
