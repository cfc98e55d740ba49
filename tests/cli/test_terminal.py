import numpy
import pandas
import pytest

from circuits.cli.terminal import cell, show


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
    row = capsys.readouterr().out.splitlines()[-2]
    assert [part.strip() for part in row.split("│")[1:-1]] == [
        "100.0%", "98.5%", "-46.7%", "100.0%", "0.0%", "-1", "1",
    ]  # fmt: skip
