"""Gradient consistency while a model trains, its file, and the facts that two tasks have in common."""

import shutil
from dataclasses import replace

import pandas
import pytest
import torch
from transformers import TrainerCallback

from circuits.consistency import (
    ConsistencyCallback,
    GradientConsistency,
    answer_shares,
    gradient_consistency,
    input_signature,
    products,
    signature_means,
)
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset
from circuits.masks import unit_mask
from circuits.models import load_model
from circuits.tasks import facts_in_common, pair_facts
from circuits.tracing import TraceCallback
from circuits.training import Optimisation, new_model, train
from circuits.units import Head
from tests.fixtures import loaded

SHORT = Optimisation(steps=4, rows=16)


@pytest.fixture(scope="module")
def facts(tasks):
    return pair_facts(tasks["bio"], tasks["qa_id"], 8, seed=3)


@pytest.mark.usefixtures("smaller")
def test_a_run_that_is_measured_is_the_same_run_and_its_last_rows_are_the_models(dataset, facts, tokenizer, tmp_path):
    mask = unit_mask(load_model(new_model("tiny-llama", tokenizer), tokenizer=tokenizer), [Head(1, 2)])
    callback = ConsistencyCallback(*facts, 2, by=("all", "layer"), mask=mask, out=tmp_path / "table.parquet")
    train("mixed", dataset, tmp_path / "a", optimisation=SHORT, callbacks={"mixed": [callback]})
    train("mixed", dataset, tmp_path / "b", optimisation=SHORT)
    one, two = (load_model(tmp_path / name / "mixed") for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    table = callback.table
    assert table["step"].unique().tolist() == [2, 4]
    assert set(table["by"]) == {"all", "layer", "mask"}
    alone = gradient_consistency(one, *facts, by=("all", "layer"), mask=mask.for_model(one))
    last = table[table["step"] == 4]
    for name in ("all", "layer", "mask"):
        rows = last[last["by"] == name].drop(columns=["step", "by"]).reset_index(drop=True)
        pandas.testing.assert_frame_equal(rows, alone.means(name), atol=1e-6, check_dtype=False)
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "table.parquet"), table)


@pytest.mark.usefixtures("smaller")
def test_a_run_that_goes_on_goes_on_from_its_rows(dataset, facts, tmp_path):
    whole = ConsistencyCallback(*facts, 1)
    train("mixed", dataset, tmp_path / "a", optimisation=SHORT, callbacks={"mixed": [whole]})

    def stop(_stage, step, _steps):
        if step == 3:
            raise KeyboardInterrupt

    settings = {"optimisation": SHORT, "evaluate_every": 2}
    stopped, again = ConsistencyCallback(*facts, 1), ConsistencyCallback(*facts, 1)
    with pytest.raises(KeyboardInterrupt):
        train("mixed", dataset, tmp_path / "b", callbacks={"mixed": [stopped]}, progress=stop, **settings)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    train("mixed", dataset, tmp_path / "b", callbacks={"mixed": [again]}, **settings)
    pandas.testing.assert_frame_equal(again.table, whole.table)
    [rows] = (tmp_path / "c" / ".training-mixed").glob("cosines-*")
    assert rows.name == "cosines-2"
    shutil.rmtree(rows)
    with pytest.raises(CircuitsError, match="goes on from step 2, but there are no cosines up to it in .*cosines-2"):
        train("mixed", dataset, tmp_path / "c", callbacks={"mixed": [ConsistencyCallback(*facts, 1)]}, **settings)


def test_what_cannot_be_measured_is_refused(dataset, facts, tmp_path):
    with pytest.raises(CircuitsError, match="cosines every 0 steps are none: the least is 1"):
        ConsistencyCallback(*facts, 0)
    with pytest.raises(CircuitsError, match="inside and outside of which mask"):
        ConsistencyCallback(*facts, 1, by=("mask",))
    callbacks = {"mixed": [ConsistencyCallback(*facts, 9)]}
    with pytest.raises(CircuitsError, match="cosines every 9 steps are none in 4 steps of training"):
        train("mixed", dataset, tmp_path / "a", optimisation=SHORT, callbacks=callbacks)


@pytest.mark.parametrize("noun", ["cosines", "traces"])
def test_a_function_that_is_hooked_into_the_training_model_is_refused(dataset, facts, noun, tmp_path):
    class Hooked(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            model.model.layers[1].register_forward_hook(lambda *_: None)

    measuring = {"cosines": ConsistencyCallback(*facts, 2), "traces": TraceCallback(facts[:1], 2)}[noun]
    with pytest.raises(CircuitsError, match=f"hooked into the model at model.layers.1: {noun} are measured on a model"):
        train("mixed", dataset, tmp_path, optimisation=SHORT, callbacks={"mixed": [Hooked(), measuring]})


def test_consistency_is_saved_loaded_and_shown(facts, tmp_path):
    model = loaded("llama")
    found = gradient_consistency(model, *facts, by=("all", "neuron"), mask=unit_mask(model, [Head(0, 1)]))
    found.save(tmp_path / "found.safetensors")
    again = GradientConsistency.load(tmp_path / "found.safetensors")
    assert (again.groups, again.provenance) == (found.groups, found.provenance)
    for name in found.cosines:
        assert torch.equal(again.cosines[name], found.cosines[name])
        pandas.testing.assert_frame_equal(again.parts[name], found.parts[name])
    pandas.testing.assert_frame_equal(again.means("mask"), found.means("mask"))
    shown = again._repr_html_()
    assert "matched" in shown
    assert "inside" in shown
    assert "and 372 more" in shown
    facts[0].save(tmp_path / "task.safetensors")
    with pytest.raises(CircuitsError, match="holds a task, not a gradient consistency"):
        GradientConsistency.load(tmp_path / "task.safetensors")


def test_several_masks_are_several_times_one(facts):
    model = loaded("llama")
    masks = {name: unit_mask(model, [Head(layer, 0)]) for layer, name in enumerate(("first", "second"))}
    both = gradient_consistency(model, *facts, by=(), mask=masks)
    assert both.parts["mask"]["unit"].tolist() == ["inside first", "outside first", "inside second", "outside second"]
    alone = torch.cat(
        [gradient_consistency(model, *facts, by=(), mask=mask).cosines["mask"] for mask in masks.values()]
    )
    assert torch.equal(both.cosines["mask"], alone)


def test_means_of_an_example_are_those_of_its_pairs(facts):
    found = gradient_consistency(loaded("llama"), *facts, by=["layer"])
    rows = found.by_example("layer").set_index(["unit", "kind", "example"])["cosine"]
    means = found.pairs("layer").groupby(["unit", "kind", "example"])["cosine"].mean()
    assert len(rows) == len(means)
    assert rows.to_dict() == pytest.approx(means.to_dict(), abs=1e-6)


def test_facts_are_paired_answer_by_answer_also_where_an_example_tells_several(tokenizer, tmp_path):
    settings = DatasetSettings(people=6, biographies=1, row="biography")
    dataset = make_dataset(tmp_path / "facts", settings)
    bio, qa = (dataset.task(split, tokenizer) for split in ("bio", "qa_id"))
    assert len(bio.answers) == 6 * len(bio)
    facts = facts_in_common(bio, qa)
    assert len(facts) == len(qa)
    one, two = pair_facts(bio, qa)
    assert len(one) == len(one.answers) == len(two) == len(qa)
    for name in ("group", "attribute", "value"):
        assert one.answers[name].tolist() == two.answers[name].tolist()
    for answer in one.answers.itertuples():
        tokens = one.tokens[answer.example]
        other = two.answers.iloc[answer.example]
        assert torch.equal(tokens[answer.start : answer.end], two.tokens[answer.example][other["start"] : other["end"]])
    some = pair_facts(bio, qa, 5, seed=1)
    assert some[0].answers["value"].tolist() != pair_facts(bio, qa, 5, seed=2)[0].answers["value"].tolist()
    # groups may be names in one task and numbers in the other
    other = replace(qa, answers=qa.answers.assign(group="nobody"))
    with pytest.raises(CircuitsError, match="bio and qa_id have no fact in common"):
        pair_facts(bio, other)


def test_the_shares_of_answers_have_the_mean_and_the_spread_of_the_share(tasks):
    answers = input_signature(loaded("llama"), tasks["bio"].select(range(0, 120, 4)), per_answer=True)
    shares = answer_shares(answers)
    means = signature_means(answers).set_index("span")
    assert shares.groupby("span")["share"].mean().to_dict() == pytest.approx(means["share"].to_dict())
    assert len(shares) == 3 * means["answers"].iloc[0] < len(answers)


@pytest.mark.parametrize("at_a_time", [1 << 24, 3_000])
def test_entries_of_masks_are_the_same_taken_alone_or_from_all(facts, at_a_time, monkeypatch):
    model = loaded("llama")
    some = unit_mask(model, [Head(layer, 1) for layer in range(3)])
    masks = {"some": some, "random": some.random(0)}
    found = []
    for cost in (0, 1e9):
        monkeypatch.setattr(products, "_TAKING", cost)
        monkeypatch.setattr(products, "_AT_A_TIME", at_a_time)
        found.append(gradient_consistency(model, *facts, by=(), mask=masks).cosines["mask"])
    assert torch.allclose(found[0], found[1], atol=1e-5)
