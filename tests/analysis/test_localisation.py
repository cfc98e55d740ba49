"""The step localise: against weights changed by hand, and where the shared parameters are all that was trained."""

import copy

import numpy
import pandas
import pytest
import torch

from circuits.analysis import AnalysisSettings, analyse
from circuits.analysis.compared_consistency import consistency_differences, sections_of_both
from circuits.analysis.localisation import MEASURES, localisation_means, localisation_tests, measured
from circuits.consistency import representation_consistency
from circuits.errors import CircuitsError
from circuits.figures import localisation_figure
from circuits.masks import covered_parameters
from circuits.models import load_huggingface, load_model, save_model
from circuits.tasks import pair_facts
from tests.fixtures import loaded, without_pages

pytestmark = pytest.mark.usefixtures("all_unchecked", "pageless")

SETTINGS = {"draws": 2, "fractions": (), "fraction": 0.05, "examples_by_step": {"localise": 12}}


@pytest.fixture(scope="module")
def chosen(tasks):
    return [tasks["bio"], tasks["qa_id"]]


@pytest.fixture(scope="module")
def found(chosen, tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("l") / "out", AnalysisSettings(**SETTINGS)
    model, pre = loaded("llama"), loaded("llama", seed=1)
    with without_pages():
        return analyse(model, chosen, pre, out=out, settings=settings, only=["localise"], check_start=False)


def by_hand(huggingface, one, two):
    """Mean over layers of the cosine of centred activations where each answer is predicted, one example at a time."""
    sides = []
    for task in (one.right_padded(), two.right_padded()):
        states = []
        for example, answer in enumerate(task.answers.itertuples()):
            tokens = task.tokens[example, : answer.start][None]
            with torch.no_grad():
                hidden = huggingface(tokens, output_hidden_states=True).hidden_states[1:]
            states.append(torch.stack([layer[0, -1] for layer in hidden]))
        stacked = torch.stack(states)
        sides.append(stacked - stacked.mean(0))
    return torch.cosine_similarity(*sides, dim=-1)


def mixed(mask, inside, outside, folder):
    """A checkpoint with the values of one model in the mask, and of the other everywhere else."""
    model = copy.deepcopy(outside)
    values = covered_parameters(inside)
    with torch.no_grad():
        for name, value in covered_parameters(model).items():
            if name in mask.masks:
                value.copy_(torch.where(mask.masks[name], values[name], value))
    return save_model(model, folder)


@pytest.mark.parametrize("act", ["revert", "alone"])
def test_numbers_are_those_of_weights_changed_by_hand(found, chosen, act, tmp_path):
    model, pre = loaded("llama"), loaded("llama", seed=1)
    one, two = pair_facts(*chosen, 12)
    inside, outside = (pre, model) if act == "revert" else (model, pre)
    mixed(found.masks["global"], inside, outside, tmp_path / "changed")
    # the last layer's hidden state of Hugging Face's model has gone through the last norm
    expected = by_hand(load_huggingface(tmp_path / "changed"), one, two)[:, :-1].mean(1)
    view = load_model(tmp_path / "changed")
    again = measured(view, one, two)
    table = found.tables["localisation_facts"]
    rows = table[(table["act"] == act) & (table["scope"] == "global") & (table["condition"] == "shared")]
    for measure in MEASURES:
        assert rows[measure].astype(float).tolist() == pytest.approx(again[measure].astype(float).tolist(), abs=1e-5)
    pairs = representation_consistency(view, one, two, per_pair=True)
    early = pairs[(pairs["kind"] == "matched") & (pairs["layer"] < pairs["layer"].max())]
    assert early.groupby("example")["cosine"].mean().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_controls_lie_outside_and_the_ends_are_both_models(found, chosen):
    one, two = pair_facts(*chosen, 12)
    table = found.tables["localisation_facts"]
    for act, model in (("none", loaded("llama")), ("all", loaded("llama", seed=1))):
        rows = table[table["act"] == act]
        expected = measured(model, one, two)
        assert rows["cosine"].tolist() == pytest.approx(expected["cosine"].tolist(), abs=1e-6)
    sizes = table.groupby(["act", "scope", "condition", "draw"])["parameters"].first()
    for act in ("revert", "alone"):
        for scope in ("global", "tensor"):
            told = sizes[act, scope].unstack("draw")
            control = "shared_thinned" if "shared_thinned" in told.index else "shared"
            assert told.loc["random", 0] == told.loc[control, 0] > 0


def test_where_all_that_was_trained_is_shared_the_agreement_hangs_on_it(found, chosen, tmp_path):
    settings, model = AnalysisSettings(**SETTINGS | {"rest": "fine_tuned"}), loaded("llama")
    mixed(found.masks["global"], loaded("llama", seed=1), model, tmp_path / "pre")
    pre = load_model(tmp_path / "pre")
    found = analyse(model, chosen, pre, out=tmp_path / "o", settings=settings, only=["localise"], check_start=False)
    means = found.tables["localisation"].set_index(["scope", "act", "condition"])
    for measure in MEASURES:
        for act, whole in (("revert", "all"), ("alone", "none")):
            assert means.loc[("global", act, "shared"), measure] == pytest.approx(means.loc[("", whole, ""), measure])
    assert means.loc[("", "all", ""), "cosine"] != pytest.approx(means.loc[("", "none", ""), "cosine"], abs=0.01)


def test_tests_compare_fact_by_fact_and_means_are_over_facts(found):
    facts = found.tables["localisation_facts"]
    pandas.testing.assert_frame_equal(localisation_means(facts), found.tables["localisation"])
    tests = localisation_tests(facts).set_index(["scope", "act", "measure"])
    acted = facts[(facts["scope"] == "tensor") & (facts["act"] == "revert")]
    told = acted["condition"].unique()
    control = "shared_thinned" if "shared_thinned" in told else "shared"
    one, random = (
        acted[acted["condition"] == name].groupby("example")["cosine"].mean() for name in (control, "random")
    )
    row = tests.loc["tensor", "revert", "cosine"]
    assert row["difference"] == pytest.approx((one - random).mean())
    assert row["low"] < row["difference"] < row["high"]
    assert found.summary["localisation"]["bio and qa_id"]["tensor"]["revert_shared"].keys() == MEASURES.keys()


def test_a_mask_like_any_random_one_differs_from_these_as_often_as_the_threshold_says(found):
    """Each set of parameters, drawn or not, leaves a cosine of its own to all facts together."""
    facts = found.tables["localisation_facts"]
    base = facts[(facts["scope"] == "tensor") & (facts["act"] == "revert") & (facts["condition"] == "random")]
    base, generator, p_values = base[base["draw"] == 0], numpy.random.default_rng(0), []
    for _ in range(30):
        sets = [("shared", 0), *(("random", draw) for draw in range(5))]
        drawn = [
            base.assign(condition=name, draw=draw, cosine=base["cosine"] + generator.normal(0, 0.05))
            for name, draw in sets
        ]
        tests = localisation_tests(pandas.concat(drawn, ignore_index=True)).set_index("measure")
        p_values.append(tests["p"]["cosine"])
    assert numpy.mean(numpy.array(p_values) < 0.05) <= 0.14


def test_what_random_parameters_do_to_two_models_stands_beside_what_the_shared_ones_do(found):
    facts = found.tables["localisation_facts"]
    other = facts.assign(cosine=facts["cosine"].where(facts["condition"] != "random", facts["cosine"] / 2))
    sides = [{"localisation_facts": one, "localisation": localisation_means(one)} for one in (facts, other)]
    table = dict(consistency_differences(*sides))["localisation"]
    acted = table[table["act"].isin(["revert", "alone"])].set_index(["scope", "act"])
    assert (acted["cosine_difference"] == 0).all()
    means = facts[facts["condition"] == "random"].groupby(["scope", "act"])["cosine"].mean()
    for side, share in (("a", 1), ("b", 0.5)):
        assert acted[f"cosine_random_{side}"].to_dict() == pytest.approx((share * means).to_dict())
    (section,) = sections_of_both({"localisation": table}, {}, ("mixed", "two-stage"))
    shown = section.table[section.table["measure"] == "activations: cosine, random ones"]
    shown = shown.set_index(["the top", "parameters"])["two-stage"]
    assert shown["of each tensor", "reverted"] == f"{means['tensor', 'revert'] / 2:.2f}"
    assert len(shown) == len(means)


def test_without_a_start_it_is_refused(chosen, tmp_path):
    sentence = r"the step localise was asked for, but there is no model before fine-tuning \(pre\)"
    with pytest.raises(CircuitsError, match=sentence):
        analyse(loaded("llama"), chosen, out=tmp_path / "a", settings=AnalysisSettings(**SETTINGS), only=["localise"])


def test_the_figure_has_a_dot_for_each_mean(found):
    table = found.tables["localisation"].assign(model="m")
    figure = localisation_figure(table)
    assert len(figure.data) == 8
    rows = table[table["scope"].isin(["global", ""])]
    assert list(figure.data[0].x) == rows["cosine"].tolist()
    assert "whole model" in figure.data[0].y
