"""Scores of all heads and behaviours equal a loop over TransformerLens' patterns."""

import numpy
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.rankings import Behaviour, behaviour_scores, head_patterns
from circuits.rankings import gallery as module
from circuits.statistics import intervals


def cells_by_hand(name, tokens, spans):
    """(query, key) pairs of a behaviour, token by token."""
    length = len(tokens)
    earlier = [(query, key) for query in range(length) for key in range(query + 1)]
    if name == "previous_token":
        return [(query, key) for query, key in earlier if query - key == 1]
    if name == "first_token":
        return [(query, key) for query, key in earlier if key == 0 < query]
    if name == "duplicate_token":
        return [(query, key) for query, key in earlier if key < query and tokens[key] == tokens[query]]
    if name == "induction":
        return [(query, key) for query, key in earlier if key > 0 and tokens[key - 1] == tokens[query]]
    one, other = name.split("_to_")
    queries = [length - 1] if one == "last" else spans.get(one, [])
    return [(query, key) for query, key in earlier if query in queries and key in spans.get(other, [])]


@pytest.mark.parametrize("numbers", [2**26, 1])
def test_scores_equal_a_loop_over_raw_patterns(model, tasks, monkeypatch, numbers):
    monkeypatch.setattr(module, "_NUMBERS", numbers)
    task = tasks["qa_ood"].select(range(5))
    table = behaviour_scores(model, task)
    assert {"previous_token", "first_token", "last_to_subject", "relation_to_subject"} <= set(table["behaviour"])
    rows = table.set_index(["unit", "behaviour"])
    expected = {}
    for example in range(len(task)):
        length = int(task.answers["start"][task.answers["example"] == example].min())
        tokens = task.tokens[example, :length]
        spans = {name: at[example, :length].nonzero().flatten().tolist() for name, at in task.spans.items()}
        _, cache = model.run_with_cache(tokens[None])
        for name in table["behaviour"].unique():
            cells = cells_by_hand(name, tokens.tolist(), spans)
            queries = {query for query, _ in cells}
            if not queries:
                continue
            for layer, head in ((0, 1), (3, 2)):
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
                score = sum(float(pattern[cell]) for cell in cells) / len(queries)
                even = sum(1 / (query + 1) for query, _ in cells) / len(queries)
                expected.setdefault((f"L{layer}H{head}", name), []).append((score, even))
    assert len(expected) == 2 * table["behaviour"].nunique()
    for place, found in expected.items():
        score, even = numpy.array(found).T
        row = rows.loc[place]
        assert row["score"] == pytest.approx(score.mean(), abs=1e-5), place
        assert row["uniform"] == pytest.approx(even.mean(), abs=1e-5), place
        assert row["excess"] == pytest.approx((score - even).mean(), abs=1e-5), place
        assert row["examples"] == len(found)
        groups = task.answers["group"].tolist() if "group" in task.answers else None
        if len(found) == len(task):
            low, high = intervals(score - even, groups, kind="bounded_difference")
            assert (row["excess_low"], row["excess_high"]) == pytest.approx((float(low), float(high)), abs=1e-4)


def test_patterns_of_all_heads_are_the_models(model, tasks):
    task = tasks["qa_ood"].select(range(5))
    found = head_patterns(model, task, example=3)
    length = int(task.answers["start"][3])
    _, cache = model.run_with_cache(task.tokens[3:4, :length])
    assert found.patterns.shape[2:] == (length, length)
    assert torch.allclose(found.patterns[2], cache["blocks.2.attn.hook_pattern"][0], atol=1e-6)


def test_a_behaviour_that_no_prompt_has_is_refused(model, tasks):
    with pytest.raises(CircuitsError, match="no prompt of qa_ood has what name mover: last → IO needs"):
        behaviour_scores(model, tasks["qa_ood"].select([0]), [Behaviour("name_mover", "last", "IO")])
