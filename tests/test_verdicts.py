"""Verdicts against scipy, enumeration and simulation."""

import itertools
import math
from dataclasses import replace

import numpy
import pandas
import pytest
from scipy import stats

from circuits.errors import CircuitsError
from circuits.statistics import Paired, beyond_draws
from circuits.verdicts import (
    Finding,
    compare_answers,
    corrected_together,
    findings_over_seeds,
    seeds_needed,
    spearman,
)

NOTHING = ("1a", "claim", "here", "control")


def asked(values: list[float], groups: list[int] | None = None) -> pandas.Series:
    """A number for each question, one person each if not said otherwise."""
    groups = list(range(len(values))) if groups is None else groups
    keys = pandas.MultiIndex.from_arrays(
        [groups, range(len(values)), ["city"] * len(values)], names=["group", "example", "attribute"]
    )
    return pandas.Series(values, keys)


def verdict(difference: float, low: float, high: float, p_value: float) -> str:
    return Finding(*NOTHING, difference, low, high, p_value).verdict


def test_a_verdict_needs_a_small_p_value_and_a_difference_worth_the_name():
    assert verdict(0.2, 0.1, 0.3, 0.001) == "holds"
    assert verdict(-0.2, -0.3, -0.1, 0.001) == "does not hold"
    assert verdict(0.2, -0.1, 0.5, 0.06) == "cannot be told"
    assert verdict(-0.2, -0.5, 0.1, 0.06) == "cannot be told"
    # certain, but less than two points
    assert verdict(0.015, 0.005, 0.03, 0.001) == "cannot be told"
    # Holm's p-value finds it, the interval that is shown does not
    assert verdict(0.2, -0.1, 0.5, 0.04) == verdict(-0.2, -0.5, 0.1, 0.04) == "cannot be told"
    # no room for two points in the paper's direction
    assert verdict(0.005, 0.001, 0.009, 0.001) == verdict(0.0, -0.01, 0.01, 1.0) == "does not hold"
    assert verdict(math.nan, math.nan, math.nan, math.nan) == "cannot be told"


def test_pairs_are_of_the_same_questions():
    one, other = asked([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]), asked([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    assert compare_answers(one, other, 0.95)["difference"] == 0.25
    with pytest.raises(CircuitsError, match="asked different ones"):
        compare_answers(one, other.iloc[1:], 0.95)


def test_a_difference_from_random_draws_must_be_beyond_single_draws():
    generator = numpy.random.default_rng(0)
    one, other = (asked(generator.binomial(1, share, 200) / 1, range(200)) for share in (0.9, 0.5))
    alone = compare_answers(one, other, 0.95)
    apart = [0.1, 0.9, 0.5, 0.3, 0.7]
    found = compare_answers(one, other, 0.95, draws=apart)
    by_hand = beyond_draws(
        Paired(*(alone[name] for name in ("difference", "low", "high", "p_value"))), apart, answers=200
    )
    assert [found[name] for name in ("difference", "low", "high", "p_value")] == pytest.approx(
        [by_hand.difference, by_hand.low, by_hand.high, by_hand.p_value]
    )
    assert (alone["p_value"] < 0.001, found["p_value"] > 0.1) == (True, True)
    assert ("questions could tell" in alone["needed"], "5 random draws lie" in found["needed"]) == (True, True)
    near = compare_answers(one, other, 0.95, draws=[0.5, 0.5001, 0.4999])
    assert near["p_value"] < 0.001
    assert near["needed"] == alone["needed"]
    # one draw says nothing, and nothing is told from it
    single = Finding(*NOTHING, **compare_answers(one, other, 0.95, draws=[0.5]))
    assert (single.verdict, "1 random draw" in single.needed) == ("cannot be told", True)


def test_p_values_of_a_page_are_corrected_together():
    found = [Finding(*NOTHING, 0.3, 0.1, 0.5, p_value) for p_value in (0.03, 0.02, math.nan)]
    assert [one.p_value for one in corrected_together(found)] == pytest.approx([0.04, 0.04, math.nan], nan_ok=True)
    found = [Finding(*NOTHING, 0.3, 0.1, 0.5, 0.04)] * 3
    assert [one.verdict for one in corrected_together(found)] == ["cannot be told"] * 3


def test_correlations_have_permutation_p_values():
    one, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 4.0, 6.0, 5.0]
    found = stats.spearmanr(one, other).statistic
    orders = [stats.spearmanr(one, order).statistic for order in itertools.permutations(other)]
    exact = numpy.mean([abs(value) >= abs(found) - 1e-12 for value in orders])
    correlation, low, high, p_value = spearman(one, other)
    assert (correlation, p_value) == (pytest.approx(found), pytest.approx(exact))
    assert -1 < low < correlation < high < 1
    generator = numpy.random.default_rng(3)
    one = generator.normal(size=16)
    other = one + generator.normal(size=16) * 2
    expected = stats.spearmanr(one, other)
    correlation, _, _, p_value = spearman(one, other)
    assert (correlation, p_value) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue, abs=0.01))
    assert spearman(range(100), range(100))[3] == pytest.approx(1 / 20_001)
    for sign in (1, -1):
        # perfect agreement of few is no certainty
        correlation, *ends, _ = spearman(range(8), [sign * rank for rank in range(8)])
        least, most = (sign * end for end in ends[::sign])
        assert sign * correlation == pytest.approx(1)
        assert most == pytest.approx(1)
        assert 0.8 < least < 0.99
        assert least < spearman(range(40), range(40))[1]
    assert spearman([1.0] * 5, range(5))[3] == 1


def test_unrelated_heads_agree_by_chance_as_often_as_the_p_value_says():
    generator = numpy.random.default_rng(0)
    found = [spearman(*generator.normal(size=(2, 16)))[3] for _ in range(120)]
    assert 0.01 < numpy.mean(numpy.array(found) < 0.05) < 0.10


def seeds(*differences: float, smallest: float = 0.05) -> list[list[Finding]]:
    return [[Finding(*NOTHING, value, smallest=smallest)] for value in differences]


def test_several_seeds_are_tested_on_their_differences():
    (found,) = findings_over_seeds(seeds(0.4, 0.5, 0.45))
    expected = stats.ttest_1samp([0.4, 0.5, 0.45], 0)
    interval = expected.confidence_interval(0.95)
    assert found.difference == pytest.approx(0.45)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.p_value, found.verdict) == (pytest.approx(expected.pvalue), "holds")
    (found,) = findings_over_seeds(seeds(0.4, -0.1, 0.2))
    assert found.verdict == "cannot be told"
    needed = seeds_needed(numpy.std([0.4, -0.1, 0.2], ddof=1), 1 / 6)
    assert found.needed == f"{needed} seeds could tell"
    assert findings_over_seeds(seeds(-0.4, -0.5, -0.45))[0].verdict == "does not hold"
    assert findings_over_seeds(seeds(0.4))[0].needed.startswith("one seed")
    assert findings_over_seeds(seeds(0.4, math.nan))[0].needed == "1 of 2 seeds have no such number"
    assert findings_over_seeds(seeds(0.4, math.nan))[0].by_seed == "+40.0% · none"
    assert findings_over_seeds(seeds(0.4, 0.5))[0].control == "control"


def test_intervals_end_at_the_largest_difference_that_there_can_be():
    wide = [Finding(*NOTHING, difference) for difference in (0.95, 0.2, 0.9)]
    (over,) = findings_over_seeds([[one] for one in wide])
    assert over.high == 1 > over.difference > over.low
    assert over.low >= -1
    (sizes,) = findings_over_seeds([[replace(one, most=2.0)] for one in wide])
    assert 1 < sizes.high <= 2
    nothing = Finding(*NOTHING, 0.3)
    assert math.isnan(nothing.low)
    assert math.isnan(nothing.high)


def test_seeds_that_are_all_alike_cannot_tell():
    for values in ((0.5, 0.5), (1.0, 1.0, 1.0), (0.0, 0.0), (0.9 - 0.4, 0.8 - 0.3, 0.7 - 0.2)):
        (found,) = findings_over_seeds(seeds(*values))
        assert found.difference == pytest.approx(values[0])
        assert [math.isnan(value) for value in (found.low, found.high, found.p_value)] == [True] * 3
        assert (found.verdict, "no spread to judge by" in found.needed) == ("cannot be told", True)
    assert seeds_needed(0.0, 0.5) is None


def test_a_verdict_agrees_with_the_interval_that_is_shown():
    # beside two claims that are certain, Holm asks the third for no more than if it were alone; its interval does
    many = [
        [Finding(*NOTHING, 0.5 + seed / 1e6), Finding(*NOTHING, 0.5 - seed / 1e6), Finding(*NOTHING, difference)]
        for seed, difference in enumerate((0.32, 0.45, 0.25))
    ]
    *certain, last = findings_over_seeds(many)
    assert [one.verdict for one in certain] == ["holds"] * 2
    assert last.p_value == pytest.approx(stats.ttest_1samp([0.32, 0.45, 0.25], 0).pvalue)
    assert (last.p_value < 0.05, last.low < 0, last.verdict) == (True, True, "cannot be told")
    mirrored = [[replace(one, difference=-one.difference) for one in claims] for claims in many]
    *certain, last = findings_over_seeds(mirrored)
    assert [one.verdict for one in certain] == ["does not hold"] * 2
    assert (last.p_value < 0.05, last.high > 0, last.verdict) == (True, True, "cannot be told")


def test_equal_arms_rarely_get_a_verdict_on_sizes():
    # as in three seeds of the small study: the difference of two sizes has a standard deviation of a tenth of them
    generator = numpy.random.default_rng(1)
    found = [findings_over_seeds(seeds(*generator.normal(0, 0.1, size=3)))[0].verdict for _ in range(150)]
    assert found.count("holds") / len(found) < 0.05


def test_so_many_seeds_tell_four_times_in_five():
    count = seeds_needed(0.1, 0.12)
    generator = numpy.random.default_rng(2)
    drawn = generator.normal(0.12, 0.1, size=(2000, count))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.06)
    assert seeds_needed(1.0, 0.001) is None


def test_two_models_that_lose_nothing_may_still_differ():
    # what they lose is measured on six people: that none of it differs does not say that nobody's would
    both = asked([1.0] * 6)
    nothing = both - both
    found = compare_answers(nothing, nothing, 0.95, most=2.0)
    assert (found["difference"], found["p_value"]) == (0, 1)
    assert found["low"] == pytest.approx(-found["high"])
    assert found["high"] > 0.5
    # and one that loses all beside one that loses nothing does lose more
    everything = asked([1.0] * 60)
    found = compare_answers(everything, everything - 1, 0.95, most=2.0)
    assert found["difference"] == 1
    assert 0.5 < found["low"] < 1 < found["high"] <= 2
