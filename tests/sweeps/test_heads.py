import copy

import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.interventions import mean_head_outputs, pair_people
from circuits.metrics import evaluate
from circuits.sweeps import sweep_heads, sweep_patches
from circuits.units import Head


def test_a_sweep_equals_one_changed_copy_a_head(model, tasks):
    chosen = [tasks["qa_id"].select(range(9)), tasks["bio"].select(range(7))]
    table = sweep_heads(model, chosen, ["zero"])
    assert len(table) == 16 * 2
    for task in chosen:
        own = evaluate(model, task)
        for row in table[table["task"] == task.name].iloc[::3].itertuples():
            by_hand = copy.deepcopy(model)
            with torch.no_grad():
                by_hand.blocks[row.layer].attn.W_O[row.index] = 0
            scores = evaluate(by_hand, task)
            assert row.unit == f"L{row.layer}H{row.index}"
            assert row.log_prob == pytest.approx(scores["log_prob"].mean(), abs=1e-4)
            assert row.log_prob_effect == pytest.approx(scores["log_prob"].mean() - own["log_prob"].mean(), abs=1e-4)
            assert row.exact_match == scores["exact_match"].mean()


def test_mean_ablation_in_a_sweep(model, tasks, bio):
    task, head = tasks["qa_id"].select(range(5)), Head(2, 2)
    table = sweep_heads(model, [task], ["mean"], reference=bio, heads=[head])
    means = mean_head_outputs(model, bio)

    def hook(z, hook):
        z[:, :, 2] = means[2, 2]
        return z

    with model.hooks([("blocks.2.attn.hook_z", hook)]):
        expected = evaluate(model, task)["log_prob"].mean()
    assert table["log_prob"].tolist() == pytest.approx([expected], abs=1e-4)


def test_a_patch_sweep_says_how_often_the_other_answer_is_given(model, tasks):
    target = tasks["qa_ood"]
    source = pair_people(target)
    same = [
        example
        for example in range(len(target))
        if (target.answers["end"] - target.answers["start"])[example]
        == (source.answers["end"] - source.answers["start"])[example]
    ]
    target, source = target.select(same), source.select(same)
    table = sweep_patches(model, source, target, mode="person")
    assert len(table) == 16
    assert {"source_exact_match", "source_exact_match_effect", "log_prob_effect"} <= set(table.columns)
    assert (table["mode"] == "person").all()
    assert table["log_prob_effect"].abs().max() > 0.01
    # patched from itself, nothing changes
    still = sweep_patches(model, target, target)
    assert still["log_prob_effect"].abs().max() < 1e-4


def test_a_sweep_without_tasks_is_refused(model):
    with pytest.raises(CircuitsError, match="a sweep needs a task"):
        sweep_heads(model, [])


def test_one_task_alone_is_a_task(model, tasks):
    task = tasks["qa_id"].select(range(4))
    alone, listed = (sweep_heads(model, given, "zero", heads=[Head(1, 2)]) for given in (task, [task]))
    pandas.testing.assert_frame_equal(alone, listed)
