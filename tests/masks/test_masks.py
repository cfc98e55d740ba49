import copy

import numpy
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.masks import (
    ParameterMask,
    ablate_mask,
    gini,
    graft,
    influenced_parameters,
    mean,
    revert,
    shared_parameters,
    shared_size,
    sharing,
    top_share,
    zero,
)
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_model, parameters_of
from circuits.tracing import GradientTrace, trace_gradients
from circuits.units import Head, KVGroup, Neuron
from tests.conftest import lively


@pytest.fixture
def traces(model, tasks):
    return [trace_gradients(model, tasks[split].select(range(12))) for split in ("bio", "qa_id")]


@pytest.fixture
def mask(traces):
    return shared_parameters(traces, 0.05)


@pytest.fixture
def pre(family, tokenizer):
    return load_model(lively(family, seed=1), tokenizer=tokenizer)


def state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_influenced_set_is_the_top_of_a_full_sort(traces):
    trace = traces[0]
    found = influenced_parameters(trace, 0.03)
    values = numpy.concatenate([value.numpy().ravel() for value in trace.gradients.values()])
    chosen = numpy.concatenate([value.numpy().ravel() for value in found.masks.values()])
    assert chosen.sum() == round(0.03 * len(values))
    assert values[chosen].min() >= values[~chosen].max()


def test_shared_parameters_and_their_numbers_by_hand(traces):
    shared = shared_parameters(traces, 0.05)
    sets = []
    for trace in traces:
        values = numpy.concatenate([value.numpy().ravel() for value in trace.gradients.values()])
        sets.append(set(numpy.argsort(-values, kind="stable")[: round(0.05 * len(values))].tolist()))
    both = sets[0] & sets[1]
    assert (
        set(numpy.flatnonzero(numpy.concatenate([m.numpy().ravel() for m in shared.masks.values()])).tolist()) == both
    )
    report = sharing(traces, 0.05)
    total, count = report["total"], len(sets[0])
    assert report["size"] == len(both)
    assert report["share"] == pytest.approx(len(both) / count)
    assert report["jaccard"] == pytest.approx(len(both) / len(sets[0] | sets[1]))
    assert report["chance"] == pytest.approx(count * count / total)
    assert report["lift"] == pytest.approx(len(both) / (count * count / total))


def test_independent_traces_have_lift_one():
    generator = torch.Generator().manual_seed(0)
    traces = [
        GradientTrace(task, {"blocks.0.attn.W_Q": torch.rand(8, 50, 500, generator=generator)}, {}, 1, {"model": "a"})
        for task in ("one", "two", "three")
    ]
    report = sharing(traces[:2], 0.1)
    assert report["lift"] == pytest.approx(1, abs=0.08)
    assert report["permuted_lift"] == pytest.approx(1, abs=0.08)
    assert sharing(traces, 0.2)["lift"] == pytest.approx(1, abs=0.15)


def test_the_permuted_control_keeps_what_tensors_hold():
    # all influence in the first tensor: sharing is explained by the tensor alone
    generator = torch.Generator().manual_seed(0)
    traces = [
        GradientTrace(
            task,
            {
                "blocks.0.attn.W_Q": 1 + torch.rand(2, 10, 500, generator=generator),
                "blocks.1.attn.W_Q": torch.rand(2, 100, 450, generator=generator),
            },
            {},
            1,
            {"model": "a"},
        )
        for task in ("one", "two")
    ]
    report = sharing(traces, 0.05)
    assert report["lift"] == pytest.approx(report["permuted_lift"], rel=0.1)
    assert report["lift"] > 9


def test_shared_size_equals_counting_unit_by_unit(mask, model):
    cfg = model.cfg
    groups = cfg.n_key_value_heads or cfg.n_heads
    under = "_" if cfg.n_key_value_heads else ""
    heads, neurons = shared_size(mask, Head), shared_size(mask, Neuron)
    has = mask.masks
    for row in heads.itertuples():
        prefix = f"blocks.{row.layer}.attn."
        own = sum(int(has[prefix + name][row.index].sum()) for name in ("W_Q", "W_O", "b_Q") if prefix + name in has)
        group = row.index // (cfg.n_heads // groups)
        names = [f"{prefix}{under}{name}" for name in ("W_K", "W_V", "b_K", "b_V")]
        shared = sum(int(has[name][group].sum()) for name in names if name in has) * groups / cfg.n_heads
        assert (row.query_output, row.key_value, row.size) == (own, shared, own + shared)
    for row in neurons[neurons["layer"] == 2].itertuples():
        prefix = f"blocks.{row.layer}.mlp."
        count = int(has[prefix + "W_in"][:, row.index].sum()) + int(has[prefix + "W_out"][row.index].sum())
        if prefix + "W_gate" in has:
            count += int(has[prefix + "W_gate"][:, row.index].sum())
        if prefix + "b_in" in has:
            count += int(has[prefix + "b_in"][row.index])
        assert row.size == count
    # biases added to the residual stream belong to no unit
    no_unit = [entries for name, entries in has.items() if name.endswith(("b_O", "b_out"))]
    assert heads["size"].sum() + neurons["size"].sum() == mask.size - sum(int(entries.sum()) for entries in no_unit)
    assert heads["parameters"].sum() + neurons["parameters"].sum() == mask.total - sum(
        entries.numel() for entries in no_unit
    )
    if cfg.n_key_value_heads:
        assert shared_size(mask, KVGroup)["size"].sum() == heads["key_value"].sum()


def test_gini_and_top_share_by_hand():
    values = torch.tensor([0.0, 1.0, 3.0, 4.0])
    pairs = sum(abs(float(a - b)) for a in values for b in values)
    assert gini(values) == pytest.approx(pairs / (2 * 4 * float(values.sum())))
    assert gini(torch.zeros(3)) == 0
    assert top_share(torch.tensor([1.0] * 18 + [5.0, 9.0]), 0.1) == pytest.approx(14 / 32)


def test_masks_combine(mask, model):
    everything = ParameterMask({name: torch.ones_like(m) for name, m in mask.masks.items()}, mask.model)
    other = mask.random(3)
    assert (mask | other).size == mask.size + other.size - (mask & other).size
    assert (mask - other).size == mask.size - (mask & other).size
    assert (~mask).size == mask.total - mask.size == (everything - mask).size
    with pytest.raises(CircuitsError, match="belong to different models"):
        _ = mask & ParameterMask(mask.masks, "other")


def test_random_masks_match_every_tensor(mask):
    drawn = [mask.random(seed) for seed in (0, 0, 1)]
    for name, entries in mask.masks.items():
        assert int(drawn[0].masks[name].sum()) == int(entries.sum())
    assert all(torch.equal(value, drawn[1].masks[name]) for name, value in drawn[0].masks.items())
    assert any(not torch.equal(value, drawn[2].masks[name]) for name, value in drawn[0].masks.items())


def test_a_mask_is_saved_a_bit_an_entry_and_loaded(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    loaded = ParameterMask.load(tmp_path / "mask.safetensors")
    assert all(torch.equal(value, loaded.masks[name]) for name, value in mask.masks.items())
    assert (loaded.model, loaded.provenance) == (mask.model, mask.provenance)
    assert (tmp_path / "mask.safetensors").stat().st_size < mask.total / 8 + 30_000


@pytest.mark.parametrize("act", ["revert", "zero", "mean"])
def test_acting_changes_the_masked_entries_alone_and_restores_every_bit(mask, model, pre, act):
    before, earlier = state(model), state(pre)
    acting = {
        "revert": lambda: revert(model, mask, pre),
        "zero": lambda: zero(model, mask),
        "mean": lambda: mean(model, mask),
    }
    with acting[act]():
        for name, value in parameters_of(model).items():
            expected = before[name].clone()
            if name in mask.masks:
                fill = {"revert": earlier[name], "zero": torch.zeros(()), "mean": before[name].mean()}[act]
                expected = torch.where(mask.masks[name], fill, expected)
            assert torch.allclose(value, expected, atol=1e-7), name
    assert equal(state(model), before)
    with pytest.raises(KeyError), acting[act]():
        raise KeyError("on the way")
    assert equal(state(model), before)


def test_blocks_lie_inside_one_another(mask, model, pre):
    before, other = state(model), mask.random(5)
    with zero(model, mask), revert(model, other, pre):
        for name, entries in other.masks.items():
            value = parameters_of(model)[name]
            assert torch.equal(value[entries], parameters_of(pre)[name][entries])
            assert not value[mask.masks[name] & ~entries].any()
    assert equal(state(model), before)
    mask.check(model)


def test_masks_must_treat_tied_embeddings_alike():
    model = load_model(lively("llama"))
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in parameters_of(model).items()}
    masks["embed.W_E"][3] = True
    with (
        pytest.raises(CircuitsError, match="are one tensor in this model"),
        zero(model, ParameterMask(masks, fingerprint(model))),
    ):
        pass
    masks["unembed.W_U"][:, 3] = True
    before = state(model)
    with zero(model, ParameterMask(masks, fingerprint(model))):
        assert not model.embed.W_E[3].any()
        assert model.embed.W_E[4].any()
    assert equal(state(model), before)


def test_a_graft_of_everything_is_the_fine_tuned_model_and_of_nothing_the_old_one(mask, model, pre, tasks):
    everything = ParameterMask(
        {name: torch.ones_like(value, dtype=torch.bool) for name, value in parameters_of(model).items()}, mask.model
    )
    tokens, before = tasks["bio"].tokens[:4], state(pre)
    with graft(pre, everything, model):
        assert equal(
            {n: v.detach() for n, v in parameters_of(pre).items()},
            {n: v.detach() for n, v in parameters_of(model).items()},
        )
        assert torch.equal(pre(tokens), model(tokens))
    with graft(pre, ~everything, model):
        assert equal(state(pre), before)
    assert equal(state(pre), before)


def test_reverting_equals_changing_a_copy_by_hand(mask, model, pre, tasks):
    task = tasks["qa_id"]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in parameters_of(by_hand).items():
            if name in mask.masks:
                value[mask.masks[name]] = parameters_of(pre)[name][mask.masks[name]]
    table = ablate_mask(model, mask, [task], pre, "revert", draws=2)
    expected = {"none": evaluate(model, task), "shared": evaluate(by_hand, task)}
    for condition, scores in expected.items():
        row = table[table["condition"] == condition].iloc[0]
        assert row["log_prob"] == pytest.approx(scores["log_prob"].mean(), abs=1e-5)
        assert row["exact_match"] == scores["exact_match"].mean()
    assert len(table[table["condition"] == "random"]) == 2
    assert table[table["condition"] != "none"]["parameters"].unique().tolist() == [mask.size]


def test_a_mask_of_another_model_is_refused_by_name(mask, model, pre):
    for act in (lambda: zero(pre, mask), lambda: revert(pre, mask, model), lambda: graft(model, mask, pre)):
        with pytest.raises(CircuitsError, match=f"made for model {mask.model}, not for {fingerprint(pre)}"):
            act()
    moved = mask.for_model(pre)
    with zero(pre, moved):
        pass
    assert moved.provenance["made_for"] == mask.model


def test_a_mask_of_another_shape_is_refused(mask, family, tokenizer):
    other = load_model(lively("pythia" if family == "llama" else "llama"), tokenizer=tokenizer)
    with pytest.raises(CircuitsError, match="has another shape or is missing there"):
        mask.check(other)


def test_bad_numbers_are_refused(traces, mask, model):
    with pytest.raises(CircuitsError, match="the fraction is 1.5"):
        shared_parameters(traces, 1.5)
    with pytest.raises(CircuitsError, match="sharing takes two tasks"):
        shared_parameters(traces[:1])
    dead = GradientTrace(
        "dead",
        {name: torch.zeros_like(value) for name, value in traces[0].gradients.items()},
        {},
        1,
        traces[0].provenance,
    )
    with pytest.raises(CircuitsError, match="only 0 of .* parameters have a gradient for the task dead"):
        influenced_parameters(dead)
    broken = {name: value.clone() for name, value in traces[0].gradients.items()}
    next(iter(broken.values()))[0, 0, 0] = float("nan")
    with pytest.raises(CircuitsError, match="gradients that are not finite"):
        influenced_parameters(GradientTrace("broken", broken, {}, 1, traces[0].provenance))
    with pytest.raises(CircuitsError, match="there is no mode 'invert'"):
        ablate_mask(model, mask, [], mode="invert")
    with pytest.raises(CircuitsError, match="reverting needs the model before fine-tuning"):
        ablate_mask(model, mask, [])
