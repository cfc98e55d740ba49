import math

import pandas
import pytest

from circuits.errors import CircuitsError
from circuits.figures import save_figure
from circuits.figures.rankings import RANKING_LABELS, agreement_figure, ranking_curves_figure
from circuits.statistics import mean_interval


def curves(counts=(0, 1, 2, 3, 4), tasks=("qa_id", "qa_ood"), condition: str = "sufficient") -> pandas.DataFrame:
    most = max(counts)
    rows = [
        (condition, metric, draw, n, n / most / 4, task, (n / most) ** (power + draw / 5), 0.9, 0.1)
        for metric, draws, power in (("shared_size", 1, 0.5), ("change", 1, 1), ("random", 5, 2))
        for draw in range(draws)
        for n in counts
        for task in tasks
    ]
    return pandas.DataFrame(
        rows, columns=["condition", "metric", "draw", "n", "fraction", "task", "exact_match", "fine_tuned", "pre"]
    )


def lines(figure):
    return [trace for trace in figure.data if trace.mode == "lines+markers"]


def test_curves_show_the_numbers_of_their_table():
    table = curves()
    figure = ranking_curves_figure(table, units="heads")
    drawn = lines(figure)
    assert [line.name for line in drawn] == ["Shared Size", "change of weights", "random"] * 2
    assert list(drawn[0].x) == [0, 1, 2, 3, 4]
    assert list(drawn[0].y) == pytest.approx([(n / 4) ** 0.5 for n in range(5)])
    drawn_at_two = table[(table["metric"] == "random") & (table["n"] == 2) & (table["task"] == "qa_id")]["exact_match"]
    mean, low, high = mean_interval(drawn_at_two.tolist())
    (band, _) = (trace for trace in figure.data if trace.mode == "none")
    assert drawn[2].y[2] == pytest.approx(mean)
    assert (band.y[2], band.y[-3]) == pytest.approx((high, low))
    whole = [trace for trace in figure.data if trace.mode == "lines"]
    assert [tuple(line.y) for line in whole] == [(0.9, 0.9), (0.1, 0.1)] * 2
    assert [note.text for note in figure.layout.annotations] == ["QA-ID", "QA-OOD"]
    assert "the top n heads fine-tuned" in figure.layout.title.text


def test_a_legend_with_every_ranking_fits_beside_the_plot():
    table = pandas.concat([curves().query("metric == 'change'").assign(metric=name) for name in RANKING_LABELS])
    figure = ranking_curves_figure(table)
    layout, entries = figure.layout, [trace for trace in figure.data if trace.showlegend]
    assert len(entries) >= 11
    # plotly scrolls what is taller than the plot, and an image has no scroll bar: a line takes 19 pixels, and its gap
    gap = 10 if layout.legend.tracegroupgap is None else layout.legend.tracegroupgap
    assert len(entries) * (19 + gap) <= layout.height - layout.margin.t - layout.margin.b


def test_the_axis_of_n_is_linear_for_many_units_too():
    counts = [0, 16, 352, 1408]
    figure = ranking_curves_figure(curves(counts, ["qa_id"]), units="neurons")
    assert list(lines(figure)[0].x) == counts
    assert figure.layout.xaxis.type in (None, "linear")


def test_a_model_before_fine_tuning_is_drawn_only_if_known():
    figure = ranking_curves_figure(curves(condition="zero").assign(pre=math.nan))
    assert "before fine-tuning" not in [trace.name for trace in figure.data]
    assert "zero" in figure.layout.title.text


def test_agreement_shows_its_table():
    table = pandas.DataFrame(
        {"change": [1.0, -0.5, math.nan], "random": [-0.5, 1.0, -0.001], "other": [math.nan, -0.001, 1.0]},
        index=["change", "random", "other"],
    )
    figure = agreement_figure(table, "heads")
    (heat,) = figure.data
    assert [list(row) for row in heat.text] == [
        ["1.00", "−0.50", "–"],
        ["−0.50", "1.00", "0.00"],
        ["–", "0.00", "1.00"],
    ]
    assert list(heat.x) == ["change of weights", "random", "other"]
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert figure.layout.title.text == "How far rankings agree: heads"


def test_figures_are_saved_as_pages(tmp_path):
    save_figure(ranking_curves_figure(curves()), tmp_path / "curves.html", "beside")
    assert "Shared Size" in (tmp_path / "curves.html").read_text()


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(CircuitsError, match="the table has no fine_tuned"):
        ranking_curves_figure(curves().drop(columns="fine_tuned"))
    with pytest.raises(CircuitsError, match="the table has no rows"):
        ranking_curves_figure(curves().iloc[:0])
    with pytest.raises(CircuitsError, match="one condition, not sufficient and revert"):
        ranking_curves_figure(pandas.concat([curves(), curves(condition="revert")]))
    with pytest.raises(CircuitsError, match="several rows for one point and condition"):
        ranking_curves_figure(curves(), "condition")
    with pytest.raises(CircuitsError, match="the same rankings as rows and columns"):
        agreement_figure(pandas.DataFrame({"a": [1.0]}, index=["b"]))
