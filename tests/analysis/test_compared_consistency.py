"""Two models' consistency and signature, compared fact by fact."""

import pytest

from circuits.analysis import AnalysisSettings, compare
from circuits.analysis.compared_consistency import EXCESS
from circuits.statistics import paired
from tests.fixtures import loaded, without_pages

pytestmark = pytest.mark.usefixtures("all_unchecked")

SETTINGS = AnalysisSettings(draws=2, fractions=(), examples_by_step={"consistency": 12, "signature": 12})


@pytest.fixture(scope="module")
def found(tasks, tmp_path_factory):
    chosen = [tasks["bio"], tasks["qa_id"]]
    out = tmp_path_factory.mktemp("compared") / "out"
    models = loaded("llama"), loaded("llama", seed=1)
    with without_pages():
        return compare(*models, chosen, out=out, settings=SETTINGS, only=["consistency", "signature"])


def _by_hand(one, other, index):
    one, other = one.align(other, join="inner")
    groups = one.index.get_level_values("group").to_numpy()
    told = paired(other.to_numpy(), one.to_numpy(), groups, kind="real")
    assert index == len(one)
    return [told.difference, told.low, told.high, told.p_value]


def test_gradients_are_compared_fact_by_fact(found):
    table = found.tables["gradient_consistency"]
    pairs = [side.tables["gradient_consistency_pairs"] for side in (found.a, found.b)]
    names = [f"cosine_{name}" for name in ("difference", "difference_low", "difference_high", "p")]
    sides = [
        side.query("unit == 'L2' and kind == 'matched'").set_index(["group", "example"])["cosine"] for side in pairs
    ]
    row = table.query("unit == 'L2' and kind == 'matched'").iloc[0]
    assert row[names].tolist() == pytest.approx(_by_hand(*sides, row["answers"]))
    sides = [
        side.query("unit == 'random' and scope == 'tensor' and kind == 'matched'")
        .groupby(["group", "example"])["cosine"]
        .mean()
        for side in pairs
    ]
    row = table.query("condition == 'random' and scope == 'tensor' and kind == 'matched'").iloc[0]
    assert row[names].tolist() == pytest.approx(_by_hand(*sides, row["answers"]))
    wide = [
        side.query("by == 'all'").pivot(index=["group", "example"], columns="kind", values="cosine") for side in pairs
    ]
    sides = [(side["matched"] - side["same_attribute"]).dropna() for side in wide]
    row = table[(table["by"] == "all") & (table["kind"] == EXCESS)].iloc[0]
    assert row[names].tolist() == pytest.approx(_by_hand(*sides, row["answers"]))


def test_activations_and_signatures_are_compared_too(found):
    table = found.tables["representation_consistency"]
    means = [side.tables["representation_consistency"] for side in (found.a, found.b)]
    rows = [side.query("kind == 'matched' and span == 'last' and layer == 1").iloc[0] for side in (table, *means)]
    assert rows[0]["retrieved_a"] == pytest.approx(rows[1]["retrieval"])
    assert rows[0]["cosine_difference"] == pytest.approx(rows[2]["cosine"] - rows[1]["cosine"])
    table = found.tables["signature"].set_index(["task", "span"]).loc[("bio", "subject")]
    shares = [
        side.tables["signature"].set_index(["task", "span"]).loc[("bio", "subject")] for side in (found.a, found.b)
    ]
    assert table["share_difference"] == pytest.approx(shares[1]["share"] - shares[0]["share"])
    assert table["effect_difference"] == pytest.approx(shares[1]["effect"] - shares[0]["effect"])
    assert table["share_difference_low"] < table["share_difference"] < table["share_difference_high"]


def test_the_page_and_the_figures_show_both(found):
    page = found.report.read_text()
    for title in ("Where are BIO and QA-ID alike?", "Are facts in the same place?", "What the answers rest on"):
        assert f"<h2>{title}</h2>" in page
    assert {"consistency_bio_qa_id", "inside_bio_qa_id", "signature"} <= set(found.figures)
    assert {"gradient_consistency", "representation_consistency", "signature"} <= set(found.summary)
