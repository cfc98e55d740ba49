"""What a study found of the paper's claims."""

from dataclasses import replace

import numpy
import pandas
import pytest

from circuits.study import Finding, findings
from circuits.study.claims import claims_table

NOTHING = ("1a", "claim", "here", "control")


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


def test_a_table_shows_interval_p_value_and_what_could_tell():
    found = Finding(*NOTHING, 0.05, -0.02, 0.12, 0.2, needed="about 400 questions could tell")
    row = claims_table([found, replace(found, p_value=0.00001)]).iloc[0].tolist()
    assert row[4:] == ["+5.0% (-2.0% to +12.0%)", "0.2", "cannot be told: about 400 questions could tell"]


def test_pairs_are_of_the_same_questions_whatever_the_order():
    summary, tables = study([[1.0, 0.0], [1.0, 1.0]] * 20, [[0.0, 0.0], [1.0, 1.0]] * 20)
    turned = {"answers": tables["answers"].iloc[::-1]}
    assert findings(summary, turned) == findings(summary, tables)
    assert findings(summary, turned)[0].difference == 0.25


def test_only_a_second_stage_that_lowers_recall_of_biographies_forgets():
    summary, tables = study([[1.0]] * 6, [[0.0]] * 6)
    for before, after, forgets in ((1.0, 0.2, True), (0.2, 0.9, False), (1.0, 1.0, False)):
        summary["accuracy"]["two_stage"] |= {"bio_after_stage_1": before, "bio": after}
        assert any("forgets" in claim.claim for claim in findings(summary, tables)) == forgets
