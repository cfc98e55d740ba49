"""Analyses whose longest steps are shared out to workers."""

from contextlib import contextmanager
from dataclasses import replace
from pickle import dumps, loads

import pandas
import pytest
import torch
from typer.testing import CliRunner

from circuits.analysis import AnalysisSettings, analyse, compare, jobs, steps
from circuits.cli.app import app
from circuits.errors import CircuitsError
from circuits.executors import Processes
from circuits.interventions import single
from circuits.models import load_model
from circuits.tracing.shards import Shard
from circuits.units import Head
from tests.fixtures import FAMILIES, lively, loaded, without_pages

pytestmark = pytest.mark.usefixtures("all_unchecked")

STEPS = ("sweep", "neurons", "patch")
TABLES = ("sweep", "sweep_answers", "neurons", "neuron_answers", "patches", "patch_answers")
SETTINGS = AnalysisSettings(draws=2, neurons=7, fractions=(0.01,), modes=("zero", "mean"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    lively(FAMILIES[0]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(tasks):
    """Two tasks about the same people, of which one has foils, so that each is measured by other metrics."""
    qa = tasks["qa_id"]
    qa = qa.select(qa.answers.loc[qa.answers["end"] - qa.answers["start"] == 1, "example"].tolist()[:6])
    foils = qa.tokens.clone()
    places = torch.arange(len(qa)), torch.tensor(qa.answers["start"].tolist())
    foils[places] = (foils[places] + 1) % 90
    return [tasks["bio"].select(range(8)), replace(qa, foils=replace(qa, tokens=foils))]


class Elsewhere:
    """Runs jobs in the wrong order, as in another process; stops as Ctrl-C would after so many."""

    def __init__(self, shared: bool = True, after: int | None = None) -> None:
        self.shared, self.after, self.ran = shared, after, []

    @contextmanager
    def start(self, work, _, *, threads=1):
        assert threads == 1
        worker = loads(dumps(work))

        def run(given):
            for job in reversed(given):
                if len(self.ran) == self.after:
                    raise KeyboardInterrupt
                self.ran.append(job)
                yield job, loads(dumps(worker(job)))

        yield run

    @property
    def interventions(self) -> list[jobs.Job]:
        return [job for job in self.ran if isinstance(job, jobs.Job)]


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch):
    """So that each task has several jobs and shards."""
    monkeypatch.setattr(jobs, "_TOGETHER", 5)
    monkeypatch.setattr(steps, "_TRACED_TOGETHER", 3)


@pytest.fixture(scope="module", autouse=True)
def only_tables():
    with without_pages():
        yield


@pytest.fixture(scope="module")
def serial(folder, asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial") / "out"
    return analyse(load_model(folder), asked, out=out, settings=SETTINGS, only=STEPS)


def same_tables(one, two, names=TABLES, *, facts=True) -> None:
    """Whether tables are the same to the byte, and with them what they say they came from."""
    for name in names:
        pandas.testing.assert_frame_equal(one.tables[name], two.tables[name], check_exact=True)
        for ending in (".parquet", ".csv") if facts else (".csv",):
            files = [found.folder / "tables" / f"{name}{ending}" for found in (one, two)]
            assert files[0].read_bytes() == files[1].read_bytes()


def same_traces(one, two) -> None:
    assert [*one.traces] == [*two.traces]
    for name, trace in one.traces.items():
        for tensor, value in trace.gradients.items():
            other = two.traces[name].gradients[tensor]
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("shared", [True, False])
def test_workers_give_the_same_tables_to_the_byte(folder, asked, serial, tmp_path, shared):
    executor = Elsewhere(shared)
    found = analyse(load_model(folder), asked, out=tmp_path / "out", settings=SETTINGS, only=STEPS, executor=executor)
    same_traces(serial, found)
    same_tables(serial, found)
    # heads in two modes, and neurons, on two tasks; heads from each task's run into the other's
    counts = [
        len(found.tables[name].query("task == @task"))
        for name in ("sweep", "neurons", "patches")
        for task in found.tables[name]["task"].unique()
    ]
    assert len(executor.interventions) == sum(-(-count // 5) for count in counts) > 2 * len(counts)
    assert {"logit_diff", "group"} <= {*found.tables["sweep_answers"]}
    shards = [job for job in executor.ran if isinstance(job, Shard)]
    assert [(job.start, job.stop) for job in reversed(shards)] == [(0, 3), (3, 6), (0, 3), (3, 6), (6, 8)]
    # nothing is left of what was under way
    files = [{path.relative_to(one.folder) for path in one.folder.rglob("*")} for one in (serial, found)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_processes_give_the_same_tables_to_the_byte(folder, asked, serial, tmp_path):
    given = {"settings": SETTINGS, "traces": {name: serial.traces[name] for name in serial.traces}}
    found = analyse(
        load_model(folder), asked, out=tmp_path / "out", only=["sweep", "patch"], executor=Processes(1), **given
    )
    same_tables(serial, found, ("sweep", "sweep_answers", "patches", "patch_answers"), facts=False)  # of given traces


def test_what_was_interrupted_goes_on_with_what_is_missing(folder, asked, serial, tmp_path):
    model, out = load_model(folder), tmp_path / "out"
    given = {"out": out, "settings": SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        analyse(model, asked, only=["sweep"], executor=Elsewhere(after=9), **given)
    kept = {path: path.stat().st_mtime_ns for path in (out / "steps" / "sweep").glob("*.parquet")}
    assert len(kept) == 9
    with pytest.raises(KeyboardInterrupt):
        analyse(model, asked, only=["sweep"], executor=Elsewhere(after=0), **given)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    last = Elsewhere()
    found = analyse(model, asked, only=["sweep"], executor=last, **given)
    assert len(last.ran) == 14 - 9
    same_tables(serial, found, ("sweep", "sweep_answers"))
    # another executor, or none, goes on with the analysis; a trace that was begun in another way is made anew
    with pytest.raises(KeyboardInterrupt):
        analyse(model, asked, only=STEPS, executor=Elsewhere(after=2), **given)
    assert (out / "traces" / "bio.safetensors.shards").is_dir()
    found = analyse(model, asked, only=STEPS, **given)
    same_tables(serial, found)
    assert all(path.suffix == ".safetensors" for path in (out / "traces").iterdir())


def test_an_analysis_that_began_here_goes_on_elsewhere(folder, asked, serial, tmp_path):
    model, out = load_model(folder), tmp_path / "out"
    analyse(model, asked, out=out, settings=SETTINGS, only=["trace"])
    (out / "steps" / "trace.json").unlink()
    (out / "traces" / "qa_id.safetensors").unlink()
    executor = Elsewhere()
    found = analyse(model, asked, out=out, settings=SETTINGS, only=["neurons"], executor=executor)
    assert len([job for job in executor.ran if isinstance(job, Shard)]) == 2
    same_tables(serial, found, ("neurons", "neuron_answers"))


def test_models_that_workers_cannot_load_are_refused_before_anything_runs(folder, asked, tmp_path):
    given = {"out": tmp_path / "out", "settings": SETTINGS, "executor": Elsewhere()}
    memory, model, changed = loaded(FAMILIES[0]), load_model(folder), load_model(folder)
    with pytest.raises(CircuitsError, match="^a model in memory cannot be sent to workers: save it, and give its fol"):
        analyse(memory, asked, **given)
    with torch.no_grad():
        next(iter(changed.checkpoint.tensors.values())).add_(1.0)
    for call in (lambda: analyse(changed, asked, **given), lambda: compare(model, changed, asked, **given)):
        with pytest.raises(CircuitsError, match="is not the model that was given"):
            call()
    with pytest.raises(CircuitsError, match="a model in memory cannot be sent to workers"):
        compare(model, memory, asked, **given)
    with pytest.raises(CircuitsError, match="there is no executor 'banana'"):
        analyse(model, asked, **given | {"executor": "banana"})
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value)  # noqa: ARG005
    with pytest.raises(CircuitsError, match="hook"):
        analyse(model, asked, **given)
    assert list(tmp_path.iterdir()) == []
    assert given["executor"].ran == []


def test_the_commands_hand_their_options_to_the_executor(folder, dataset, tmp_path, monkeypatch):
    given = []
    for name in ("analyse", "compare"):
        monkeypatch.setattr(f"circuits.analysis.{name}", lambda *_, **options: given.append(options) or 1 / 0)
    options = ["--task", "qa_id", "--data", dataset.folder, "--out", tmp_path / "out", "--executor", "processes"]
    for words in (["analyse", folder], ["compare", folder, folder]):
        command = [str(word) for word in (*words, *options)]
        assert isinstance(CliRunner().invoke(app, [*command, "--workers", "3"]).exception, ZeroDivisionError)
        assert given.pop()["executor"] == Processes(3)
        with pytest.raises(CircuitsError, match="the executor processes has no address: choose ray"):
            CliRunner().invoke(app, [*command, "--address", "auto"], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_missing_or_there_twice_are_noticed(folder, asked):
    given = jobs.Asked(asked[1], single([Head(layer, 0) for layer in range(4)] * 2, "zero"), ("exact_match",))
    model = load_model(folder)
    shares = [given.run_share(model, share) for share in range(given.shares)]
    assert len(shares) == 2
    assert len(shares[0])
    pandas.testing.assert_frame_equal(given.joined(shares[::-1]), given.run(model), check_exact=True)
    for wrong in ([shares[0][1:]], [*shares, shares[0]]):
        with pytest.raises(CircuitsError, match="memory was short in some jobs on qa_id"):
            given.joined(wrong)
