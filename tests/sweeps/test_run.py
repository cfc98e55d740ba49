import copy
import json
import re
import shutil

import pandas
import pytest
import torch
from scipy.stats import false_discovery_control

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset
from circuits.interventions import pair_formats, pair_people, patch_heads, run_interventions, single
from circuits.masks import ParameterMask, covered_parameters
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_model
from circuits.sweeps import SweepPlan, run_sweep, sweep_state
from circuits.sweeps.jobs import largest
from circuits.tasks import Task
from circuits.units import Head, layer_of, layout_of
from tests.fixtures import FAMILIES
from tests.sweeps.conftest import contents


def times(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_equals_one_changed_copy_a_head(places, plan_of, dataset, tokenizer, tmp_path, family):
    table = run_sweep(plan_of(family, tasks=["qa_id", "bio"]), tmp_path / "out")
    assert len(table) == 16 * 2
    model = load_model(places.folder / family)
    for split in ("qa_id", "bio"):
        task = dataset.task(split, tokenizer).sample(6, 0)
        own = evaluate(model, task)["log_prob"].mean()
        for row in table[table["task"] == split].iloc[::3].itertuples():
            by_hand = copy.deepcopy(model)
            with torch.no_grad():
                by_hand.blocks[row.layer].attn.W_O[row.index] = 0
            expected = evaluate(by_hand, task)
            assert row.unit == f"L{row.layer}H{row.index}"
            assert row.log_prob == pytest.approx(expected["log_prob"].mean(), abs=1e-4)
            assert row.log_prob_effect == pytest.approx(expected["log_prob"].mean() - own, abs=1e-4)
            assert row.exact_match == expected["exact_match"].mean()


def test_patching_from_the_other_format_equals_hooks(places, plan_of, dataset, tokenizer, tmp_path):
    table = run_sweep(plan_of(modes="patch", source="formats", units=["L1H2", "L3H0"]), tmp_path / "out")
    model = load_model(places.model)
    task = dataset.task("qa_ood", tokenizer).sample(6, 0)
    source = pair_formats(task, dataset.task("bio", tokenizer))
    for row in table.itertuples():
        with patch_heads(model, [Head.parse(row.unit)], source, target=task):
            assert row.log_prob == pytest.approx(evaluate(model, task, len(task))["log_prob"].mean(), abs=1e-4)


def test_foils_and_counterfactuals_of_a_file_need_no_source(places, plan_of, dataset, tokenizer, tmp_path):
    task = dataset.task("qa_ood", tokenizer).sample(6, 0)
    others = pair_people(task, 0, dataset.task("qa_ood", tokenizer))
    own, foreign = (
        [
            (text.removesuffix(value).rstrip(), f" {value}")
            for text, value in zip(one.texts, one.answers["value"], strict=True)
        ]
        for one in (task, others)
    )
    rows = [
        {"prompt": prompt, "answer": answer, "foil": foil, "counterfactual": other}
        for (prompt, answer), (other, foil) in zip(own, foreign, strict=True)
        if len(tokenizer(prompt).input_ids) == len(tokenizer(other).input_ids) and answer != foil
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "tasks": str(file),
        "dataset": None,
        "examples": None,
        "units": ["L0H2", "L3H0"],
        "metrics": ["log_prob", "logit_diff"],
    }
    table = run_sweep(plan_of(**asked, modes=["zero", "patch"]), tmp_path / "out")
    model, read = load_model(places.model), Task.from_file(file, tokenizer)
    plan = [one for mode in ("zero", "patch") for one in single([Head(0, 2), Head(3, 0)], mode)]
    expected = run_interventions(model, read, plan, metrics=asked["metrics"])
    for column in ("log_prob_effect", "logit_diff", "logit_diff_effect"):
        assert table[column].tolist() == pytest.approx(expected[column].tolist(), abs=1e-4)
    # named, they are the same; and where a task has none, that is said before anything is computed
    again = run_sweep(plan_of(**asked, modes=["zero", "patch"], source="counterfactuals"), tmp_path / "again")
    assert again["logit_diff"].tolist() == table["logit_diff"].tolist()
    for options, sentence in (
        ({"modes": "patch"}, "patching needs the run to take values from: give source, or a task with counterfactuals"),
        ({"metrics": "logit_diff"}, "logit_diff needs a foil for each answer: give the task foils, or a source"),
        ({"metrics": "source_exact_match"}, "source_exact_match needs"),
        ({"modes": "patch", "source": "counterfactuals"}, "the task qa_ood has no counterfactuals"),
    ):
        with pytest.raises(CircuitsError, match=sentence):
            run_sweep(plan_of(**options), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_means_are_taken_over_the_reference_that_is_named(plan_of, tmp_path):
    tables = [
        run_sweep(plan_of(modes="mean", units="L1H2", reference=split), tmp_path / str(split))
        for split in (None, "qa_ood", "bio")
    ]
    assert tables[0]["log_prob"].tolist() == tables[1]["log_prob"].tolist() != tables[2]["log_prob"].tolist()


def test_what_a_sweep_leaves(plan_of, tmp_path, dataset):
    out = tmp_path / "deep" / "out"
    table = run_sweep(plan_of(), out)
    assert {path.name for path in out.iterdir()} == {
        *(".locks", ".workers"),
        *("plan.json", "parts", "table.csv", "table.parquet"),
    }
    assert [path.name for path in sorted((out / "parts").iterdir())] == [f"{job:04d}.parquet" for job in range(4)]
    assert pandas.read_csv(out / "table.csv")["log_prob"].tolist() == pytest.approx(table["log_prob"].tolist())
    assert table.attrs["dataset"] == dataset.fingerprint
    assert {"model", "device", "dtype", "seed", "settings", "library_version", "git_commit"} <= set(table.attrs)
    assert contents(out)["table.parquet"] == (out / "table.parquet").read_bytes()


def test_a_finished_sweep_is_left_alone_and_gives_its_table_again(plan_of, tmp_path):
    table, before = run_sweep(plan_of(), tmp_path), times(tmp_path)
    pandas.testing.assert_frame_equal(run_sweep(plan_of(), tmp_path), table)
    assert times(tmp_path) == before


def test_what_is_missing_or_damaged_is_done_again_and_nothing_else(plan_of, tmp_path):
    run_sweep(plan_of(), tmp_path)
    before, content = times(tmp_path), contents(tmp_path)
    (tmp_path / "parts" / "0001.parquet").unlink()
    (tmp_path / "parts" / "0003.parquet").write_bytes(content["parts/0003.parquet"][:100])
    (tmp_path / "parts" / ".0001.parquet.left.parquet").write_bytes(b"half")
    (tmp_path / ".table.csv.left.csv").write_bytes(b"half")
    (tmp_path / "table.csv").unlink()
    assert sweep_state(tmp_path).done == 2
    run_sweep(plan_of(), tmp_path)
    assert contents(tmp_path) == content
    after = times(tmp_path)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"parts/0001.parquet", "parts/0003.parquet", "table.csv"}


def test_another_plan_model_or_dataset_is_refused_and_the_difference_named(places, plan_of, tmp_path):
    out = tmp_path / "out"
    run_sweep(plan_of(units="L0H0"), out)
    before = contents(out)

    def refused(plan: SweepPlan, sentence: str) -> None:
        with pytest.raises(CircuitsError, match=sentence):
            run_sweep(plan, out)
        assert contents(out) == before

    refused(plan_of(units="L0H0", examples=7), "holds a sweep with examples 6, not 7: choose another folder or delete")
    refused(plan_of(units="L0H1"), re.escape("holds a sweep with units ['L0H0'], not ['L0H1']"))
    refused(plan_of("other", units="L0H0"), r"holds a sweep with model \w{16}, not \w{16}")
    refused(plan_of("pythia", units="L0H0"), r"holds a sweep with model \w{16}, not \w{16}")
    facts = make_dataset(tmp_path / "facts", DatasetSettings(people=12, seed=1)).folder
    refused(plan_of(units="L0H0", dataset=facts), r"holds a sweep with dataset \w{16}, not \w{16}")
    # the same model and data in another place are the same
    shutil.copytree(places.model, tmp_path / "copy")
    run_sweep(SweepPlan(tmp_path / "copy", dataset=places.dataset, examples=6, job_size=5, units="L0H0"), out)
    assert contents(out) == before


def test_another_ranking_of_the_same_name_is_refused(plan_of, tmp_path):
    ranking = tmp_path / "ranking.csv"
    ranking.write_text("unit\nL0H0\nL1H1\n")
    table = run_sweep(plan_of(units=ranking, together="cumulative"), tmp_path / "out")
    assert table["unit"].tolist() == ["L0H0", "L0H0+L1H1"]
    ranking.write_text("unit\nL1H1\nL0H0\n")
    with pytest.raises(CircuitsError, match=r"holds a sweep with ranking \w{16}, not \w{16}"):
        run_sweep(plan_of(units=ranking, together="cumulative"), tmp_path / "out")


def saved_mask(folder, file, odd: int):
    """A mask of the model in a folder: the largest tenth of its heads' entries, in even or odd heads alone."""
    model = load_model(folder)
    parameters = {name: value for name, value in covered_parameters(model).items() if layout_of(name).unit is Head}
    held = {name: value.abs() > value.abs().quantile(0.9) for name, value in parameters.items()}
    for entries in held.values():
        entries[1 - odd :: 2] = False
    mask = ParameterMask(held, fingerprint(model))
    mask.save(file)
    return mask


def test_units_from_a_mask_give_the_rows_of_the_same_units_by_name(places, plan_of, tmp_path):
    file = tmp_path / "mask.safetensors"
    mask = saved_mask(places.model, file, 0)
    sizes = {
        Head(layer, head): sum(int(mask.masks[name][head].sum()) for name in mask.masks if layer_of(name) == layer)
        for layer in range(4)
        for head in range(4)
    }
    by_hand = [str(head) for head in sorted(sizes, key=lambda head: -sizes[head])][:3]
    plan = plan_of(units={"mask": file, "kind": "heads", "top": 3}, together="cumulative", modes=["zero", "mean"])
    table = run_sweep(plan, tmp_path / "mask")
    listed = run_sweep(plan_of(units=by_hand, together="cumulative", modes=["zero", "mean"]), tmp_path / "list")
    assert table["unit"].tolist()[:2] == [by_hand[0], "+".join(by_hand[:2])]
    pandas.testing.assert_frame_equal(table, listed)
    assert sweep_state(tmp_path / "mask").plan == plan
    # another mask in the same file is another sweep
    saved_mask(places.model, file, 1)
    with pytest.raises(CircuitsError, match=r"holds a sweep with ranking \w{16}, not \w{16}"):
        run_sweep(plan, tmp_path / "mask")


def test_a_mask_of_another_model_is_refused(places, plan_of, tmp_path):
    saved_mask(places.other, tmp_path / "mask.safetensors", 0)
    plan = plan_of(units={"mask": tmp_path / "mask.safetensors"})
    with pytest.raises(CircuitsError, match=r"the mask was made for model \w{16}, not for \w{16}"):
        run_sweep(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing(places, plan_of, tmp_path):
    out = tmp_path / "out"
    for plan, sentence in [
        (plan_of("nowhere"), "there is no folder"),
        (plan_of(dataset=tmp_path / "no"), "there is no folder"),
        (plan_of(dataset=None), "does not say what it was trained on"),
        (plan_of(units="L9H9"), "there is no head L9H9: the model has layers 0 to 3"),
        (plan_of(positions=99), "has a position 99"),
        (plan_of(units="L0H0", site="k"), "act on its key/value group instead"),
    ]:
        with pytest.raises(CircuitsError, match=sentence):
            run_sweep(plan, out)
    with pytest.raises(CircuitsError, match="there is no executor 'banana': choose from serial, processes"):
        run_sweep(plan_of(), out, "banana")
    with pytest.raises(CircuitsError, match="the executor serial is one worker, not 2"):
        run_sweep(plan_of(), out, workers=2)
    with pytest.raises(CircuitsError, match="there are to be 0 workers"):
        run_sweep(plan_of(), out, "processes", workers=0)
    assert list(tmp_path.iterdir()) == []
    (out).mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(CircuitsError, match="holds something that is no sweep: choose another folder"):
        run_sweep(plan_of(), out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(CircuitsError, match=r"thesis.txt is a file: name a folder for the sweep"):
        run_sweep(plan_of(), out / "thesis.txt")
    with pytest.raises(CircuitsError, match="holds no sweep: it has no plan.json"):
        sweep_state(out)


def test_a_screen_computes_the_largest_estimates_exactly(plan_of, tmp_path):
    settings = {"tasks": ["qa_id", "bio"], "modes": ["zero", "mean"], "job_size": 3}
    full = run_sweep(plan_of(**settings), tmp_path / "full")
    table = run_sweep(plan_of(**settings, screen="attribution", verify=0.25), tmp_path / "screened")
    assert table[["unit", "mode", "task"]].equals(full[["unit", "mode", "task"]])
    assert table["estimate"].notna().all()
    for split in ("qa_id", "bio"):
        rows, exact = table[table["task"] == split], full[full["task"] == split]
        assert rows["exact"].sum() == 8
        assert rows.loc[rows["exact"], "estimate"].abs().min() >= rows.loc[~rows["exact"], "estimate"].abs().max()
        found = rows.loc[rows["exact"], "log_prob_effect"]
        assert found.tolist() == pytest.approx(exact.loc[found.index, "log_prob_effect"].tolist(), abs=1e-5)
        assert rows.loc[~rows["exact"], "log_prob_effect"].isna().all()
    content = contents(tmp_path / "screened")
    for part in (0, 1, 3):
        (tmp_path / "screened" / "parts" / f"{part:04d}.parquet").unlink()
    (tmp_path / "screened" / "table.parquet").unlink()
    run_sweep(plan_of(**settings, screen="attribution", verify=0.25), tmp_path / "screened")
    assert contents(tmp_path / "screened") == content


def test_of_equal_estimates_the_first_are_taken():
    assert largest(pandas.Series([1.0, -1.0, 1.0, 0.5], index=[4, 5, 6, 7]), 2) == [0, 1]


def test_positions_are_numbers_and_rows_tell_layer_and_index(plan_of, tmp_path):
    table = run_sweep(plan_of(units=["L0H1", "L2H3"], positions="each", examples=2), tmp_path / "heads")
    assert table["positions"].tolist() == 2 * list(range(len(table) // 2))
    assert table[["layer", "index"]].drop_duplicates().to_numpy().tolist() == [[0, 1], [2, 3]]


def test_formats_are_patched_at_the_positions_that_match(plan_of, tmp_path):
    plan = plan_of(units=["L1H0"], modes=["zero", "patch"], source="formats", positions="each")
    table = run_sweep(plan, tmp_path)
    zeroed, patched = (set(table[table["mode"] == mode]["positions"]) for mode in ("zero", "patch"))
    assert 0 < len(patched) < len(zeroed)
    assert patched < zeroed


def test_partners_come_from_all_people_not_only_the_sampled(plan_of, tmp_path):
    table = run_sweep(plan_of(units=["L1H0"], modes="patch", source="people", examples=1), tmp_path)
    assert len(table) == 1


def test_threads_and_denormal_numbers_are_as_before_afterwards(plan_of, tmp_path):
    tiny = torch.full((1,), 1e-39)
    before = torch.get_num_threads(), float(tiny * 0.5)
    run_sweep(plan_of(threads=2, units="L0H0"), tmp_path)
    assert (torch.get_num_threads(), float(tiny * 0.5)) == before


def test_the_state_of_a_sweep_that_is_under_way(plan_of, tmp_path):
    run_sweep(plan_of(tasks=["qa_id", "bio"]), tmp_path)
    whole = sweep_state(tmp_path)
    assert (whole.done, whole.jobs, whole.interventions, len(whole.table)) == (8, 8, 32, 32)
    assert whole.plan == plan_of(tasks=["qa_id", "bio"])
    for name in ("table.parquet", "table.csv", "parts/0000.parquet", "parts/0005.parquet"):
        (tmp_path / name).unlink()
    state = sweep_state(tmp_path)
    assert (state.done, state.jobs, len(state.table)) == (6, 8, 22)
    assert {"layer", "index"} <= set(state.table)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text('{"plan": {"speed": 1}, "interventions": {}}')
    with pytest.raises(CircuitsError, match="is no plan that this version reads"):
        sweep_state(tmp_path / "other")
    with pytest.raises(CircuitsError, match=r"holds no sweep: its plan.json is of something else"):
        sweep_state(tmp_path)
    with pytest.raises(CircuitsError, match="holds something that is no sweep"):
        run_sweep(plan_of(), tmp_path)


def test_answers_are_kept_for_comparisons_and_all_rows_are_corrected_together(places, plan_of, tmp_path):
    plan = plan_of(units=["L0H0", "L1H2", "L2H1"], modes=["zero", "mean"], per_answer=True, job_size=2)
    table = run_sweep(plan, tmp_path / "serial")
    answers = pandas.read_parquet(tmp_path / "serial" / "answers")
    assert len(answers) == 6 * 6
    means = answers.groupby(["mode", "unit"])["log_prob_effect"].mean()
    for row in table.itertuples():
        assert means[row.mode, row.unit] == pytest.approx(row.log_prob_effect)
        own = answers[(answers["mode"] == row.mode) & (answers["unit"] == row.unit)]
        assert row.answers == own["changed"].sum() == 6
    expected = false_discovery_control(table["log_prob_effect_p"])
    assert table["log_prob_effect_q"].tolist() == pytest.approx(expected.tolist())
    # interrupted between the two files of a job: the same to the byte
    whole = contents(tmp_path / "serial")
    for name in ("parts/0001.parquet", "table.parquet", "table.csv"):
        (tmp_path / "serial" / name).unlink()
    run_sweep(plan, tmp_path / "serial")
    assert contents(tmp_path / "serial") == whole


def test_a_sweep_reverts_to_the_start_that_its_model_was_trained_from(places, plan_of, tmp_path):
    tuned = shutil.copytree(places.model, tmp_path / "tuned")
    start = fingerprint(load_model(places.other))
    (tuned / "circuits.json").write_text(json.dumps({"start_fingerprint": start}))
    settings = {"modes": "revert", "units": ["L0H0"]}
    run_sweep(plan_of(tuned, pre=places.other, **settings), tmp_path / "right")
    # a waiver changes no number: a sweep goes on with or without it
    run_sweep(plan_of(tuned, pre=places.other, check_start=False, **settings), tmp_path / "right")
    with pytest.raises(CircuitsError, match=f"tuned was trained from model {start}"):
        run_sweep(plan_of(tuned, pre=places.model, **settings), tmp_path / "wrong")
    run_sweep(plan_of(tuned, pre=places.model, check_start=False, **settings), tmp_path / "wrong")
