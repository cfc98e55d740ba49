import itertools
import math
from dataclasses import replace

import numpy
import pandas
import pytest
from scipy import stats

from circuits.study import Finding, findings
from circuits.study.claims import _by_question, claims_table
from circuits.verdicts import (
    beyond_draws,
    compare_answers,
    corrected_together,
    findings_over_seeds,
    seeds_needed,
    spearman,
)

NOTHING = ("1a", "claim", "here", "control")


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


def test_one_run_gives_no_verdict_on_sizes():
    assert Finding(*NOTHING, 5.0).verdict == "cannot be told"
    assert claims_table([Finding(*NOTHING, 5.0)])["verdict"].item().startswith("cannot be told: one run")


def answers(right: list[list[float]], **columns: object) -> pandas.DataFrame:
    """One person for each list."""
    rows = [
        {"group": person, "example": 10 * person + place, "attribute": "city", "exact_match": value}
        for person, values in enumerate(right)
        for place, value in enumerate(values)
    ]
    return pandas.DataFrame(rows).assign(**columns)


def study(mixed: list[list[float]], two: list[list[float]]) -> tuple[dict, dict]:
    """As far as the step evaluate."""
    both = {"mixed": mixed, "two_stage": two, "two_stage_gentle": two}
    means = {name: float(numpy.mean([value for person in right for value in person])) for name, right in both.items()}
    accuracy = {
        name: {"bio": 1.0, "qa_id": 1.0, "qa_ood": value, "bio_after_stage_1": 1.0} for name, value in means.items()
    }
    table = pandas.concat([answers(right, model=name, split="qa_ood") for name, right in both.items()])
    return {"accuracy": accuracy}, {"answers": table}


def test_all_of_sixty_against_fifty_six_cannot_be_told():
    # 100 % against 93.3 %: four answers that only one model gives, the exact p-value is 0.125
    one, other = [[1.0]] * 60, [[0.0]] * 4 + [[1.0]] * 56
    found = findings(*study(one, other))
    assert [claim.verdict for claim in found] == ["cannot be told"] * 2
    assert found[0].p_value == pytest.approx(0.25)  # two claims
    assert "questions could tell" in found[0].needed
    assert found[0].low < 0 < found[0].high


def test_a_large_difference_is_told():
    found = findings(*study([[1.0] * 3] * 40, [[0.0] * 3] * 20 + [[1.0] * 3] * 20))
    assert [claim.verdict for claim in found] == ["holds"] * 2
    found = findings(*study([[0.0] * 3] * 20 + [[1.0] * 3] * 20, [[1.0] * 3] * 40))
    assert [claim.verdict for claim in found] == ["does not hold"] * 2


def test_answers_of_one_person_count_together():
    # 30 answers more are right, but of one person
    alone = findings(*study([[1.0]] * 60, [[0.0]] * 30 + [[1.0]] * 30))
    together = findings(*study([[1.0] * 30] * 2, [[0.0] * 30, [1.0] * 30]))
    assert [one[0].verdict for one in (alone, together)] == ["holds", "cannot be told"]


def test_pairs_are_of_the_same_questions_whatever_the_order():
    one = answers([[1.0, 0.0], [1.0, 1.0]])
    other = answers([[0.0, 0.0], [1.0, 1.0]]).iloc[::-1]
    found = compare_answers(_by_question(one), _by_question(other), 0.95)
    assert found["difference"] == 0.25
    with pytest.raises(ValueError, match="asked different ones"):
        compare_answers(_by_question(one), _by_question(other.iloc[1:]), 0.95)


def test_a_difference_from_random_draws_must_be_beyond_single_draws():
    sure = {"difference": 0.3, "low": 0.25, "high": 0.35, "p_value": 0.0001, "needed": "60 questions"}
    narrow = beyond_draws(sure, [0.50, 0.51, 0.49, 0.50, 0.50], 0.95)
    wide = beyond_draws(sure, [0.1, 0.9, 0.5, 0.3, 0.7], 0.95)
    deviation = math.sqrt(0.1) * math.sqrt(1 + 1 / 5)
    assert wide["p_value"] == pytest.approx(2 * stats.t.sf(0.3 / deviation, 4))
    assert "random draws" in wide["needed"]
    assert (narrow["p_value"] < 0.001, wide["low"] < 0 < wide["high"], narrow["low"] > 0.2) == (True, True, True)
    assert beyond_draws(sure, [0.5] * 5, 0.95)["p_value"] == 0.0001


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
    assert spearman([1.0] * 5, range(5))[3] == 1


def test_unrelated_heads_agree_by_chance_as_often_as_the_p_value_says():
    generator = numpy.random.default_rng(0)
    found = [spearman(*generator.normal(size=(2, 16)))[3] for _ in range(200)]
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
    deviation, needed = numpy.std([0.4, -0.1, 0.2], ddof=1), seeds_needed(numpy.std([0.4, -0.1, 0.2], ddof=1), 1 / 6)
    assert found.needed == f"{needed} seeds could tell"
    assert deviation > 0
    assert findings_over_seeds(seeds(-0.4, -0.5, -0.45))[0].verdict == "does not hold"
    assert findings_over_seeds(seeds(0.4))[0].needed.startswith("one seed")
    assert findings_over_seeds(seeds(0.4, math.nan))[0].needed == "1 of 2 seeds have no such number"


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
    found = [findings_over_seeds(seeds(*generator.normal(0, 0.1, size=3)))[0].verdict for _ in range(400)]
    assert found.count("holds") / len(found) < 0.05


def test_so_many_seeds_tell_four_times_in_five():
    count = seeds_needed(0.1, 0.12)
    generator = numpy.random.default_rng(2)
    drawn = generator.normal(0.12, 0.1, size=(2000, count))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.06)
    assert seeds_needed(1.0, 0.001) is None


def test_a_table_shows_interval_p_value_and_what_could_tell():
    found = Finding(*NOTHING, 0.05, -0.02, 0.12, 0.2, needed="about 400 questions could tell")
    row = claims_table([found, replace(found, p_value=0.00001)]).iloc[0].tolist()
    assert row[4:] == ["+5.0% (-2.0% to +12.0%)", "0.2", "cannot be told: about 400 questions could tell"]
