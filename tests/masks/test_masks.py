import copy
import dataclasses
import math
from pathlib import Path

import numpy
import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.masks import (
    FRACTIONS,
    ParameterMask,
    ablate_at,
    ablate_mask,
    ablation_means,
    ablation_summary,
    gini,
    graft,
    influenced_parameters,
    mean,
    revert,
    selection,
    shared_parameters,
    shared_size,
    sharing,
    sharing_curve,
    top_share,
    unit_mask,
    units_of,
    zero,
)
from circuits.masks.packing import PackedTensor, combine, invert, pack
from circuits.masks.selection import largest
from circuits.metrics import evaluate
from circuits.models import fingerprint, identity, load_model, parameters_of, shape_of
from circuits.statistics import beyond_draws, mean_interval, paired
from circuits.storage import write_tensors
from circuits.tracing import GradientTrace, trace_gradients
from circuits.units import Head, KVGroup, Neuron, with_groups
from tests.fixtures import lively


@pytest.fixture(scope="module")
def traces(untouched, tasks):
    return [trace_gradients(untouched, tasks[split].select(range(12))) for split in ("bio", "qa_id")]


@pytest.fixture(scope="module")
def mask(traces):
    return shared_parameters(traces, 0.05)


def state(model):
    return {name: value.clone() for name, value in parameters_of(model).items()}


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


def test_the_top_of_each_tensor_and_all_above_a_threshold(traces):
    trace = traces[0]
    found = influenced_parameters(trace, 0.03, "tensor")
    for name, gradient in trace.gradients.items():
        chosen, count = found.masks[name], round(0.03 * gradient.numel())
        count = min(count, int((gradient > 0).sum()))
        assert int(chosen.sum()) == count
        if count:
            assert gradient[chosen].min() >= gradient[~chosen].max()
    values = torch.cat([gradient.flatten() for gradient in trace.gradients.values()])
    threshold = float(values.quantile(0.9))
    above = influenced_parameters(trace, threshold=threshold)
    assert above.size == int((values > threshold).sum())
    for name, gradient in trace.gradients.items():
        assert torch.equal(above.masks[name], gradient > threshold)
    assert above.provenance["threshold"] == threshold
    assert found.provenance["scope"] == "tensor"
    shared = shared_parameters(traces, threshold=threshold)
    assert torch.equal(
        shared.masks[name], (traces[0].gradients[name] > threshold) & (traces[1].gradients[name] > threshold)
    )


def test_sets_of_any_number_of_tasks_combine(traces, model, tasks):
    traces = [*traces, trace_gradients(model, tasks["qa_ood"].select(range(6)))]
    sets = [influenced_parameters(trace, 0.05) for trace in traces]
    flat = [
        set(numpy.flatnonzero(numpy.concatenate([m.numpy().ravel() for m in one.masks.values()])).tolist())
        for one in sets
    ]
    report = sharing(traces, 0.05)
    assert shared_parameters(traces, 0.05).size == report["size"] == len(flat[0] & flat[1] & flat[2])
    assert report["jaccard"] == pytest.approx(report["size"] / len(flat[0] | flat[1] | flat[2]))
    assert (sets[0] - sets[1] - sets[2]).size == len(flat[0] - flat[1] - flat[2])


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_the_largest_entries_are_those_of_a_stable_sort(few, monkeypatch):
    monkeypatch.setattr(selection, "_FEW", few)
    generator = torch.Generator().manual_seed(0)
    # few different values, so that ties are everywhere; zeros, negative values, tiny and huge ones
    pool = torch.tensor([0.0, -1e-30, 1e-39, 0.25, -0.25, 0.2500001, 3.0, -7e30])
    values = {
        name: pool[torch.randint(len(pool), shape, generator=generator)]
        for name, shape in {"a": (7, 11), "b": (300,), "c": (5, 4, 3), "d": (1,)}.items()
    }
    flat = torch.cat([value.abs().flatten() for value in values.values()])
    order = flat.argsort(descending=True, stable=True)
    for count in (0, 1, 5, 60, 61, 62, 200, 300, len(flat) - 1, len(flat)):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:count]] = True
        found = torch.cat([entries.flatten() for entries in largest(values, count).values()])
        assert torch.equal(found, expected), count


def test_influenced_sets_stand_for_their_traces(traces):
    for scope in ("global", "tensor"):
        sets = [influenced_parameters(trace, 0.1, scope) for trace in traces]
        one, other = shared_parameters(sets), shared_parameters(traces, 0.1, scope)
        assert one.size == other.size == (one & other).size
        assert one.provenance == other.provenance
        found, expected = sharing(sets, draws=2, seed=3), sharing(traces, 0.1, 2, seed=3, scope=scope)
        assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    for given, fraction in ((sets, 0.1), ([traces[0], sets[1]], None)):
        with pytest.raises(CircuitsError, match="influenced sets were chosen by a fraction already: give them alone"):
            shared_parameters(given, fraction)
    with pytest.raises(CircuitsError, match="two of the traces are of the same examples"):
        shared_parameters([sets[0], sets[0]])


def test_the_curve_holds_what_sharing_says_at_each_fraction(traces):
    curve = sharing_curve(traces, [0.001, 0.2], draws=2, seed=1)
    assert curve["fraction"].tolist() == [0.001, 0.2]
    for row in curve.to_dict("records"):
        fraction = row.pop("fraction")
        # where nothing is shared in neurons there is no Gini over them
        assert row == pytest.approx(sharing(traces, fraction, draws=2, seed=1), rel=0, abs=0, nan_ok=True)
    assert (FRACTIONS[0], FRACTIONS[-1], len(FRACTIONS)) == (1e-4, 0.2, 14)


def apart(drawn: list[float], others: int) -> float:
    """How far the means of these draws and of so many others may lie apart: four standard errors."""
    return 4 * float(numpy.std(drawn, ddof=1)) * math.sqrt(1 / len(drawn) + 1 / others)


def test_the_control_is_the_intersection_with_permuted_traces_with_an_interval(traces):
    report = sharing(traces, 0.05, draws=4)
    # by hand: permute a trace within each tensor, then intersect
    generator = torch.Generator().manual_seed(7)
    first = influenced_parameters(traces[0], 0.05)
    sizes, ginis = [], []
    for _ in range(6):
        permuted = {
            name: value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
            for name, value in traces[1].gradients.items()
        }
        trace = GradientTrace("permuted", permuted, {}, 1, traces[1].provenance)
        both = first & influenced_parameters(trace, 0.05)
        sizes.append(both.size)
        ginis.append(gini(torch.tensor(shared_size(both, Head)["size"].to_numpy(copy=True))))
    assert report["permuted"] == pytest.approx(numpy.mean(sizes), abs=apart(sizes, 4))
    assert report["permuted_gini"] == pytest.approx(numpy.mean(ginis), abs=apart(ginis, 4))
    assert report["permuted_low"] < report["permuted"] < report["permuted_high"]
    assert report["permuted_lift"] == pytest.approx(report["permuted"] / report["chance"])
    assert report["permuted_share_high"] == pytest.approx(report["permuted_high"] / report["influenced"])
    neurons = shared_size(shared_parameters(traces, 0.05), Neuron)["size"]
    assert report["neuron_gini"] == gini(torch.tensor(neurons.to_numpy(copy=True)))


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
    heads, neurons = shared_size(mask, Head), shared_size(mask, Neuron)
    has = mask.masks
    for row in heads.itertuples():
        prefix = f"blocks.{row.layer}.attn."
        own = sum(int(has[prefix + name][row.index].sum()) for name in ("W_Q", "W_O", "b_Q") if prefix + name in has)
        group = row.index // (cfg.n_heads // groups)
        names = [f"{prefix}{name}" for name in ("W_K", "W_V", "b_K", "b_V")]
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
    assert math.isnan(gini(torch.zeros(3)))
    assert math.isnan(top_share(torch.zeros(3), 0.1))
    assert top_share(torch.tensor([1.0] * 18 + [5.0, 9.0]), 0.1) == pytest.approx(14 / 32)


def test_masks_combine(mask, model):
    everything = ParameterMask({name: torch.ones_like(m) for name, m in mask.masks.items()}, mask.model)
    other = mask.permuted(3)
    assert (mask | other).size == mask.size + other.size - (mask & other).size
    assert (mask - other).size == mask.size - (mask & other).size
    assert (~mask).size == mask.total - mask.size == (everything - mask).size
    with pytest.raises(CircuitsError, match="belong to different models"):
        _ = mask & ParameterMask(mask.masks, "other")


@pytest.mark.parametrize("draw", ["permuted", "random"])
def test_random_masks_match_every_tensor(mask, draw):
    few = mask.control(0)[0] if draw == "random" else mask
    drawn = [getattr(few, draw)(seed) for seed in (0, 0, 1)]
    for name, entries in few.masks.items():
        assert int(drawn[0].masks[name].sum()) == int(entries.sum())
    assert all(torch.equal(value, drawn[1].masks[name]) for name, value in drawn[0].masks.items())
    assert any(not torch.equal(value, drawn[2].masks[name]) for name, value in drawn[0].masks.items())
    assert ((drawn[0] & few).size == 0) == (draw == "random")


@pytest.fixture(scope="module")
def crowded(mask):
    """A mask that, as in the study, fills most of a tensor."""
    masks = dict(mask.masks.items())
    values = masks["blocks.1.attn.W_O"].view(-1)
    values[: 7 * len(values) // 10] = True
    return ParameterMask(masks, mask.model)


def test_a_control_lies_outside_the_mask_which_is_thinned_to_what_fits(crowded):
    mask = crowded
    full = [name for name, packed in mask.packed.items() if 2 * packed.count > packed.total]
    assert "blocks.1.attn.W_O" in full
    thinned, control = mask.control(3)
    for name, entries in mask.masks.items():
        room = int((~entries).sum())
        kept, drawn = thinned.masks[name], control.masks[name]
        assert int(kept.sum()) == int(drawn.sum()) == min(int(entries.sum()), room)
        assert not (drawn & entries).any()
        assert not (kept & ~entries).any()
        assert name in full or torch.equal(kept, entries)
    assert thinned.provenance["parameters"] == mask.size > thinned.size
    assert all(torch.equal(value, thinned.masks[name]) for name, value in mask.control(3)[0].masks.items())
    assert any(not torch.equal(value, thinned.masks[name]) for name, value in mask.control(4)[0].masks.items())
    with pytest.raises(CircuitsError, match=r"the mask holds .* of the .* entries of .*: outside it there is no room"):
        mask.random(3)
    assert thinned.control(0)[0] is thinned


def test_every_set_of_a_size_is_as_likely():
    packed = ParameterMask({"w": torch.tensor([True, True, False, False])}, "a")
    few, most = ParameterMask({"w": torch.arange(4) < 1}, "a"), ParameterMask({"w": torch.arange(4) < 3}, "a")
    for mask, sets in ((packed, 6), (few, 4), (most, 4)):
        counts = {}
        for seed in range(300):
            drawn = tuple(mask.permuted(seed).masks["w"].tolist())
            counts[drawn] = counts.get(drawn, 0) + 1
        assert len(counts) == sets
        expected = 300 / sets
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20
    # outside: two of four, and those of the mask that stay
    two = ParameterMask({"w": torch.arange(6) < 2}, "a")
    most = ParameterMask({"w": torch.arange(6) < 4}, "a")
    for draw in (lambda seed: two.random(seed), lambda seed: most.control(seed)[0]):
        drawn = [tuple(draw(seed).masks["w"].nonzero()[:, 0].tolist()) for seed in range(300)]
        counts = [drawn.count(pair) for pair in set(drawn)]
        assert len(counts) == 6
        assert sum((count - 50) ** 2 / 50 for count in counts) < 20


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.11, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(1,), (13,), (3, 5, 7), (64, 1000)])
def test_packed_tensors_are_what_was_packed(shape, share):
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.rand(shape, generator=generator) < part for part in (share, 0.3))
    packed, other = pack(one), pack(two)
    assert torch.equal(packed.unpack(), one)
    assert packed.count == int(one.sum())
    assert len(packed.code) <= -(-one.numel() // 8)
    assert torch.equal(invert(packed).unpack(), ~one)
    assert torch.equal(combine(packed, other, numpy.bitwise_and).unpack(), one & two)
    assert torch.equal(combine(other, packed, lambda a, b: a & ~b).unpack(), two & ~one)
    again = PackedTensor.from_code(packed.code, packed.gaps, packed.shape)
    assert torch.equal(again.unpack(), one)
    assert again.count == packed.count
    # strided tensors have the same entries
    assert torch.equal(pack(one.movedim(0, -1)).unpack(), one.movedim(0, -1))


def test_sparse_masks_take_a_byte_an_entry_in_memory_and_on_disk(tmp_path):
    mask = ParameterMask({"w": torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) < 0.01}, "a")
    assert sum(len(packed.code) for packed in mask.packed.values()) < 1.15 * mask.size
    mask.save(tmp_path / "sparse.safetensors")
    assert (tmp_path / "sparse.safetensors").stat().st_size < 1.15 * mask.size + 2000
    assert torch.equal(ParameterMask.load(tmp_path / "sparse.safetensors").masks["w"], mask.masks["w"])


def test_a_damaged_mask_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    for code, gaps in ((torch.zeros(3, dtype=torch.uint8), []), (torch.full((9,), 200, dtype=torch.uint8), ["w"])):
        metadata = {"kind": "mask", "model": "a", "shapes": {"w": [10, 10]}, "gaps": gaps, "provenance": {}}
        write_tensors(path, {"w": code}, metadata)
        with pytest.raises(CircuitsError, match=r"mask.safetensors is damaged: .* bytes are no mask of shape"):
            ParameterMask.load(path)
    write_tensors(path, {}, {"kind": "mask", "model": "a", "shapes": {"w": [10]}, "gaps": [], "provenance": {}})
    with pytest.raises(CircuitsError, match="is damaged"):
        ParameterMask.load(path)


def test_a_mask_by_layer_and_in_jupyter(mask):
    table = mask.by_layer()
    assert table["size"].sum() == mask.size
    assert table["parameters"].sum() == mask.total
    for row in table.itertuples():
        part = "attn" if row.component == "attention" else "mlp"
        parts = [m for name, m in mask.masks.items() if name.startswith(f"blocks.{row.layer}.{part}.")]
        assert row.size == sum(int(entries.sum()) for entries in parts)
        assert row.fraction == row.size / sum(entries.numel() for entries in parts)
    html = mask._repr_html_()
    assert f"<b>{mask.size:,}</b> of {mask.total:,} parameters" in html
    assert html.count("<tr") == 1 + 4
    assert f"{table['size'][0]:,} ({table['fraction'][0]:.2%})" in html


def test_the_parameters_of_units(model):
    cfg = model.cfg
    groups = cfg.n_key_value_heads or cfg.n_heads
    repeats = cfg.n_heads // groups
    found = unit_mask(model, [*with_groups([Head(1, 3)], shape_of(model)), KVGroup(2, 1), Neuron(0, 17)])
    alone = unit_mask(model, [Head(1, 3), KVGroup(2, 1), Neuron(0, 17)])
    assert {name for name, packed in (found - alone).packed.items() if packed.count} == {
        f"blocks.1.attn.{name}" for name in ("W_K", "W_V") if repeats > 1
    }
    wanted = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in parameters_of(model).items()}
    for name in ("W_Q", "W_O", "b_Q"):
        if f"blocks.1.attn.{name}" in wanted:
            wanted[f"blocks.1.attn.{name}"][3] = True
    for name in ("W_K", "W_V", "b_K", "b_V"):
        if f"blocks.1.attn.{name}" in wanted:
            wanted[f"blocks.1.attn.{name}"][3 // repeats] = True
            wanted[f"blocks.2.attn.{name}"][1] = True
    wanted["blocks.0.mlp.W_in"][:, 17] = True
    wanted["blocks.0.mlp.W_out"][17] = True
    if cfg.gated_mlp:
        wanted["blocks.0.mlp.W_gate"][:, 17] = True
    else:
        wanted["blocks.0.mlp.b_in"][17] = True
    assert all(torch.equal(found.masks[name], wanted[name]) for name in found.masks)
    assert not any(entries.any() for name, entries in wanted.items() if name not in found.masks)
    found.check(model)
    everything = [Head(layer, head) for layer in range(4) for head in range(cfg.n_heads)]
    everything += [Neuron(layer, neuron) for layer in range(4) for neuron in range(cfg.d_mlp)]
    everything += with_groups(everything[: 4 * cfg.n_heads], shape_of(model))
    assert unit_mask(model, everything).size == found.total
    sizes = shared_size(found, KVGroup).set_index("unit")["fraction"]
    assert sizes["L2G1"] == 1
    assert sizes["L2G0"] == 0
    with pytest.raises(CircuitsError, match="there is no neuron L0N9999"):
        unit_mask(model, [Neuron(0, 9999)])


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
    before, other = state(model), mask.permuted(5)
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
    alone = [{name: masks[name]} for name in ("embed.W_E", "unembed.W_U")]
    for chosen in (masks, *alone):
        with zero(model, ParameterMask(chosen, fingerprint(model))):
            assert not model.embed.W_E[3].any()
            assert not model.unembed.W_U[:, 3].any()
            assert model.embed.W_E[4].any()
        assert equal(state(model), before)


def test_models_that_tie_differently_are_not_grafted(tokenizer):
    tied, untied = load_model(lively("llama")), load_model(lively("llama"))
    layout = dataclasses.replace(untied.checkpoint.layout, tied=False)
    untied.checkpoint = dataclasses.replace(untied.checkpoint, layout=layout)
    mask = unit_mask(tied, [Head(0, 0)])
    with pytest.raises(CircuitsError, match="only one ties its embeddings"):
        graft(untied, mask, tied)


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


def test_reverting_equals_changing_a_copy_by_hand(crowded, model, pre, tasks):
    mask = crowded
    task = tasks["qa_id"]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in parameters_of(by_hand).items():
            if name in mask.masks:
                value[mask.masks[name]] = parameters_of(pre)[name][mask.masks[name]]
    table = ablate_mask(model, mask, [task], pre=pre, mode="revert", draws=2)
    expected = {"none": evaluate(model, task), "shared": evaluate(by_hand, task)}
    for condition, scores in expected.items():
        row = table[table["condition"] == condition].iloc[0]
        assert row["log_prob"] == pytest.approx(scores["log_prob"].mean(), abs=1e-5)
        assert row["exact_match"] == scores["exact_match"].mean()
    assert len(table[table["condition"] == "random"]) == 2
    sizes = table.groupby("condition")[["parameters", "overlap"]].max()
    thinned = mask.control("0/0")[0].size
    assert 0 < thinned < mask.size
    assert sizes["parameters"].to_dict() == {
        "none": 0, "shared": mask.size, "shared_thinned": thinned, "random": thinned
    }  # fmt: skip
    assert sizes["overlap"].to_dict() == {"none": 0, "shared": mask.size, "shared_thinned": thinned, "random": 0}


def test_an_ablation_beside_its_random_draws(crowded, model, pre, tasks):
    mask = crowded
    table = ablate_mask(model, mask, [tasks["qa_id"], tasks["bio"]], pre=pre, mode="zero", draws=3)
    summary = ablation_summary(table).set_index("task")
    for task in ("qa_id", "bio"):
        rows = table[table["task"] == task].set_index("condition")
        before, after = rows["exact_match"]["none"], rows["exact_match"]["shared"]
        middle, low, high = mean_interval(rows["exact_match"]["random"].tolist())
        expected = [before, after, before - after, before - middle, before - min(high, 1), before - max(low, 0), 3]
        assert summary["thinned_drop"][task] == pytest.approx(before - rows["exact_match"]["shared_thinned"].mean())
        assert summary["parameters"][task] == mask.size > summary["thinned_parameters"][task]
        columns = ["before", "after", "drop", "random_drop", "random_drop_low", "random_drop_high", "draws"]
        assert summary.loc[task, columns].tolist() == pytest.approx(expected, nan_ok=True)
    both = ablation_summary(pandas.concat([table.assign(model="a"), table.assign(model="b")]))
    assert both[["model", "task"]].values.tolist() == [["a", "qa_id"], ["a", "bio"], ["b", "qa_id"], ["b", "bio"]]


def test_ablations_of_several_modes_or_masks_are_summed_up_apart():
    rows = [("none", 0, 1.0), ("shared", 0, 0.2), ("random", 0, 1.0), ("random", 1, 0.9)]
    table = pandas.DataFrame(rows, columns=["condition", "draw", "exact_match"]).assign(
        task="qa_id", parameters=9, overlap=0, log_prob=0.0
    )
    milder = table.assign(exact_match=table["exact_match"].replace(0.2, 0.7))
    for column in ("mode", "scope", "model"):
        both = pandas.concat([table.assign(**{column: "zero"}), milder.assign(**{column: "mean"})])
        summary = ablation_summary(both)
        assert summary[[column, "after", "draws"]].values.tolist() == [["zero", 0.2, 2], ["mean", 0.7, 2]]
        answers = both.assign(example=0, group="Ada", attribute="city")
        assert len(ablation_means(answers)) == len(both)
        with pytest.raises(CircuitsError, match="the table has several rows for one condition and draw"):
            ablation_summary(both.drop(columns=column))


def test_an_interval_of_random_drops_holds_nothing_that_no_accuracy_could_be():
    rows = [("none", 0, 1.0), ("shared", 0, 0.2), ("random", 0, 1.0), ("random", 1, 0.98), ("random", 2, 1.0)]
    table = pandas.DataFrame(rows, columns=["condition", "draw", "exact_match"]).assign(task="qa_id", parameters=9)
    (row,) = ablation_summary(table).itertuples()
    assert mean_interval([1.0, 0.98, 1.0])[2] > 1
    assert row.random_drop_low == 0 < row.random_drop < row.random_drop_high
    assert row.thinned_drop == row.drop


def test_what_a_mask_costs_beyond_random_ones_is_paired_by_answer(crowded, model, pre, tasks):
    answers = ablate_mask(model, crowded, [tasks["qa_id"], tasks["bio"]], pre=pre, draws=3, per_answer=True)
    # so that there is something to tell: random masks do nothing, and thinned ones break the first half
    first = answers["example"] < answers["example"].max() // 2
    right = answers["condition"].isin(["none", "random"]) | ((answers["condition"] == "shared_thinned") & ~first)
    answers["exact_match"] = right.astype(float)
    answers.loc[
        (answers["condition"] == "random") & (answers["draw"] == 1) & (answers["example"] == 1), "exact_match"
    ] = 0
    summary = ablation_summary(answers).set_index("task")
    means = ablation_summary(ablation_means(answers)).set_index("task")
    pandas.testing.assert_frame_equal(summary[means.columns], means)
    for task, rows in answers.groupby("task"):
        kept = dict(list(rows.groupby("condition")))
        names = list(zip(kept["none"]["example"], kept["none"]["attribute"], strict=True))
        mean = {}
        for condition in ("random", "shared_thinned"):
            by_answer = kept[condition].set_index(["draw", "example", "attribute"])["exact_match"]
            mean[condition] = [sum(by_answer[draw, *name] for draw in range(3)) / 3 for name in names]
        groups = kept["none"]["group"].to_numpy()
        found = paired(mean["random"], mean["shared_thinned"], groups, kind="bounded_difference")
        of_draw = rows.groupby(["condition", "draw"])["exact_match"].mean()
        apart = [of_draw["random", draw] - of_draw["shared_thinned", draw] for draw in range(3)]
        found = beyond_draws(found, apart, answers=len(names))
        row = summary.loc[task, ["excess", "excess_low", "excess_high", "excess_p"]]
        assert row.tolist() == pytest.approx([found.difference, found.low, found.high, found.p_value])
        assert row["excess"] == pytest.approx(summary["thinned_drop"][task] - summary["random_drop"][task])
        assert summary["drop"][task] == summary["drop_high"][task] == 1 > summary["drop_low"][task]
    with pytest.raises(CircuitsError, match="the table has several rows for one condition and draw"):
        ablation_summary(pandas.concat([answers, answers]))


def test_a_mask_like_any_random_one_costs_more_than_these_as_often_as_the_threshold_says():
    generator, found = numpy.random.default_rng(0), []
    for _ in range(60):
        # each mask leaves a share of the answers of its own
        conditions = [("none", 0), ("shared", 0), *(("random", draw) for draw in range(5))]
        rows = [
            pandas.DataFrame(
                {
                    "condition": condition,
                    "draw": draw,
                    "parameters": 9,
                    "task": "qa",
                    "example": range(60),
                    "group": range(60),
                    "exact_match": generator.binomial(1, 1 if condition == "none" else share, 60) / 1,
                    "log_prob": 0.0,
                }
            )
            for (condition, draw), share in zip(conditions, generator.beta(12, 6, 7), strict=True)
        ]
        found.append(ablation_summary(pandas.concat(rows))["excess_p"].item())
    assert numpy.mean(numpy.array(found) < 0.05) < 0.12


def test_every_answer_of_an_ablation_is_kept(crowded, model, pre, tasks):
    mask = crowded
    chosen = [tasks["qa_id"].select(range(5)), tasks["bio"].select(range(3))]
    answers = ablate_mask(model, mask, chosen, pre=pre, draws=2, per_answer=True)
    table = ablate_mask(model, mask, chosen, pre=pre, draws=2)
    pandas.testing.assert_frame_equal(ablation_means(answers), table)
    assert len(table) == 6 * 2
    _, control = mask.control("0/1")
    with revert(model, control, pre):
        expected = evaluate(model, chosen[1])
    rows = answers[(answers["condition"] == "random") & (answers["draw"] == 1) & (answers["task"] == "bio")]
    columns = ["example", "group", "attribute", "exact_match", "log_prob"]
    pandas.testing.assert_frame_equal(rows[columns].reset_index(drop=True), expected[columns])
    with pytest.raises(CircuitsError, match="an ablation needs a task to evaluate"):
        ablate_mask(model, mask, [], pre=pre)


def test_the_random_gini_is_that_of_sets_drawn_from_all_that_units_own(traces, model):
    shared = shared_parameters(traces, 0.05)
    report = sharing(traces, 0.05, draws=8)
    generator = numpy.random.default_rng(1)
    for kind, prefix in ((Head, ""), (Neuron, "neuron_")):
        names = [name for name in shared.masks if ("attn" in name) == (kind is Head) and "b_O" not in name]
        names = [name for name in names if not name.endswith("b_out")]
        sizes = [shared.masks[name].numel() for name in names]
        count = int(shared_size(shared, kind)["size"].sum())
        by_hand = []
        for _ in range(8):
            flat = numpy.zeros(sum(sizes), dtype=bool)
            flat[generator.choice(len(flat), count, replace=False)] = True
            parts = numpy.split(flat, numpy.cumsum(sizes)[:-1])
            masks = {name: torch.zeros_like(entries) for name, entries in shared.masks.items()}
            masks |= {
                name: torch.from_numpy(part).view(masks[name].shape) for name, part in zip(names, parts, strict=True)
            }
            drawn = shared_size(ParameterMask(masks, shared.model), kind)["size"]
            by_hand.append(gini(torch.tensor(drawn.to_numpy(copy=True))))
        assert report[f"random_{prefix}gini"] == pytest.approx(numpy.mean(by_hand), abs=apart(by_hand, 8))
        assert report[f"random_{prefix}gini_low"] < report[f"random_{prefix}gini"] < report[f"random_{prefix}gini_high"]
        assert report[f"{prefix}gini"] > report[f"random_{prefix}gini"]


def test_nothing_shared_has_no_gini():
    rows = torch.zeros(2, 10, 50)
    one, two = rows.clone(), rows.clone()
    one[0, 0, :10] = two[1, 0, :10] = 1.0
    report = sharing(
        [GradientTrace(task, {"blocks.0.attn.W_Q": values}, {}, 1, {"model": "a"}) for task, values in
         (("one", one), ("two", two))], 0.01, draws=2
    )  # fmt: skip
    assert report["size"] == 0
    assert math.isnan(report["gini"])
    assert math.isnan(report["random_gini"])


def test_traces_that_cannot_be_compared_are_refused(traces, model, tasks):
    one, two = traces
    bio, qa = (tasks[split].select(range(12)) for split in ("bio", "qa_id"))
    with pytest.raises(CircuitsError, match="two of the traces are of the same examples, of bio: sharing takes"):
        shared_parameters([one, one])
    with pytest.raises(CircuitsError, match="two of the traces are of the same examples, of bio: sharing takes"):
        sharing([one, two, trace_gradients(model, bio)])
    for name, options in {
        "statistic": {"statistic": "square"},
        "loss": {"loss": "all"},
        "per": {"per": "batch"},
        "components": {"components": ["attention"]},
    }.items():
        with pytest.raises(CircuitsError, match=f"the traces of bio and qa_id were made with different {name}, "):
            shared_parameters([one, trace_gradients(model, qa, **options)])
    by_hand = dataclasses.replace(two, gradients=dict(list(two.gradients.items())[1:]))
    with pytest.raises(CircuitsError, match="of the traces of bio and qa_id only one covers"):
        shared_parameters([one, by_hand])


@pytest.mark.parametrize("act", ["revert", "graft"])
def test_a_copy_made_inside_a_block_has_a_name_of_its_own(mask, model, pre, act):
    block = revert(model, mask, pre) if act == "revert" else graft(pre, mask, model)
    changed, name = (model, fingerprint(model)) if act == "revert" else (pre, fingerprint(pre))
    with block:
        copied = copy.deepcopy(changed)
        assert identity(changed) == name
    assert identity(changed) == name
    assert identity(copied) == fingerprint(copied) != name
    own = ParameterMask(mask.masks, name)
    with pytest.raises(CircuitsError, match=f"the mask was made for model {name}, not for {fingerprint(copied)}"):
        own.check(copied)


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
    with pytest.raises(CircuitsError, match="the fraction is 1.5: it must .* and 1, and 0.01 is one percent"):
        shared_parameters(traces, 1.5)
    with pytest.raises(CircuitsError, match="sharing takes two tasks"):
        shared_parameters(traces[:1])
    with pytest.raises(CircuitsError, match="the number of permutations is 0"):
        sharing(traces, draws=0)
    with pytest.raises(CircuitsError, match="the trace of bio does not say of which model it is"):
        influenced_parameters(dataclasses.replace(traces[0], provenance={}))
    foreign = dataclasses.replace(traces[1], provenance={"model": "other"})
    with pytest.raises(CircuitsError, match="the traces are of different models, .*, other: trace one model"):
        shared_parameters([traces[0], foreign])
    with pytest.raises(CircuitsError, match="a threshold takes the place of fraction and scope"):
        influenced_parameters(traces[0], 0.1, threshold=0.5)
    with pytest.raises(CircuitsError, match="a threshold takes the place of fraction and scope"):
        shared_parameters(traces, scope="tensor", threshold=0.5)
    with pytest.raises(CircuitsError, match=r"the threshold is -1\.0: it must be zero or more"):
        influenced_parameters(traces[0], threshold=-1.0)
    with pytest.raises(CircuitsError, match=r"no parameter's trace of the task bio exceeds 1e\+09: the largest is"):
        influenced_parameters(traces[0], threshold=1e9)
    with pytest.raises(CircuitsError, match="there is no scope 'layer'"):
        influenced_parameters(traces[0], 0.1, "layer")
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mask.safetensors", r"'mask.safetensors' is no mask: load it with ParameterMask.load\('mask.safetensors'\)"),
        (Path("mask.safetensors"), r"load it with ParameterMask.load\('mask.safetensors'\)"),
        ({}, "a mask is needed, and this is a dict: load one with ParameterMask.load, or make one"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_mask_is_refused(model, pre, tasks, given, message):
    positions = tasks["bio"].span("subject")
    for act in (
        lambda: ablate_mask(model, given, tasks["bio"]),
        lambda: zero(model, given),
        lambda: graft(pre, given, model),
        lambda: ablate_at(model, given, tasks["bio"], positions=positions),
        lambda: units_of(given),
        lambda: shared_size(given, Neuron),
    ):
        with pytest.raises(CircuitsError, match=message):
            act()


def test_a_mask_is_ablated_on_one_task_as_on_a_list_of_it(model, mask, tasks):
    task = tasks["bio"].select(range(4))
    one, several = (ablate_mask(model, mask, given, mode="zero", draws=1) for given in (task, [task]))
    pandas.testing.assert_frame_equal(one, several)
