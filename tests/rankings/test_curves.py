import copy
import itertools
import math
from dataclasses import replace

import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.interventions import Intervention, ablate_heads, mean_head_outputs, run_interventions
from circuits.masks import covered_parameters, revert, unit_mask
from circuits.metrics import evaluate
from circuits.models import parameters_of, shape_of
from circuits.rankings import (
    RESTS,
    Evidence,
    critical_curve,
    curve_areas,
    curve_means,
    curve_summary,
    default_counts,
    rank_units,
    sufficient_curve,
)
from circuits.statistics import mean_interval
from circuits.units import Head, KVGroup, Neuron, with_groups

ATTENTION = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O")


def grafted_by_hand(start, source, units, everything_else=False):
    """A copy of ``start`` with the heads' slices of ``source``, and perhaps all that belongs to no head."""
    by_hand = copy.deepcopy(start)
    ours, theirs = parameters_of(by_hand), parameters_of(source)
    with torch.no_grad():
        for name in ours:
            if everything_else and name.split(".")[-1] not in ATTENTION:
                ours[name].copy_(theirs[name])
        for layer, index in units:
            for name in ATTENTION:
                if (full := f"blocks.{layer}.attn.{name}") in ours:
                    slot = index * len(ours[full]) // start.cfg.n_heads
                    ours[full][slot] = theirs[full][slot]
    return by_hand


def agrees(row, model, task) -> bool:
    scores = evaluate(model, task)
    return row.exact_match == scores["exact_match"].mean() and row.log_prob == pytest.approx(
        scores["log_prob"].mean(), abs=1e-4
    )


def top(rankings: pandas.DataFrame, row) -> list[tuple[int, int]]:
    order = rankings[(rankings["metric"] == row.metric) & (rankings["draw"] == row.draw)]
    return list(zip(order["layer"], order["index"], strict=True))[: row.n]


@pytest.fixture
def rankings(model, pre) -> pandas.DataFrame:
    return rank_units(Evidence(model, pre), Head, ["change", "random"], draws=2)


@pytest.fixture
def state(model, pre):
    return [{name: value.detach().clone() for name, value in one.named_parameters()} for one in (model, pre)]


def restored(state, model, pre) -> bool:
    return all(
        torch.equal(value, before[name])
        for before, one in zip(state, (model, pre), strict=True)
        for name, value in one.named_parameters()
    )


@pytest.mark.parametrize("rest", RESTS)
def test_a_sufficient_curve_equals_a_fresh_graft_at_every_point(model, pre, recalled, tasks, rankings, state, rest):
    scored = [recalled, tasks["bio"].select(range(4))]
    curve = sufficient_curve(rankings, pre, model, tasks=scored, rest=rest, counts=[0, 1, 2, 7, 15])
    assert len(curve) == 3 * 5 * 2
    assert restored(state, model, pre)
    for row in curve[(curve["draw"] == 0) & curve["n"].isin([0, 2, 15])].itertuples():
        by_hand = grafted_by_hand(pre, model, top(rankings, row), rest == "fine_tuned")
        assert agrees(row, by_hand, scored[row.task == "bio"])


def test_a_critical_curve_equals_a_fresh_copy_at_every_point(model, pre, recalled, rankings, state):
    curve = critical_curve(rankings, model, [recalled], pre=pre)
    assert restored(state, model, pre)
    assert list(curve["n"]) == 3 * list(range(17))
    for row in curve[(curve["draw"] == 0) & curve["n"].isin([1, 5, 16])].itertuples():
        assert agrees(row, grafted_by_hand(model, pre, top(rankings, row)), recalled)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_critical_curve_of_ablated_outputs_equals_ablating_heads(model, tasks, recalled, rankings, mode):
    means = mean_head_outputs(model, tasks["bio"])
    curve = critical_curve(rankings, model, [recalled], mode=mode, reference=tasks["bio"], counts=[0, 1, 3, 9])
    for row in curve.itertuples():
        with ablate_heads(model, [Head(*unit) for unit in top(rankings, row)], mode, means=means):
            assert agrees(row, model, recalled)
    assert curve["pre"].isna().all()
    assert set(curve["condition"]) == {mode}


def test_curves_end_at_the_models_themselves(model, pre, recalled, rankings):
    sufficient, critical = (
        sufficient_curve(rankings, pre, model, tasks=[recalled]),
        critical_curve(rankings, model, [recalled], pre=pre),
    )
    whole, before = (evaluate(one, recalled) for one in (model, pre))
    assert whole["exact_match"].mean() == 1
    assert before["exact_match"].mean() < 1
    for curve, n in ((sufficient, 16), (critical, 0)):
        assert (curve.loc[curve["n"] == n, "exact_match"] == 1).all()
        assert curve.loc[curve["n"] == n, "log_prob"].tolist() == pytest.approx(
            [whole["log_prob"].mean()] * 3, abs=1e-5
        )
        assert (curve["fine_tuned"] == 1).all()
        assert (curve["pre"] == before["exact_match"].mean()).all()
    lowest = sufficient_curve(rankings, pre, model, tasks=[recalled], counts=[0], rest="pre")
    assert lowest["log_prob"].tolist() == pytest.approx([before["log_prob"].mean()] * 3, abs=1e-5)


def test_the_fraction_is_of_all_parameters(model, pre, recalled, rankings):
    curve = critical_curve(rankings, model, [recalled], pre=pre, counts=[0, 1, 16])
    total = sum(value.numel() for value in parameters_of(model).values())
    if model.checkpoint.config.tie_word_embeddings:
        total -= model.unembed.W_U.numel()
    owned = sum(value.numel() for name, value in parameters_of(model).items() if name.split(".")[-1] in ATTENTION)
    first = curve[curve["n"] == 1]["fraction"]
    one = sum(
        parameters_of(model)[f"blocks.0.attn.{name}"][0].numel()
        for name in ATTENTION
        if f"blocks.0.attn.{name}" in parameters_of(model)
    )
    assert first.tolist() == pytest.approx([one / total] * 3)
    assert curve[curve["n"] == 16]["fraction"].tolist() == pytest.approx([owned / total] * 3)


def test_curves_of_neurons(model, pre, recalled):
    rankings = rank_units(Evidence(model, pre), Neuron, ["change"])
    two = recalled.select([0, 1])
    sufficient = sufficient_curve(rankings, pre, model, tasks=[two], counts=[0, 100, 4 * model.cfg.d_mlp])
    assert sufficient["exact_match"].iloc[-1] == 1
    zero = critical_curve(rankings, model, [two], mode="zero", counts=[0, 100, 4 * model.cfg.d_mlp])
    no_neurons = copy.deepcopy(model)
    with torch.no_grad():
        for block in no_neurons.blocks:
            block.mlp.W_out[:] = 0
    assert zero["log_prob"].iloc[-1] == pytest.approx(evaluate(no_neurons, two)["log_prob"].mean(), abs=1e-4)
    assert critical_curve(rankings, model, [two], mode="mean", counts=[0])["exact_match"].tolist() == [1.0]


def test_one_ranking_alone_is_a_table_with_units(model, pre, recalled):
    curve = critical_curve(pandas.DataFrame({"unit": ["L3H1", "L0H0"]}), model, [recalled], pre=pre)
    assert list(curve["n"]) == [0, 1, 2]
    assert set(curve["metric"]) == {"ranking"}


def test_the_same_curve_twice_to_the_bit(model, pre, recalled, rankings):
    one, two = (sufficient_curve(rankings, pre, model, tasks=[recalled], counts=[0, 3, 5]) for _ in range(2))
    assert one.equals(two)


def made_up(condition: str, accuracies: list[float], draw: int = 0, counts=(0, 1, 2, 4, 8)) -> pandas.DataFrame:
    return pandas.DataFrame(
        {
            "condition": condition,
            "metric": "made_up",
            "draw": draw,
            "n": counts,
            "task": "qa",
            "exact_match": accuracies,
            "fine_tuned": 0.8,
        }
    )


def test_one_number_for_a_curve_by_hand():
    (row,) = curve_summary(made_up("sufficient", [0.0, 0.2, 0.75, 0.76, 0.8])).itertuples()
    area = (0.5 * (0.0 + 0.2) + 0.5 * (0.2 + 0.75) + 2 * 0.5 * (0.75 + 0.76) + 4 * 0.5 * (0.76 + 0.8)) / 8
    assert row.auc == pytest.approx(area)
    assert (row.n95, row.draws) == (4, 1)
    assert math.isnan(row.auc_low)
    (row,) = curve_summary(made_up("revert", [0.8, 0.4, 0.39, 0.5, 0.0])).itertuples()
    assert row.n50 == 2
    assert "n95" not in row._fields


def test_a_curve_that_never_gets_there_has_no_number():
    assert curve_summary(made_up("sufficient", [0.0, 0.1, 0.2, 0.3, 0.4]))["n95"].isna().all()
    assert curve_summary(made_up("zero", [0.8] * 5))["n50"].isna().all()
    nothing_right = made_up("sufficient", [0.0] * 5).assign(fine_tuned=0.0)
    assert curve_summary(nothing_right)["n95"].isna().all()


def test_draws_give_an_interval_and_a_median():
    rising = ([0.0, 0.8, 0.8, 0.8, 0.8], [0.0, 0.0, 0.0, 0.8, 0.8], [0.0, 0.0, 0.0, 0.0, 0.1])
    (row,) = curve_summary(
        pandas.concat([made_up("sufficient", values, draw) for draw, values in enumerate(rising)])
    ).itertuples()
    areas = [curve_summary(made_up("sufficient", values))["auc"].item() for values in rising]
    assert (row.auc, row.auc_low, row.auc_high) == pytest.approx(mean_interval(areas))
    assert (row.n95, row.draws) == (4, 3)


def test_joined_curves_are_summed_up_apart():
    fast, slow = [0.8] * 5, [0.0, 0.0, 0.0, 0.0, 0.8]
    for column in ("model", "kind", "seed"):
        both = pandas.concat(
            [made_up("sufficient", values).assign(**{column: name}) for name, values in (("a", fast), ("b", slow))]
        )
        summary = curve_summary(both).set_index(column)
        for name, values in (("a", fast), ("b", slow)):
            (alone,) = curve_summary(made_up("sufficient", values)).itertuples()
            row = summary.loc[name]
            assert (row["auc"], row["n95"], row["draws"]) == (alone.auc, alone.n95, 1)
        answers = both.assign(example=0, group="Ada", attribute="city", log_prob=0.0, pre=0.0)
        assert curve_means(answers)[[column, "n", "exact_match"]].values.tolist() == (
            both[[column, "n", "exact_match"]].values.tolist()
        )
        assert curve_areas(answers).set_index(column)["area"].to_dict() == summary["auc"].to_dict()
    with pytest.raises(CircuitsError, match="the curves have several rows for one point"):
        curve_summary(both.drop(columns="seed"))
    for summed_up in (curve_means, curve_areas):
        with pytest.raises(CircuitsError, match="the curves have several rows for one point of an answer"):
            summed_up(answers.drop(columns="seed"))


def test_joined_curves_may_be_measured_at_other_counts():
    short = made_up("sufficient", [0.0, 1.0, 1.0], counts=(0, 1, 2)).assign(kind="head")
    long = made_up("sufficient", [0.0, 0.0, 1.0], counts=(0, 10, 20)).assign(kind="neuron")
    named = {"example": 0, "group": "Ada", "attribute": "city"}
    areas = curve_areas(pandas.concat([short, long]).assign(**named)).set_index("kind")["area"]
    assert areas.to_dict() == {"head": 0.75, "neuron": 0.25}
    with pytest.raises(
        CircuitsError,
        match=r"the sufficient curve of made_up .*kind head\) has a single point: measure two counts or more",
    ):
        curve_areas(pandas.concat([short.iloc[:1], long]).assign(**named))
    uneven = pandas.concat([short.assign(**named), short.iloc[:2].assign(**named | {"example": 1})])
    with pytest.raises(CircuitsError, match=r"kind head\) has answers that are not there at every n"):
        curve_areas(uneven)


def test_counts_are_dense_first_and_end_at_all():
    assert default_counts(32) == list(range(33))
    counts = default_counts(1408)
    assert counts == sorted(set(counts))
    assert counts == [0, 1, 2, 4, 8, 16, 32, 64, 128, *(round(140.8 * part) for part in range(1, 11))]
    assert default_counts(270, halvings=4, tenths=False) == [0, 17, 34, 68, 135, 270]
    assert default_counts(100, tenths=False) == [0, 1, 2, 4, 8, 16, 32, 64, 100]
    assert default_counts(270, halvings=4) == [0, 17, 27, 54, 81, 108, 135, 162, 189, 216, 243, 270]
    for units in (33, 270, 46080):
        for halvings in (None, 2, 4):
            counts = default_counts(units, halvings=halvings)
            assert max(after - before for before, after in itertools.pairwise(counts)) <= units / 10 + 1
            assert (counts[0], counts[-1]) == (0, units)


def test_an_accuracy_of_just_enough_answers_is_enough():
    # 19 is 95 % of 20, whatever floats make of it
    enough, whole = 19 / 53, 20 / 53
    assert enough < 0.95 * whole
    curve = made_up("sufficient", [0.0, 0.1 * whole, enough, whole, whole]).assign(fine_tuned=whole)
    (row,) = curve_summary(curve).itertuples()
    assert row.n95 == 2
    # and three of six answers are not less than half
    half = math.nextafter(0.3, 0)
    (row,) = curve_summary(made_up("revert", [0.6, half, 0.2, 0.0, 0.0]).assign(fine_tuned=0.6)).itertuples()
    assert row.n50 == 2


def test_every_answer_of_a_curve_is_kept(model, pre, recalled, tasks, rankings):
    scored = [recalled, tasks["bio"].select(range(4))]
    both = ((sufficient_curve, (pre, model), {"tasks": scored}), (critical_curve, (model, scored), {"pre": pre}))
    for curve, models, options in both:
        answers = curve(rankings, *models, **options, counts=[0, 2, 15], per_answer=True)
        table = curve(rankings, *models, **options, counts=[0, 2, 15])
        pandas.testing.assert_frame_equal(curve_means(answers), table)
        assert len(answers) == 3 * 3 * sum(len(task.answers) for task in scored)
        row = table[(table["n"] == 2) & (table["task"] == "bio")].iloc[0]
        start, source = (pre, model) if curve is sufficient_curve else (model, pre)
        expected = evaluate(grafted_by_hand(start, source, top(rankings, row), curve is sufficient_curve), scored[1])
        rows = answers[(answers["n"] == 2) & (answers["task"] == "bio") & (answers["metric"] == "change")]
        names = ["example", "group", "attribute", "exact_match"]
        pandas.testing.assert_frame_equal(rows[names].reset_index(drop=True), expected[names])
        assert rows["fine_tuned"].tolist() == evaluate(model, scored[1])["exact_match"].tolist()
        assert rows["pre"].tolist() == evaluate(pre, scored[1])["exact_match"].tolist()


def test_heads_bring_their_groups_or_do_not_and_the_curve_says_so(model, pre, recalled, rankings):
    shape = shape_of(model)
    grouped = shape.n_heads > shape.n_key_value_heads
    for groups in (True, False):
        curve = critical_curve(rankings, model, [recalled], pre=pre, counts=[0, 1, 3, 16], groups=groups)
        for row in curve[curve["draw"] == 0].itertuples():
            heads = [Head(*unit) for unit in top(rankings, row)]
            units = with_groups(heads, shape) if groups else heads
            assert row.groups == sum(isinstance(unit, KVGroup) for unit in units)
            mask = unit_mask(model, units)
            with revert(model, mask, pre):
                assert agrees(row, model, recalled)
            total = sum(value.numel() for value in covered_parameters(model).values())
            assert row.fraction == pytest.approx(mask.size / total)
        assert (curve["groups"].max() > 0) == (grouped and groups)
        ends = sufficient_curve(rankings, pre, model, tasks=[recalled], counts=[16], groups=groups)
        assert (ends["exact_match"] == 1).all()
    assert (critical_curve(rankings, model, [recalled], mode="zero", counts=[0, 9])["groups"] == 0).all()


def test_reverting_means_the_same_in_the_engine_and_in_masks(model, pre, tasks):
    questions, head = tasks["qa_id"].select(range(6)), Head(0, 0)
    for units in ([head], with_groups([head], shape_of(model))):
        found = run_interventions(
            model, questions, [Intervention(tuple(units), "revert")], metrics=["log_prob"], pre=pre
        )
        with revert(model, unit_mask(model, units), pre):
            expected = evaluate(model, questions)["log_prob"].mean()
        assert found["log_prob"].iloc[0] == pytest.approx(expected, rel=1e-6)


def test_bad_input_is_refused(model, pre, recalled, rankings):
    def refuses(message, table=rankings, tasks=(recalled,), **options):
        with pytest.raises(CircuitsError, match=message):
            critical_curve(table, model, list(tasks), pre=pre, **options)

    refuses("there is no mode 'delete': choose from revert, zero, mean", mode="delete")
    refuses("the counts must lie between 0 and 16", counts=[0, 17])
    refuses("the counts must lie between 0 and 16", counts=[])
    refuses("a curve needs a task to score", tasks=())
    refuses("two tasks are called recalled", tasks=(recalled, recalled))
    refuses("a ranking is a table with a column unit", table=rankings.drop(columns="unit"))
    refuses("a ranking is of heads or of neurons: it names L0G1", table=pandas.DataFrame({"unit": ["L0G1"]}))
    refuses("'L0N1' is not a head", table=pandas.DataFrame({"unit": ["L0H1", "L0N1"]}))
    refuses("there is no head L9H0", table=pandas.DataFrame({"unit": ["L9H0"]}))
    refuses("the ranking ranking names L0H1 twice", table=pandas.DataFrame({"unit": ["L0H1", "L0H1"]}))
    with pytest.raises(CircuitsError, match="reverting needs the model before fine-tuning"):
        critical_curve(rankings, model, [recalled])
    with pytest.raises(CircuitsError, match="there is no rest 'none': choose from fine_tuned, pre"):
        sufficient_curve(rankings, pre, model, tasks=[recalled], rest="none")
    with pytest.raises(CircuitsError, match="the curves have no condition"):
        curve_summary(rankings)
    with pytest.raises(CircuitsError, match=r"the revert curve of change \(task recalled\) has a single point"):
        curve_summary(critical_curve(rankings, model, [recalled], pre=pre, counts=[3]))


def test_a_task_of_several_answers_counts_answers(model, pre, bio, rankings):
    long = replace(bio, name="long")
    curve = critical_curve(rankings, model, [long], pre=pre, counts=[0])
    assert curve["log_prob"].tolist() == pytest.approx([evaluate(model, long)["log_prob"].mean()] * 3, abs=1e-4)
