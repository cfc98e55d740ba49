"""The paper's study end to end (arXiv 2505.16178): nothing but calls to the other rooms, in resumable steps.

1. data: make people up.
2. train: mixed, two-stage, and two-stage with a small second rate, from the same starting weights: those of a new
   small model, or of a pretrained checkpoint.
3. evaluate: exact match of every model on every split.
4. trace: gradients of BIO and QA-ID at θ_mixed and θ_two-stage.
5. share: shared parameters, Shared Size, and their controls.
6. ablate: revert the shared parameters to θ_pre, against random ones.
7. graft: the fewest fine-tuned parameters that keep QA-ID, by score.
8. rank: heads and neurons by Shared Size and its rivals; are the top ones enough, and are they needed?
9. sweep: ablate every head.
10. patch: every head from the BIO run of the same person, and from another person's run.
11. attend: score every head's attention, and draw the attention figures.
12. report: ``summary.json`` and ``report.html``.

Each step writes its results and then ``steps/NAME.json``; a study that is started again goes on after the last of
these. Several seeds are several studies, and a summary of theirs.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas
import torch

from circuits.errors import CircuitsError
from circuits.facts import FAMILIAR, SPLITS, DatasetSettings, FactDataset, make_dataset
from circuits.figures import (
    attention_figure,
    save_figure,
    study_figures,
    write_results_page,
    write_seeds_report,
    write_study_report,
)
from circuits.interventions import ABLATIONS, pair_formats, pair_people
from circuits.masks import (
    FRACTIONS,
    SCOPES,
    SCORES,
    Graft,
    ParameterMask,
    ablate_mask,
    ablation_means,
    graft,
    graft_by_score,
    shared_parameters,
    shared_size,
    sharing,
    sharing_curve,
)
from circuits.metrics import METRICS, evaluate
from circuits.models import Model, facts_of, family_of, fingerprint, load_config, load_model
from circuits.rankings import (
    BEHAVIOURS,
    RANKINGS,
    Evidence,
    agreement,
    attention_scores,
    critical_curve,
    curve_areas,
    curve_means,
    curve_summary,
    default_counts,
    rank_units,
    read_head,
    sufficient_curve,
)
from circuits.statistics import intervals, mean_interval
from circuits.storage import check_ending, flatten, provenance, read_json, write_json, write_table
from circuits.sweeps import sweep_heads, sweep_patches
from circuits.tasks import Task
from circuits.tracing import GradientTrace, trace_gradients
from circuits.training import PRETRAINED, Job, Optimisation, train_side_by_side
from circuits.units import Head, Neuron

FAMILIES: tuple[str, ...] = ("llama", "pythia")
_FAMILY_OF = {"LlamaForCausalLM": "llama", "GPTNeoXForCausalLM": "pythia"}
#: The models that are compared, and all that are evaluated.
_COMPARED = ("mixed", "two_stage")
_EVALUATED = ("pre", "stage_1", "mixed", "two_stage", "two_stage_gentle")
_TRACED = ("bio", "qa_id")
_SCORED = ("bio", "qa_id", "qa_ood")
_RANKED = ("qa_id", "qa_ood")
#: What may lie in the folder of several seeds, beside the folders of the seeds.
_OVER_SEEDS = ("summary.json", "report.html")


@dataclass(frozen=True)
class StudySettings:
    """What a study is made from.

    Attributes:
        family: ``llama`` or ``pythia``; that of the pretrained model, or ``llama``, if not given.
        seed: of people, weights, rows and random masks.
        data: the people.
        optimisation: how they are learned.
        fraction: k of the influenced sets.
        trace_examples: examples of each task that are traced.
        sweep_examples: examples of each task that are scored under each ablation.
        keep: share of the accuracy on QA-ID that a graft must keep.
        rank_examples: examples of each task that are scored at each point of a ranking's curves.
        draws: random masks, permutations and rankings.
        model: folder of a pretrained checkpoint to start from; a new small model of the family if not given.
        evaluate_every: steps of training between points of its curves and between saved states.
        evaluate_examples: examples of each split that whole models are scored on; all if not given.
        fractions: the k of the sharing curve.
        rank_halvings: curves over more than 32 units are measured at every tenth of them, and below the first at so
            many halvings of all of them; at every doubling from 1 if not given.
        sweep_modes: how every head is ablated alone.
    """

    family: str | None = None
    seed: int = 0
    data: DatasetSettings = field(default_factory=DatasetSettings)
    optimisation: Optimisation = field(default_factory=Optimisation)
    fraction: float = 0.01
    trace_examples: int = 600
    sweep_examples: int = 200
    keep: float = 0.95
    rank_examples: int = 50
    draws: int = 5
    model: str | None = None
    evaluate_every: int = 100
    evaluate_examples: int | None = None
    fractions: tuple[float, ...] = FRACTIONS
    rank_halvings: int | None = None
    sweep_modes: tuple[str, ...] = ABLATIONS

    def __post_init__(self) -> None:
        found = "llama"
        if self.model is not None:
            architecture = family_of(load_config(self.model)).ARCHITECTURE
            found = _FAMILY_OF.get(architecture, architecture)
        if self.family is None:
            object.__setattr__(self, "family", found)
        if self.model is None and self.family not in FAMILIES:
            raise CircuitsError(f"there is no family {self.family!r}: choose from {', '.join(FAMILIES)}")
        if self.model is not None and self.family != found:
            raise CircuitsError(f"the model {self.model} is a {found}, not a {self.family}: leave out the family")
        if self.data.seed != self.seed:
            raise CircuitsError(
                f"the study's seed is {self.seed}, but its people's is {self.data.seed}: make them equal"
            )
        if not 0 < self.fraction < 1:
            raise CircuitsError(f"the fraction is {self.fraction}: it must lie between 0 and 1")
        if not 0 < self.keep <= 1:
            raise CircuitsError(f"the share to keep is {self.keep}: it must be more than 0 and at most 1")
        examples = [self.trace_examples, self.sweep_examples, self.rank_examples]
        examples += [] if self.evaluate_examples is None else [self.evaluate_examples]
        if min(examples) < 1 or self.draws < 2:
            raise CircuitsError("a study needs an example to trace and to score, and two random draws for an interval")
        if self.rank_halvings is not None and self.rank_halvings < 1:
            raise CircuitsError(f"the number of halvings is {self.rank_halvings}: it must be 1 or more")
        if not self.sweep_modes or not self.fractions or self.evaluate_every < 1:
            raise CircuitsError("a study needs a mode to ablate heads by, a fraction, and steps between evaluations")
        if self.data.people < 8:
            raise CircuitsError(f"a study of {self.data.people} people has nobody to compare with: take 8 or more")


#: For a pretrained model of some hundred million parameters: two to three hours of one thread. Give it its ``model``.
PRETRAINED_STUDY = StudySettings(
    data=FAMILIAR,
    optimisation=PRETRAINED,
    trace_examples=120,
    sweep_examples=8,
    rank_examples=60,
    evaluate_every=50,
    evaluate_examples=240,
    fractions=(0.0001, 0.001, 0.01, 0.1),
    rank_halvings=4,
    sweep_modes=("zero",),
)


def run_study(
    out: str | Path, settings: StudySettings | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run the study, or the rest of one that was interrupted.

    Args:
        out: the study's folder.
        settings: what to do; must be the same when a study goes on.
        say: called with a line when a step begins.

    Returns:
        The content of ``summary.json``.

    Raises:
        CircuitsError: the folder holds a study with other settings.
    """
    study = _Study(Path(out), settings or StudySettings())
    study.claim()
    if (study.out / "steps" / "evaluate.json").is_file():
        study.check_answers()
    for name, step in study.steps().items():
        done = study.out / "steps" / f"{name}.json"
        if done.is_file():
            continue
        if say is not None:
            say(f"{name}: {(step.__doc__ or '').splitlines()[0].rstrip('.')}")
        spent = study.out / "steps" / f"{name}.spent.json"
        with _stopwatch(spent):
            step()
        spent.rename(done)
    summary: dict[str, Any] = read_json(study.out / "summary.json")
    return summary


@contextmanager
def _stopwatch(path: Path) -> Iterator[None]:
    """Add the seconds of the block to those of earlier attempts that were interrupted."""
    before = read_json(path)["seconds"] if path.is_file() else 0.0
    begun = time.monotonic()
    try:
        yield
    finally:
        write_json(path, {"seconds": round(before + time.monotonic() - begun, 1)})


class _Study:
    def __init__(self, out: Path, settings: StudySettings) -> None:
        self.out, self.settings = out, settings
        self.checkpoints, self.tables, self.figures = out / "checkpoints", out / "tables", out / "figures"
        self._models: dict[str, Model] = {}

    def steps(self) -> dict[str, Callable[[], None]]:
        return {
            "data": self.make_data,
            "train": self.train,
            "evaluate": self.evaluate,
            "trace": self.trace,
            "share": self.share,
            "ablate": self.ablate,
            "graft": self.graft,
            "rank": self.rank,
            "sweep": self.sweep,
            "patch": self.patch,
            "attend": self.attend,
            "report": self.report,
        }

    def claim(self) -> None:
        """Write down what this study is, or check that the folder's study is the same."""
        plan = self.out / "plan.json"
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if self.settings.model is not None:
            wanted["model_fingerprint"] = fingerprint(load_model(self.settings.model))
        if not plan.is_file():
            if self.out.exists() and any(not path.name.startswith(".") for path in self.out.iterdir()):
                raise CircuitsError(f"{self.out} holds something that is no study: choose another folder")
            write_json(plan, wanted)
            return
        # a setting that the plan does not know of had its default
        found = flatten(json.loads(json.dumps(asdict(StudySettings())))) | flatten(read_json(plan))
        for name, value in flatten(wanted).items():
            before = found.get(name)
            if before != value:
                raise CircuitsError(
                    f"{self.out} holds a study with {name} {before}, not {value}: choose another folder or delete it"
                )

    def check_answers(self) -> None:
        """Refuse what an earlier version evaluated: it kept no answers to compare models by."""
        if not (self.tables / "answers.parquet").is_file():
            raise CircuitsError(
                f"{self.out} was evaluated by an earlier version, which kept no answers: delete all of its steps but "
                "data.json and train.json, and run the study again"
            )

    # what the steps share

    @property
    def start(self) -> str:
        """What the models were before training, for a reader."""
        model = self.settings.model
        return f"tiny-{self.settings.family}" if model is None else Path(model).resolve().name

    @cached_property
    def dataset(self) -> FactDataset:
        return FactDataset(self.out / "data")

    def model(self, name: str) -> Model:
        if name not in self._models:
            self._models[name] = load_model(self.checkpoints / name)
        return self._models[name]

    @cached_property
    def tasks(self) -> dict[str, Task]:
        tokenizer = self.model("pre").tokenizer
        return {split: self.dataset.task(split, tokenizer) for split in SPLITS}

    def sample(self, split: str, count: int | None) -> Task:
        return self.tasks[split] if count is None else self.tasks[split].sample(count, self.settings.seed)

    def traces(self, name: str) -> list[GradientTrace]:
        return [GradientTrace.load(self.out / "traces" / name / f"{split}.safetensors") for split in _TRACED]

    def mask_file(self, name: str, scope: str) -> Path:
        return self.out / "masks" / f"{name}{'' if scope == 'global' else f'-{scope}'}.safetensors"

    def mask(self, name: str, scope: str = "global") -> ParameterMask:
        return ParameterMask.load(self.mask_file(name, scope))

    def table(self, name: str) -> pandas.DataFrame:
        return pandas.read_parquet(self.tables / f"{name}.parquet")

    def write(self, name: str, table: pandas.DataFrame) -> None:
        facts = {
            "dataset": self.dataset.fingerprint,
            "models": {model: facts_of(loaded) for model, loaded in self._models.items()},
            "settings": read_json(self.out / "plan.json"),
            "seed": self.settings.seed,
        }
        write_table(self.tables / f"{name}.parquet", table, facts)

    # the steps

    def make_data(self) -> None:
        """Make people, biographies and questions."""
        make_dataset(self.out / "data", self.settings.data)

    def train(self) -> None:
        """Train mixed, two-stage, and two-stage with a small second rate."""
        train_side_by_side(
            [Job("mixed"), Job("bio-only"), Job("two-stage", "bio-only"), Job("two-stage-gentle", "bio-only")],
            self.dataset,
            self.checkpoints,
            self.settings.model or f"tiny-{self.settings.family}",
            self.settings.optimisation,
            self.settings.seed,
            evaluate_every=self.settings.evaluate_every,
        )
        curves = [
            pandas.read_parquet(self.checkpoints / name / "curve.parquet").assign(model=name)
            for name in _EVALUATED
            if name != "pre"
        ]
        self.write("curves", pandas.concat(curves, ignore_index=True).drop(columns="stage"))

    def evaluate(self) -> None:
        """Score every model on every split."""
        answers = [self.answers(self.model(name)).assign(model=name) for name in _EVALUATED]
        table = pandas.concat(answers, ignore_index=True)
        self.write("answers", table)
        self.write("accuracy", _accuracies(table, ["model"]))

    def answers(self, model: Model) -> pandas.DataFrame:
        """Every answer on every split, so that models can be compared question by question."""
        tables = [
            evaluate(model, self.sample(split, self.settings.evaluate_examples)).assign(split=split)
            for split in self.tasks
        ]
        return pandas.concat(tables, ignore_index=True)[["split", "example", "group", "attribute", *METRICS]]

    def trace(self) -> None:
        """Trace the gradients of both tasks."""
        for name in _COMPARED:
            for split in _TRACED:
                trace = trace_gradients(self.model(name), self.sample(split, self.settings.trace_examples))
                trace.save(self.out / "traces" / name / f"{split}.safetensors")

    def share(self) -> None:
        """Find the shared parameters."""
        reports, curves, heads, neurons, hooked = [], [], [], [], []
        fraction, draws, seed = self.settings.fraction, self.settings.draws, self.settings.seed
        for name in _COMPARED:
            traces = self.traces(name)
            for scope in SCOPES:
                of = {"model": name, "scope": scope}
                mask = shared_parameters(traces, fraction, scope)
                mask.save(self.mask_file(name, scope))
                reports.append(of | sharing(traces, fraction, draws, seed, scope))
                curves.append(sharing_curve(traces, self.settings.fractions, draws, seed, scope).assign(**of))
                heads.append(shared_size(mask, Head).assign(**of))
                neurons.append(shared_size(mask, Neuron).assign(**of))
            hooked += [trace.units(Head).assign(model=name, task=trace.task) for trace in traces]
        self.write("shared", pandas.DataFrame(reports))
        self.write("sharing_curve", pandas.concat(curves, ignore_index=True))
        self.write("shared_heads", pandas.concat(heads, ignore_index=True))
        self.write("shared_neurons", pandas.concat(neurons, ignore_index=True))
        self.write("traced_heads", pandas.concat(hooked, ignore_index=True))

    def ablate(self) -> None:
        """Revert the shared parameters to their values before training, and random ones."""
        tables, answers = [], []
        tasks = [self.sample(split, self.settings.trace_examples) for split in _SCORED]
        draws, seed = self.settings.draws, self.settings.seed
        for name in _COMPARED:
            for scope in SCOPES:
                model, mask, pre = self.model(name), self.mask(name, scope), self.model("pre")
                each = ablate_mask(model, mask, tasks, pre, "revert", draws, seed, per_answer=True)
                tables.append(ablation_means(each).assign(model=name, scope=scope))
                answers.append(each.assign(model=name, scope=scope))
        self.write("ablation", pandas.concat(tables, ignore_index=True))
        self.write("ablation_answers", pandas.concat(answers, ignore_index=True))

    def graft(self) -> None:
        """Find the fewest fine-tuned parameters that keep QA-ID."""
        # all of QA-ID: a graft that was chosen on some of the questions may forget the others
        pre, task = self.model("pre"), self.tasks["qa_id"]
        keep = self.settings.keep
        curves, grafted = [], []
        for name in _COMPARED:
            fine_tuned = self.model(name)
            if not evaluate(fine_tuned, task)["exact_match"].any():
                continue  # there is nothing to keep: such a model has no rows
            for score in SCORES:
                found = graft_by_score(pre, fine_tuned, task, score, keep)
                found.save(self.out / "grafts" / name / score)
                curves.append(found.curve.assign(model=name))
                with graft(pre, found.mask, fine_tuned):
                    of = {"model": name, "score": score, "size": found.size, "fraction": found.fraction}
                    grafted.append(self.answers(pre).assign(**of))
        columns = ["model", "score", "size", "fraction", "exact_match", "log_prob", "chosen"]
        self.write("grafts", pandas.concat(curves)[columns] if curves else pandas.DataFrame(columns=columns))
        keys = ["model", "score", "size", "fraction"]
        columns = [*keys, "split", "example", "group", "attribute", *METRICS]
        answers = pandas.concat(grafted, ignore_index=True)[columns] if grafted else pandas.DataFrame(columns=columns)
        self.write("grafted_answers", answers)
        self.write("grafted", _accuracies(answers, keys))

    def best_graft(self, name: str) -> str | None:
        """The score that gave the smallest graft of a model; None if there is nothing to graft."""
        table = self.table("grafts")
        rows = table[(table["model"] == name) & table["chosen"].astype(bool)]
        return None if rows.empty else str(rows.sort_values("size", kind="stable")["score"].iloc[0])

    def rank(self) -> None:
        """Rank heads and neurons, and test whether the top ones are enough and needed."""
        tasks = [self.sample(split, self.settings.rank_examples) for split in _RANKED]
        # a new model can do nothing with the embeddings it had before training
        rest = "fine_tuned" if self.settings.model is None else "pre"
        rankings, curves, summaries, agreements, areas = [], [], [], [], []
        for name in _COMPARED:
            pre, fine_tuned = self.model("pre"), self.model(name)
            best = self.best_graft(name)
            evidence = Evidence(
                fine_tuned,
                pre,
                dict(zip(("bio", "qa"), self.traces(name), strict=True)),
                self.mask(name),
                None if best is None else Graft.load(self.out / "grafts" / name / best).mask,
                tasks[0],
                self.settings.seed,
            )
            for kind in (Head, Neuron):
                metrics = [
                    metric
                    for metric in RANKINGS
                    if not (metric == "ablation" and kind is Neuron) and not (metric == "graft_size" and best is None)
                ]
                of_tensors = replace(evidence, shared=self.mask(name, "tensor"))
                per_tensor = rank_units(of_tensors, kind, ["shared_size"], self.settings.draws)
                ranking = pandas.concat(
                    [
                        rank_units(evidence, kind, metrics, self.settings.draws),
                        per_tensor.assign(metric="shared_size_per_tensor"),
                    ],
                    ignore_index=True,
                )
                counts = default_counts(ranking["unit"].nunique(), halvings=self.settings.rank_halvings)
                both = [
                    sufficient_curve(ranking, pre, fine_tuned, tasks, counts, rest, per_answer=True),
                    critical_curve(ranking, fine_tuned, tasks, pre, counts=counts, per_answer=True),
                ]
                answers = pandas.concat(both, ignore_index=True)
                curve = curve_means(answers)
                agreed = agreement(ranking).rename_axis("metric").reset_index()
                of = {"model": name, "kind": kind.NOUN}
                rankings.append(ranking.assign(**of))
                areas.append(curve_areas(answers).assign(**of))
                curves.append(curve.assign(**of))
                summaries.append(curve_summary(curve).assign(**of))
                agreements.append(agreed.melt("metric", var_name="other", value_name="spearman").assign(**of))
        self.write("rankings", pandas.concat(rankings, ignore_index=True))
        self.write("ranking_curves", pandas.concat(curves, ignore_index=True))
        self.write("ranking_areas", pandas.concat(areas, ignore_index=True))
        self.write("ranking_summary", pandas.concat(summaries, ignore_index=True))
        self.write("agreement", pandas.concat(agreements, ignore_index=True))

    def sweep(self) -> None:
        """Ablate every head alone."""
        tasks = [self.sample(split, self.settings.sweep_examples) for split in _SCORED]
        tables = []
        for name in _COMPARED:
            # a task of its own in each call: what a head is set to comes from the task that is scored
            each = [sweep_heads(self.model(name), [task], self.settings.sweep_modes) for task in tasks]
            long = pandas.concat(each, ignore_index=True)
            wide = long.pivot(
                index=["layer", "index", "head", "mode"],
                columns="task",
                values=[
                    *("exact_match", "exact_match_effect", "log_prob", "log_prob_effect"),
                    *("log_prob_effect_low", "log_prob_effect_high", "log_prob_effect_p", "log_prob_effect_q"),
                ],
            )
            wide.columns = [f"{metric}.{task}" for metric, task in wide.columns]
            tables.append(wide.reset_index().rename(columns={"head": "unit", "index": "head"}).assign(model=name))
        table = pandas.concat(tables, ignore_index=True)
        table["effect"] = table["log_prob_effect.qa_id"]
        self.write("heads", table)

    def patch(self) -> None:
        """Patch every head from the other format and from another person."""
        target = self.sample("qa_ood", self.settings.sweep_examples)
        # the few examples that a pretrained model has time for hold no partners for each other
        among = target if self.settings.model is None else self.tasks["qa_ood"]
        sources = {
            "bio": pair_formats(target, self.tasks["bio"]),
            "person": pair_people(target, self.settings.seed, among),
        }
        tables = [
            sweep_patches(self.model(name), source, target, kind).assign(model=name)
            for name in _COMPARED
            for kind, source in sources.items()
        ]
        self.write("patches", pandas.concat(tables, ignore_index=True))

    def attend(self) -> None:
        """Score every head's attention, and draw the attention figures."""
        questions = self.sample("qa_ood", self.settings.sweep_examples)
        formats = {"bio": pair_formats(questions, self.tasks["bio"]), "qa": questions}
        tables = [attention_scores(self.model(name), formats).assign(model=name) for name in _COMPARED]
        scores = pandas.concat(tables, ignore_index=True)
        self.write("attention", scores)
        for head in dict.fromkeys((self.top_head(), self.attending_head())):
            save_figure(self.attention(head), self.figures / f"attention_{head}.html", "beside")

    def top_head(self) -> Head:
        """The head of the mixed model with the largest Shared Size."""
        table = self.table("shared_heads")
        rows = table[table["model"] == "mixed"].sort_values("size", ascending=False, kind="stable")
        return Head.parse(rows["unit"].iloc[0])

    def attending_head(self) -> Head:
        """The head of the mixed model whose attention shows a behaviour in both formats most."""
        table = self.table("attention")
        rows = table[table["model"] == "mixed"]
        best = rows[list(BEHAVIOURS)].max(axis="columns").sort_values(ascending=False, kind="stable").index[0]
        return Head.parse(rows["unit"][best])

    def attention(self, head: Head) -> Any:
        """The attention figure of a head, over a fact of a QA-OOD person that the mixed model recalls."""
        model, task = self.model("mixed"), self.tasks["qa_ood"]
        scores = evaluate(model, task)
        recalled = scores[scores["exact_match"] & (scores["attribute"] == "university")]
        example = int((recalled if len(recalled) else scores)["example"].iloc[0])
        question = task.select([example])
        biography = pair_formats(question, self.tasks["bio"])
        readings = [read_head(model, head, biography, 0, "BIO"), read_head(model, head, question, 0, "QA")]
        return attention_figure(readings, subtitle=f"mixed model, {self.start}, a QA-OOD person")

    def report(self) -> None:
        """Write the summary and the report."""
        models = {name: facts_of(self.model(name)) for name in _EVALUATED}
        summary = {**self.summary(), "provenance": provenance(dataset=self.dataset.fingerprint, models=models)}
        write_json(self.out / "summary.json", summary)
        tables = _tables(self.out)
        figures = study_figures(tables, self.settings.keep)
        for name, figure in figures.items():
            save_figure(figure, self.figures / f"{name}.html", "beside")
        heads = dict.fromkeys((summary["top_head"], summary["attending_head"]))
        attention = {head: self.attention(Head.parse(head)) for head in heads}
        write_study_report(self.out / "report.html", summary, tables, figures, attention)

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; without what steps that are not done would say."""
        steps = self.out / "steps"
        done = [name for name in self.steps() if name != "report" and (steps / f"{name}.json").is_file()]
        seconds = {name: read_json(steps / f"{name}.json")["seconds"] for name in done}
        parts: dict[str, tuple[str, Callable[[], Any]]] = {
            "accuracy": ("evaluate", self._accuracy),
            "shared": ("share", lambda: self._shared("global")),
            "shared_per_tensor": ("share", lambda: self._shared("tensor")),
            "ablation": ("ablate", lambda: {name: self._ablation(name, "global") for name in _COMPARED}),
            "ablation_per_tensor": ("ablate", lambda: {name: self._ablation(name, "tensor") for name in _COMPARED}),
            "graft": ("graft", lambda: {name: self._graft(name) for name in _COMPARED}),
            "rankings": ("rank", self._rankings),
            "top_head": ("share", lambda: str(self.top_head())),
            "attending_head": ("attend", lambda: str(self.attending_head())),
        }
        return {
            **{name: part() for name, (step, part) in parts.items() if step in done},
            "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
            "settings": read_json(self.out / "plan.json"),
            "seeds": [self.settings.seed],
            "versions": _versions(),
            "machine": _machine(),
        }

    def _accuracy(self) -> dict[str, dict[str, float]]:
        accuracy = self.table("accuracy").set_index(["model", "split"])["exact_match"]
        by_model: dict[str, dict[str, float]] = {
            name: {split: round(float(accuracy[name, split]), 4) for split in SPLITS} for name in _EVALUATED
        }
        for name in ("two_stage", "two_stage_gentle"):
            by_model[name]["bio_after_stage_1"] = by_model["stage_1"]["bio"]
        return by_model

    def _shared(self, scope: str) -> dict[str, Any]:
        table = self.table("shared")
        by_model: dict[str, Any] = table[table["scope"] == scope].set_index("model").to_dict("index")
        return by_model

    def _ablation(self, name: str, scope: str) -> dict[str, Any]:
        """Exact match under each condition, with an interval over people that has all draws of a question in it."""
        table = self.table("ablation_answers")
        table = table[(table["model"] == name) & (table["scope"] == scope)]
        found: dict[str, Any] = {}
        for condition, rows in table.groupby("condition", sort=False):
            by_task = dict(list(rows.groupby("task", sort=False)))
            found[str(condition)] = {
                task: round(float(part["exact_match"].mean()), 4) for task, part in by_task.items()
            }
            found[f"{condition}_interval_95"] = {task: _share_interval(part) for task, part in by_task.items()}
        return found

    def _graft(self, name: str) -> dict[str, Any]:
        """The smallest graft of a model, and that of each score; None where there is nothing to graft."""
        table, grafted = self.table("grafts"), self.table("grafted")
        table = table[(table["model"] == name) & table["chosen"].astype(bool)].set_index("score")
        grafted = grafted[grafted["model"] == name].set_index(["score", "split"])["exact_match"]

        def numbers(score: str | None) -> dict[str, Any]:
            if score not in table.index:
                return {"size": None, "fraction": None, "accuracy": None, "splits": dict.fromkeys(SPLITS)}
            row = table.loc[score]
            return {
                "size": int(row["size"]),
                "fraction": round(float(row["fraction"]), 6),
                "accuracy": round(float(row["exact_match"]), 4),
                "splits": {split: round(float(grafted[score, split]), 4) for split in SPLITS},
            }

        best = self.best_graft(name)
        return {**numbers(best), "score": best, "by": {score: numbers(score) for score in SCORES}}

    def _rankings(self) -> dict[str, dict[str, float | None]]:
        """One number for each curve of the mixed model's heads on QA-ID; None for an n that is never reached."""
        table = self.table("ranking_summary")
        table = table[(table["model"] == "mixed") & (table["kind"] == Head.NOUN) & (table["task"] == "qa_id")]
        table = table.set_index(["metric", "condition"])
        columns = {
            "sufficient_auc": ("sufficient", "auc"),
            "critical_auc": ("revert", "auc"),
            "n95": ("sufficient", "n95"),
            "n50": ("revert", "n50"),
        }
        found: dict[str, dict[str, float | None]] = {}
        for metric in dict.fromkeys(table.index.get_level_values("metric")):
            values = {name: float(table.loc[(metric, row), column]) for name, (row, column) in columns.items()}
            found[metric] = {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
        return found


def run_studies(
    out: str | Path,
    seeds: Sequence[int],
    settings: StudySettings | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the study once for each seed, or the rest of it, and sum up over the seeds.

    Args:
        out: gets a study's folder for each seed, ``seed-0`` and so on, ``summary.json`` and ``report.html``.
        seeds: which; those that are finished are not run again.
        settings: of all of them but for the seed.
        say: called with a line when a step begins.

    Returns:
        The content of ``summary.json``: in place of each number of a study's summary a ``mean`` over seeds, its 95 %
        interval ``interval_95`` and the ``values`` in the order of ``seeds``. The mean is None if a seed has no such
        number, the interval also if there is a single seed.

    Raises:
        CircuitsError: there are no seeds, one is given twice, or the folder holds something else or studies with other
            settings.
    """
    out, settings = Path(out), settings or StudySettings()
    if not seeds:
        raise CircuitsError("there are no seeds: name one or more")
    if len(set(seeds)) < len(seeds):
        raise CircuitsError(f"the seed {max(seeds, key=list(seeds).count)} is given twice: seeds must differ")
    if out.exists():
        for path in out.iterdir():
            if not path.name.startswith((".", "seed-")) and path.name not in _OVER_SEEDS:
                raise CircuitsError(f"{out} holds something that is no set of studies: choose another folder")
    chosen = {seed: replace(settings, seed=seed, data=replace(settings.data, seed=seed)) for seed in seeds}
    # a folder that does not fit is refused before the hours of the seeds before it
    for seed, one in chosen.items():
        _Study(out / f"seed-{seed}", one).claim()
    summaries = []
    for seed, one in chosen.items():
        if say is not None:
            say(f"seed {seed}: {out / f'seed-{seed}'}")
        summaries.append(run_study(out / f"seed-{seed}", one, say))
    single = {"settings", "seeds", "versions", "machine", "provenance"}
    numbers = {name for summary in summaries for name in summary} - single
    summary = {
        **_over_seeds([{name: value for name, value in one.items() if name in numbers} for one in summaries]),
        "settings": {name: value for name, value in summaries[0]["settings"].items() if name != "seed"},
        "seeds": list(seeds),
        "versions": summaries[0]["versions"],
        "machine": summaries[0].get("machine"),
        "provenance": provenance(datasets=[one["provenance"]["dataset"] for one in summaries]),
    }
    summary["settings"]["data"] = {name: value for name, value in summary["settings"]["data"].items() if name != "seed"}
    write_json(out / "summary.json", summary)
    write_seeds_report(out / "report.html", summaries, [_tables(out / f"seed-{seed}") for seed in seeds])
    return summary


def report_study(folder: str | Path, page: str | Path) -> list[Path]:
    """Write what a study of one seed found of each claim of the paper, as Markdown with images.

    Args:
        folder: the study's; its models must be trained and evaluated, and the page says which later steps are missing.
        page: the Markdown file; images go into ``figures`` beside it.

    Returns:
        What was written, the page last.

    Raises:
        CircuitsError: the folder holds no study of one seed, or none that has come so far; the page does not end in
            ``.md``, or no browser is there to draw images.
    """
    folder, page = Path(folder), Path(page)
    check_ending(page, (".md",), "page")
    if not (folder / "steps" / "evaluate.json").is_file():
        raise CircuitsError(
            f"{folder} holds no study of one seed that was evaluated: make one with 'circuits study --out DIR'"
        )
    study = _Study(folder, _settings_of(read_json(folder / "plan.json")))
    study.check_answers()
    missing = [name for name in study.steps() if not (folder / "steps" / f"{name}.json").is_file()]
    summary = study.summary() if missing else read_json(folder / "summary.json")
    # a step that is not done may have written some of its tables
    written = (
        "accuracy",
        "answers",
        "curves",
        *(name for step, names in _TABLES.items() if step not in missing for name in names),
    )
    return write_results_page(page, summary, {name: study.table(name) for name in written}, missing)


#: The tables that the page shows, by the step that writes them.
_TABLES = {
    "share": ("shared", "sharing_curve", "shared_heads"),
    "ablate": ("ablation", "ablation_answers"),
    "graft": ("grafts",),
    "rank": ("rankings", "ranking_curves", "ranking_areas", "ranking_summary", "agreement"),
    "sweep": ("heads",),
    "patch": ("patches",),
}


def _share_interval(answers: pandas.DataFrame) -> list[float]:
    """The 95 % interval of exact match: answers of one person are not independent."""
    values = answers["exact_match"].to_numpy(float)
    low, high = intervals(values, answers["group"].to_numpy(), proportion=True)
    return [round(float(low), 4), round(float(high), 4)]


def _accuracies(answers: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """Means of each metric on each split, and the interval of exact match."""
    rows = []
    for values, part in answers.groupby([*keys, "split"], sort=False):
        low, high = _share_interval(part)
        of = dict(zip([*keys, "split"], values, strict=True))
        means = part[list(METRICS)].astype(float).mean()
        rows.append({**of, "answers": len(part), **means, "exact_match_low": low, "exact_match_high": high})
    columns = [*keys, "split", "answers", *METRICS, "exact_match_low", "exact_match_high"]
    return pandas.DataFrame(rows, columns=columns)


def _settings_of(plan: dict[str, Any]) -> StudySettings:
    """The settings that a plan was written from."""

    def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    # a plan may name settings that a later version has done away with, and the model's fingerprint
    names = {one.name for one in fields(StudySettings)}
    known = {name: value for name, value in with_tuples(plan).items() if name in names}
    data, optimisation = DatasetSettings(**with_tuples(plan["data"])), Optimisation(**with_tuples(plan["optimisation"]))
    return StudySettings(**known | {"data": data, "optimisation": optimisation})


def _tables(folder: Path) -> dict[str, pandas.DataFrame]:
    """A study's result tables by name."""
    return {path.stem: pandas.read_parquet(path) for path in sorted((folder / "tables").glob("*.parquet"))}


#: Parts of a summary, and numbers in the others, that are shares.
_SHARES = ("accuracy", "ablation", "ablation_per_tensor", "splits")
_SHARE_NAMES = ("share", "jaccard", "gini", "top_tenth", "fraction", "auc")


def _over_seeds(values: list[Any], share: bool = False) -> Any:
    """Mean, interval and values of a number; of a dictionary, the same of what all seeds have in it."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, dict):
        names = [name for name in first if all(name in value for value in values)]
        return {
            name: _over_seeds(
                [value[name] for value in values], share or name in _SHARES or name.endswith(_SHARE_NAMES)
            )
            for name in names
        }
    if first is None or isinstance(first, str | list):
        return values
    if None in values:
        return {"mean": None, "interval_95": [None, None], "values": values}
    mean, *ends = mean_interval([float(value) for value in values])
    if share:  # what cannot be the mean needs no place in its interval
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    return {
        "mean": round(mean, 6),
        "interval_95": [None if math.isnan(end) else round(end, 6) for end in ends],
        "values": values,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "transformer-lens", "datasets", "accelerate", "pandas", "plotly")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _machine() -> dict[str, Any]:
    """What this runs on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": processor, "cores": os.cpu_count(), "gpu": device, "threads": torch.get_num_threads()}
