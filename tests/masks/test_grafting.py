import copy

import pytest
import torch

from circuits.datasets import DatasetSettings, Role, Task, make_dataset
from circuits.errors import CircuitsError
from circuits.masks import (
    Graft,
    ParameterMask,
    ablate_mask,
    covered_parameters,
    graft,
    graft_at,
    graft_by_optimisation,
    graft_by_score,
    role_positions,
    unit_mask,
)
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_huggingface, load_model, parameters_of, save_model
from circuits.tracing import trace_gradients
from circuits.training import Optimisation, train
from circuits.units import Head, KVGroup, Neuron
from tests.conftest import FAMILIES, lively


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fine-tuned model of each family, its start, and questions it recalls."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
    optimisation = Optimisation(steps=70, rows=24, warmup_steps=5)
    found = {}
    for family in FAMILIES:
        (path,) = train("mixed", dataset, folder / family, f"tiny-{family}", optimisation)
        found[family] = (folder / family / "pre", path)
    return dataset, found


@pytest.fixture
def models(trained, family):
    return tuple(load_model(path) for path in trained[1][family])


@pytest.fixture
def task(trained, models):
    return Task.from_dataset(trained[0], "qa_id", models[0].tokenizer)


def state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def accuracy(model, task):
    return float(evaluate(model, task)["exact_match"].mean())


def grafted_by_hand(models, masks):
    """A copy of θ_pre with the masked entries of θ_ft."""
    by_hand = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, value in covered_parameters(by_hand).items():
            value[masks[name]] = parameters_of(models[1])[name].detach()[masks[name]]
    return by_hand


def test_the_graft_by_change_is_the_smallest_of_a_full_sort_that_keeps_the_accuracy(models, task):
    pre, fine_tuned = models
    before = state(pre)
    found = graft_by_score(pre, fine_tuned, task)
    assert equal(state(pre), before)
    reached = accuracy(fine_tuned, task)
    assert reached > 0.8
    assert found.accuracy >= 0.95 * reached
    assert 0 < found.fraction == found.size / found.mask.total < 1
    old, new = covered_parameters(pre), covered_parameters(fine_tuned)
    changes = torch.cat([(new[name] - old[name]).abs().flatten() for name in new])
    order = changes.argsort(descending=True, stable=True)

    def by_sort(size):
        chosen = torch.zeros(len(changes), dtype=torch.bool)
        chosen[order[:size]] = True
        parts = chosen.split([value.numel() for value in new.values()])
        return {name: part.view(new[name].shape) for name, part in zip(new, parts, strict=True)}

    masks = by_sort(found.size)
    assert all(torch.equal(masks[name], found.mask.masks[name]) for name in masks)
    # every row of the curve, against a copy that was grafted by hand
    for row in found.curve.iloc[::4].itertuples():
        scores = evaluate(grafted_by_hand(models, by_sort(row.size)), task)
        assert row.exact_match == scores["exact_match"].mean()
        assert row.log_prob == pytest.approx(scores["log_prob"].mean(), rel=1e-5)
    smaller = found.curve[found.curve["size"] < found.size]
    assert (smaller["exact_match"] < 0.95 * reached).all()
    assert smaller["size"].max() >= 0.98 * found.size
    assert found.curve["chosen"].sum() == 1
    assert found.curve["size"].min() == 0
    assert found.curve["size"].max() == int(changes.count_nonzero())


def test_gradient_x_change_ranks_by_the_gradient_along_the_path(models, task):
    pre, fine_tuned = models
    found = graft_by_score(pre, fine_tuned, task, "gradient_x_change", batch_size=5)
    assert equal(state(pre), state(graft_by_score(pre, fine_tuned, task).mask and pre))
    old, new = covered_parameters(pre), covered_parameters(fine_tuned)
    sums = {name: torch.zeros_like(value) for name, value in old.items()}
    for share in (0.125, 0.375, 0.625, 0.875):
        between = copy.deepcopy(pre)
        with torch.no_grad():
            for name, value in covered_parameters(between).items():
                value.copy_(old[name] + share * (new[name] - old[name]))
        for example in range(len(task)):
            one = task.select([example])
            logits = between(one.tokens)[0]
            where = one.answer_mask[0].nonzero()[:, 0]
            loss = torch.nn.functional.cross_entropy(logits[where - 1], one.tokens[0, where])
            named = parameters_of(between)
            gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
            for name, gradient in gradients.items():
                if name in sums:
                    sums[name] += gradient
                else:
                    sums["embed.W_E"] += gradient.T
    scores = {name: (sums[name] * (new[name] - old[name])).abs() for name in new}
    flat = torch.cat([value.flatten() for value in scores.values()])
    chosen = torch.cat([found.mask.masks[name].flatten() for name in scores])
    assert chosen.sum() == found.size
    by_hand = torch.zeros_like(chosen)
    by_hand[flat.argsort(descending=True)[: found.size]] = True
    assert (chosen & by_hand).sum() > 0.999 * found.size
    assert found.accuracy >= 0.95 * accuracy(fine_tuned, task)


def test_optimisation_keeps_the_accuracy_with_fewer_parameters_than_the_largest_changes(models, task):
    pre, fine_tuned = models
    before = state(pre)
    found = graft_by_optimisation(pre, fine_tuned, task, steps=30)
    assert equal(state(pre), before)
    by_change = found.curve[found.curve["score"] == "change"]
    kept = by_change[by_change["exact_match"] >= 0.95 * accuracy(fine_tuned, task)]["size"].min()
    assert found.size < 0.7 * kept
    with graft(pre, found.mask, fine_tuned):
        assert accuracy(pre, task) == found.accuracy >= 0.95 * accuracy(fine_tuned, task)
    again = graft_by_optimisation(pre, fine_tuned, task, steps=30)
    assert all(torch.equal(value, again.mask.masks[name]) for name, value in found.mask.masks.items())
