import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.masks import (
    Graft,
    ParameterMask,
    ablate_mask,
    covered_parameters,
    graft,
    graft_by_optimisation,
    graft_by_score,
    unit_mask,
)
from circuits.masks.graft_search import GraftSearch
from circuits.masks.packing import PackedTensors, pack
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_huggingface, load_model, parameters_of, save_model
from circuits.tracing import trace_gradients
from circuits.training import new_model
from circuits.units import TIED, Head, Neuron
from tests.fixtures import gradients_of


@pytest.fixture(scope="session")
def task(tasks):
    return tasks["qa_id"].select(range(12))


@pytest.fixture(scope="session")
def models(family, tokenizer, task, tmp_path_factory):
    """A model before and after it was fine-tuned on the task until it recalls it."""
    pre = load_model(new_model(f"tiny-{family}", tokenizer), tokenizer=tokenizer)
    tuned = new_model(f"tiny-{family}", tokenizer)
    targets = task.tokens.masked_fill(~task.answer_mask, -100)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        tuned(task.tokens, labels=targets).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("tuned") / family
    save_model(load_model(tuned, tokenizer=tokenizer), folder)
    return pre, load_model(folder)


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
            if name not in masks:
                continue
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


def test_gradient_x_change_is_the_gradient_along_the_path_times_the_change(models, task):
    pre, fine_tuned = models
    task, before = task.select(range(4)), state(pre)
    search = GraftSearch(pre, fine_tuned, task, 0.95, None)
    with search.started():
        found = search.gradients_x_changes(batch_size=3)
    assert equal(state(pre), before)
    old, new = covered_parameters(pre), covered_parameters(fine_tuned)
    sums = {name: torch.zeros_like(value) for name, value in old.items()}
    for share in (0.125, 0.375, 0.625, 0.875):
        between = copy.deepcopy(pre)
        with torch.no_grad():
            for name, value in covered_parameters(between).items():
                value.copy_(old[name] + share * (new[name] - old[name]))
        leaves = gradients_of(between)
        for example in range(len(task)):
            one = task.select([example])
            logits = between(one.tokens)[0]
            where = one.answer_mask[0].nonzero()[:, 0]
            loss = torch.nn.functional.cross_entropy(logits[where - 1], one.tokens[0, where])
            for name, gradient in leaves(loss).items():
                sums[name] += gradient
    for name, value in found.items():
        expected = (sums[name] / 4 / len(task) * (new[name] - old[name])).abs()
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-4 * float(expected.max())), name


def test_optimisation_keeps_the_accuracy_with_fewer_parameters_than_the_largest_changes(models, task):
    pre, fine_tuned = models
    if pre.cfg.parallel_attn_mlp:
        pytest.skip("slow, and each step of the descent is tested on both families")
    before = state(pre)
    found = graft_by_optimisation(pre, fine_tuned, task, steps=20)
    assert equal(state(pre), before)
    wanted = 0.95 * accuracy(fine_tuned, task)
    by_change = found.curve[found.curve["score"] == "change"]
    assert found.size < 0.7 * by_change[by_change["exact_match"] >= wanted]["size"].min()
    by_hand = grafted_by_hand(models, found.mask.masks)
    assert accuracy(by_hand, task) == found.accuracy >= wanted


def test_optimisation_descends_the_loss_over_the_relaxed_mask(models, task):
    pre, fine_tuned = models
    search = GraftSearch(pre, fine_tuned, task, 0.95, None)
    old, new = covered_parameters(pre), covered_parameters(fine_tuned)
    base = {name: (new[name] - old[name]).abs() > 1e-2 for name in new}
    count = sum(int(entries.sum()) for entries in base.values())
    with search.started():
        found = search.relax(PackedTensors({n: pack(entries) for n, entries in base.items()}), 2, 0.2, 3.0, 64, 0)
    # the same two steps by differentiating the relaxed mask itself, in a copy
    logits = {name: torch.full(value.shape, -3.0, requires_grad=True) for name, value in new.items()}

    def reference(weights, tokens):
        """Hugging Face's model with these weights."""
        rows, model = pre.checkpoint.rows, AutoModelForCausalLM.from_config(pre.checkpoint.config)
        tensors = {name: tensor.detach().clone() for name, tensor in pre.checkpoint.tensors.items()}
        for row in rows:
            if row.kind != "unembedding" or not pre.checkpoint.tied:
                row.stored(tensors[row.tensor]).copy_(weights[row.name])
        return torch.func.functional_call(model.eval(), tensors, (tokens,)).logits

    def relaxed(name):
        inside = logits[name].sigmoid()
        return torch.where(base[name], 1 - inside, inside)

    for _ in range(2):
        weights = {name: old[name] + relaxed(name) * (new[name] - old[name]) for name in new}
        if TIED[1] not in weights:
            weights[TIED[1]] = weights[TIED[0]].T
        answers = task.answers
        losses = []
        logits_of = reference(weights, task.tokens)
        for row in answers.itertuples():
            at = torch.arange(row.start, row.end)
            losses.append(
                torch.nn.functional.cross_entropy(logits_of[row.example, at - 1], task.tokens[row.example, at])
            )
        total = torch.stack(losses).mean() + 3.0 * sum(relaxed(name).sum() for name in new) / count
        slopes = torch.autograd.grad(total, list(logits.values()))
        size = torch.cat([slope.flatten() for slope in slopes]).square().mean().sqrt()
        with torch.no_grad():
            for value, slope in zip(logits.values(), slopes, strict=True):
                value -= 0.2 * slope / size
    for name, value in found.items():
        assert torch.allclose(value, relaxed(name), atol=2e-4), name


def test_the_same_seed_relaxes_the_same_mask(models, task):
    base = PackedTensors({name: pack(value > 0) for name, value in covered_parameters(models[0]).items()})
    search = GraftSearch(*models, task, 0.95, None)
    with search.started():
        one, two, other = (search.relax(base, 2, 0.2, 3.0, 5, seed) for seed in (3, 3, 4))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_graft_of_units_touches_nothing_else(models, task):
    pre, fine_tuned = models
    everything = [Head(layer, head) for layer in range(4) for head in range(4)]
    everything += [Neuron(layer, neuron) for layer in range(4) for neuron in range(pre.cfg.d_mlp)]
    base = ParameterMask(
        {name: torch.full(value.shape, "embed" in name) for name, value in covered_parameters(fine_tuned).items()},
        fingerprint(fine_tuned),
    )
    with graft(pre, base, fine_tuned):
        start = accuracy(pre, task)
        few = [unit for unit in everything if unit.layer in (0, 3)]
        reached = accuracy(grafted_by_hand((pre, fine_tuned), unit_mask(fine_tuned, few).masks), task)
        wanted = (start + reached) / 2 / accuracy(fine_tuned, task)
        assert start < wanted < reached
        allowed = unit_mask(fine_tuned, few)
        found = graft_by_score(pre, fine_tuned, task, score="gradient_x_change", keep=wanted, units=iter(few))
        assert 0 < found.size < allowed.size
        assert found.accuracy >= wanted * accuracy(fine_tuned, task)
        assert found.mask.total == base.total
        assert found.mask.provenance["units"] == allowed.provenance["units"]
        search = GraftSearch(pre, fine_tuned, task, wanted, few)
        with search.started():
            relaxed = search.relax(found.mask.masks, 1, 0.2, 3.0, 64, 0)
        for name, entries in found.mask.masks.items():
            own = allowed.masks[name] if name in allowed.masks else torch.zeros_like(entries)
            assert not (entries & ~own).any()
            assert torch.equal(relaxed[name] > 0, own)
        with pytest.raises(CircuitsError, match=r"parameters that may be grafted reach an accuracy of \d.*take more"):
            graft_by_score(pre, fine_tuned, task, keep=1.0, units=[Neuron(0, 0)])


def test_a_grafted_model_is_an_ordinary_checkpoint(models, task, tmp_path):
    pre, fine_tuned = models
    mask = unit_mask(fine_tuned, [Head(1, 2), Head(3, 0), Neuron(2, 5)]).permuted(0)
    with graft(pre, mask, fine_tuned):
        save_model(pre, tmp_path / "grafted")
        logits = pre(task.tokens)
    loaded = load_model(tmp_path / "grafted")
    assert torch.equal(loaded(task.tokens), logits)
    assert load_huggingface(tmp_path / "grafted").config.architectures == pre.checkpoint.config.architectures
    trace = trace_gradients(loaded, task)
    assert trace.provenance["model"] == fingerprint(loaded)
    own = mask.for_model(loaded)
    table = ablate_mask(loaded, own, [task], pre=pre, draws=1)
    with torch.no_grad():
        assert torch.equal(loaded(task.tokens), logits)
    assert set(table["condition"]) == {"none", "shared", "random"}
    expected = evaluate(pre, task)["log_prob"].mean()
    assert table[table["condition"] == "shared"]["log_prob"].iloc[0] == pytest.approx(expected, abs=1e-6)


def test_a_graft_is_saved_and_loaded(models, task, tmp_path):
    found = graft_by_score(*models, task, units=[Head(0, 0)], keep=1e-9)
    found.save(tmp_path / "graft")
    loaded = Graft.load(tmp_path / "graft")
    assert all(torch.equal(value, loaded.mask.masks[name]) for name, value in found.mask.masks.items())
    assert loaded.mask.provenance == found.mask.provenance
    assert loaded.curve.equals(found.curve)
    assert loaded.answers.equals(found.answers)
    assert found.answers["exact_match"].mean() == found.accuracy
    assert found.answers["fine_tuned"].tolist() == evaluate(models[1], task)["exact_match"].tolist()
    with graft(models[0], found.mask, models[1]):
        assert found.answers["exact_match"].tolist() == evaluate(models[0], task)["exact_match"].tolist()
    assert (loaded.size, loaded.accuracy, repr(loaded)) == (found.size, found.accuracy, repr(found))
    (tmp_path / "graft" / "curve.parquet").unlink()
    with pytest.raises(CircuitsError, match="there is no file .*curve"):
        Graft.load(tmp_path / "graft")


def test_bad_grafts_are_refused(models, task):
    pre, fine_tuned = models
    with pytest.raises(CircuitsError, match="there is no score 'size'"):
        graft_by_score(pre, fine_tuned, task, score="size")
    with pytest.raises(CircuitsError, match="have the same weights where a graft may be: there is nothing to graft"):
        graft_by_score(fine_tuned, fine_tuned, task)
    with pytest.raises(CircuitsError, match="the batch size is 0"):
        graft_by_score(pre, fine_tuned, task, batch_size=0)
    with pytest.raises(CircuitsError, match="the share to keep is 1.5"):
        graft_by_score(pre, fine_tuned, task, keep=1.5)
    with pytest.raises(CircuitsError, match="there is no head L9H0"):
        graft_by_score(pre, fine_tuned, task, units=[Head(9, 0)])
    with pytest.raises(CircuitsError, match="a graft of no units"):
        graft_by_score(pre, fine_tuned, task, units=[])
    with pytest.raises(CircuitsError, match="gets no answer of qa_id right"):
        graft_by_score(fine_tuned, pre, task)
    with pytest.raises(CircuitsError, match="steps, step size and batch size must be positive"):
        graft_by_optimisation(pre, fine_tuned, task, steps=0)
