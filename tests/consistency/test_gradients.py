from dataclasses import replace

import numpy
import pytest
import torch

from circuits.consistency import (
    KINDS,
    gradient_consistency,
    gradient_consistency_along,
    products,
)
from circuits.errors import CircuitsError
from circuits.interventions import pair_formats
from circuits.masks import ParameterMask, unit_mask
from circuits.models import load_model, parameters_of, rows_of
from circuits.tasks import Task
from circuits.tracing import loss_gradients
from circuits.units import Head, KVGroup, Neuron
from tests.models.test_hookable import CONFIGS
from tests.models.test_hookable import lively as lively_of

PARTS = ("all", "layer", "component", "head", "group", "neuron")
NAMES = ("gemma2", "gpt2", "llama", "llama-biases", "neox", "phi3", "qwen3", "olmo2")
assert set(NAMES) <= set(CONFIGS)


@pytest.fixture
def pair(tasks):
    qa = tasks["qa_id"].select(range(5))
    return qa, pair_formats(qa, tasks["bio"])


def small(pair):
    """In the vocabulary of the small models."""
    return [replace(task, tokens=task.tokens % 61) for task in pair]


def each_alone(model, tasks):
    """Explicit backward passes: the gradients of each example of both tasks."""
    return [[loss_gradients(model, task.select([example])) for example in range(len(task))] for task in tasks]


def expected(gradients, chosen):
    """The slow obvious way: the entries that are chosen of each parameter, side by side."""
    one, two = (
        torch.stack([torch.cat([v.double() for n, g in each.items() for v in chosen(n, g)]) for each in side])
        for side in gradients
    )
    return one / one.norm(dim=1, keepdim=True) @ (two / two.norm(dim=1, keepdim=True)).T


def of_unit(model, unit):
    masks = unit_mask(model, [unit]).masks
    return lambda name, value: [value[masks[name]]] if name in masks else []


def of(model, component=("attention", "mlp"), layer=None):
    rows = rows_of(model)
    return lambda name, value: (
        [value.flatten()] if rows[name].component in component and layer in (None, rows[name].layer) else []
    )


def check(found, by, unit, cosines):
    number = found.parts[by]["unit"].tolist().index(str(unit))
    assert torch.allclose(found.cosines[by][number].double(), cosines, atol=1e-5), (by, unit)


@pytest.mark.parametrize("name", NAMES)
def test_cosines_of_every_part_are_those_of_explicit_backward_passes(name, pair):
    model, (task, other) = load_model(lively_of(name)), small(pair)
    mask = ParameterMask(
        {
            each: torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) < 0.03
            for each, value in parameters_of(model).items()
            if rows_of(model)[each].component in ("attention", "mlp")
        },
        unit_mask(model, [Head(0, 0)]).model,
    )
    found = gradient_consistency(model, task, other, by=PARTS, mask=mask, batch_size=2)
    gradients = each_alone(model, (task, other))
    check(found, "all", "all", expected(gradients, of(model)))
    check(found, "layer", "L1", expected(gradients, of(model, layer=1)))
    check(found, "component", "L2.mlp", expected(gradients, of(model, ("mlp",), 2)))
    check(found, "head", "L1H2", expected(gradients, of_unit(model, Head(1, 2))))
    check(found, "neuron", "L0N7", expected(gradients, of_unit(model, Neuron(0, 7))))
    if "group" in found.cosines:
        check(found, "group", "L1G1", expected(gradients, of_unit(model, KVGroup(1, 1))))
    inside, whole = mask.masks, of(model)
    check(found, "mask", "inside", expected(gradients, lambda n, v: [v[inside[n]]] if n in inside else []))
    check(found, "mask", "outside", expected(gradients, lambda n, v: [v[~inside[n]]] if whole(n, v) else []))


@pytest.mark.parametrize(("cost", "at_a_time"), [(-(10**9), 1 << 24), (10**9, 2000), (-(10**9), 500)])
def test_summing_over_positions_and_forming_entries_agree(cost, at_a_time, pair, monkeypatch):
    model, (task, other) = load_model(lively_of("llama")), small(pair)
    usual = gradient_consistency(model, task, other, by=PARTS)
    monkeypatch.setattr(products, "_ADDING", cost)
    monkeypatch.setattr(products, "_AT_A_TIME", at_a_time)
    for name, cosines in gradient_consistency(model, task, other, by=PARTS, loss="answer").cosines.items():
        assert torch.allclose(cosines, usual.cosines[name], atol=1e-5, equal_nan=True), name


def test_a_format_and_itself_have_cosine_1_and_pairs_are_symmetric(untouched, pair):
    found = gradient_consistency(untouched, pair[0], pair[0])
    for cosines in found.cosines.values():
        assert torch.allclose(cosines.diagonal(dim1=1, dim2=2), torch.ones(()), atol=1e-5)
        assert torch.allclose(cosines, cosines.transpose(1, 2), atol=1e-5)
    assert float(found.cosines["all"].min()) < 0.95


def test_a_projection_is_near_seeded_and_unbiased(untouched, pair):
    task, other = pair
    exact = gradient_consistency(untouched, task, other, by=["all"]).cosines["all"]
    draws = [
        gradient_consistency(untouched, task, other, by=["all"], projection=256, seed=seed).cosines["all"]
        for seed in (0, 0, *range(1, 12))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    errors = torch.stack(draws[1:]) - exact
    assert float(errors.abs().mean()) < 0.1
    assert float(errors.mean(0).abs().mean()) < float(errors.abs().mean()) / 2


def by_hand(values, groups, name):
    """The delete-one jackknife, straight from its definition."""
    kept = [
        numpy.mean([value for value, pair in zip(values, groups, strict=True) if left not in pair]) for left in name
    ]
    return numpy.std(kept) * (len(name) - 1) ** 0.5


def test_pairs_and_means_say_what_is_matched(untouched, tasks):
    qa = tasks["qa_id"].select(range(0, 36, 3))
    found = gradient_consistency(untouched, qa, pair_formats(qa, tasks["bio"]), by=["all", "head"])
    pairs, means = found.pairs(), found.means().set_index("kind")
    assert len(pairs) == 144
    for row in pairs.itertuples():
        one, two = qa.answers.loc[row.example], qa.answers.loc[row.other]
        same = one["group"] == two["group"], one["attribute"] == two["attribute"]
        expected = {(True, True): 0, (False, True): 1, (True, False): 2, (False, False): 3}[same]
        assert row.kind == KINDS[expected]
    for kind, some in pairs.groupby("kind"):
        assert means.loc[kind, "mean"] == pytest.approx(some["cosine"].mean(), abs=1e-6)
        assert means.loc[kind, "median"] == pytest.approx(some["cosine"].median(), abs=1e-6)
    assert means.loc["matched", "low"] < means.loc["matched", "mean"] < means.loc["matched", "high"]
    above = means.loc["matched", "mean"] - means.loc["unrelated", "mean"]
    assert means.loc["unrelated", "matched_above"] == pytest.approx(above)
    some, groups = pairs[pairs["kind"] == "unrelated"], qa.answers["group"].tolist()
    touched = [(groups[row.example], groups[row.other]) for row in some.itertuples()]
    names = list(dict.fromkeys(groups))
    pseudo = found._jackknifed(found.cosines["all"][0].double(), found.kinds == 3)
    error = numpy.std(pseudo) / (len(names) - 1) ** 0.5
    assert error == pytest.approx(by_hand(some["cosine"], touched, names), rel=1e-5)
    assert len(found.pairs("head", ["matched"])) == 12 * len(found.parts["head"])


def test_gradients_that_have_nothing_in_common_have_0_within_the_interval():
    generator = torch.Generator().manual_seed(3)
    found = gradient_consistency_of_noise(torch.randn(2, 40, 500, generator=generator))
    means = found.means().set_index("kind")
    assert means.loc["matched", "low"] < 0 < means.loc["matched", "high"]
    assert means.loc["unrelated", "matched_above"] < 0.05
    alike = torch.randn(1, 40, 500, generator=generator) + 0.5 * torch.randn(2, 40, 500, generator=generator)
    assert gradient_consistency_of_noise(alike).means()["low"][0] > 0.5


def gradient_consistency_of_noise(sides):
    import pandas

    from circuits.consistency import GradientConsistency

    one, two = sides / sides.norm(dim=2, keepdim=True)
    kinds = torch.where(torch.eye(len(one)) > 0, 0, 3)
    parts = {"all": pandas.DataFrame({"unit": ["all"], "layer": -1, "index": -1})}
    names = list(range(len(one)))
    return GradientConsistency({"all": (one @ two.T)[None]}, parts, kinds, (names, names))


def test_checkpoints_become_steps_of_one_table(model, pre, pair):
    table = gradient_consistency_along(
        {0: pre, 50: model}, *pair, by=["all", "layer"], mask=unit_mask(model, [Head(1, 1)])
    )
    assert table["step"].unique().tolist() == [0, 50]
    single = gradient_consistency(model, *pair, by=["all"]).means()
    found = table[(table["step"] == 50) & (table["by"] == "all")]
    assert found["mean"].tolist() == pytest.approx(single["mean"].tolist())
    assert set(table["by"]) == {"all", "layer", "mask"}


def test_what_cannot_be_compared_is_refused(model, pre, pair, tokenizer, tasks):
    task, other = pair
    alone = Task.from_prompts(["Priscilla Oakley was born in"], [" Paris"], tokenizer, name="alone")
    with pytest.raises(CircuitsError, match=r"the examples of alone have no groups: say which belong"):
        gradient_consistency(model, task, alone)
    strangers = tasks["qa_ood"].select([len(tasks["qa_ood"]) - 1])
    with pytest.raises(CircuitsError, match="have no group in common that tells the same"):
        gradient_consistency(model, task, strangers)
    with pytest.raises(CircuitsError, match="the mask was made for model"):
        gradient_consistency(model, task, other, mask=unit_mask(pre, [Head(0, 0)]))
    embedded = ParameterMask({"embed.W_E": model.W_E.detach() > 0}, unit_mask(model, [Head(0, 0)]).model)
    with pytest.raises(CircuitsError, match=r"holds entries of embed\.W_E, but gradients are compared in"):
        gradient_consistency(model, task, other, mask=embedded)
    with pytest.raises(CircuitsError, match="gradients are not compared by 'tensor': choose from all, layer"):
        gradient_consistency(model, task, other, by=["tensor"])
    with pytest.raises(CircuitsError, match="cannot tell inside from outside a mask"):
        gradient_consistency(model, task, other, projection=8, mask=unit_mask(model, [Head(0, 0)]))
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)]),  # noqa: ARG005
        pytest.raises(CircuitsError, match=r"hooked into the model at blocks\.1\.attn\.hook_z"),
    ):
        gradient_consistency(model, task, other)
