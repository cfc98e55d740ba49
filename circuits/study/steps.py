"""The steps of the study: nothing but calls to the other rooms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas

from circuits.facts import make_dataset
from circuits.figures import attention_figure, save_figure
from circuits.interventions import pair_formats, pair_people
from circuits.masks import (
    SCOPES,
    SCORES,
    Graft,
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
from circuits.models import Model, facts_of
from circuits.rankings import (
    Evidence,
    agreement,
    attention_scores,
    critical_curve,
    curve_areas,
    curve_means,
    curve_summary,
    default_counts,
    rank_units,
    rankings_of,
    read_head,
    sufficient_curve,
)
from circuits.storage import provenance, write_json
from circuits.study.folder import COMPARED, EVALUATED, TRACED, StudyFolder
from circuits.study.study_page import study_figures, write_study_report
from circuits.study.summary import accuracies, summarise
from circuits.sweeps import sweep_heads, sweep_patches
from circuits.tracing import trace_gradients
from circuits.training import Job, train_side_by_side
from circuits.units import Head, Neuron

_SCORED = ("bio", "qa_id", "qa_ood")
_RANKED = ("qa_id", "qa_ood")


class Study(StudyFolder):
    """A study's folder with what fills it."""

    def steps(self) -> dict[str, Callable[[], None]]:
        """Every step by name, in their order."""
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
            for name in EVALUATED
            if name != "pre"
        ]
        self.write("curves", pandas.concat(curves, ignore_index=True).drop(columns="stage"))

    def evaluate(self) -> None:
        """Score every model on every split."""
        answers = [self.answers(self.model(name)).assign(model=name) for name in EVALUATED]
        table = pandas.concat(answers, ignore_index=True)
        self.write("answers", table)
        self.write("accuracy", accuracies(table, ["model"]))

    def answers(self, model: Model) -> pandas.DataFrame:
        """Every answer on every split, so that models can be compared question by question."""
        tables = [
            evaluate(model, self.sample(split, self.settings.evaluate_examples)).assign(split=split)
            for split in self.tasks
        ]
        return pandas.concat(tables, ignore_index=True)[["split", "example", "group", "attribute", *METRICS]]

    def trace(self) -> None:
        """Trace the gradients of both tasks."""
        for name in COMPARED:
            for split in TRACED:
                trace = trace_gradients(self.model(name), self.sample(split, self.settings.trace_examples))
                trace.save(self.out / "traces" / name / f"{split}.safetensors")

    def share(self) -> None:
        """Find the shared parameters."""
        reports, curves, heads, neurons, hooked = [], [], [], [], []
        fraction, draws, seed = self.settings.fraction, self.settings.draws, self.settings.seed
        for name in COMPARED:
            traces = self.traces(name)
            for scope in SCOPES:
                of = {"model": name, "scope": scope}
                mask = shared_parameters(traces, fraction, scope)
                mask.save(self.mask_file(name, scope))
                reports.append(of | sharing(traces, fraction, draws, seed=seed, scope=scope))
                curves.append(
                    sharing_curve(traces, self.settings.fractions, draws, seed=seed, scope=scope).assign(**of)
                )
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
        for name in COMPARED:
            for scope in SCOPES:
                model, mask, pre = self.model(name), self.mask(name, scope), self.model("pre")
                each = ablate_mask(model, mask, tasks, pre=pre, mode="revert", draws=draws, seed=seed, per_answer=True)
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
        for name in COMPARED:
            fine_tuned = self.model(name)
            if not evaluate(fine_tuned, task)["exact_match"].any():
                continue  # there is nothing to keep: such a model has no rows
            for score in SCORES:
                found = graft_by_score(pre, fine_tuned, task, score=score, keep=keep)
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
        self.write("grafted", accuracies(answers, keys))

    def rank(self) -> None:
        """Rank heads and neurons, and test whether the top ones are enough and needed."""
        tasks = [self.sample(split, self.settings.rank_examples) for split in _RANKED]
        # a new model can do nothing with the embeddings it had before training
        rest = "fine_tuned" if self.settings.model is None else "pre"
        rankings, curves, summaries, agreements, areas = [], [], [], [], []
        for name in COMPARED:
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
                    for metric in rankings_of(evidence)
                    if not (metric == "ablation" and kind is Neuron) and not (metric == "graft_size" and best is None)
                ]
                of_tensors = replace(evidence, shared=self.mask(name, "tensor"))
                per_tensor = rank_units(of_tensors, kind, ["shared_size"], draws=self.settings.draws)
                ranking = pandas.concat(
                    [
                        rank_units(evidence, kind, metrics, draws=self.settings.draws),
                        per_tensor.assign(metric="shared_size_per_tensor"),
                    ],
                    ignore_index=True,
                )
                counts = default_counts(ranking["unit"].nunique(), halvings=self.settings.rank_halvings)
                both = [
                    sufficient_curve(ranking, pre, fine_tuned, tasks=tasks, counts=counts, rest=rest, per_answer=True),
                    critical_curve(ranking, fine_tuned, tasks, pre=pre, counts=counts, per_answer=True),
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
        for name in COMPARED:
            # a task of its own in each call: what a head is set to comes from the task that is scored
            each = [sweep_heads(self.model(name), [task], self.settings.sweep_modes) for task in tasks]
            long = pandas.concat(each, ignore_index=True)
            wide = long.pivot(
                index=["layer", "index", "unit", "mode"],
                columns="task",
                values=[
                    *("exact_match", "exact_match_effect", "log_prob", "log_prob_effect"),
                    *("log_prob_effect_low", "log_prob_effect_high", "log_prob_effect_p", "log_prob_effect_q"),
                ],
            )
            wide.columns = [f"{metric}.{task}" for metric, task in wide.columns]
            tables.append(wide.reset_index().assign(model=name))
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
            sweep_patches(self.model(name), source, target, mode=kind).assign(model=name)
            for name in COMPARED
            for kind, source in sources.items()
        ]
        self.write("patches", pandas.concat(tables, ignore_index=True))

    def attend(self) -> None:
        """Score every head's attention, and draw the attention figures."""
        questions = self.sample("qa_ood", self.settings.sweep_examples)
        formats = {"bio": pair_formats(questions, self.tasks["bio"]), "qa": questions}
        tables = [attention_scores(self.model(name), formats).assign(model=name) for name in COMPARED]
        scores = pandas.concat(tables, ignore_index=True)
        self.write("attention", scores)
        for head in dict.fromkeys((self.top_head(), self.attending_head())):
            save_figure(self.attention(head), self.figures / f"attention_{head}.html", "beside")

    def attention(self, head: Head) -> Any:
        """The attention figure of a head, over a fact of a QA-OOD person that the mixed model recalls."""
        model, task = self.model("mixed"), self.tasks["qa_ood"]
        scores = evaluate(model, task)
        recalled = scores[scores["exact_match"] & (scores["attribute"] == "university")]
        example = int((recalled if len(recalled) else scores)["example"].iloc[0])
        question = task.select([example])
        biography = pair_formats(question, self.tasks["bio"])
        readings = [
            read_head(model, head, biography, example=0, title="BIO"),
            read_head(model, head, question, example=0, title="QA"),
        ]
        return attention_figure(readings, subtitle=f"mixed model, {self.start}, a QA-OOD person")

    def report(self) -> None:
        """Write the summary and the report."""
        models = {name: facts_of(self.model(name)) for name in EVALUATED}
        summary = {
            **summarise(self, list(self.steps())),
            "provenance": provenance(dataset=self.dataset.fingerprint, models=models),
        }
        write_json(self.out / "summary.json", summary)
        tables = self.all_tables()
        figures = study_figures(tables, self.settings.keep)
        for name, figure in figures.items():
            save_figure(figure, self.figures / f"{name}.html", "beside")
        heads = dict.fromkeys((summary["top_head"], summary["attending_head"]))
        attention = {head: self.attention(Head.parse(head)) for head in heads}
        write_study_report(self.out / "report.html", summary, tables, figures, attention)
