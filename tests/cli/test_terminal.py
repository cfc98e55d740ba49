import numpy
import pandas
import pytest

from circuits.cli.terminal import cell, effects, show


@pytest.mark.parametrize("whole", [int, float, numpy.int64, numpy.int32, numpy.float32, numpy.float64])
def test_a_whole_number_reads_alike_whatever_its_type(whole):
    assert cell(whole(737280)) == "737,280"
    assert cell(whole(0)) == "0"


def test_other_values_are_as_a_person_reads_them():
    values = [True, numpy.bool_(False), float("nan"), "mixed", 0.000123, -2.0641]
    assert [cell(value) for value in values] == ["True", "False", "–", "mixed", "0.000123", "-2.064"]


def test_success_is_in_percent_in_every_table(capsys):
    columns = ["exact_match", "first_token", "exact_match_effect", "before", "random drop low", "log_prob", "fraction"]
    show(pandas.DataFrame([[1.0, 0.985, -0.46667, 1, -0.0001, -1.0, 1.0]], columns=columns), "")
    row = capsys.readouterr().out.splitlines()[-1]
    assert [part.strip() for part in row.split()] == [
        "100.0%", "98.5%", "-46.7%", "100.0%", "0.0%", "-1", "1",
    ]  # fmt: skip


EFFECTS = pandas.DataFrame(
    {
        "unit": ["L0H1", "L1H2"],
        "mode": "zero",
        "task": ["bio", "qa_ood"],
        "exact_match_effect": [-0.2, 0.0],
        "exact_match_effect_low": [-0.31, -0.1],
        "exact_match_effect_high": [-0.12, 0.1],
        "exact_match_effect_q": [0.001, 1.0],
        "log_prob_effect": [-0.5, -1.25],
        "log_prob_effect_low": [-0.75, -2.5],
        "log_prob_effect_high": [-0.25, -0.5],
        "log_prob_effect_q": [0.01, 0.25],
    }
)


def test_effects_stand_beside_their_intervals_and_what_is_the_same_everywhere_is_left_out():
    table = effects(EFFECTS, ["unit", "mode", "task"], "log_prob_effect")
    assert list(table) == ["unit", "task", "log_prob_effect", "95 %", "q", "exact_match_effect", "95 %", "q"]
    assert table.iloc[0].tolist() == ["L1H2", "qa_ood", -1.25, "-2.5 to -0.5", "0.25", 0.0, "-10.0 to 10.0%", "1"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_word_and_no_number_is_broken_whatever_the_width(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    show(effects(EFFECTS, ["unit", "mode", "task"], "log_prob_effect"), "")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width or "no room" in shown.splitlines()[-1]
    words = {"L1H2", "qa_ood", "-1.25", "effect", "log", "prob"}
    assert words <= set(shown.split())
    assert ("-31.0 to -12.0%" in shown) == (width >= 80)
    assert ("95 % of exact match effect" in shown) == (width < 80)


def test_rows_that_are_not_shown_are_counted_with_commas(capsys):
    show(pandas.DataFrame({"n": range(1403)}), "", 3)
    assert "… and 1,400 more rows" in capsys.readouterr().out
