"""The whole study by the command: small, killed on the way, and gone on with."""

import json
import math
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from circuits.analysis import Comparison, running
from circuits.analysis.figures import figures_of
from circuits.analysis.page import write_page
from circuits.masks import Graft, graft
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_model
from circuits.statistics import mean_interval
from circuits.storage import atomic_file
from circuits.study import (
    StudySettings,
    findings,
    results_page,
    seeds_page,
)
from circuits.study.folder import Study
from circuits.study.study_page import study_figures
from tests.cli.commands import call, refused
from tests.fixtures import few_points, of_size
from tests.processes import ended, forked

pytestmark = pytest.mark.usefixtures("all_unchecked")


SMALL_STUDY = ("--people", 8, "--steps", 30, "--rank-examples", 2, "--draws", 2)
#: What the command has no options for: a whole study all the same, and its models learn some answers.
FEW_ROWS = replace(
    StudySettings(),
    optimisation=replace(
        StudySettings().optimisation,
        rows=36,
        qa_share=0.66,
        learning_rate=1e-2,
        gentle_learning_rate=5e-3,
        warmup_steps=5,
    ),
    trace_examples=9,
    sweep_examples=24,
    fractions=(0.001, 0.1),
    rank_halvings=1,
    rates=(1e-3,),
)
#: Layers, heads and neurons of its models.
LAYERS, HEADS, NEURONS = 2, 2, 64


def call_study(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command's small study, of a smaller model than the small one."""
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": NEURONS, "hidden_size": 64}
    with of_size(num_hidden_layers=LAYERS, **shape), pytest.MonkeyPatch.context() as patch:
        patch.setattr("circuits.study.usual_settings", lambda *_, **__: FEW_ROWS)
        return call("study", *SMALL_STUDY, *arguments)


@pytest.fixture(scope="module")
def coarse():
    """Curves, paths and searches of few points; of the analyses, the first of a whole model has a page."""
    drawn = []

    def figures(tables):
        return figures_of(tables) if "sweep" in tables and not drawn else {}

    def page(path, summary, tables, found):
        if found:
            drawn.append(path)
            write_page(path, summary, tables, found)

    with few_points(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("circuits.masks.graft_search._SIZES", 9)
        patch.setattr("circuits.masks.graft_search._TOLERANCE", 0.05)
        patch.setattr("circuits.analysis.analysis.figures_of", figures)
        patch.setattr("circuits.analysis.analysis.write_page", page)
        yield


@pytest.fixture(scope="module")
def study(without_workers, coarse, tmp_path_factory):
    """A small study whose process is killed on the way, and that goes on in this one, which has its imports already."""
    if not hasattr(os, "fork"):
        pytest.skip("children are forked")
    out = tmp_path_factory.mktemp("study") / "study"
    steps = out / "comparison" / "a" / "steps"

    def killed_while_it_traces() -> None:
        write = running.write_json

        def killed(path: Path, content: object) -> None:
            if path == steps / "trace.json":
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)

        running.write_json = killed
        print(call_study("--out", out))  # noqa: T201

    # before its record, so that what it had saved is made again
    assert ended(forked(killed_while_it_traces), 1200) == -signal.SIGKILL
    assert [file.name for file in steps.iterdir()] == ["evaluate.json"]
    assert not (out / "summary.json").exists()
    again = call_study("--out", out)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert "mixed: trace:" in again.stdout
    assert "train:" not in again.stdout
    assert "mixed: evaluate:" not in again.stdout
    return out


def tables_of(folder: Path) -> dict[str, pandas.DataFrame]:
    return Study(folder, StudySettings()).tables()


def test_a_study_writes_what_it_promises(study):
    summary = json.loads((study / "summary.json").read_text())
    for arm in ("mixed", "two_stage", "two_stage_gentle"):
        for split in ("bio", "qa_id", "qa_ood"):
            assert 0 <= summary["accuracy"][arm][split] <= 1
    assert "bio_after_stage_1" in summary["accuracy"]["two_stage"]
    for arm in ("mixed", "two_stage_gentle"):
        assert {"size", "total", "chance", "lift", "gini"} <= set(summary["shared"][arm])
        for condition in ("shared", "random"):
            assert set(summary["ablation"][arm][condition]) == {"bio", "qa_id", "qa_ood"}
            for scope in ("ablation", "ablation_per_tensor"):
                for low, high in summary[scope][arm][f"{condition}_interval_95"].values():
                    assert 0 <= low <= high <= 1
        assert summary["shared"][arm]["size"] != summary["shared_per_tensor"][arm]["size"]
    for arm in ("mixed", "two_stage", "two_stage_gentle"):
        assert {"matched", "mismatched", "inside", "outside"} <= set(summary["consistency"]["gradient"][arm])
        assert {"matched", "mismatched", "retrieval"} <= set(summary["consistency"]["representation"][arm])
        assert sum(summary["signature"][arm][name] for name in ("subject", "relation", "context")) == pytest.approx(
            1, abs=1e-3
        )
    assert summary["top_head"].startswith("L")
    steps = {"data", "train", "evaluate", "trace", "share", "ablate", "graft", "rank", "sweep", "patch", "attend"}
    steps |= {"rates", "consistency", "localise", "signature", "integrate"}
    assert steps | {"patch_people", "total"} == set(summary["seconds"])
    own = running.seconds(study)
    del own["report"]  # which says it
    assert summary["seconds"]["total"] == pytest.approx(sum(own.values()), abs=0.1)
    assert {"seeds", "versions"} <= set(summary)
    for name in ("pre", "mixed", "two_stage_gentle"):
        assert load_model(study / "checkpoints" / name).cfg.n_layers == LAYERS
    tables = tables_of(study)
    heads = tables["sweep"]
    assert not heads.duplicated(["layer", "index", "model", "mode", "task"]).any()
    assert len(heads) == LAYERS * HEADS * 2 * 2 * 3
    assert heads["log_prob_effect"].notna().all()
    people = pandas.read_parquet(study / "tables" / "patches_from_people.parquet")
    assert set(people.attrs["models"]) >= {"mixed", "two_stage_gentle"}
    assert len(people) == len(tables["patches"]) == LAYERS * HEADS * 2
    assert set(tables["patches"]["task"]) == {"qa_ood from bio"}
    assert {"accuracy", "curves", "ablation", "shared_heads"} <= set(tables)
    compared = Comparison(study / "comparison")
    assert compared.names == ("mixed", "two_stage_gentle")
    assert {"accuracy", "ablation", "sweep", "patches", "masks", "heads", "areas"} <= set(compared.tables)
    assert {"gradient_consistency", "representation_consistency", "signature"} <= set(compared.tables)
    assert compared.report.is_file()
    answers, accuracy = tables["answers"], tables["accuracy"].set_index(["model", "split"])
    right = answers.groupby(["model", "split"])["exact_match"].mean()
    assert accuracy["exact_match"].to_dict() == pytest.approx(right.to_dict())
    assert not answers.duplicated(["model", "split", "example", "attribute"]).any()
    assert (accuracy["exact_match_low"] <= accuracy["exact_match"]).all()
    assert (accuracy["exact_match"] <= accuracy["exact_match_high"]).all()
    for name in ("shared", "shared_heads", "shared_neurons", "sharing_curve", "ablation"):
        assert set(tables[name]["scope"]) == {"global", "tensor"}
    ablation = tables["ablation"]
    assert (ablation[ablation["condition"] == "random"]["overlap"] == 0).all()
    keys = ["model", "scope", "condition", "draw", "task"]
    means = tables["ablation_answers"].groupby(keys)["exact_match"].mean()
    assert ablation.set_index(keys)["exact_match"].to_dict() == pytest.approx(means.to_dict())
    for scope in ("global", "tensor"):
        rows = tables["shared"].set_index(["model", "scope"])
        assert compared.a.masks[scope].size == rows["size"]["mixed", scope]
    assert len(list((study / "figures").glob("*.html"))) >= 8
    page = (study / "report.html").read_text()
    assert "What holds in this run" in page
    assert "<script src" not in page


def test_second_stages_at_more_rates_start_from_the_same_first_stage(study):
    table = tables_of(study)["rates"]
    assert table.groupby("rate")["split"].apply(list).to_dict() == {
        rate: ["bio", "qa_id", "qa_ood"] for rate in (1e-3, 5e-3, 1e-2)
    }
    accuracy = tables_of(study)["accuracy"].set_index(["model", "split"])["exact_match"]
    for rate, model in ((5e-3, "two_stage_gentle"), (1e-2, "two_stage")):
        for split, value in table[table["rate"] == rate].set_index("split")["exact_match"].items():
            assert value == accuracy[model, split]
    made = json.loads((study / "rates" / "0.001" / "qa_only" / "circuits.json").read_text())
    assert made["stage"]["learning_rate"] == 1e-3
    assert made["start_fingerprint"] == fingerprint(load_model(study / "checkpoints" / "stage_1"))
    model = load_model(study / "rates" / "0.001" / "qa_only")
    right = evaluate(model, Study(study, StudySettings()).tasks["bio"])["exact_match"].mean()
    assert table.set_index(["rate", "split"])["exact_match"][1e-3, "bio"] == pytest.approx(right)
    assert "Recall after second stages at several rates" in (study / "report.html").read_text()


def test_a_study_grafts_and_ranks(study):
    summary = json.loads((study / "summary.json").read_text())
    tables = tables_of(study)
    grafts, grafted = tables["grafts"], tables["graft_accuracy"]
    for name, side in (("mixed", "a"), ("two_stage_gentle", "b")):
        found = summary["graft"][name]
        chosen = grafts[(grafts["model"] == name) & grafts["chosen"].astype(bool)].set_index("score")
        if not len(chosen):
            # a model that learned no question has nothing to graft
            assert found["size"] is found["accuracy"] is None
            assert summary["accuracy"][name]["qa_id"] == 0
            continue
        assert found["size"] == chosen["size"].min() == chosen["size"][found["score"]]
        assert found["accuracy"] >= 0.95 * summary["accuracy"][name]["qa_id"] - 1e-3
        saved = Graft.load(study / "comparison" / side / "grafts" / "qa_id")
        assert (saved.size, saved.fraction) == (found["size"], pytest.approx(found["fraction"], abs=1e-6))
        for score, one in found["by"].items():
            rows = grafted[(grafted["model"] == name) & (grafted["score"] == score)].set_index("task")
            assert one["splits"]["qa_id"] == one["accuracy"] == pytest.approx(rows["exact_match"]["qa_id"], abs=1e-4)
            assert len(rows) == 5
    rankings = summary["rankings"]
    assert {"shared_size", "bio_trace", "qa_trace", "change", "gradient_x_activation", "ablation", "random"} <= set(
        rankings
    )
    rows = tables["ranking_summary"].set_index(["model", "kind", "condition", "metric", "task"])
    for metric, numbers in rankings.items():
        sufficient, critical = (
            rows.loc[("mixed", "head", condition, metric, "qa_id")] for condition in ("sufficient", "revert")
        )
        assert numbers["sufficient_auc"] == pytest.approx(sufficient["auc"], abs=1e-4)
        assert numbers["critical_auc"] == pytest.approx(critical["auc"], abs=1e-4)
        for name, value in (("n95", sufficient["n95"]), ("n50", critical["n50"])):
            assert numbers[name] == value or (numbers[name] is None and pandas.isna(value))
    areas = tables["ranking_areas"].groupby(["model", "kind", "condition", "metric", "task"])["area"].mean()
    assert areas.to_dict() == pytest.approx(rows["auc"].to_dict())
    curves = tables["ranking_curves"]
    assert set(curves["kind"]) == {"head", "neuron"}
    assert set(curves["model"]) == {"mixed", "two_stage_gentle"}
    assert set(curves["task"]) == {"qa_id", "qa_ood"}
    assert (
        tables["rankings"]
        .groupby(["model", "kind", "metric", "draw"])["unit"]
        .nunique()
        .isin([LAYERS * HEADS, LAYERS * NEURONS])
        .all()
    )
    assert set(tables["agreement"]["metric"]) >= set(rankings)
    assert tables["sharing_curve"].groupby("model")["fraction"].nunique().tolist() == [3, 3]
    page = (study / "report.html").read_text()
    for words in ("needs fewer grafted parameters", "Are the top heads enough?", "How far rankings agree"):
        assert words in page


def test_several_seeds_are_studies_and_a_summary(study, tmp_path, monkeypatch):
    # what is found in a seed's tables is found once
    known = {}

    def once(summary, tables):
        seed = summary["settings"]["seed"]
        known[seed] = known.get(seed) or findings(summary, tables)
        return known[seed]

    monkeypatch.setattr(seeds_page, "findings", once)
    out = tmp_path / "seeds"
    for seed in (0, 1):
        shutil.copytree(study, out / f"seed-{seed}")
    # a second study, as far as its plan and its summary say
    plan, file = out / "seed-1" / "plan.json", out / "seed-1" / "summary.json"
    settings = json.loads(plan.read_text())
    settings["seed"] = settings["data"]["seed"] = 1
    plan.write_text(json.dumps(settings))
    other = json.loads(file.read_text())
    first = json.loads(file.read_text())
    other["settings"] = settings
    other["accuracy"]["mixed"]["qa_ood"] = first["accuracy"]["mixed"]["qa_ood"] + 0.25
    other["graft"]["mixed"]["size"] = None
    file.write_text(json.dumps(other))
    result = call_study("--seeds", "0,1", "--out", out)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    values = [one["accuracy"]["mixed"]["qa_ood"] for one in (first, other)]
    mean, low, high = mean_interval(values)
    ends = [max(low, 0), min(high, 1)]  # of a share
    assert summary["accuracy"]["mixed"]["qa_ood"] == {
        "mean": pytest.approx(mean), "interval_95": pytest.approx(ends), "values": values,
    }  # fmt: skip
    assert low < 0
    for numbers in (summary["consistency"]["gradient"]["mixed"]["inside"], summary["signature"]["mixed"]["context"]):
        assert set(numbers) == {"mean", "interval_95", "values"}
    assert summary["graft"]["mixed"]["size"]["mean"] is None
    # two seeds that are all alike show no spread to judge by
    alike = summary["rankings"]["random"]["sufficient_auc"]
    assert alike["mean"] == pytest.approx(first["rankings"]["random"]["sufficient_auc"])
    assert alike["interval_95"] == [None, None]
    assert summary["top_head"] == [first["top_head"]] * 2
    assert "seed" not in summary["settings"]
    page = (out / "report.html").read_text()
    assert "; by seed +" in page or "; by seed -" in page
    assert "Are both formats alike inside?" in page
    assert "1 of 2 seeds have no such number" in page
    assert "the seeds are all alike and show no spread to judge by" in page
    small = tmp_path / "small.md"
    refused(call("report", out, tmp_path, "--out", small), "holds no finished studies")
    assert not small.exists()
    assert call("report", out, out, "--out", small).returncode == 0
    text = small.read_text()
    assert text.count("## Small llama model, facts told once") == 2
    assert f"{mean:.1%}" in text
    assert "1 of 2 seeds have no such number" in text
    refused(call_study("--seeds", "0,1", "--out", out, "--steps", 31), "not 31")
    refused(call_study("--seeds", "0", "--out", study), "holds something that is no set of studies")
    refused(call_study("--out", out), "holds something that is not a study")


def test_a_graft_by_command_is_an_ordinary_checkpoint(study, tmp_path):
    mixed, pre, out = study / "checkpoints" / "mixed", study / "checkpoints" / "pre", tmp_path / "graft"
    summary = json.loads((study / "summary.json").read_text())
    if summary["accuracy"]["mixed"]["qa_id"] == 0:
        pytest.fail("the small study learns nothing: train it longer")
    result = call("graft", mixed, "--pre", pre, "--by", "change", "--out", out)
    assert result.returncode == 0, result.stderr
    found = Graft.load(out)
    assert found.size == summary["graft"]["mixed"]["by"]["change"]["size"]
    model, before, fine_tuned = (load_model(folder) for folder in (out / "model", pre, mixed))
    with graft(before, found.mask, fine_tuned):
        assert fingerprint(model) == fingerprint(before)
    assert "qa_id" in call("evaluate", out / "model", "--task", "qa_id").stdout
    assert call("graft", mixed, "--pre", pre, "--by", "change", "--no-model", "--out", tmp_path / "two").returncode == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "answers.parquet",
        "curve.parquet",
        "mask.safetensors",
    }


def test_a_finished_study_is_not_done_again_and_another_one_is_refused(study):
    before = (study / "report.html").stat().st_mtime_ns
    assert call_study("--out", study).returncode == 0
    assert (study / "report.html").stat().st_mtime_ns == before
    refused(call_study("--out", study, "--steps", 31), "a study with optimisation.steps 30, not 31")


def test_a_checkpoint_of_a_study_finds_its_own_data(study, tmp_path):
    result = call("attention", study / "checkpoints" / "mixed", "--head", "L1H1", "--out", tmp_path / "fig.html")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fig.html").exists()


def test_the_page_of_a_study_says_its_numbers(study, tmp_path, monkeypatch):
    shown = results_page._SHOWN
    monkeypatch.setattr(results_page, "_SHOWN", {name: shown[name] for name in ("accuracy", "agreement_heads_mixed")})

    def draw(figures):
        """Without a browser, which the tests of figures start."""
        for path, figure in figures.items():
            with atomic_file(path) as image:
                image.write_text(figure.to_json())

    monkeypatch.setattr(results_page, "save_images", draw)
    # of the figures, those that are shown
    tables = {name: tables_of(study)[name] for name in ("accuracy", "agreement", "ranking_curves")}
    tables["ranking_curves"] = tables["ranking_curves"].query("model == 'mixed' and kind == 'head'")
    monkeypatch.setattr(results_page, "study_figures", lambda _, keep: study_figures(tables, keep))
    result = call("report", study, "--out", tmp_path / "docs" / "page.md")
    assert result.returncode == 0, result.stderr
    assert "page.md, 2 images" in result.stdout
    page = (tmp_path / "docs" / "page.md").read_text()
    summary = json.loads((study / "summary.json").read_text())
    mixed, two = (summary["accuracy"][name]["qa_ood"] for name in ("mixed", "two_stage_gentle"))
    assert f"{mixed:.1%} against {two:.1%}" in page
    assert f"{summary['shared']['mixed']['size']:,} against {summary['shared']['two_stage_gentle']['size']:,}" in page
    assert f"{summary['graft']['mixed']['size']:,} (" in page
    assert "| `rank_examples` | 2 |" in page
    assert "| `evaluate_examples` | all |" in page
    found = findings(summary, tables_of(study))
    figures = ["1a"] * 2 + ["2a"] * 4 + ["2b"] * 8 + ["3b"] + ["4a", "4a", "4b", "4b"] * 2 + ["4c"] * 2 + ["v2"] * 24
    assert [one.figure for one in found] == figures
    for one in found:
        assert f"| {one.here} | {one.control} | " in page
        assert f"**{one.verdict}**" in page
        # sizes of one run are not judged, and everything else is tested
        size = one.figure in ("2a", "3b") or "update more parameters" in one.claim
        assert math.isnan(one.p_value) if size else one.figure == "v2" or not math.isnan(one.p_value)
    assert {one.verdict for one in found if one.figure in ("2a", "3b")} == {"cannot be told"}
    images = [f"page-{name}.png" for name in ("accuracy", "agreement-heads-mixed")]
    assert {path.name for path in (tmp_path / "docs" / "figures").iterdir()} == set(images)
    for image in images:
        assert f"](figures/{image})" in page
    refused(call("report", study, "--out", tmp_path / "page.html"), "a page cannot be saved as")
    refused(call("report", tmp_path, "--out", tmp_path / "page.md"), "holds no study of one seed that was evaluated")
    # a study of an earlier version, which measured nothing along training
    earlier = shutil.copytree(study, tmp_path / "earlier")
    shutil.rmtree(earlier / "along")
    refused(call_study("--out", earlier), "was trained by an earlier version, which measured nothing along training")
    # the same study before its grafts and rankings
    unfinished = shutil.copytree(study, tmp_path / "unfinished")
    for step in ("analyse", "compare", "updated", "patch_people", "attend", "report"):
        (unfinished / "steps" / f"{step}.json").unlink()
    for table in ("updated", "patches_from_people", "attention"):
        (unfinished / "tables" / f"{table}.parquet").unlink()
    for step in ("graft", "rank", "sweep", "patch", "consistency", "localise", "signature", "integrate"):
        (unfinished / "comparison" / "b" / "steps" / f"{step}.json").unlink()
    (unfinished / "summary.json").unlink()
    assert call("report", unfinished, "--out", tmp_path / "part" / "page.md").returncode == 0
    part = (tmp_path / "part" / "page.md").read_text()
    missing = "graft, sweep, patch, rank, consistency, localise, signature, integrate, updated, patch_people, attend"
    assert f"{missing}, report are" in part
    for one in found:
        assert (one.claim in part) == (one.figure in ("1a", "2a", "2b"))
