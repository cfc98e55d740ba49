"""Figures of consistency and signature hold the numbers of their tables."""

import pandas
import pytest

from circuits.errors import CircuitsError
from circuits.figures import consistency_figure, inside_figure, signature_figure


def by_layer(model, matched):
    rows = [
        {"model": model, "layer": layer, "kind": kind, "mean": value, "low": value - 0.1, "high": value + 0.1}
        for layer in (0, 1)
        for kind, value in (("matched", matched + layer / 10), ("same_attribute", 0.0), ("unrelated", 0.01))
    ]
    table = pandas.DataFrame(rows)
    names = {"mean": "cosine", "low": "cosine_low", "high": "cosine_high"}
    same = {"cka": 0.7, "retrieval": 0.9, "retrieval_low": 0.8, "retrieval_high": 1.0, "chance": 0.1}
    return table, table[table["kind"] != "unrelated"].rename(columns=names).assign(**same)


def test_the_profile_has_a_line_for_each_model_and_kind():
    sides = [by_layer("mixed", 0.5), by_layer("two_stage", 0.2)]
    figure = consistency_figure(*(pandas.concat(tables) for tables in zip(*sides, strict=True)))
    lines = {trace.name: trace for trace in figure.data if trace.xaxis == "x" and trace.name}
    assert set(lines) == {"mixed", "mixed, mismatched", "two-stage", "two-stage, mismatched"}
    assert list(lines["mixed"].y) == [0.5, 0.6]
    assert list(lines["two-stage, mismatched"].y) == [0.0, 0.0]
    assert [trace.name for trace in figure.data if trace.xaxis == "x4" and trace.name] == [
        "mixed",
        "two-stage",
        "chance",
    ]
    alone = consistency_figure(*by_layer("model", 0.5))
    assert {trace.name for trace in alone.data if trace.showlegend} == {"matched", "mismatched"}


def test_bars_inside_are_means_over_draws():
    rows = [("shared", 0, 0.5, 0.4, 0.6), ("random", 0, 0.1, 0.0, 0.2), ("random", 1, 0.3, 0.2, 0.4)]
    table = pandas.DataFrame(rows, columns=["condition", "draw", "mean", "low", "high"]).assign(
        model="m", scope="tensor"
    )
    shared, random = inside_figure(table).data
    assert (shared.y[0], shared.error_y.array[0], random.y[0]) == pytest.approx((0.5, 0.1, 0.2))
    assert (random.error_y.array[0], random.error_y.arrayminus[0]) == pytest.approx((0.1, 0.1))


def test_spans_are_stacked_and_the_context_comes_last():
    spans = {"context": 0.2, "subject": 0.5, "relation": 0.3}
    rows = [
        {"task": "bio", "model": model, "span": span, "share": share, "effect": 1.0}
        for model in ("mixed", "two_stage")
        for span, share in spans.items()
    ]
    figure = signature_figure(pandas.DataFrame(rows))
    assert [trace.name for trace in figure.data] == ["subject", "relation", "context"]
    assert list(figure.data[0].x) == [0.5, 0.5]
    assert set(figure.data[0].y) == {"BIO, mixed", "BIO, two-stage"}
    with pytest.raises(CircuitsError, match="the table has no share"):
        signature_figure(pandas.DataFrame(rows).drop(columns="share"))
