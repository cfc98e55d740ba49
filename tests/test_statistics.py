"""Intervals and tests against loops, enumeration and simulation."""

import functools
import math
from itertools import product

import numpy
import pandas
import pytest
from scipy import stats

from benchmarks.coverage import KINDS, cases, coverage, null_rate, people_of, shares, through
from circuits.errors import CircuitsError
from circuits.statistics import (
    Paired,
    answers_needed,
    beyond_draws,
    corrected,
    intervals,
    mean_interval,
    of_draws,
    paired,
    paired_p_values,
)

PEOPLE = ["Ada", "Bo", "Ada", "Cy", "Cy", "Cy", "Di", "Eve", "Eve", "Bo"]


def spread(values, groups) -> tuple[list[float], float, float]:
    """What each group adds beyond the mean, and the mean with its variance, in loops."""
    mean = sum(values) / len(values)
    beyond = dict.fromkeys(groups, 0.0)
    for value, group in zip(values, groups, strict=True):
        beyond[group] += value - mean
    count = len(beyond)
    variance = count / (count - 1) * sum(u**2 for u in beyond.values()) / len(values) ** 2
    return list(beyond.values()), mean, variance


def test_the_interval_is_students():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    # t(0.975, 3) = 3.182446, standard error = 1.290994 / 2
    assert high - mean == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert all(end != end for end in mean_interval([1.0])[1:])


@pytest.mark.parametrize(("right", "count"), [(0, 8), (3, 8), (60, 60), (17, 60)])
def test_a_share_has_wilsons_interval(right, count):
    low, high = intervals(numpy.arange(count) < right, kind="share")
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert high - low > 0.05


def test_groups_count_as_so_many_independent_answers():
    # answers of one person are all alike: people are what is counted
    people = numpy.repeat(numpy.arange(12), 5)
    right = people < 5
    low, high = intervals(right, people, kind="share")
    _, share, variance = spread(right.tolist(), people.tolist())
    answers, reach = share * (1 - share) / variance, stats.t.ppf(0.975, 11)
    assert answers == pytest.approx(11)
    answers *= (stats.norm.ppf(0.975) / reach) ** 2
    right_ones = share * answers
    ends = stats.beta.ppf(
        [0.025, 0.975], [right_ones, right_ones + 1], [answers - right_ones + 1, answers - right_ones]
    )
    assert (float(low), float(high)) == pytest.approx(tuple(ends))
    alike = 12 * (stats.norm.ppf(0.975) / reach) ** 2
    every, none = (intervals(numpy.full(60, value), people, kind="share") for value in (1, 0))
    assert list(map(float, every)) == pytest.approx([0.025 ** (1 / alike), 1])
    assert list(map(float, none)) == pytest.approx([0, 1 - 0.025 ** (1 / alike)])


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 8), (5, 2, 20), (1, 9, 60), (8, 0, 8)])
def test_a_difference_of_shares_has_tangos_interval(gained, lost, count):
    def score(difference: float) -> float:
        """By the most likely chances among many, the difference given."""
        share = numpy.linspace(max(0, -difference), (1 - difference) / 2, 200_001)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            terms = [(gained, share + difference), (lost, share), (count - gained - lost, 1 - 2 * share - difference)]
            likely = sum(times * numpy.log(chance.clip(0)) for times, chance in terms if times)
        best = share[numpy.nanargmax(likely)]
        return (gained - lost - count * difference) / math.sqrt(count * (2 * best + difference * (1 - difference)))

    low, high = intervals([1] * gained + [-1] * lost + [0] * (count - gained - lost), kind="binary_difference")
    assert -1 <= low < (gained - lost) / count <= high <= 1
    assert high - low > 0.1
    assert score(float(low)) == pytest.approx(1.96, abs=0.01)
    if high < 1:
        assert score(float(high)) == pytest.approx(-1.96, abs=0.01)


def test_a_skewed_mean_has_halls_interval_or_the_wider_students():
    values = [0.1, 0.4, 0.2, 3.0, 0.3, 9.0, 0.2, 0.5, 0.1, 1.0]
    low, high = (float(end) for end in intervals(values, PEOPLE, kind="real"))
    beyond, mean, variance = spread(values, PEOPLE)
    count = len(beyond)
    skewness = sum(u**3 for u in beyond) / count / (sum(u**2 for u in beyond) / count) ** 1.5
    skewness *= math.sqrt(count * (count - 1)) / (count - 2)

    def transformed(t: float) -> float:
        root = math.sqrt(count)
        return t + skewness * t**2 / 3 / root + skewness**2 * t**3 / 27 / count + skewness / 6 / root

    reach = stats.t.ppf(0.975, count - 1)
    error = math.sqrt(variance)
    assert transformed((mean - high) / error) == pytest.approx(-reach)
    assert low == pytest.approx(mean - reach * error)
    # turned round, the other end is the longer one
    assert intervals([-value for value in values], PEOPLE, kind="real") == pytest.approx((-high, -low))


def test_rows_are_apart_and_the_order_of_answers_is_nothing():
    generator = numpy.random.default_rng(0)
    values, people = generator.gamma(1, size=(2000, 40)), generator.integers(0, 9, 40)
    low, high = intervals(values, people, kind="real")
    order = generator.permutation(40)
    for row in (0, 1023, 1024, 1999):
        for own, owners in ((values[row], people), (values[row, order], people[order])):
            alone = intervals(own, owners, kind="real")
            assert list(map(float, alone)) == pytest.approx([low[row], high[row]])
    assert numpy.array_equal(intervals(values, range(40), kind="real"), intervals(values, kind="real"))
    assert intervals(values.reshape(50, 40, 40), people, kind="real")[0].shape == (50, 40)


def test_draws_that_are_all_alike_have_a_mean_and_no_interval():
    for draws in ([1.0] * 5, [0.5, 0.5], [0.1 + 0.2, 0.3]):
        mean, low, high = mean_interval(draws)
        assert mean == pytest.approx(draws[0])
        assert math.isnan(low)
        assert math.isnan(high)


def test_a_row_is_the_same_in_any_company():
    # effects on a log-probability that happen to be 0 are no differences of 0/1 values
    rows = numpy.array([[0.0] * 6, [0.0, 0.0, 1.0, 0.0, -1.0, 1.0], [0.1, -0.4, 0.2, 1.3, 0.0, 0.7]])
    for people in (None, ["Ada", "Ada", "Bo", "Bo", "Cy", "Cy"]):
        together = [*intervals(rows, people, kind="real"), paired_p_values(rows, people, kind="real")]
        for number, row in enumerate(rows):
            alone = [*intervals(row, people, kind="real"), paired_p_values(row, people, kind="real")]
            beside = [found[number] for found in together]
            assert list(map(float, alone)) == pytest.approx(list(map(float, beside)), nan_ok=True)
    assert [found[0] for found in together] == pytest.approx([math.nan, math.nan, 1], nan_ok=True)


def test_bounded_differences_that_are_all_alike_count_each_group_once():
    people = numpy.repeat(numpy.arange(20), 3)
    for value in (0, 1, -1):
        expected = intervals(numpy.full(60, value), people, kind="binary_difference")
        found = intervals(numpy.full(60, value), people, kind="bounded_difference")
        assert list(map(float, found)) == list(map(float, expected))
    low, high = intervals(numpy.full(60, 0.4), people, kind="bounded_difference")
    # as if 8 of 20 independent answers were gained and none lost, at the reach of 20 groups
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, 19)) - 1
    expected = intervals([1] * 8 + [0] * 12, kind="binary_difference", level=level)
    assert [float(low), float(high)] == pytest.approx(list(map(float, expected)))
    assert low < 0.4 < high
    # where they are not alike, as other means
    values = numpy.linspace(-0.2, 0.9, 60) ** 3
    assert intervals(values, people, kind="bounded_difference") == intervals(values, people, kind="real")


def test_rare_events_of_whole_groups_are_covered_where_most_answers_are_alike():
    people, generator, mean = numpy.repeat(numpy.arange(15), 4), numpy.random.default_rng(0), 0.08
    happened = generator.random((2000, 15)) < mean
    values = numpy.repeat(happened, 4, axis=1).astype(float)
    # and one draw of five says otherwise now and then, either way
    noise = (generator.random(values.shape) < 0.03) * numpy.where(generator.random(values.shape) < 0.5, 0.2, -0.2)
    values = numpy.where(values == 0, noise, values)
    low, high = intervals(values, people, kind="bounded_difference")
    assert ((low <= mean) & (mean <= high)).mean() > 0.93
    assert low.min() >= -1
    assert high.max() <= 1
    # fewer groups than would show a spread
    low, high = intervals([0.9, -0.8, 1.0], [0, 1, 2], kind="bounded_difference")
    assert (float(low), float(high)) == (-1, 1)


def test_what_is_all_alike_or_of_one_person():
    # nothing shows how much other values would differ
    assert all(math.isnan(end) for end in intervals([0.3] * 7, kind="real"))
    assert all(math.isnan(end) for end in intervals([0.1, 0.4], ["Ada", "Ada"], kind="real"))
    assert intervals([1, 1], ["Ada", "Ada"], kind="share") == pytest.approx((0, 1), abs=1e-6)


def test_pairs_of_zeros_and_ones_have_mcnemars_exact_test():
    one, other = [1] * 9 + [0] * 2 + [1] * 20, [0] * 9 + [1] * 2 + [1] * 20
    found = paired(one, other, kind="binary_difference")
    assert found.difference == pytest.approx(7 / 31)
    assert found.p_value == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert [found.low, found.high] == list(map(float, intervals(numpy.subtract(one, other), kind="binary_difference")))
    assert paired([1, 1, 0], [1, 1, 0], kind="binary_difference").p_value == 1


def test_signs_of_groups_are_flipped_in_every_way():
    values = [0.3, 1.2, -0.4, 2.0, 0.1, 0.5, 0.7, -0.2, 0.9, 0.6]
    sums = dict.fromkeys(PEOPLE, 0.0)
    for value, person in zip(values, PEOPLE, strict=True):
        sums[person] += value
    totals = [
        abs(sum(sign * value for sign, value in zip(signs, sums.values(), strict=True)))
        for signs in product((1, -1), repeat=len(sums))
    ]
    expected = sum(total >= abs(sum(values)) - 1e-12 for total in totals) / len(totals)
    assert float(paired_p_values(values, PEOPLE, kind="real")) == expected
    # many groups: drawn at random, close to the exact value
    many = numpy.random.default_rng(1).normal(0.15, 1, 200)
    assert float(paired_p_values(many, kind="real")) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert float(paired_p_values(many + 9, kind="real")) == 1e-4


def test_corrections_equal_their_definitions():
    p = numpy.array([0.02, 0.001, math.nan, 0.2, 0.011])
    assert corrected(p)[[1, 4, 0, 3]] == pytest.approx([0.004, 0.033, 0.04, 0.2])
    assert corrected(p, "bh")[[1, 4, 0, 3]] == pytest.approx([0.004, 0.022, 0.02 * 4 / 3, 0.2])
    assert math.isnan(corrected(p)[2])
    assert math.isnan(corrected(p, "bh")[2])


def test_so_many_answers_tell_the_difference_four_times_in_five():
    generator = numpy.random.default_rng(0)
    one, other = generator.normal(size=(2, 4000))
    needed = answers_needed(0.4, one, other, kind="real")
    found = paired_p_values(generator.normal(0.4, 2**0.5, (1000, needed)), kind="real") < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.04)
    pilot = shares(0.25, 0.1)(generator, 1, numpy.arange(400))[0]
    people = numpy.repeat(numpy.arange(400), 5)
    binary = functools.partial(answers_needed, kind="binary_difference")
    alike = binary(0.15, numpy.repeat(pilot > 0, 5) * 1, numpy.repeat(pilot < 0, 5) * 1, groups=people)
    assert alike == pytest.approx(5 * binary(0.15, pilot * 1.0, pilot * 0.0), rel=0.01)
    assert binary(0, [1, 0], [0, 0]) is None
    assert answers_needed(0.5, [0.3, 0.3], [0.1, 0.1], kind="real") is None
    expected = math.ceil((1.959964 + 0.841621) ** 2 * 0.09 / 0.01)
    assert binary(0.1, [1, 1], [1, 1]) == expected
    assert answers_needed(0.1, [1, 1], [1, 1], kind="real") is None


def test_a_difference_from_random_draws_must_be_beyond_single_draws():
    sure = Paired(difference=0.3, low=0.25, high=0.35, p_value=0.0001)
    narrow = beyond_draws(sure, [0.50, 0.51, 0.49, 0.50, 0.50], answers=60)
    wide = beyond_draws(sure, [0.1, 0.9, 0.5, 0.3, 0.7], answers=60)
    deviation = math.sqrt(0.1) * math.sqrt(1 + 1 / 5)
    assert wide.p_value == pytest.approx(2 * stats.t.sf(0.3 / deviation, 4))
    assert (narrow.p_value < 0.001, wide.low < 0 < wide.high, narrow.low > 0.2) == (True, True, True)
    single = beyond_draws(sure, [0.5], answers=60)
    assert single.difference == 0.3
    assert all(math.isnan(value) for value in (single.low, single.high, single.p_value))


def test_a_thinned_mask_that_varies_from_draw_to_draw_counts_as_its_control_does():
    """Where there is little room the control is all of it, and it is the mask that is drawn."""
    generator, wrong = numpy.random.default_rng(0), {"control": 0, "both": 0}
    for _ in range(300):
        thinned = generator.normal(0.5, 0.03, 5)
        rows = pandas.DataFrame({"condition": "random", "draw": range(5), "x": 0.5 + generator.normal(0, 1e-4, 5)})
        drawn = pandas.DataFrame({"condition": "shared_thinned", "draw": range(5), "x": thinned})
        of_control, apart = of_draws(pandas.concat([rows, drawn]), "x")
        gap = float(numpy.mean(of_control) - thinned.mean())
        found = Paired(difference=gap, low=gap - 1e-3, high=gap + 1e-3, p_value=1e-6)
        for name, draws in (("control", of_control), ("both", apart)):
            wrong[name] += beyond_draws(found, draws, answers=200).p_value < 0.05
    assert wrong["both"] < 300 * 0.08
    assert wrong["control"] > 300 * 0.5


def test_draws_that_are_all_alike_may_lie_an_answer_apart():
    # five equal accuracies over 60 answers do not say that a sixth would be the same to the last digit
    sure = Paired(difference=0.3, low=0.25, high=0.35, p_value=0.00001)
    for alike in ([0.5] * 5, [0.5, 0.5, 0.5, 0.5, 0.5 + 1e-12]):
        found = beyond_draws(sure, alike, answers=60)
        assert found.p_value == pytest.approx(2 * stats.t.sf(0.3 / (math.sqrt(1 + 1 / 5) / 60), 4))
        assert 0.2 < found.low < 0.25
    # over five answers they say next to nothing
    assert beyond_draws(sure, [0.4] * 5, answers=5).low < 0


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[0]} {case[1]}")
def test_intervals_cover_what_they_say(case):
    kind, name, draw, mean = case

    def covered(people: numpy.ndarray) -> float:
        values = draw(numpy.random.default_rng(3), 600_000 // len(people), people)
        return coverage(intervals(values, people, kind=KINDS[kind]), mean)

    for people in (numpy.arange(60), numpy.arange(200), people_of(16), people_of(50)):
        # few events among few people can only be covered too often
        rare = name in ("5%", "97%", "+5% −5%", "+0% −20%", "few") and people.max() < 100
        # and where nearly all values are 0, each of the others counts as much as it could
        most = 1 if name == "97% of 5 draws" else 0.998 if rare else 0.975
        assert 0.93 <= covered(people) <= most, (len(people), covered(people))
    if name != "few":  # with one chance in six no answer of eight is in the tail
        assert min(covered(numpy.arange(8)), covered(people_of(8))) >= 0.9


def test_nothing_is_found_as_often_as_the_threshold_says():
    gamma = through(lambda chance: -stats.gamma.ppf(chance, 0.8))
    for people, times in ((numpy.arange(100), 3000), (people_of(16), 1500), (people_of(50), 1500)):
        for draw, kind in ((shares(0.5), "binary_difference"), (gamma, "real")):
            assert 0.03 <= null_rate(draw, people, times, seed=1, kind=kind) <= 0.07


def test_bad_input_is_refused(unchecked):
    for call, sentence in [
        (lambda: intervals([], kind="real"), "there are no answers to take a mean of"),
        (lambda: intervals([1.0, 2.0], ["Ada"], kind="real"), "there are 2 answers and 1 groups"),
        (lambda: intervals([0.5, 1], kind="share"), "values of the kind share are 0 and 1, but these are others"),
        (lambda: intervals([0.5, 1], kind="binary_difference"), "are −1, 0 and 1, but these are others"),
        (lambda: intervals([-2.0, 1], kind="bounded_difference"), "are between −1 and 1, but these are others"),
        (lambda: intervals([0.5, 1], kind="proportion"), "there is no kind of values 'proportion': choose from share"),
        (lambda: paired([1, 0], [1], kind="real"), "pairs are of the same answers"),
        (lambda: corrected([0.1], "sidak"), "there is no correction 'sidak': choose holm or bh"),
        (lambda: corrected([1.1]), "a p-value is between 0 and 1"),
    ]:
        with pytest.raises(CircuitsError, match=sentence):
            call()
