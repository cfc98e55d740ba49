import math

import pandas
import pytest

from circuits.figures import Finding
from circuits.figures.claims import _accuracy_margin, _agreement, _draw_margin, _sizes, claims_over_seeds
from circuits.statistics import mean_interval


def verdict(difference: float, margin: float) -> str:
    return Finding("1a", "", "", "", difference, margin).verdict


def test_a_verdict_needs_a_difference_beyond_chance():
    assert verdict(0.2, 0.1) == "holds here"
    assert verdict(-0.2, 0.1) == "does not hold here"
    assert verdict(0.1, 0.1) == verdict(-0.05, 0.1) == verdict(0.0, 0.0) == "cannot be told"
    assert verdict(math.nan, 0.0) == "cannot be told"


def test_margins_of_accuracies_are_those_of_binomials():
    # 60 of 100 against 40 of 100: a standard error of √(0.24 / 100 · 2)
    assert _accuracy_margin(100, 0.6, 0.4) == pytest.approx(1.96 * 0.0692820, abs=1e-5)
    assert _accuracy_margin(100, 0.0, 1.0) == 0


def test_margins_of_single_draws_are_wider_than_those_of_their_mean():
    draws = [0.1, 0.2, 0.3]
    _, low, high = mean_interval(draws)
    # Student's t with 2 degrees of freedom is 4.303; the standard deviation of the draws is 0.1
    assert _draw_margin(low, high, 3) == pytest.approx(4.303 * 0.1 * math.sqrt(1 + 1 / 3), rel=1e-3)


def test_sizes_differ_from_a_twentieth_on():
    assert verdict(*_sizes(106, 100)) == "holds here"
    assert verdict(*_sizes(104, 100)) == verdict(*_sizes(None, 100)) == "cannot be told"
    assert verdict(*_sizes(100, 106)) == "does not hold here"


def test_what_ranks_like_ablation_is_read_from_the_rows_of_ablation():
    scores = pandas.DataFrame({"ablation": [4, 3, 2, 1], "shared_size": [4, 2, 3, 1], "qa_trace": [4, 3, 1, 2]})
    pairs = scores.corr(method="spearman").rename_axis("metric").reset_index()
    table = pairs.melt("metric", var_name="other", value_name="spearman").assign(model="mixed", kind="head")
    found = _agreement({"agreement": table, "shared_heads": pandas.DataFrame({"model": ["mixed"] * 4})})
    # one pair of neighbours changes places in each: 1 - 6 * 2 / (4 * 15); Shared Size and the trace agree less
    assert (found.here, found.control) == (
        "0.80 (unrelated rankings: ± 1.13)",
        "with the cost of ablation: QA trace 0.80",
    )
    assert found.difference == pytest.approx(0.8)


def test_verdicts_are_counted_over_seeds():
    seeds = [
        [Finding("1a", "claim", f"seed {seed}", "", difference, 0.1)] for seed, difference in enumerate((1, -1, 1))
    ]
    assert claims_over_seeds(seeds).iloc[0].tolist() == ["1a", "claim", "seed 0 · seed 1 · seed 2", "2 of 3", "1 of 3"]
