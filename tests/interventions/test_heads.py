import copy

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.interventions import (
    ablate_heads,
    matching_positions,
    mean_head_outputs,
    pair_formats,
    pair_people,
    patch_heads,
    replace_heads,
)
from circuits.metrics import evaluate
from circuits.tasks import Task
from circuits.units import Head


def alone(task: Task, example: int) -> torch.Tensor:
    return task.tokens[example, task.attention_mask[example]][None]


@pytest.mark.parametrize("head", ["L0H0", "L1H3", "L3H2"])
def test_zero_ablation_equals_zeroing_the_heads_w_o(model, bio, head):
    unit = Head.parse(head)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        by_hand.blocks[unit.layer].attn.W_O[unit.index] = 0
    with ablate_heads(model, [unit]):
        found = model(bio.tokens)
    assert torch.allclose(found, by_hand(bio.tokens), atol=1e-5)
    assert not torch.allclose(found, model(bio.tokens), atol=1e-2)


def test_several_heads_at_once(model, bio):
    heads = [Head(0, 1), Head(2, 3), Head(2, 0)]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for unit in heads:
            by_hand.blocks[unit.layer].attn.W_O[unit.index] = 0
    with ablate_heads(model, heads):
        assert torch.allclose(model(bio.tokens), by_hand(bio.tokens), atol=1e-5)


def test_mean_outputs_are_over_tokens_and_not_over_padding(model, bio):
    means = mean_head_outputs(model, bio, batch_size=3)
    for layer in range(model.cfg.n_layers):
        rows = []
        for example in range(len(bio)):
            _, cache = model.run_with_cache(alone(bio, example))
            rows.append(cache[f"blocks.{layer}.attn.hook_z"][0])
        assert torch.allclose(means[layer], torch.cat(rows).mean(0), atol=1e-5)


def test_mean_ablation_equals_a_hook_written_by_hand(model, bio):
    means, head = mean_head_outputs(model, bio), Head(1, 2)

    def hook(z, hook):
        z[:, :, head.index] = means[head.layer, head.index]
        return z

    expected = model.run_with_hooks(bio.tokens, fwd_hooks=[("blocks.1.attn.hook_z", hook)])
    with ablate_heads(model, [head], "mean", means=means):
        assert torch.allclose(model(bio.tokens), expected, atol=1e-6)


def test_padding_changes_nothing(model, bio):
    with ablate_heads(model, [Head(1, 1)]):
        together = evaluate(model, bio)["log_prob"]
        one_by_one = [float(evaluate(model, bio.select([example]))["log_prob"].iloc[0]) for example in range(len(bio))]
    assert together.tolist() == pytest.approx(one_by_one, abs=1e-4)


def test_another_person_is_asked_the_same_and_answers_otherwise(tasks):
    task = tasks["qa_ood"]
    other = pair_people(task, seed=1)
    assert all(torch.equal(other.spans[name], at) for name, at in task.spans.items())
    frame = ~(task.span("subject") | task.span("answer"))
    assert torch.equal(other.tokens[frame], task.tokens[frame])
    assert (other.answers["value"] != task.answers["value"]).all()
    assert (other.answers["attribute"] == task.answers["attribute"]).all()
    assert pair_people(task, seed=1).texts == other.texts != pair_people(task, seed=2).texts


def test_partners_may_come_from_more_people_than_are_asked(tasks):
    task = tasks["qa_ood"]
    few = task.select([0, 7])
    with pytest.raises(CircuitsError, match="nobody else is asked"):
        pair_people(few)
    other = pair_people(few, seed=1, among=task)
    assert set(other.texts) <= set(task.texts)
    assert (other.answers["value"] != few.answers["value"]).all()
    assert other.answers["attribute"].tolist() == few.answers["attribute"].tolist()
    assert pair_people(task, seed=1, among=task).texts == pair_people(task, seed=1).texts


def test_patching_from_another_person_equals_a_hook_written_by_hand(model, tasks):
    target = tasks["qa_ood"].select(range(8))
    source = pair_people(tasks["qa_ood"]).select(range(8))
    head = Head(2, 1)
    with patch_heads(model, [head], source, target=target):
        found = model(target.tokens)
    for example in range(len(target)):
        last = int(target.answers["start"][example]) - 1
        _, cache = model.run_with_cache(source.tokens[example : example + 1])
        theirs = cache["blocks.2.attn.hook_z"][0, : last + 1, head.index]

        def hook(z, hook, theirs=theirs, last=last):
            z[0, : last + 1, head.index] = theirs
            return z

        expected = model.run_with_hooks(
            target.tokens[example : example + 1], fwd_hooks=[("blocks.2.attn.hook_z", hook)]
        )
        length = int(target.attention_mask[example].sum())
        assert torch.allclose(found[example, :length], expected[0, :length], atol=1e-4)


def test_positions_of_two_formats_match_by_span(model, tasks, tokenizer):
    questions = tasks["qa_ood"]
    biographies = pair_formats(questions, tasks["bio"])
    assert (biographies.answers["value"] == questions.answers["value"]).all()
    assert (biographies.answers["group"] == questions.answers["group"]).all()
    matches = matching_positions(biographies, questions)
    for example in range(len(questions)):
        pairs = matches[matches[:, 0] == example][:, 1:].tolist()
        last = [int(task.answers["start"][example]) - 1 for task in (biographies, questions)]
        assert last in pairs
        for theirs, ours in pairs:
            if [theirs, ours] != last:
                assert any(
                    bool(questions.spans[name][example, ours]) and bool(biographies.spans[name][example, theirs])
                    for name in ("subject", "relation")
                )
            if bool(questions.spans["subject"][example, ours]):
                assert biographies.tokens[example, theirs] == questions.tokens[example, ours]
        assert sum(bool(questions.spans["subject"][example, ours]) for _, ours in pairs) == 2
        assert len({ours for _, ours in pairs}) == len(pairs)


def test_patching_between_formats_equals_a_hook_written_by_hand(model, tasks):
    target = tasks["qa_ood"].select(range(6))
    source = pair_formats(target, tasks["bio"])
    matches, head = matching_positions(source, target), Head(1, 0)
    with patch_heads(model, [head], source, target=target):
        found = model(target.tokens)
    for example in range(len(target)):
        _, cache = model.run_with_cache(alone(source, example))
        theirs = cache["blocks.1.attn.hook_z"][0, :, head.index]

        def hook(z, hook, theirs=theirs, example=example):
            for _, source_position, position in matches[matches[:, 0] == example].tolist():
                z[0, position, head.index] = theirs[source_position]
            return z

        tokens = alone(target, example)
        expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", hook)])
        assert torch.allclose(found[example, : tokens.shape[1]], expected[0], atol=1e-4)


def test_patching_a_run_with_itself_changes_nothing(model, tasks):
    task = tasks["qa_id"].select(range(5))
    heads = [Head(layer, head) for layer in range(4) for head in range(4)]
    before = model(task.tokens)
    with patch_heads(model, heads, task, target=task):
        # values come from the arithmetic, the run is the hookable model's: equal but for rounding
        assert torch.allclose(model(task.tokens), before, atol=1e-5 * float(before.abs().max()), rtol=0)


def test_hooks_leave_with_the_block_also_after_an_exception(model, bio):
    before = model(bio.tokens)
    with pytest.raises(KeyError), ablate_heads(model, [Head(0, 0)]):
        raise KeyError("on the way")
    assert torch.equal(model(bio.tokens), before)


def test_bad_input_is_refused(model, tasks, bio):
    with (
        pytest.raises(CircuitsError, match="there is no head L9H0: the model has layers 0 to 3"),
        ablate_heads(model, [Head(9, 0)]),
    ):
        pass
    with pytest.raises(CircuitsError, match="there is no ablation 'max'"):
        ablate_heads(model, [Head(0, 0)], "max")
    with pytest.raises(CircuitsError, match="needs the mean outputs"):
        ablate_heads(model, [Head(0, 0)], "mean")
    with (
        pytest.raises(CircuitsError, match="L0H0 was to be replaced, but its layer was never run"),
        replace_heads(model, {Head(0, 0): torch.zeros(32)}),
    ):
        pass
    with pytest.raises(CircuitsError, match="the source has 3, the target 10"):
        matching_positions(bio.select([0, 1, 2]), bio)
    few = tasks["qa_ood"].select(range(2))
    with pytest.raises(CircuitsError, match="nobody else is asked"):
        pair_people(few)
    with pytest.raises(CircuitsError, match="bio does not tell the"):
        pair_formats(tasks["qa_ood"], bio.select([0]))
