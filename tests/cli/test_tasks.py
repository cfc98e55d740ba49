"""Every command takes a file of prompts, and says in one sentence what is wrong with it."""

import json
import shutil
from pathlib import Path

import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset, open_task, word_tokenizer
from circuits.facts.pools import POOLS
from circuits.metrics import AnswerTokens, logit_diff
from circuits.models import answer_logits, load_model
from circuits.sweeps import SweepPlan
from circuits.sweeps.jobs import PreparedSweep
from circuits.tasks import Prompt, Task, read_prompts, write_prompts
from circuits.tracing import GradientTrace
from tests.cli.commands import call, refused
from tests.fixtures import lively


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints that know no people, a dataset, and prompts that the first checkpoint answers right."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = word_tokenizer()
    for seed in (0, 1):
        lively("llama", seed).save_pretrained(folder / f"model{seed}")
        tokenizer.save_pretrained(folder / f"model{seed}")
    make_dataset(folder / "facts", DatasetSettings(people=12))
    model = load_model(folder / "model0")
    last, cities = POOLS["invented"].last_names, POOLS["invented"].cities
    known = [name for name in (*last, *(city for city in cities if " " not in city)) if name in tokenizer.get_vocab()]
    prompts = []
    for one, other in zip(known[:6], known[6:12], strict=True):
        text, changed = (f"{name} was born in" for name in (one, other))
        with torch.no_grad():
            best = model(torch.tensor([tokenizer(text).input_ids]))[0, -1].argsort(descending=True)
        right, wrong = [word for word in map(tokenizer.decode, best[:40]) if word.strip("<>").isalpha()][:2]
        about = {"answer": f" {right}", "foil": f" {wrong}", "counterfactual": changed, "spans": {"who": one}}
        prompts.append(Prompt(text, **about))
    write_prompts(folder / "births.jsonl", prompts)
    return folder


@pytest.fixture
def births(place, tmp_path, monkeypatch):
    """The file of prompts, in a folder of the test's own where the command is given."""
    monkeypatch.chdir(tmp_path)
    return shutil.copy(place / "births.jsonl", tmp_path / "births.jsonl")


def must(*arguments: object) -> str:
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_evaluate_scores_prompts_and_their_foils(place, births):
    shutil.copy(births, "births2.jsonl")
    shown = must("evaluate", place / "model0", "--task", births, "--task", "births2.jsonl", "--out", "s.parquet")
    assert "logit" in shown  # in two lines, where numbers are wide
    table = pandas.read_parquet("s.parquet")
    assert table["task"].tolist() == ["births"] * 6 + ["births2"] * 6
    model = load_model(place / "model0")
    task = Task.from_file(births, model.tokenizer)
    with torch.no_grad():
        expected = logit_diff(answer_logits(model, task), AnswerTokens.of(task))
    assert table["logit_diff"].tolist() == pytest.approx([*expected.tolist()] * 2, abs=1e-4)
    assert "dataset" not in table.attrs
    assert table.attrs["tasks"]["births"]["prompts"] == task.provenance["prompts"]


def test_people_and_prompts_go_into_one_table(place, births):
    must("evaluate", place / "model0", "--data", place / "facts", "--task", births, "--task", "qa_ood", "--examples", 3,
         "--out", "s.parquet", "--csv")  # fmt: skip
    table = pandas.read_parquet("s.parquet")
    assert table.groupby("task")["logit_diff"].count().to_dict() == {"births": 3, "qa_ood": 0}
    assert {"dataset", "tasks"} <= set(table.attrs)
    assert set(table.attrs["tasks"]) == {"births", "qa_ood"}


def test_every_other_command_takes_prompts(place, births):
    model, pre = place / "model0", place / "model1"
    must("trace", model, "--task", births, "--out", "traces")
    assert GradientTrace.load("traces/births.safetensors").examples == 6
    must("ablate", model, "--task", births, "--head", "L1H1", "--out", "heads.parquet")
    assert pandas.read_parquet("heads.parquet")["task"].tolist() == ["births"] * 2
    must("patch", model, "--task", births, "--head", "L1H1", "--out", "patch.parquet")
    patched = pandas.read_parquet("patch.parquet")
    assert patched["mode"].tolist() == ["counterfactuals"]
    assert "source_exact_match" in patched
    must("graft", model, "--pre", pre, "--task", births, "--by", "change", "--out", "graft")
    assert "data" not in json.loads(Path("graft/model/circuits.json").read_text())
    rank = ("--traces", "traces", "--metric", "births_trace", "--metric", "gradient_x_activation")
    must("rank", model, "--pre", pre, "--task", births, *rank, "--out", "ranked", "--examples", 2)
    assert list(pandas.read_parquet("ranked/ranking.parquet")["metric"].unique()) == [rank[3], rank[5]]
    shown = must("attention", model, "--head", "L2H1", "--task", births, "--example", 3, "--out", "fig.html")
    assert "fig.html: L2H1 on example 3 of births" in shown
    two = ("--task", births, "--example", 0, "--example", 2, "--against", pre, "--span", "who")
    shown = must("attention", model, "--head", "L2H1", *two, "--out", "against.html")
    assert f"L2H1 on examples 0 and 2 of births, against {pre}" in shown
    assert "model0 \\u2212 model1" in Path("against.html").read_text()
    assert "the average of births" in must(
        "attention", model, "--head", "L2H1", *two[:2], "--average", "--out", "a.html"
    )


def test_a_sweep_takes_prompts_without_any_people(place, births):
    plan = SweepPlan(place / "model0", units=["L1H1"], modes="patch", source="people")
    # as a plan has them that allows any task
    object.__setattr__(plan, "tasks", (str(births),))
    object.__setattr__(plan, "source", "counterfactuals")
    prepared = PreparedSweep(plan)
    prepared.check()
    [task] = prepared.tasks.values()
    assert prepared.sources[str(births)] is task.counterfactuals
    assert prepared.facts["dataset"] is None
    assert prepared.facts["prompts"] == {"births": task.provenance["prompts"]}
    object.__setattr__(plan, "dataset", str(place / "facts"))
    with pytest.raises(CircuitsError, match="none of the tasks .* is a split of its people"):
        PreparedSweep(plan)


def test_tasks_that_cannot_be_opened_are_refused(place, births, tmp_path):
    model = place / "model0"
    score = ("evaluate", model, "--task")
    refused(call("evaluate", model), "does not say what it was trained on: give a task of your own (--task)")
    refused(call(*score, "nowhere.jsonl"), "there is no file nowhere.jsonl: give the path of a file of prompts")
    refused(call(*score, births, "--task", births), "is given twice: name it once")
    (tmp_path / "other").mkdir()
    shutil.copy(births, "other/births.jsonl")
    refused(call(*score, births, "--task", "other/births.jsonl"), "would both be called 'births'")
    refused(call(*score, births, "--data", place / "facts"), "is a split of its people: leave it out")
    refused(call(*score, births, "--chat"), "has no chat template")
    refused(call("evaluate", place, "--task", births), f"{place} is no checkpoint: it has no config.json")
    refused(call("evaluate", place, "--data", "nowhere"), f"{place} is no checkpoint: it has no config.json")
    one = ("attention", model, "--head", "L0H0")
    refused(call(*one, "--task", births, "--person", 2), "draw one of them at a time")
    refused(call(*one, "--example", 2), "are for a task: name it with --task")
    refused(call(*one, "--task", births, "--example", 6), "there is no example 6 of births: it has 0 to 5")
    refused(call(*one, "--task", births, "--window", "3-5"), "'3-5' is no window: give its first and last token")
    refused(call(*one, "--task", births, "--span", "IO"), "has no span 'IO': it has who")
    refused(call(*one, "--task", births, "--average", "--example", 1), "--average has no tokens: it goes without")
    refused(call("patch", model, "--task", births, "--from", "formats"), "formats are the people's")
    refused(call("ablate", model, "--task", births, "--drop-bad", "--out", "sweep"), "has no --drop-bad")
    refused(call("rank", model, "--pre", model, "--task", births, "--traces", "other"), "there is no trace in other")


BAD = (
    ('{"prompt": "Who"', "line 2 of bad.jsonl is not JSON"),
    ('{"prompt": "Who"}', "line 3 of bad.jsonl has no 'answer'"),
    ('{"prompt": "Who", "answer": "x"}', "line 4 of bad.jsonl: the answer 'x' is glued to its prompt"),
    ('{"prompt": "Who is", "answer": " it"}', "line 5 of bad.jsonl: there is no foil, but others have one"),
)


@pytest.fixture
def bad(births, tmp_path):
    good = births.read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([good[0], *(line for line, _ in BAD), good[1]]))
    return "bad.jsonl"


def test_check_shows_what_the_tokenizer_makes_and_lists_every_bad_line(place, births, bad):
    shown = must("tasks", "check", births, "--model", place / "model0")
    for said in ("span who", "in all prompts", "each prompt is its own", "example 2"):
        assert said in shown
    checked = call("tasks", "check", bad, "--model", place / "model0")
    assert checked.returncode == 2
    assert checked.stderr == (
        "circuits: 4 lines of bad.jsonl cannot be used, and 2 can: mend them, or go on without them with --drop-bad\n"
    )
    listed = [line for line in checked.stdout.splitlines() if line.startswith("  line")]
    assert len(listed) == len(BAD)
    for line, (_, sentence) in zip(listed, BAD, strict=True):
        assert sentence in line
    assert "4 lines that cannot be used" in must("tasks", "check", bad, "--model", place / "model0", "--drop-bad")


def test_check_says_once_what_is_wrong_with_many_lines(place, births, tmp_path):
    good = births.read_text().splitlines()
    lines = [good[0], *['{"prompt": "Who"}'] * 7, '{"answer": " x"}', good[1]]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    shown = must("tasks", "check", "many.jsonl", "--model", place / "model0", "--drop-bad")
    [many] = [line for line in shown.splitlines() if "has no 'answer'" in line or "have no" in line]
    assert many.startswith("  lines 2, 3, 4, 5, 6 and 2 more of many.jsonl")
    assert "  line 9 of many.jsonl has no 'prompt'" in shown


def test_check_needs_no_weights_and_lists_files_without_any_good_line(place, births, tmp_path):
    bare = shutil.copytree(place / "model0", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "span who" in must("tasks", "check", births, "--model", bare)
    (tmp_path / "none.jsonl").write_text('{"prompt": "Who"}\n{"prompt": 3, "answer": " x"}\n')
    checked = call("tasks", "check", "none.jsonl", "--model", bare, "--drop-bad")
    assert checked.returncode == 2
    assert checked.stderr == "circuits: none of the 2 lines of none.jsonl can be used\n"
    (tmp_path / "one.jsonl").write_text('{"prompt": "Who"}\n')
    alone = call("tasks", "check", "one.jsonl", "--model", bare)
    assert alone.stderr == "circuits: the one line of one.jsonl cannot be used\n"
    assert "line 1 of none.jsonl has no" in checked.stdout
    assert "line 2 of none.jsonl: the prompt is 3" in checked.stdout
    refused(call("tasks", "check", "qa_ood", "--model", bare), "is a split of the people")


def test_commands_go_on_without_bad_lines_and_say_so(place, bad):
    refused(call("evaluate", place / "model0", "--task", bad), "line 2 of bad.jsonl is not JSON")
    shown = must("evaluate", place / "model0", "--task", bad, "--drop-bad", "--out", "s.parquet")
    assert "bad: 4 lines dropped, the first: line 2 of bad.jsonl is not JSON" in shown
    table = pandas.read_parquet("s.parquet")
    assert len(table) == 2
    assert len(table.attrs["tasks"]["bad"]["dropped"]) == 4


def test_make_writes_a_ready_source(place, tmp_path):
    out = tmp_path / "ioi.jsonl"
    assert "5 prompts of ioi" in must("tasks", "make", "ioi", "--out", out, "--prompts", 5, "--seed", 3)
    assert len(read_prompts(out)) == 5
    refused(call("tasks", "make", "iio", "--out", out), "there is no ready source 'iio': choose from ioi")
    refused(call("tasks", "make", "ioi", "--out", tmp_path / "ioi.csv"), "end the name in .jsonl")
    refused(call("tasks", "make", "ioi", "--out", out, "--model", place / "model0"), "it takes 2")


def test_a_saved_task_is_named_after_its_file_and_fits_its_tokenizer(births, tmp_path):
    Task.from_file(births, word_tokenizer()).save(tmp_path / "kept.safetensors")
    assert open_task(tmp_path / "kept.safetensors", word_tokenizer()).name == "kept"
    with pytest.raises(CircuitsError, match="make the task again with the model's"):
        open_task(tmp_path / "kept.safetensors", word_tokenizer("familiar"))
    with pytest.raises(CircuitsError, match="leave out the chat"):
        open_task(tmp_path / "kept.safetensors", word_tokenizer(), chat=True)
