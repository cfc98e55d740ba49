import copy
from dataclasses import replace

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.interventions import mean_head_outputs
from circuits.interventions.heads import mean_outputs
from circuits.metrics import evaluate
from circuits.models import LeanModel, capture, identity, load_model, parameters_of
from circuits.rankings import subsets as room
from circuits.rankings.subsets import ablating, count_parameters, score_subsets, swapping
from circuits.units import Head, Neuron
from tests.fixtures import lively
from tests.models.test_families import random_model

KINDS = (Head, Neuron)


def some_subsets(model, kind, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    units = kind.count(room.shape_of(model))
    drawn = torch.rand(count, model.cfg.n_layers, units, generator=generator) < torch.rand(
        count, 1, 1, generator=generator
    )
    drawn[0], drawn[1] = False, True
    drawn[3, :2] = drawn[2, :2]
    return torch.cat([drawn, drawn[2:3]])


def swapped_by_hand(model, other, kind, subset):
    """A copy of the model with the slices written one unit at a time."""
    by_hand = copy.deepcopy(model)
    ours, theirs = parameters_of(by_hand), parameters_of(other)
    grouped = model.cfg.n_key_value_heads
    with torch.no_grad():
        for layer, index in subset.nonzero().tolist():
            attention, mlp = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp."
            if kind is Head:
                for name in ("W_Q", "b_Q", "W_O"):
                    if attention + name in ours:
                        ours[attention + name][index] = theirs[attention + name][index]
                slot = index // (model.cfg.n_heads // grouped) if grouped else index
                for name in ("W_K", "b_K", "W_V", "b_V"):
                    name = attention + name
                    if name in ours:
                        ours[name][slot] = theirs[name][slot]
            else:
                for name in ("W_in", "W_gate"):
                    if mlp + name in ours:
                        ours[mlp + name][:, index] = theirs[mlp + name][:, index]
                for name in ("b_in", "W_out"):
                    if mlp + name in ours:
                        ours[mlp + name][index] = theirs[mlp + name][index]
    return by_hand


def ablated_by_hand(model, kind, subset, outputs=None):
    """Hooks that write one unit at a time."""

    def hook(activation, hook):
        for index in subset[hook.layer()].nonzero()[:, 0].tolist():
            activation[:, :, index] = 0 if outputs is None else outputs[hook.layer(), index].squeeze()
        return activation

    name = "attn.hook_z" if kind is Head else "mlp.hook_post"
    return model.hooks(fwd_hooks=[(f"blocks.{layer}.{name}", hook) for layer in range(model.cfg.n_layers)])


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_equals_copies_changed_by_hand(model, pre, tasks, kind):
    subsets, chosen = some_subsets(model, kind), [tasks["bio"].select(range(4)), tasks["qa_id"].select(range(3))]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with swapping(model, pre, kind) as switch:
        table = score_subsets(model, chosen, subsets, switch, batch_size=3)
    assert list(table["subset"]) == [*range(7), *range(7)]
    for row in table.itertuples():
        scores = evaluate(swapped_by_hand(model, pre, kind, subsets[row.subset]), chosen[row.task != "bio"])
        assert row.log_prob == pytest.approx(scores["log_prob"].mean(), abs=1e-4)
        assert row.exact_match == scores["exact_match"].mean()
    assert table["log_prob"].nunique() == 12
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_ablating_equals_hooks_written_by_hand(model, tasks, kind, to):
    subsets, task = some_subsets(model, kind), tasks["qa_id"].select(range(5))
    outputs = mean_outputs(model, tasks["bio"].select(range(9)), kind, batch_size=4) if to == "mean" else None
    with ablating(model, kind, outputs) as switch:
        table = score_subsets(model, [task], subsets, switch, batch_size=2)
    for row in table.itertuples():
        with ablated_by_hand(model, kind, subsets[row.subset], outputs):
            scores = evaluate(model, task)
        assert row.log_prob == pytest.approx(scores["log_prob"].mean(), abs=1e-4)
    assert table["log_prob"].nunique() == 6


def test_mean_outputs_are_over_tokens_and_not_over_padding(model, bio):
    heads, neurons = mean_outputs(model, bio, Head, 3), mean_outputs(model, bio, Neuron, 3)
    assert torch.allclose(heads, mean_head_outputs(model, bio), atol=1e-6)
    post = capture(model, bio.tokens, [(2, "post")])[2, "post"]
    assert torch.allclose(neurons[2, :, 0], post[bio.attention_mask].mean(0), atol=1e-6)


def test_a_layer_runs_once_for_each_distinct_state_of_the_layers_before_it(model, bio, monkeypatch):
    subsets = torch.zeros(5, 4, 4, dtype=torch.bool)
    subsets[1, 3, 0] = subsets[2, 3, 1] = subsets[3, 2, 0] = True
    ran = []

    real = LeanModel.layer

    def counted(lean, layer, stream, **others):
        ran.append(layer)
        return real(lean, layer, stream, **others)

    monkeypatch.setattr(LeanModel, "layer", counted)
    with ablating(model, Head) as switch:
        score_subsets(model, [bio], subsets, switch)
    assert sorted(ran) == [0, 1, 2, 2, 3, 3, 3, 3]


def test_parameters_of_a_group_count_once(model):
    subsets = torch.zeros(3, 4, 4, dtype=torch.bool)
    subsets[0, 1, 0] = subsets[1, 1, :2] = subsets[2, 1, 2] = subsets[2, 3, 1] = True
    d_model, d_head = model.cfg.d_model, model.cfg.d_head
    bias = 0 if model.cfg.n_key_value_heads else d_head
    own = 2 * d_model * d_head + bias
    key_value = 2 * (d_model * d_head + bias)
    pair = 2 * own + (1 if model.cfg.n_key_value_heads else 2) * key_value
    assert count_parameters(model, Head, subsets).tolist() == [own + key_value, pair, 2 * (own + key_value)]
    neurons = torch.zeros(1, 4, model.cfg.d_mlp, dtype=torch.bool)
    neurons[0, 2, :10] = True
    width = 3 * d_model if model.cfg.gated_mlp else 2 * d_model + 1
    assert count_parameters(model, Neuron, neurons).tolist() == [10 * width]


def test_weights_return_also_after_an_exception(model, pre):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    name = identity(model)

    def fail():
        with swapping(model, pre, Head) as switch:
            switch.to(torch.ones(4, 4, dtype=torch.bool))
            assert torch.equal(model.blocks[3].attn.W_O, pre.blocks[3].attn.W_O)
            assert identity(model) == name
            raise KeyError("on the way")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@torch.no_grad()
def test_angles_are_those_of_the_whole_prompt(tasks):
    reference = random_model("llama, dynamic", max_position_embeddings=6)
    task = replace(tasks["qa_id"].select(range(1)), tokens=tasks["qa_id"].select(range(1)).tokens % 67)
    model = load_model(reference)
    nothing = torch.zeros(1, 3, 4, dtype=torch.bool)
    with ablating(model, Head) as switch:
        found = score_subsets(model, [task], nothing, switch)["log_prob"].item()
    log_probs = reference(task.tokens).logits[0].log_softmax(-1)
    answer = task.answers.iloc[0]
    places = range(answer["start"], answer["end"])
    expected = sum(float(log_probs[place - 1, task.tokens[0, place]]) for place in places)
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_model_of_another_kind_is_refused(model, family):
    other = load_model(lively("pythia" if family == "llama" else "llama"))
    with (
        pytest.raises(CircuitsError, match="memory and memory are not the same kind of model: blocks.0.attn"),
        swapping(model, other, Head),
    ):
        pass
