"""The steps consistency and signature: planted truths, and tables that are what the functions give."""

from dataclasses import replace

import numpy
import pandas
import pytest

from circuits.analysis import AnalysisSettings, analyse
from circuits.analysis.consistency import consistency_tests, masked_cosines
from circuits.analysis.summary import consistency_numbers
from circuits.consistency import (
    gradient_consistency,
    input_signature,
    representation_consistency,
    signature_means,
)
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset
from circuits.statistics import paired
from circuits.tasks import pair_facts
from tests.fixtures import loaded

pytestmark = pytest.mark.usefixtures("all_unchecked")

SETTINGS = AnalysisSettings(draws=2, fractions=(), examples_by_step={"consistency": 20, "signature": 20})
STEPS = ["consistency", "signature"]


@pytest.fixture(scope="module")
def chosen(tasks):
    return [tasks["bio"], tasks["qa_id"]]


@pytest.fixture(scope="module")
def found(chosen, tmp_path_factory):
    return analyse(loaded("llama"), chosen, out=tmp_path_factory.mktemp("c") / "out", settings=SETTINGS, only=STEPS)


@pytest.mark.usefixtures("pageless")
def test_tasks_that_are_the_same_text_are_alike_in_everything(tasks, tmp_path):
    one = tasks["qa_id"].select(range(12))
    other = replace(one.select(range(11, -1, -1)), name="again")
    same = analyse(loaded("llama"), [one, other], out=tmp_path / "same", settings=SETTINGS, only=STEPS)
    matched = same.tables["gradient_consistency"].query("kind == 'matched'")
    known = matched[matched["mean"].notna()]
    assert set(known["by"]) == {"all", "layer", "component", "mask"}
    assert known["mean"].tolist() == pytest.approx([1] * len(known), abs=1e-5)
    table = same.tables["representation_consistency"].query("kind == 'matched' and span == 'last'")
    assert table["cosine"].tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert table["retrieval"].tolist() == [1] * 4
    assert table["cka"].tolist() == pytest.approx([1] * 4)
    numbers = same.summary["consistency"][0]
    assert (numbers["task"], numbers["other"]) == ("qa_id", "again")
    assert numbers["gradient"]["matched"] == numbers["representation"]["retrieval"] == 1
    assert numbers["gradient"]["mismatched"] < 0.9


def test_the_tables_are_what_the_functions_give(chosen, found):
    model, (one, two) = loaded("llama"), pair_facts(*chosen, 20)
    assert len(one) == 20
    table = found.tables["gradient_consistency"]
    assert set(zip(table["task"], table["other"], strict=True)) == {("bio", "qa_id")}
    alone = gradient_consistency(model, one, two, by=("all", "component"), mask=found.masks["tensor"])
    for name, condition, unit in (("all", "all", "all"), ("component", "all", "L2.mlp"), ("mask", "shared", "inside")):
        rows = table[(table["by"] == name) & (table["condition"] == condition) & table["scope"].isin(["", "tensor"])]
        rows = rows[rows["unit"] == ("shared" if unit == "inside" else unit)].set_index("kind")
        expected = alone.means(name).query("unit == @unit").set_index("kind")
        for column in ("pairs", "mean", "low", "high", "matched_above"):
            numpy.testing.assert_allclose(rows[column], expected[column], atol=1e-5)
    rest = table.query("condition == 'rest' and scope == 'tensor' and kind == 'matched'")["mean"].item()
    outside = alone.means("mask").query("unit == 'outside' and kind == 'matched'")["mean"].item()
    assert rest == pytest.approx(outside, abs=1e-5)
    random = found.masks["tensor"].control("0/1")[1]
    drawn = gradient_consistency(model, one, two, by=(), mask=random).means("mask").iloc[0]["mean"]
    of_draw = table.query("condition == 'random' and draw == 1 and scope == 'tensor' and kind == 'matched'")
    assert of_draw["mean"].item() == pytest.approx(drawn, abs=1e-5)
    activations = found.tables["representation_consistency"].drop(columns=["task", "other"])
    expected = representation_consistency(model, one, two, spans=("last", "subject"))
    pandas.testing.assert_frame_equal(activations, expected, atol=1e-5, check_dtype=False)


def test_differences_are_tested_fact_by_fact(found):
    tests = found.tables["consistency_tests"]
    pairs = found.tables["gradient_consistency_pairs"]
    rows = pairs.query("unit == 'L1'").pivot(index=["group", "example"], columns="kind", values="cosine")
    rows = rows.dropna(subset=["matched", "same_attribute"])
    by_hand = paired(
        *(rows[kind].to_numpy() for kind in ("matched", "same_attribute")),
        rows.index.get_level_values("group").to_numpy(),
        kind="real",
    )
    row = tests.query("measure == 'gradient' and unit == 'L1' and than == 'same_attribute'").iloc[0]
    assert [row["difference"], row["low"], row["high"], row["p"]] == pytest.approx(
        [by_hand.difference, by_hand.low, by_hand.high, by_hand.p_value]
    )
    inside = masked_cosines(pairs).query("scope == 'global'")
    rows = pairs.query("by == 'mask' and scope == 'global' and kind == 'matched'")
    control = "shared_thinned" if "shared_thinned" in set(rows["condition"]) else "shared"
    for column, condition in (("inside", control), ("random", "random")):
        expected = rows[rows["condition"] == condition].groupby("example")["cosine"].mean()
        assert inside.set_index("example")[column].to_dict() == pytest.approx(expected.to_dict())
    row = tests.query("measure == 'inside' and scope == 'global' and than == 'random'").iloc[0]
    assert row["difference"] == pytest.approx((inside["inside"] - inside["random"]).mean())
    retrieved = tests.query("measure == 'retrieval' and span == 'last' and layer == 3").iloc[0]
    activations = found.tables["representation_consistency"]
    last = activations.query("kind == 'matched' and span == 'last' and layer == 3").iloc[0]
    assert (retrieved["value"], retrieved["control"]) == pytest.approx((last["retrieval"], last["chance"]))
    assert (tests["q"] >= tests["p"] - 1e-12).all()


def test_planted_differences_are_found_inside(found):
    """Facts that agree by 0.2 more inside the shared parameters than in random ones."""
    pairs = found.tables["gradient_consistency_pairs"].copy()
    masked = (pairs["by"] == "mask") & (pairs["kind"] == "matched") & (pairs["scope"] == "global")
    pairs.loc[masked, "cosine"] = pairs.loc[masked, "example"] / 100
    pairs.loc[masked & pairs["condition"].str.startswith("shared"), "cosine"] += 0.2
    # two draws that are alike could not tell
    more = [pairs[masked & (pairs["draw"] == 1)].assign(draw=draw) for draw in (2, 3, 4)]
    pairs = pandas.concat([pairs, *more], ignore_index=True)
    tests = consistency_tests(pairs, found.tables["representation_consistency_pairs"])
    row = tests.query("measure == 'inside' and scope == 'global' and than == 'random'").iloc[0]
    assert row["difference"] == pytest.approx(0.2)
    assert row["p"] < 0.05


def test_a_mask_like_any_random_one_differs_from_these_as_often_as_the_threshold_says(found):
    """Each set of parameters, drawn or not, has a cosine of its own for all facts together."""
    pairs = found.tables["gradient_consistency_pairs"]
    rows = pairs[(pairs["by"] == "mask") & (pairs["kind"] == "matched") & (pairs["scope"] == "global")]
    base = rows[rows["condition"] == "random"].query("draw == 0").reset_index(drop=True)
    nothing, generator, p_values = (
        found.tables["representation_consistency_pairs"].iloc[:0],
        numpy.random.default_rng(0),
        [],
    )
    for _ in range(50):
        sets = [("shared", 0), ("rest", 0), *(("random", draw) for draw in range(5))]
        drawn = [
            base.assign(condition=name, draw=draw, cosine=base["example"] / 100 + generator.normal(0, 0.05))
            for name, draw in sets
        ]
        tests = consistency_tests(pandas.concat(drawn, ignore_index=True), nothing)
        p_values.append(tests.query("than == 'random'")["p"].item())
    assert numpy.mean(numpy.array(p_values) < 0.05) <= 0.12


def test_the_signature_is_that_of_the_facts_both_tasks_tell(chosen, found):
    table = found.tables["signature"]
    assert set(table["task"]) <= {"bio", "qa_id"}
    one, _ = pair_facts(*chosen, 20)
    answers = found.tables["signature_answers"].query("task == 'bio'")
    told = answers.drop_duplicates("example")
    assert told["group"].tolist() == one.answers["group"].tolist()
    alone = input_signature(loaded("llama"), replace(one, name="bio"), per_answer=True, draws=2)
    expected = signature_means(alone)
    rows = table.query("task == 'bio'").reset_index(drop=True)
    assert rows["span"].tolist() == ["subject", "relation", "context"]
    for name in ("effect", "share", "share_low", "answers"):
        numpy.testing.assert_allclose(rows[name], expected[name], atol=1e-5)
    shares = answers.dropna(subset="share").groupby("span")["share"].mean()
    assert shares.to_dict() == pytest.approx(rows.set_index("span")["share"].to_dict(), abs=1e-5)


def test_what_is_found_is_summed_up_drawn_and_shown(found):
    [numbers] = found.summary["consistency"]
    assert numbers == {"task": "bio", "other": "qa_id", **consistency_numbers(found.tables, "bio", "qa_id")}
    table = found.tables["gradient_consistency"]
    inside = table.query("scope == 'tensor' and kind == 'matched'").groupby("condition")["mean"].mean()
    assert numbers["gradient"]["outside_per_tensor"] == pytest.approx(inside["random"], abs=1e-4)
    assert numbers["gradient"]["inside_per_tensor"] == pytest.approx(
        inside.get("shared_thinned", inside["shared"]), abs=1e-4
    )
    assert {"consistency_bio_qa_id", "inside_bio_qa_id", "signature"} <= set(found.figures)
    page = found.report.read_text()
    for title in ("Are BIO and QA-ID alike inside?", "Is it the shared parameters", "What the answers rest on"):
        assert title in page


def test_what_is_lacking_is_said(tasks, tmp_path):
    bio, qa = tasks["bio"].select(range(8)), tasks["qa_id"].select(range(8))
    apart = replace(qa, answers=qa.answers.assign(group=qa.answers["group"] + 1000))
    blind = [replace(task, spans={}) for task in (bio, apart)]
    model = loaded("llama")
    for step, reason in zip(
        STEPS, ("no two tasks tell three facts of the same groups", "no task has spans"), strict=True
    ):
        with pytest.raises(CircuitsError, match=f"the step {step} was asked for, but {reason}"):
            analyse(model, blind, out=tmp_path / "a", settings=SETTINGS, only=[step])
    assert not (tmp_path / "a").exists()
    # one fact alone has nobody to lend it tokens
    single = replace(qa.select([0]), name="single")
    found = analyse(loaded("llama"), single, out=tmp_path / "b", settings=SETTINGS, only=["signature"])
    assert found.tables["signature"].empty
    assert "signature" not in found.summary
    assert "signature" not in found.figures


@pytest.mark.usefixtures("pageless")
def test_examples_that_tell_several_facts_are_taken_answer_by_answer(tokenizer, tmp_path):
    settings = DatasetSettings(people=12, biographies=1, row="biography", order="fixed")
    dataset = make_dataset(tmp_path / "facts", settings)
    pair = [dataset.task(split, tokenizer) for split in ("bio", "qa_id")]
    found = analyse(loaded("llama"), pair, out=tmp_path / "out", settings=SETTINGS, only=STEPS)
    pairs = found.tables["gradient_consistency_pairs"].query("by == 'all' and kind == 'matched'")
    assert pairs["attribute"].nunique() == 6
    assert len(pairs) == 20
    places = found.tables["signature_answers"].query("task == 'bio'")["place"]
    assert set(places) == set(range(6))
    assert found.tables["signature"].query("task == 'bio'")["answers"].min() > 0
