"""Every family through everything that acts on weights, with the three models that must agree inside and after it."""

from dataclasses import replace

import pytest
import torch

from circuits.facts import DatasetSettings, make_dataset
from circuits.interventions import ablate_heads
from circuits.masks import (
    ParameterMask,
    graft,
    graft_at,
    graft_by_score,
    mean,
    revert,
    shared_parameters,
    shared_size,
    unit_mask,
    zero,
)
from circuits.metrics import evaluate
from circuits.models import (
    difference,
    fingerprint,
    lean_model,
    load_model,
    load_tokenizer,
    parameters_of,
    save_model,
    shape_of,
)
from circuits.rankings import Evidence, attention_scores, critical_curve, rank_units, sufficient_curve
from circuits.tracing import trace_gradients
from circuits.training import Optimisation, train
from circuits.units import COMPONENTS, Head, KVGroup, Neuron
from tests.fixtures import said_by
from tests.models.test_hookable import FAMILIES, lively

pytestmark = pytest.mark.usefixtures("all_unchecked")


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(name):
    """A Hugging Face model and what is loaded from it: before fine-tuning, and after."""
    return [(reference, load_model(reference)) for reference in (lively(name, seed) for seed in (0, 1))]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("few") / "facts", DatasetSettings(people=4))


@pytest.fixture(scope="module")
def asked(tasks):
    """Two tasks in the small vocabulary of these models."""
    return [
        replace(task, tokens=task.tokens % 61)
        for task in (tasks["bio"].select(range(4)), tasks["qa_id"].select(range(4)))
    ]


@torch.no_grad()
def agreed_logits(model, other, tokens):
    """By the lean and the hookable model, and by Hugging Face's with the same tensors: all the same."""
    lean = lean_model(model)
    other.load_state_dict({name: tensor.detach() for name, tensor in model.checkpoint.tensors.items()}, strict=False)
    other.tie_weights()
    found, theirs = lean.unembed(lean.run(tokens)), other(tokens).logits
    allowed = 1e-5 * float(theirs.abs().max())
    for ours in (found, model(tokens)):
        assert torch.allclose(ours, theirs, atol=allowed, rtol=0)
    return found


def test_three_models_agree_inside_and_after_every_block(pair, asked):
    (_, pre), (reference, model) = pair
    qa = asked[1]
    traces = [trace_gradients(model, task, components=COMPONENTS) for task in asked]
    shared = shared_parameters(traces, 0.05)
    assert 0 < shared.size < shared.total
    assert shared_size(shared, Head)["size"].sum() > 0
    tokens, other = qa.tokens, type(reference)(reference.config).eval()
    clean = agreed_logits(model, other, tokens)
    name = fingerprint(model)
    units = unit_mask(model, [Head(1, 2), Neuron(0, 7), KVGroup(2, 0)])
    blocks = {
        "zero": lambda: zero(model, shared),
        "mean": lambda: mean(model, shared),
        "revert": lambda: revert(model, shared, pre),
        "graft": lambda: graft(model, shared.for_model(pre), pre),
        "units": lambda: zero(model, units),
    }
    for block, make in blocks.items():
        with make():
            assert float((agreed_logits(model, other, tokens) - clean).abs().max()) > 1e-3, block
        assert torch.equal(agreed_logits(model, other, tokens), clean), block
    assert fingerprint(model) == name
    # at some positions, through the hookable model
    everywhere = torch.ones_like(qa.tokens, dtype=torch.bool)
    with graft(model, unit_mask(pre, [Head(1, 2), Neuron(0, 7)]), pre):
        expected = evaluate(model, qa)["log_prob"]
    with graft_at(model, unit_mask(pre, [Head(1, 2), Neuron(0, 7)]), pre, task=qa, positions=everywhere):
        assert evaluate(model, qa)["log_prob"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    with ablate_heads(model, [Head(1, 2)]):
        ablated = evaluate(model, qa)["log_prob"]
    output = torch.zeros_like(parameters_of(model)["blocks.1.attn.W_O"], dtype=torch.bool)
    output[2] = True
    with zero(model, ParameterMask({"blocks.1.attn.W_O": output}, name)):
        by_weights = evaluate(model, qa)["log_prob"]
    # a head without output weights puts out nothing
    assert ablated.tolist() == pytest.approx(by_weights.tolist(), abs=1e-3)


def test_it_is_grafted_ranked_saved_and_compared(pair, asked, tmp_path, coarse_search):
    (_, pre), (_reference, model) = pair
    task = said_by(model, asked[1])
    assert evaluate(model, task)["exact_match"].all()
    found = graft_by_score(pre, model, task, keep=0.5)
    with graft(pre, found.mask, model):
        assert evaluate(pre, task)["exact_match"].mean() == found.accuracy >= 0.5
        save_model(pre, tmp_path / "grafted")
        grafted = fingerprint(pre)
    assert found.fraction < 1
    assert fingerprint(load_model(tmp_path / "grafted")) == grafted
    ranking = rank_units(
        Evidence(model, pre, task=task, grafted=found.mask), Head, ["change", "graft_size", "ablation"]
    )
    everything = shape_of(model).n_layers * shape_of(model).n_heads
    curve = critical_curve(ranking, model, [task], pre=pre, counts=[0, everything])
    assert (curve[curve["n"] == 0]["exact_match"] == 1).all()
    curve = sufficient_curve(ranking, pre, model, tasks=[task], counts=[0, everything], rest="fine_tuned")
    assert (curve[curve["n"] == everything]["exact_match"] == 1).all()
    assert len(attention_scores(model, {"qa": task})) == everything
    save_model(model, tmp_path / "tuned")
    table = difference(tmp_path / "grafted", tmp_path / "tuned").set_index("unit")
    whole = sum(tensor.numel() for tensor in model.checkpoint.tensors.values())
    kept = 1 - found.mask.size / whole
    assert table["changed"]["model"] == pytest.approx(kept, abs=1e-4)


def test_it_is_fine_tuned_from_its_folder_with_the_tokenizer_that_lies_there(pair, tokenizer, few, tmp_path):
    reference = pair[0][0]
    config = type(reference.config)(**{**reference.config.to_dict(), "vocab_size": len(tokenizer)})
    type(reference)(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")

    text = "Sabrina Merriweather is based in Toronto."
    assert load_tokenizer(tmp_path / "start")(text).input_ids == tokenizer(text).input_ids
    train("mixed", few, tmp_path / "out", start=tmp_path / "start", optimisation=Optimisation(steps=2, rows=2))
    assert fingerprint(load_model(tmp_path / "out" / "mixed")) != fingerprint(load_model(tmp_path / "start"))
