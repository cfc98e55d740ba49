"""An analysis from files, on a model whose units are known; its steps, and its numbers against the slow way."""

import json
import re
import shutil

import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from circuits.analysis import STEPS, Analysis, AnalysisSettings, accuracies, analyse, top_table
from circuits.cli.app import app
from circuits.errors import CircuitsError
from circuits.interventions import Intervention, run_interventions
from circuits.masks import shared_parameters, sharing
from circuits.metrics import evaluate
from circuits.models import load_model
from circuits.rankings import Evidence, default_counts, rank_units
from circuits.statistics import intervals
from circuits.tasks import Task
from circuits.tracing import trace_checkpoints, trace_gradients
from circuits.units import Head, Neuron
from tests.fixtures import few_points, loaded, without_pages
from tests.test_planted_truth import planted_checkpoint, planted_units, reached, task_of

pytestmark = pytest.mark.usefixtures("all_unchecked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The hand-built model as a checkpoint, and its two tasks as files of prompts."""
    folder = tmp_path_factory.mktemp("planted")
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(26)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    planted_checkpoint().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in "AB":
        rows = [[f"w{token}" for token in tokens] for tokens in task_of(name).tokens.tolist()]
        lines = [json.dumps({"prompt": " ".join(row[:-1]), "answer": f" {row[-1]}"}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def planted(folder):
    """The analysis that the command makes of them."""
    fraction = reached(trace_gradients(load_model(planted_checkpoint()), task_of("A")))
    tasks = [word for name in "AB" for word in ("--task", folder / f"{name}.jsonl")]
    command = ["analyse", folder / "model", *tasks, "--out", folder / "out", "--fraction", fraction, "--draws", 2]
    result = run(*command)
    assert result.exit_code == 0, result.output
    return Analysis(folder / "out"), command, result.output


def test_planted_units_come_out_of_the_command(planted):
    found, _, _ = planted
    for name, kind in (("shared_heads", Head), ("shared_neurons", Neuron)):
        table = found.tables[name].query("scope == 'global'")
        assert set(table["unit"][table["size"] > 0]) == planted_units(kind, "both")
    # what a head of one task alone does, and what a dead one does
    effects = found.tables["sweep"].pivot(index="unit", columns="task", values="log_prob_effect")
    moved = {name: set(effects.index[effects[name].abs() > 1e-6]) for name in "AB"}
    assert not moved["A"] & planted_units(Head, "B", "neither")
    assert not moved["B"] & planted_units(Head, "A", "neither")
    assert moved["A"] & planted_units(Head, "A")
    assert moved["B"] & planted_units(Head, "B")


def test_the_command_says_how_long_it_takes_what_it_finds_and_where(planted):
    found, _, output = planted
    assert re.search("about [0-9]+ (seconds|minutes) on this machine", output)
    assert "patch is left out: no task has counterfactuals, and no two have groups in common" in output
    assert "the heads that matter most" in output
    assert str(found.report) in output.replace("\n", "")
    page = found.report.read_text()
    for title in ("What the model says", "What the tasks share", "What happens without it", "Which heads"):
        assert f"<h2>{title}</h2>" in page
    assert found.summary["left_out"] == {
        "graft": "there is no model before fine-tuning (pre)",
        "patch": "no task has counterfactuals, and no two have groups in common",
        "attend": "no task has spans",
        "consistency": "no two tasks tell three facts of the same groups",
        "localise": "there is no model before fine-tuning (pre)",
        "signature": "no task has spans",
        "integrate": "no task has spans",
    }
    assert set(found.summary["seconds"]) == {step.name for step in STEPS} - set(found.summary["left_out"])


def test_what_is_there_is_not_done_again(planted):
    found, command, _ = planted
    files = [file for file in found.folder.rglob("*") if file.suffix in (".parquet", ".safetensors")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert "on this machine" not in run(*command).output  # what lacks something is not waited for
    (found.folder / "steps" / "sweep.json").unlink()
    sweep = found.tables["sweep"]
    assert run(*command).exit_code == 0
    after = {file: file.stat().st_mtime_ns for file in files}
    assert {file.name for file in files if after[file] != before[file]} == {"sweep.parquet", "sweep_answers.parquet"}
    pandas.testing.assert_frame_equal(found.tables["sweep"], sweep)
    with pytest.raises(CircuitsError, match=r"holds an analysis with settings\.seed 0, not 1"):
        run(*command, "--seed", 1)
    # of other tasks
    first = command.index("--task")
    with pytest.raises(CircuitsError, match="holds an analysis of A and B, not of B: give the same tasks"):
        run(*command[:first], *command[first + 2 :])


@pytest.fixture(scope="module")
def both(tasks):
    """A model on two tasks of people, with its start."""
    chosen = [tasks[name].select(range(8)) for name in ("bio", "qa_id")]
    return loaded("llama"), loaded("llama", seed=1), chosen


#: Everything, of little.
LITTLE = AnalysisSettings(
    draws=2,
    neurons=3,
    drawn=1,
    fractions=(0.01,),
    rankings=("shared_size", "change"),
    halvings=1,
    examples_by_step={"rank": 3, "consistency": 6, "localise": 6, "signature": 6, "integrate": 2},
)


@pytest.fixture(scope="module")
def people(both, tmp_path_factory):
    model, pre, tasks = both
    with few_points():
        return analyse(model, tasks, pre, out=tmp_path_factory.mktemp("people") / "out", settings=LITTLE)


def test_every_step_is_what_its_room_gives(both, people):
    model, _, (bio, qa) = both
    assert people.summary["left_out"] == {}
    answers = people.tables["answers"]
    alone = evaluate(model, qa)["log_prob"].tolist()
    assert answers.loc[answers["task"] == "qa_id", "log_prob"].tolist() == pytest.approx(alone)
    traced = trace_gradients(model, bio)
    assert all(torch.equal(people.traces["bio"].gradients[name], value) for name, value in traced.gradients.items())
    plan = [Intervention((Head(1, 2),))]
    row = run_interventions(model, qa, plan).iloc[0]
    swept = people.tables["sweep"].set_index(["unit", "task"]).loc[("L1H2", "qa_id")]
    for name in ("log_prob", "log_prob_effect", "log_prob_effect_low", "log_prob_effect_high", "log_prob_effect_p"):
        assert swept[name] == pytest.approx(row[name], abs=1e-6)
    assert set(people.tables["neurons"]["unit"]) <= set(people.tables["shared_neurons"]["unit"])
    assert len(people.tables["neurons"]) == 3 * 2
    assert set(people.tables["ablation"]["condition"]) >= {"none", "shared", "random"}


def test_accuracies_are_of_each_task_and_of_what_all_its_answers_have(both, tasks):
    model, (bio, qa) = both[0], (tasks["bio"], tasks["qa_id"])
    scored = [evaluate(model, bio).assign(task="bio"), evaluate(model, qa).assign(task="qa", logit_diff=1.0)]
    table = accuracies(pandas.concat(scored)).set_index("task")
    for name, alone in zip(("bio", "qa"), scored, strict=True):
        row = table.loc[name]
        assert row["answers"] == len(alone)
        assert row["log_prob"] == pytest.approx(alone["log_prob"].mean())
        low, high = intervals(alone["log_prob"].to_numpy(float), alone["group"].to_numpy(), kind="real")
        assert (row["log_prob_low"], row["log_prob_high"]) == (pytest.approx(low), pytest.approx(high))
    assert pandas.isna(table["logit_diff"]["bio"])
    assert table["logit_diff"]["qa"] == 1


def test_tasks_about_the_same_people_are_patched_into_each_other(people):
    assert set(people.tables["patches"]["task"]) == {"bio from qa_id", "qa_id from bio"}


def test_an_analysis_shows_itself(people):
    assert "steps=[ablate, attend, consistency, evaluate" in repr(people)
    assert "<table" in people._repr_html_()
    assert {"sharing", "shared_heads", "sweep", "patches", "attention"} <= set(people.figures)
    assert list(people.folder.glob("figures/attention_*.html"))
    with pytest.raises(KeyError, match="there is no table 'heads': choose from ablation"):
        people.tables["heads"]


@pytest.mark.usefixtures("pageless")
def test_steps_are_chosen_with_what_they_need(both, tmp_path):
    model, _, tasks = both
    found = analyse(model, tasks, out=tmp_path / "only", only=["ablate"], settings=AnalysisSettings(draws=2))
    assert set(found.summary["seconds"]) == {"trace", "share", "ablate"}
    found = analyse(model, tasks, out=tmp_path / "only", only=["evaluate"], settings=AnalysisSettings(draws=2))
    assert set(found.summary["seconds"]) == {"trace", "share", "ablate", "evaluate"}


@pytest.fixture(scope="module")
def by_step(tasks, tmp_path_factory):
    """Three tasks, one of which is held out of the shared set."""
    chosen = [tasks[name].select(range(8)) for name in ("bio", "qa_id", "qa_ood")]
    settings = AnalysisSettings(
        draws=2,
        neurons=0,
        fractions=(),
        modes=("zero", "mean"),
        rankings=("shared_size", "ablation", "graft_size"),
        ties=2,
        halvings=1,
        tenths=True,
        tasks_by_step={"trace": ("bio", "qa_id"), "sweep": ("qa_ood",), "rank": ("qa_id", "qa_ood")},
        examples_by_step={"trace": 4, "ablate": 5, "sweep": 4, "rank": 3},
    )
    out = tmp_path_factory.mktemp("by_step") / "out"
    with few_points(), without_pages():
        return analyse(
            loaded("llama"),
            chosen,
            loaded("llama", seed=1),
            out=out,
            settings=settings,
            skip=["patch", "attend", "consistency", "localise", "signature", "integrate"],
        )


def test_a_step_is_done_on_the_tasks_and_examples_that_are_asked_for(by_step, tasks):
    traces = [trace_gradients(loaded("llama"), tasks[name].select(range(8)).sample(4)) for name in ("bio", "qa_id")]
    assert list(by_step.traces) == ["bio", "qa_id"]
    for scope, mask in by_step.masks.items():
        expected = shared_parameters(traces, 0.01, scope)
        assert mask.size == expected.size == (mask & expected).size
        found = by_step.tables["sharing_curve"].query("scope == @scope").reset_index(drop=True)
        row = {"scope": scope, "fraction": 0.01, **sharing([*by_step.traces.values()], 0.01, 2, scope=scope)}
        pandas.testing.assert_frame_equal(found, pandas.DataFrame([row]), check_exact=True)
    counts = by_step.tables["ablation_answers"].groupby(["scope", "condition", "draw", "task"])["example"].nunique()
    assert set(counts) == {5}
    assert set(by_step.tables["ablation"]["task"]) == {"bio", "qa_id", "qa_ood"}
    assert set(by_step.tables["sweep"]["task"]) == {"qa_ood"}
    answers = by_step.tables["ranking_answers"]
    assert answers.groupby("task")["example"].nunique().to_dict() == {"qa_id": 3, "qa_ood": 3}


def test_heads_are_ablated_and_ranked_as_asked(by_step, tasks):
    swept = by_step.tables["sweep"]
    assert swept.groupby("mode")["unit"].nunique().to_dict() == {"mean": 16, "zero": 16}
    assert top_table(by_step.tables).columns.tolist()[:4] == [
        "head", "shared", "without: qa_ood, zero", "without: qa_ood, mean",
    ]  # fmt: skip
    assert "sweep" in by_step.figures
    ranked = by_step.tables["rankings"]
    metrics = {"shared_size", "shared_size_per_tensor", "bio_trace", "qa_id_trace", "random"}
    # of a model that answers nothing there is no graft
    of_heads = {"ablation", "graft_size"} if "qa_id" in by_step.grafts else {"ablation"}
    assert set(ranked.query("kind == 'head'")["metric"]) == metrics | of_heads
    assert set(ranked.query("kind == 'neuron'")["metric"]) == metrics
    tied = ranked.query("kind == 'neuron' and metric == 'shared_size'")
    assert set(tied["draw"]) == {0, 1}
    own = tasks["qa_id"].select(range(8)).sample(3)
    expected = rank_units(Evidence(loaded("llama"), task=own), Head, ["ablation"])
    found = ranked.query("kind == 'head' and metric == 'ablation'")
    assert found["unit"].tolist() == expected["unit"].tolist()
    counts = by_step.tables["ranking_curves"].query("kind == 'neuron'")["n"].unique().tolist()
    with few_points():
        assert sorted(counts) == default_counts(ranked.query("kind == 'neuron'")["unit"].nunique(), halvings=1)


def test_what_cannot_be_analysed_is_refused(both, tmp_path, unchecked):
    model, _, (bio, qa) = both
    with pytest.raises(CircuitsError, match="there is no step 'sweeps': choose from evaluate, trace"):
        analyse(model, [bio, qa], out=tmp_path / "a", only=["sweeps"])
    with pytest.raises(CircuitsError, match="the step ablate needs share, which is to be skipped"):
        analyse(model, [bio, qa], out=tmp_path / "a", only=["ablate"], skip=["share"])
    with pytest.raises(CircuitsError, match="two tasks are called bio"):
        analyse(model, [bio, bio], out=tmp_path / "a")
    other = Task(**{**bio.__dict__, "name": "other"})
    with pytest.raises(CircuitsError, match="the tasks bio and other are the same prompts"):
        analyse(model, [bio, other], out=tmp_path / "a")
    with pytest.raises(CircuitsError, match="there is nothing to analyse: give a task"):
        analyse(model, [], out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(CircuitsError, match="full holds something that is not an analysis"):
        analyse(model, bio, out=tmp_path / "full")
    with pytest.raises(CircuitsError, match="holds no analysis: it has no analysis.json"):
        Analysis(tmp_path)
    with pytest.raises(CircuitsError, match="keep is 2: it must be more than 0 and at most 1"):
        AnalysisSettings(keep=2)
    with pytest.raises(CircuitsError, match="there is no rest 'base': choose from fine_tuned, pre"):
        AnalysisSettings(rest="base")
    with pytest.raises(CircuitsError, match="there is no mode 'banana': choose from zero, mean"):
        AnalysisSettings(modes=("banana",))
    with pytest.raises(CircuitsError, match="there is no ranking 'banana': choose from shared_size"):
        AnalysisSettings(rankings=("banana",))
    with pytest.raises(CircuitsError, match="the number of examples for trace is 0: it must be 1 or more"):
        AnalysisSettings(examples_by_step={"trace": 0})
    with pytest.raises(CircuitsError, match="there is no step 'tracing': choose from evaluate, trace"):
        analyse(model, bio, out=tmp_path / "a", settings=AnalysisSettings(examples_by_step={"tracing": 1}))
    settings = AnalysisSettings(tasks_by_step={"trace": ("bio", "qa")})
    with pytest.raises(CircuitsError, match="the step trace is to be done on 'qa': choose from bio, qa_id"):
        analyse(model, [bio, qa], out=tmp_path / "a", settings=settings)
    with pytest.raises(CircuitsError, match="the task 'a/b' cannot name a file of results"):
        analyse(model, Task(**{**bio.__dict__, "name": "a/b"}), out=tmp_path / "a")


@pytest.mark.usefixtures("pageless")
def test_traces_made_elsewhere_are_taken(both, tmp_path):
    model, pre, tasks = both
    traces = {task.name: trace_checkpoints([pre, model], task) for task in tasks}
    found = analyse(model, tasks, out=tmp_path / "out", only=["share"], traces=traces)
    expected = shared_parameters(list(traces.values()), 0.01, "tensor")
    assert found.masks["tensor"].size == expected.size > 0
    assert (found.masks["tensor"] & expected).size == expected.size
    for name, trace in traces.items():
        assert torch.equal(found.traces[name].gradients["blocks.0.attn.W_V"], trace.gradients["blocks.0.attn.W_V"])
    # they are part of what the folder was made from
    with pytest.raises(CircuitsError, match="holds an analysis with traces"):
        analyse(model, tasks, out=tmp_path / "out", only=["share"])


def test_traces_of_something_else_are_refused(both, tmp_path, unchecked):
    model, pre, tasks = both
    bio = trace_gradients(model, tasks[0])
    for traces, message in (
        ({"bio": bio}, "traces are given of bio, but the tasks that are traced are bio, qa_id: give one of each"),
        ({"bio": bio, "qa_id": bio}, "the trace given for qa_id is of bio"),
        ({"bio": bio, "qa_id": trace_gradients(pre, tasks[1])}, "the trace of qa_id is of the model .*, not of"),
    ):
        with pytest.raises(CircuitsError, match=message):
            analyse(model, tasks, out=tmp_path / "out", traces=traces)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("pageless")
def test_what_has_no_record_is_made_again_whatever_lies_there(both, people, tmp_path):
    """A step that died before its record was written leaves nothing that is taken for its result."""
    model, pre, tasks = both
    shutil.copytree(people.folder, tmp_path / "out")
    for name in ("trace", "share", "ablate", "neurons", "rank"):
        (tmp_path / "out" / "steps" / f"{name}.json").unlink()
    (tmp_path / "out" / "tables" / "shared.parquet").write_bytes(b"half")
    with few_points():
        found = analyse(model, tasks, pre, out=tmp_path / "out", settings=LITTLE)
    for name in ("shared", "ablation", "ranking_curves"):
        pandas.testing.assert_frame_equal(found.tables[name], people.tables[name])
