"""The steps of the study: nothing but calls to the other rooms."""

import pandas
import plotly.graph_objects as go

from circuits.analysis import Analysis, accuracies
from circuits.analysis import compare as compare_models
from circuits.analysis.artifacts import MASKS, Table
from circuits.analysis.comparison import overlap
from circuits.analysis.running import step
from circuits.facts import make_dataset
from circuits.figures import attention_figure, save_figure
from circuits.interventions import pair_formats, pair_people
from circuits.metrics import METRICS
from circuits.metrics import evaluate as score
from circuits.rankings import attention_scores, read_head
from circuits.storage import provenance, write_json
from circuits.study.along import callbacks_along, consistency_along
from circuits.study.analyses import analyse_side_by_side
from circuits.study.folder import COMPARED, EVALUATED, LEFT_OUT, Study
from circuits.study.rates import recall_by_rate
from circuits.study.study_page import study_figures, write_study_report
from circuits.study.summary import summarise
from circuits.sweeps import sweep_patches
from circuits.training import Job, train_side_by_side

CURVES, ALONG = Table("curves"), Table("consistency_along")
ANSWERS, ACCURACY = Table("answers"), Table("accuracy")
RATES, UPDATED = Table("rates"), Table("updated")
PATCHES, ATTENTION = Table("patches_from_people"), Table("attention")


@step()
def data(study: Study) -> tuple[()]:
    """Make people, biographies and questions."""
    make_dataset(study.out / "data", study.settings.data)
    return ()


@step(CURVES, ALONG)
def train(study: Study) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Train mixed, two-stage, and two-stage with a small second rate."""
    train_side_by_side(
        [Job("mixed"), Job("bio-only"), Job("two-stage", "bio-only"), Job("two-stage-gentle", "bio-only")],
        study.dataset,
        study.checkpoints,
        start=study.settings.model or f"tiny-{study.settings.family}",
        optimisation=study.settings.optimisation,
        seed=study.settings.seed,
        evaluate_every=study.settings.evaluate_every,
        callbacks=callbacks_along(study),
    )
    curves = [
        pandas.read_parquet(study.checkpoints / name / "curve.parquet").assign(model=name)
        for name in EVALUATED
        if name != "pre"
    ]
    return pandas.concat(curves, ignore_index=True).drop(columns="stage"), consistency_along(study)


@step(ANSWERS, ACCURACY)
def evaluate(study: Study) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score every model on every split."""
    asked = {split: study.sample(split, study.settings.evaluate_examples) for split in study.tasks}
    scored = [
        score(study.model(name), task).assign(split=split, model=name)
        for name in EVALUATED
        for split, task in asked.items()
    ]
    names = ["model", "split", "example", "group", "attribute", *METRICS]
    answers = pandas.concat(scored, ignore_index=True)[names]
    return answers, accuracies(answers, ["model", "split"])


@step(RATES, needs=[ACCURACY])
def rates(study: Study, accuracy: pandas.DataFrame) -> tuple[pandas.DataFrame]:
    """Train second stages at more rates."""
    return (recall_by_rate(study, accuracy),)


@step()
def analyse(study: Study) -> tuple[()]:
    """Analyse the models side by side."""
    analyse_side_by_side(study)
    return ()


@step()
def compare(study: Study) -> tuple[()]:
    """Set the mixed model beside the two-stage one."""
    one, other = (study.model(name) for name in COMPARED)
    compare_models(
        one,
        other,
        list(study.tasks.values()),
        out=study.comparison,
        pre=study.model("pre"),
        names=COMPARED,
        settings=study.settings.analysis,
        skip=LEFT_OUT,
    )
    return ()


@step(UPDATED)
def updated(study: Study) -> tuple[pandas.DataFrame]:
    """Set the parameters that both formats updated along training beside the shared ones."""
    shared = []
    for name, folder in study.updated.items():
        found, first = Analysis(folder), MASKS.load(study.arms[name])
        rows = [
            {"scope": scope, "of_shared": first[scope].size}
            | {f"{column}_with_shared": value for column, value in overlap(mask, first[scope]).items()}
            for scope, mask in found.masks.items()
        ]
        shared.append(found.tables["shared"].merge(pandas.DataFrame(rows), on="scope").assign(model=name))
    return (pandas.concat(shared, ignore_index=True),)


@step(PATCHES)
def patch_people(study: Study) -> tuple[pandas.DataFrame]:
    """Patch every head from the run of another person."""
    target = study.sample("qa_ood", study.settings.sweep_examples)
    # the few examples that a pretrained model has time for hold no partners for each other
    among = target if study.settings.model is None else study.tasks["qa_ood"]
    source = pair_people(target, study.settings.seed, among)
    tables = [sweep_patches(study.model(name), source, target).assign(model=name) for name in COMPARED]
    return (pandas.concat(tables, ignore_index=True),)


@step(ATTENTION)
def attend(study: Study) -> tuple[pandas.DataFrame]:
    """Score every head's attention in both formats."""
    questions = study.sample("qa_ood", study.settings.sweep_examples)
    formats = {"bio": pair_formats(questions, study.tasks["bio"]), "qa": questions}
    tables = [attention_scores(study.model(name), formats).assign(model=name) for name in COMPARED]
    return (pandas.concat(tables, ignore_index=True),)


@step()
def report(study: Study) -> tuple[()]:
    """Write the summary and the report."""
    tables, facts = study.tables(), study.facts
    source = provenance(dataset=facts["dataset"], models=facts["models"])
    summary = {**summarise(study, tables), "provenance": source}
    write_json(study.out / "summary.json", summary)
    figures = study_figures(tables, study.settings.keep)
    heads = dict.fromkeys((summary["top_head"], summary["attending_head"]))
    attention = {head: _attention(study, head) for head in heads}
    for name, figure in (figures | {f"attention_{head}": one for head, one in attention.items()}).items():
        save_figure(figure, study.figures / f"{name}.html", "beside")
    write_study_report(study.out / "report.html", summary, tables, figures, attention)
    return ()


def _attention(study: Study, head: str) -> go.Figure:
    """The attention figure of a head, over a fact of a QA-OOD person that the mixed model recalls."""
    model, task = study.model("mixed"), study.tasks["qa_ood"]
    scores = score(model, task)
    recalled = scores[scores["exact_match"] & (scores["attribute"] == "university")]
    question = task.select([int((recalled if len(recalled) else scores)["example"].iloc[0])])
    biography = pair_formats(question, study.tasks["bio"])
    readings = [
        read_head(model, head, biography, example=0, title="BIO"),
        read_head(model, head, question, example=0, title="QA"),
    ]
    return attention_figure(readings, subtitle=f"mixed model, {study.start}, a QA-OOD person")


STEPS = (data, train, evaluate, rates, analyse, compare, updated, patch_people, attend, report)
