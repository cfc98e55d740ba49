import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

from circuits.facts import DatasetSettings, FactDataset, make_dataset, word_tokenizer
from circuits.masks import ParameterMask, ablate_mask, unit_mask
from circuits.models import fingerprint, load_model, parameters_of, save_model
from circuits.tracing import GradientTrace
from circuits.training import Optimisation, train
from circuits.units import Head
from tests.cli.commands import BIN, call, refused, run
from tests.fixtures import few_points, lively, of_size

pytestmark = pytest.mark.usefixtures("all_unchecked")


def best_seconds(*command: str) -> float:
    """Of a processor, which other processes do not lengthen."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    def once() -> float:
        begun = used()
        subprocess.run(command, check=True, capture_output=True)
        return used() - begun

    return min(once() for _ in range(3))


def test_help_is_quick():
    assert best_seconds(str(BIN), "--help") < 0.5


def test_import_is_quick():
    assert best_seconds(sys.executable, "-c", "import circuits") < 1


COMMANDS = (
    "info", "diff", "data", "train", "evaluate", "trace", "share", "ablate", "graft", "rank", "patch", "sweep",
    "tasks", "attention", "heads", "study", "report",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_on_every_option(command):
    result = call(command, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "Usage" in result.stdout


def test_everything_public_can_be_imported():
    import circuits

    for name in circuits.__all__:
        assert getattr(circuits, name).__doc__
    with pytest.raises(AttributeError, match="attribute banana"):
        _ = circuits.banana


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset and a checkpoint whose attention is lively, without any training."""
    folder = tmp_path_factory.mktemp("place")
    make_dataset(folder / "facts", DatasetSettings(people=12))

    for seed in (0, 1):
        lively("llama", seed).save_pretrained(folder / f"model{seed}")
        word_tokenizer().save_pretrained(folder / f"model{seed}")
    return folder


@pytest.mark.parametrize(
    ("model", "sentence"),
    [("nowhere", "there is no folder"), pytest.param("model0", "no head L9H0", marks=pytest.mark.slow)],
)
def test_bad_input_to_the_real_command_ends_with_one_sentence_and_code_2(place, tmp_path, model, sentence):
    """Before a model is loaded, and after it."""
    out = tmp_path / "fig.html"
    refused(run("attention", place / model, "--data", place / "facts", "--head", "L9H0", "--out", out), sentence)
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_refused(place, tmp_path):
    refused(call("evaluate", tmp_path / "nowhere", "--data", place / "facts"), "there is no folder")
    refused(call("attention", tmp_path / "nowhere", "--head", "L0H0"), "there is no folder")
    refused(call("evaluate", place / "model0", "--data", tmp_path / "nowhere"), "there is no folder")
    refused(call("evaluate", place / "model0"), "does not say what it was trained on")
    for data in ((), ("--data", place / "facts")):
        refused(call("evaluate", place, *data), f"{place} is no checkpoint: it has no config.json")
    refused(call("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "out"), "there is no folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("L99H0", "there is no head L99H0: the model has layers 0 to 3"),
        ("L0H4", "there is no head L0H4: each layer has heads 0 to 3"),
        ("banana", "'banana' is not a head: write layer and head as in L21H17"),
    ],
)
@pytest.mark.parametrize("command", ["attention", "ablate", "patch"])
def test_heads_that_do_not_exist_are_refused(place, tmp_path, command, head, sentence):
    out = tmp_path / ("fig.html" if command == "attention" else "table.parquet")
    refused(call(command, place / "model0", "--data", place / "facts", "--head", head, "--out", out), sentence)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_dataset_is_refused(place, tmp_path):
    facts = make_dataset(tmp_path / "facts", DatasetSettings(people=4)).folder
    (facts / "bio.jsonl").write_text("")
    for command in (("evaluate", place / "model0"), ("trace", place / "model0", "--out", tmp_path / "out")):
        refused(call(*command, "--data", facts), "is empty: bio.jsonl is missing or has no rows")
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]


def test_a_mask_of_another_model_is_refused_and_names_both(place, tmp_path):
    one, two = (load_model(place / f"model{seed}") for seed in (0, 1))
    masks = {name: value.abs() > 0.3 for name, value in parameters_of(one).items()}
    ParameterMask(masks, fingerprint(one)).save(tmp_path / "mask.safetensors")
    result = call(
        "ablate", place / "model1", "--data", place / "facts", "--mask", tmp_path / "mask.safetensors",
        "--mask-mode", "zero", "--out", tmp_path / "table.parquet",
    )  # fmt: skip
    refused(result, f"made for model {fingerprint(one)}, not for {fingerprint(two)}")
    assert not (tmp_path / "table.parquet").exists()


def test_other_bad_input_is_refused(place, tmp_path):
    model, data = place / "model0", place / "facts"
    refused(call("evaluate", model, "--data", data, "--out", tmp_path / "table.txt"), "end the name in .parquet")
    refused(call("attention", model, "--data", data, "--head", "L0H0", "--out", tmp_path / "f.gif"), "end the name in")
    refused(call("attention", model, "--data", data, "--head", "L0H0", "--person", "99"), "there is no person 99")
    refused(call("attention", model, "--data", data, "--head", "L0H0", "--attribute", "shoe"), "no attribute 'shoe'")
    refused(call("ablate", model, "--data", data, "--mask", tmp_path / "no"), "name its folder with --pre")
    refused(call("share", tmp_path / "no.safetensors", tmp_path / "nor.safetensors"), "there is no file")
    refused(call("share", tmp_path / "no.safetensors", tmp_path / "no.safetensors"), "a trace was given twice")
    refused(call("trace", model, "--data", data, "--statistic", "max", "--out", tmp_path), "no statistic 'max'")
    assert call("patch", model, "--from", "nobody").returncode == 2
    refused(call("patch", model, "--task", "bio"), "patch changes the run of a question, but bio has none")
    refused(call("evaluate", model, "--data", data, "--device", "banana"), "the device 'banana' cannot be used here")
    refused(call("study", "--fraction", 2, "--out", tmp_path / "study"), "fraction is 2.0: it must be")
    refused(call("study", "--people", 3, "--out", tmp_path / "study"), "take 8 or more")
    refused(call("ablate", model, "--data", data, "--pre", model), "name its file with --mask")
    study = ("study", "--out", tmp_path / "study")
    refused(call(*study, "--seeds", "0,banana"), "--seeds is '0,banana': write whole numbers with commas")
    refused(call(*study, "--seeds", "0,1,0"), "the seed 0 is given twice")
    refused(call(*study, "--seeds", "0,1", "--seed", 2), "--seed and --seeds were given")
    both = (model, "--data", data, "--pre", place / "model1", "--out", tmp_path / "out")
    refused(call("graft", *both, "--keep", 2), "the share to keep is 2.0")
    refused(call("graft", *both), "the fine-tuned model gets no answer of qa_id right: nothing to keep")
    refused(call("graft", model, "--data", data, "--pre", tmp_path / "no"), "there is no folder")
    refused(call("rank", *both, "--metric", "banana"), "there is no ranking 'banana'")
    refused(call("rank", *both, "--metric", "change", "--metric", "change"), "the ranking change is asked for twice")
    refused(call("rank", *both, "--metric", "change", "--examples", 2), "answers nothing of qa_id, qa_ood")
    for command in (("trace", model), ("graft", model, "--pre", model), ("rank", model, "--pre", model)):
        refused(call(*command, "--data", data, "--out", data / "qa.jsonl"), "is a file: name a folder")
    refused(call("share", data, data / "no", "--out", data / "qa.jsonl"), "is a file: name a folder")
    refused(call("rank", *both, "--metric", "shared_size"), "the ranking by shared_size needs a mask")
    refused(call("rank", *both, "--traces", tmp_path), "there is no trace in")
    refused(call("trace", *both[:3], "--components", "wings", "--out", tmp_path), "there is no component 'wings'")
    refused(call("trace", *both[:3], "--checkpoint", tmp_path / "no", "--out", tmp_path / "out"), "there is no folder")
    refused(call("data", "--out", place / "facts" / "qa.jsonl"), "is a file: name a folder")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def split_anew(tmp_path_factory):
    """A trained checkpoint, and a dataset of the same people where 3 of 9 who are held out were not for it."""
    folder = tmp_path_factory.mktemp("split")
    facts = make_dataset(folder / "facts", DatasetSettings(people=12))
    with of_size(num_hidden_layers=2, hidden_size=64):
        train("mixed", facts, folder / "ck", optimisation=Optimisation(steps=1, rows=6))
    make_dataset(folder / "other", DatasetSettings(people=12, qa_id_fraction=0.25))
    return folder


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("evaluate", ()),
        ("trace", ("--task", "bio", "--task", "qa_ood")),
        ("ablate", ()),
        ("ablate", ("--out", "sweep")),
        ("graft", ("--pre", "ck/pre", "--task", "qa_ood")),
        ("rank", ("--pre", "ck/pre", "--metric", "change")),
        ("patch", ()),
        ("compare", ("--task", "qa_ood")),
        ("sweep", ()),
    ],
)
def test_people_whose_questions_were_trained_on_are_not_scored_as_held_out(split_anew, monkeypatch, command, settings):
    monkeypatch.chdir(split_anew)
    sentence = (
        f"18 of 54 questions of qa_ood in other ask people whose questions {Path('ck/mixed')} was trained on: take its "
        f"own dataset, {split_anew / 'facts'}, or leave out qa_ood"
    )
    if command == "sweep":
        Path("plan.toml").write_text('model = "ck/mixed"\ndataset = "other"\nexamples = 5\n')
        refused(call("sweep", "run", "plan.toml", "--out", "out"), sentence)
    elif command == "compare":  # the second model is asked the same
        refused(call("compare", "ck/pre", "ck/mixed", "--data", "other", *settings), sentence)
    else:
        refused(call(command, "ck/mixed", "--data", "other", *settings), sentence)
    assert not Path("out").exists()
    assert not Path("runs").exists()
    assert not Path("sweep").exists()


def test_attention_to_a_trained_person_is_not_called_qa_ood(split_anew, monkeypatch, tmp_path):
    monkeypatch.chdir(split_anew)
    own, other = (FactDataset(name).people().set_index("person")["split"] for name in ("facts", "other"))
    draw = ("attention", "ck/mixed", "--data", "other", "--head", "L0H0", "--out", tmp_path / "fig.html", "--person")
    trained, held_out = ((own == split) & (other == "qa_ood") for split in ("qa_id", "qa_ood"))
    refused(call(*draw, int(trained.idxmax())), "6 of 6 questions of qa_ood in other ask people whose questions")
    assert call(*draw, int(held_out.idxmax())).returncode == 0
    beside = ("attention", "ck/pre", "--against", "ck/mixed", *draw[2:])
    refused(call(*beside, int(trained.idxmax())), "6 of 6 questions of qa_ood in other ask people whose questions")


def test_a_checkpoint_far_from_its_dataset_is_scored_with_a_warning(split_anew, tmp_path):
    shutil.copytree(split_anew / "ck" / "mixed", tmp_path / "far" / "mixed")
    score = ("evaluate", tmp_path / "far" / "mixed", "--task", "qa_ood", "--examples", 2, "--data")
    result = call(*score, split_anew / "other")
    assert result.returncode == 0
    assert result.stderr.startswith(f"circuits: {tmp_path / 'far' / 'mixed'} was trained on questions of the dataset")
    assert "cannot be checked" in result.stderr
    assert result.stderr.count("\n") == 1
    assert call(*score, split_anew / "facts").stderr == ""


def test_a_whole_path_by_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def must(*arguments: object) -> str:
        result = call(*arguments)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout

    must("data", "--people", 8, "--out", "facts", "--seed", 3)
    settings = ("--steps", 60, "--rows", 24, "--seed", 3)
    must("train", "--data", "facts", "--out", "ck", "--recipe", "mixed", *settings)
    must("evaluate", "ck/mixed", "--out", "scores.parquet", "--csv")
    assert len(pandas.read_csv("scores.csv")) == len(pandas.read_parquet("scores.parquet"))
    must("trace", "ck/mixed", "--examples", 10, "--out", "traces")
    stamp = Path("traces/bio.safetensors").stat().st_mtime_ns
    must("trace", "ck/mixed", "--examples", 10, "--out", "traces")
    assert Path("traces/bio.safetensors").stat().st_mtime_ns == stamp
    other = call("trace", "ck/mixed", "--examples", 10, "--statistic", "square", "--out", "traces")
    refused(other, "bio.safetensors was made with statistic abs, not square")
    must("share", "traces/bio.safetensors", "traces/qa_id.safetensors", "--out", "shared", "--fraction", 0.02)
    assert {path.name for path in Path("shared").iterdir()} == {
        "mask.safetensors", "sharing.json", "heads.parquet", "neurons.parquet",
    }  # fmt: skip
    mask = ("--mask", "shared/mask.safetensors", "--pre", "ck/pre", "--draws", 2)
    must("ablate", "ck/mixed", *mask, "--examples", 10, "--out", "mask.parquet")
    # the mask fills tensors: beside each control stands what was left of it
    conditions = pandas.read_parquet("mask.parquet").groupby("task")["condition"].value_counts().unstack()
    assert conditions.to_dict("records") == [{"none": 1, "random": 2, "shared": 1, "shared_thinned": 2}] * 3
    must("ablate", "ck/mixed", "--task", "qa_id", "--examples", 10, "--out", "heads.parquet")
    table = pandas.read_parquet("heads.parquet")
    assert len(table) == 16 * 2
    assert table.attrs["model"] == fingerprint(load_model("ck/mixed"))
    assert {"dataset", "settings", "seed", "dtype", "device", "library_version", "git_commit"} <= set(table.attrs)
    must("trace", "ck/mixed", "--task", "bio", "--examples", 4, "--components", "norms", "--per", "batch",
         "--checkpoint", "ck/pre", "--out", "along")  # fmt: skip
    along = GradientTrace.load("along/bio.safetensors")
    assert "blocks.0.ln1.w" in along.gradients
    assert "blocks.0.attn.W_O" not in along.gradients
    rank = ("--pre", "ck/pre", "--traces", "traces", "--mask", "shared/mask.safetensors", "--examples", 4)
    with few_points():
        shown = must("rank", "ck/mixed", *rank, "--draws", 2, "--out", "ranked")
    assert "left out: graft_size" in shown
    ranking, summary = (pandas.read_parquet(f"ranked/{name}.parquet") for name in ("ranking", "summary"))
    metrics = ["shared_size", "bio_trace", "qa_id_trace", "change", "gradient_x_activation", "ablation", "random"]
    assert list(ranking["metric"].unique()) == metrics
    assert set(ranking.groupby(["metric", "draw"])["unit"].nunique()) == {16}
    drawn = ranking.groupby("metric")["draw"].nunique()
    assert (drawn["random"], drawn["change"], drawn["ablation"]) == (2, 1, 1)
    assert len(ranking) == 16 * drawn.sum()
    assert len(summary) == len(metrics) * 2 * 2
    assert ranking.attrs["settings"]["mask"]
    neurons = ("--units", "neurons", "--metric", "change", "--task", "qa_id", "--mode", "zero", "--examples", 2)
    with few_points():
        must("rank", "ck/mixed", "--pre", "ck/pre", *neurons, "--rest", "pre", "--out", "neurons")
    assert pandas.read_parquet("neurons/curves.parquet").attrs["settings"]["rest"] == "pre"
    assert set(pandas.read_parquet("neurons/curves.parquet")["condition"]) == {"sufficient", "zero"}
    assert {path.name for path in Path("neurons").glob("*.html")} == {
        "sufficient.html", "critical.html", "agreement.html",
    }  # fmt: skip
    must("patch", "ck/mixed", "--from", "formats", "--head", "L1H1", "--examples", 10, "--out", "patch.parquet")
    assert pandas.read_parquet("patch.parquet")["unit"].tolist() == ["L1H1"]
    shown = must("attention", "ck/mixed", "--head", "L2H1", "--person", 2, "--out", "fig.html")
    assert "L2H1" in shown
    assert "L2H1" in Path("fig.html").read_text()


@pytest.fixture
def plan(place, tmp_path):
    """The file of a small plan."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"model: {place / 'model0'}\ndataset: {place / 'facts'}\nmodes: [zero, mean]\nexamples: 5\njob_size: 3\n"
    )
    return file


def test_a_sweep_is_run_shown_and_not_run_again(plan, tmp_path):
    out = tmp_path / "out"
    ran = call("sweep", "run", plan, "--out", out)
    assert ran.returncode == 0, ran.stderr
    assert "32 rows, the largest effects first" in ran.stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert call("sweep", "run", plan, "--out", out).stdout == ran.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before
    shown = call("sweep", "show", out)
    assert f"{out}: 11 of 11 jobs finished, 32 of 32 rows" in shown.stdout
    table = pandas.read_parquet(out / "table.parquet")
    largest = table.loc[table["log_prob_effect"].abs().idxmax(), "unit"]
    for said in ("zero, mean", table.attrs["model"], str(largest)):
        assert said in shown.stdout
    assert call("sweep", "show", out, "--watch").stdout == "11 of 11 jobs finished, 0 losses\n"
    planned = call("sweep", "plan", plan).stdout
    for said in ("32 interventions", "11 jobs of up to 3", "memory per worker", "time of one worker"):
        assert said in planned
    (out / "parts" / "0002.parquet").unlink()
    (out / "table.csv").unlink()
    assert "10 of 11 jobs finished, 29 of 32 rows" in call("sweep", "show", out).stdout


def test_bad_sweeps_are_refused(plan, place, tmp_path):
    out = tmp_path / "out"
    refused(call("sweep", "run", tmp_path / "no.yaml", "--out", out), "there is no file")
    refused(call("sweep", "show", tmp_path), "holds no sweep: it has no plan.json")
    refused(call("sweep", "run", plan, "--out", out, "--executor", "banana"), "choose from serial, processes")
    for options, sentence in (
        (("--executor", "slurm"), "the executor slurm needs the number of workers"),
        (("--address", "auto"), "the executor serial has no address: choose ray"),
        (("--executor", "slurm", "--workers", 2, "--sbatch", "gpu"), "--sbatch gpu is no option of sbatch: give NAME="),
        (("--executor", "slurm", "--workers", 2, "--sbatch", "time=2:00"), "give the time in minutes, such as time="),
    ):
        refused(call("sweep", "run", plan, "--out", out, *options), sentence)
    refused(call("sweep", "plan", tmp_path / "no.yaml"), "there is no file")
    refused(call("sweep", "show", tmp_path, "--watch"), "holds no sweep: it has no plan.json")
    assert not out.exists()
    with plan.open("a") as file:
        file.write("position: 3\n")
    refused(call("sweep", "run", plan, "--out", out), "there is no setting 'position': 'positions' may be meant")
    heads = ("ablate", place / "model0", "--data", place / "facts", "--head", "L0H0", "--examples")
    assert call(*heads, 5, "--out", out).returncode == 0
    refused(call(*heads, 6, "--out", out), "holds a sweep with examples 5, not 6")
    refused(
        call("ablate", place / "model0", "--data", place / "facts", "--mask", "no", "--pre", "no", "--out", out),
        "end the name in .parquet",
    )


def test_ablate_and_patch_into_a_folder_are_sweeps(place, tmp_path):
    common = ("--data", place / "facts", "--head", "L1H1", "--examples", 10, "--out")
    for out in ("heads", "heads.parquet"):
        assert call("ablate", place / "model0", "--task", "qa_id", *common, tmp_path / out).returncode == 0
    sweep, file = (pandas.read_parquet(tmp_path / out) for out in ("heads/table.parquet", "heads.parquet"))
    assert sweep["mode"].tolist() == file["mode"].tolist() == ["zero", "mean"]
    assert sweep["log_prob_effect"].tolist() == pytest.approx(file["log_prob_effect"].tolist(), abs=1e-4)
    for out in ("patches", "patches.parquet"):
        assert call("patch", place / "model0", "--from", "formats", *common, tmp_path / out).returncode == 0
    sweep, file = (pandas.read_parquet(tmp_path / out) for out in ("patches/table.parquet", "patches.parquet"))
    assert sweep["log_prob_effect"].tolist() == pytest.approx(file["log_prob_effect"].tolist(), abs=1e-4)


@pytest.fixture
def own_mask(place, tmp_path):
    """A mask of the first model that holds most of L2H1, then of L0H3 and L1H0."""
    model = load_model(place / "model0")
    held = unit_mask(model, [Head(2, 1), Head(0, 3), Head(1, 0)])
    fewer = {name: entries.clone() for name, entries in held.masks.items()}
    fewer["blocks.0.attn.W_Q"][3, ::2] = False
    fewer["blocks.1.attn.W_Q"][0] = False
    ParameterMask(fewer, fingerprint(model)).save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def test_the_heads_of_a_mask_are_ablated_patched_and_drawn(place, own_mask, tmp_path):
    heads = ["L2H1", "L0H3"]
    common = (place / "model0", "--data", place / "facts", "--mask", own_mask, "--top", 2)
    few = ("--examples", 5, "--out")
    for name in ("ablate", "patch"):
        options = ("--mode", "zero") if name == "ablate" else ("--from", "people")
        for out, table in ((name, f"{name}/table.parquet"), (f"{name}.parquet", f"{name}.parquet")):
            result = call(name, *common, "--task", "qa_id", *options, *few, tmp_path / out)
            assert result.returncode == 0, result.stderr
            assert pandas.read_parquet(tmp_path / table)["unit"].tolist() == heads
    named = [word for head in heads for word in ("--head", head)]
    assert call("ablate", *common[:3], *named, "--task", "qa_id", "--mode", "zero", *few, tmp_path / "named.parquet")
    one, two = (pandas.read_parquet(tmp_path / f"{name}.parquet") for name in ("ablate", "named"))
    pandas.testing.assert_frame_equal(one, two)
    for out in ("drawn", "drawn.html"):
        result = call("attention", *common, "--task", "qa_id", "--tokens", 3, "--out", tmp_path / out)
        assert result.returncode == 0, result.stderr
        assert "L2H1, L0H3 on example 0 of qa_id" in result.stdout
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["L0H3.html", "L2H1.html", "plotly.min.js"]
    page = (tmp_path / "drawn.html").read_text()
    assert page.index("<h2>L2H1</h2>") < page.index("<h2>L0H3</h2>")


def test_heads_of_a_mask_that_do_not_fit_are_refused(place, own_mask, tmp_path):
    data, out = ("--data", place / "facts"), ("--out", tmp_path / "out.html")
    of_mask = ("--mask", own_mask, "--top", 2)
    for name in ("ablate", "patch", "attention"):
        common = (name, place / "model1", *data, "--task", "qa_id")
        table = out if name == "attention" else ("--out", tmp_path / "out.parquet")
        refused(call(*common, *of_mask, *table), "the mask was made for model")
        refused(call(*common, "--top", 2, *table), "--mask and --top name the heads of a mask together")
        refused(call(*common, "--head", "L0H0", *of_mask, *table), "heads and a mask were given")
        refused(call(*common, "--mask", tmp_path / "no", "--top", 2, *table), "there is no file")
        if name != "attention":
            refused(call(*common, *of_mask, "--out", tmp_path / "sweep"), "the mask was made for model")
    refused(call("patch", place / "model0", *data, "--mask", own_mask), "give both")
    attention = ("attention", place / "model0", *data)
    refused(call(*attention, *out), "no head was named")
    refused(call(*attention, *of_mask, "--out", tmp_path / "two.png"), "is an image, which holds one head")
    refused(call(*attention, "--head", "L0H0", *out, "--width", "page"), "--width is of an image in print")
    whole = ("ablate", place / "model0", *data, *of_mask)
    for option in (("--span", "last"), ("--pre", place / "model1"), ("--mask-mode", "zero")):
        refused(call(*whole, *option), "are for a mask that is ablated whole")
    assert {path.name for path in tmp_path.iterdir()} == {"mask.safetensors"}


def test_a_mask_is_ablated_at_the_tokens_of_a_span(place, own_mask, tmp_path):
    common = ("ablate", place / "model0", "--data", place / "facts", "--mask", own_mask, "--mask-mode", "zero")
    options = ("--task", "qa_id", "--examples", 5, "--draws", 2, "--out", tmp_path / "table.parquet")
    result = call(*common, "--span", "subject", *options)
    assert result.returncode == 0, result.stderr
    assert "subject" in result.stdout
    table = pandas.read_parquet(tmp_path / "table.parquet")
    model = load_model(place / "model0")
    task = FactDataset(place / "facts").task("qa_id", model.tokenizer).sample(5)
    expected = ablate_mask(model, ParameterMask.load(own_mask), [task], mode="zero", draws=2, span="subject")
    pandas.testing.assert_frame_equal(table, expected)
    refused(call(*common, "--span", "banana", *options), "qa_id has no span 'banana'")


def test_an_interrupted_sweep_says_how_to_go_on(plan, tmp_path, monkeypatch):
    from circuits.sweeps.folder import SweepFolder

    keep = SweepFolder.write_part

    def interrupted(self, job, rows):
        if job.index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        keep(self, job, rows)

    monkeypatch.setattr(SweepFolder, "write_part", interrupted)
    stopped = call("sweep", "run", plan, "--out", tmp_path / "out")
    assert stopped.returncode == 130
    assert stopped.stderr == ("circuits: interrupted; 2 of 11 jobs are finished; the same command goes on from there\n")
    monkeypatch.undo()
    assert call("sweep", "run", plan, "--out", tmp_path / "out").returncode == 0


def test_diff_and_info_say_where_checkpoints_differ_and_what_one_is(tmp_path):
    model = load_model(lively("llama"), tokenizer=word_tokenizer())
    save_model(model, tmp_path / "base")
    with torch.no_grad():
        model.blocks[2].attn.W_Q[1] *= 2
    save_model(model, tmp_path / "tuned", {"start": "base"})
    ended = call("diff", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "out")
    assert ended.returncode == 0
    assert "L2H1" in ended.stdout
    heads = pandas.read_parquet(tmp_path / "out" / "heads.parquet")
    assert heads.loc[heads["norm"] > 0, "unit"].tolist() == ["L2H1"]
    assert heads.attrs["fingerprints"]["tuned"] == fingerprint(model)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "difference.html",
        *(f"{kind}s.parquet" for kind in ("model", "layer", "component", "head", "group", "neuron")),
    }
    lively("pythia").save_pretrained(tmp_path / "other")
    refused(call("diff", tmp_path / "base", tmp_path / "other", "--out", tmp_path / "no"), "checkpoints of one model")
    assert not (tmp_path / "no").exists()
    told = call("info", tmp_path / "tuned").stdout
    for fact in (
        "LlamaForCausalLM",
        fingerprint(model),
        f"{sum(tensor.numel() for tensor in model.checkpoint.tensors.values()):,}",
        "tied",
        "<s>",
        "parity hookable model",
        "made with start",
    ):
        assert fact in told
