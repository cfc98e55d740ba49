import copy

import pandas
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.masks import ParameterMask, shared_parameters, shared_size
from circuits.metrics import evaluate
from circuits.models import fingerprint, load_model, parameters_of, shape_of
from circuits.rankings import RANKINGS, Evidence, agreement, rank_units, rankings_of
from circuits.tracing import example_losses, trace_gradients
from circuits.units import Head, Neuron


@pytest.fixture
def evidence(model, pre, tasks) -> Evidence:
    bio, qa = tasks["bio"].select(range(8)), tasks["qa_id"].select(range(6))
    traces = {"bio": trace_gradients(model, bio), "qa": trace_gradients(model, qa)}
    shared = shared_parameters(list(traces.values()), 0.05)
    return Evidence(model, pre, traces, shared, shared.permuted(1), qa)


def by_unit(table: pandas.DataFrame) -> dict[str, float]:
    return dict(zip(table["unit"], table["score"], strict=True))


def head_sum(values: dict[str, torch.Tensor], model, layer: int, head: int) -> float:
    """The sum over a head's slices, and over its share of its group's."""
    attention, grouped = f"blocks.{layer}.attn.", model.cfg.n_key_value_heads
    own = sum(
        float(values[attention + name][head].sum()) for name in ("W_Q", "b_Q", "W_O") if attention + name in values
    )
    if grouped:
        each = model.cfg.n_heads // grouped
        return own + sum(float(values[f"{attention}{name}"][head // each].sum()) / each for name in ("W_K", "W_V"))
    return own + sum(float(values[attention + name][head].sum()) for name in ("W_K", "b_K", "W_V", "b_V"))


def neuron_sum(values: dict[str, torch.Tensor], layer: int, neuron: int) -> float:
    mlp = f"blocks.{layer}.mlp."
    columns = sum(float(values[mlp + name][:, neuron].sum()) for name in ("W_in", "W_gate") if mlp + name in values)
    return columns + sum(float(values[mlp + name][neuron].sum()) for name in ("b_in", "W_out") if mlp + name in values)


@pytest.mark.parametrize("metric", ["change", "bio_trace", "qa_trace", "shared_size", "graft_size"])
def test_sums_over_parameters_equal_explicit_slices(evidence, model, pre, metric):
    before = parameters_of(pre)
    values = {
        "change": {name: (value - before[name]).abs().detach() for name, value in parameters_of(model).items()},
        "bio_trace": evidence.traces["bio"].gradients,
        "qa_trace": evidence.traces["qa"].gradients,
        "shared_size": evidence.shared.masks,
        "graft_size": evidence.grafted.masks,
    }[metric]
    heads, neurons = (
        by_unit(rankings_of(evidence)[metric](evidence, Head)),
        by_unit(rankings_of(evidence)[metric](evidence, Neuron)),
    )
    assert (len(heads), len(neurons)) == (16, 4 * model.cfg.d_mlp)
    for layer in range(4):
        for head in range(4):
            assert heads[f"L{layer}H{head}"] == pytest.approx(head_sum(values, model, layer, head), rel=1e-4)
        for neuron in (0, 77, model.cfg.d_mlp - 1):
            assert neurons[f"L{layer}N{neuron}"] == pytest.approx(neuron_sum(values, layer, neuron), rel=1e-4)


def test_shared_size_is_that_of_the_masks(evidence):
    for kind in (Head, Neuron):
        sizes = shared_size(evidence.shared, kind)
        assert by_unit(RANKINGS["shared_size"](evidence, kind)) == dict(zip(sizes["unit"], sizes["size"], strict=True))


@pytest.mark.parametrize("kind", [Head, Neuron])
def test_gradient_x_activation_is_the_slope_of_the_loss_when_the_output_fades(evidence, model, kind):
    count = kind.count(shape_of(model))
    shares = torch.ones(4, count, requires_grad=True)

    def fade(activation, hook):
        share = shares[hook.layer()]
        return activation * (share[:, None] if kind is Head else share)

    name = "attn.hook_z" if kind is Head else "mlp.hook_post"
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.{name}", fade) for layer in range(4)]):
        example_losses(model, evidence.task).mean().backward()
    found = RANKINGS["gradient_x_activation"](evidence, kind)
    for row in found.itertuples():
        assert row.score == pytest.approx(abs(float(shares.grad[row.layer, row.index])), rel=1e-3, abs=1e-6)
    assert found["score"].min() >= 0
    assert shares.grad.min() < 0 < shares.grad.max()


def test_ablation_equals_zeroing_the_output_weights(evidence, model):
    whole = evaluate(model, evidence.task)["log_prob"].mean()
    heads = RANKINGS["ablation"](evidence, Head)
    assert len(heads) == 16
    for row in heads.itertuples():
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            by_hand.blocks[row.layer].attn.W_O[row.index] = 0
        assert row.score == pytest.approx(whole - evaluate(by_hand, evidence.task)["log_prob"].mean(), abs=1e-4)


def test_ablation_of_neurons_is_made_only_when_asked_for(evidence, huggingface, tokenizer):
    config = copy.deepcopy(huggingface.config)
    config.intermediate_size, config.num_hidden_layers = 24, 2
    small = load_model(AutoModelForCausalLM.from_config(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in parameters_of(small).values():
            value += 0.12 * torch.randn(value.shape, generator=generator)
    task = evidence.task.select([0, 1])
    neurons = rank_units(Evidence(small, task=task), Neuron, ["ablation"])
    whole = evaluate(small, task)["log_prob"].mean()
    for row in neurons.iloc[::7].itertuples():
        by_hand = copy.deepcopy(small)
        with torch.no_grad():
            by_hand.blocks[row.layer].mlp.W_out[row.index] = 0
        assert row.score == pytest.approx(whole - evaluate(by_hand, task)["log_prob"].mean(), abs=1e-4)
    assert neurons["score"].nunique() == len(neurons) == 48
    assert set(rank_units(evidence, Neuron)["metric"]) == set(rankings_of(evidence)) - {"ablation"}


def test_all_rankings_have_one_form(evidence):
    table = rank_units(evidence, Head)
    assert list(table["metric"].unique()) == list(rankings_of(evidence))
    names = {f"L{layer}H{head}" for layer in range(4) for head in range(4)}
    for (metric, _), ranking in table.groupby(["metric", "draw"]):
        assert set(ranking["unit"]) == names
        assert ranking["score"].is_monotonic_decreasing
        assert list(ranking["unit"]) == [f"L{row.layer}H{row.index}" for row in ranking.itertuples()]
        alone = rankings_of(evidence)[metric](evidence, Head)
        assert metric == "random" or by_unit(alone) == by_unit(ranking)
        assert metric == "random" or ranking["score"].tolist() == alone["score"].tolist()


def test_ties_are_broken_at_random_several_times(evidence, model):
    empty = ParameterMask(
        {name: torch.zeros_like(mask) for name, mask in evidence.shared.masks.items()}, fingerprint(model)
    )
    table = rank_units(Evidence(model, shared=empty), Head, ["shared_size"], draws=6)
    orders = {tuple(ranking["unit"]) for _, ranking in table.groupby("draw")}
    assert len(orders) == 6
    assert all(set(order) == {f"L{layer}H{head}" for layer in range(4) for head in range(4)} for order in orders)
    assert table.equals(rank_units(Evidence(model, shared=empty), Head, ["shared_size"], draws=6))
    one = {name: mask.clone() for name, mask in empty.masks.items()}
    one["blocks.2.attn.W_O"][1, 0, 0] = True
    some = ParameterMask(one, fingerprint(model))
    table = rank_units(Evidence(model, shared=some), Head, ["shared_size"], draws=6)
    assert {ranking["unit"].iloc[0] for _, ranking in table.groupby("draw")} == {"L2H1"}
    assert len(rank_units(evidence, Head, ["change"], draws=6)) == 16


def test_random_rankings_follow_from_the_seed(model):
    drawn = rank_units(Evidence(model), Head, ["random"], draws=6)
    orders = [tuple(ranking["unit"]) for _, ranking in drawn.groupby("draw")]
    assert len(set(orders)) == 6
    assert drawn.equals(rank_units(Evidence(model), Head, ["random"], draws=6))
    assert not drawn.equals(rank_units(Evidence(model, seed=1), Head, ["random"], draws=6))


def test_agreement_is_spearmans_correlation(evidence):
    table = rank_units(evidence, Head, ["change", "shared_size", "random"], draws=5)
    found = agreement(table)
    scores = {key: by_unit(ranking) for key, ranking in table.groupby(["metric", "draw"])}
    units = list(scores["change", 0])

    def correlation(one, other):
        return spearmanr([scores[one][unit] for unit in units], [scores[other][unit] for unit in units]).statistic

    assert list(found.index) == list(found.columns) == ["change", "shared_size", "random"]
    assert found.loc["change", "shared_size"] == pytest.approx(correlation(("change", 0), ("shared_size", 0)))
    draws = [correlation(("change", 0), ("random", draw)) for draw in range(5)]
    assert found.loc["change", "random"] == found.loc["random", "change"] == pytest.approx(sum(draws) / 5)
    assert [found.loc[name, name] for name in found] == pytest.approx([1, 1, 1])


def test_missing_or_foreign_evidence_is_refused(evidence, model, pre):
    for metric, message in {
        "shared_size": "the ranking by shared_size needs a mask of parameters as shared",
        "graft_size": "needs a mask of parameters as grafted",
        "bio_trace": r"the ranking by bio_trace needs a gradient trace as traces\['bio'\]",
        "gradient_x_activation": r"needs a gradient trace as traces",
        "change": "needs the model before fine-tuning as pre",
        "ablation": "needs a task to score as task",
    }.items():
        with pytest.raises(CircuitsError, match=message):
            rank_units(Evidence(model), Head, [metric])
    name = fingerprint(model)
    with pytest.raises(CircuitsError, match=f"the trace of bio was made for model {name}, not for {fingerprint(pre)}"):
        rank_units(Evidence(pre, traces=evidence.traces), Head, ["bio_trace"])
    with pytest.raises(CircuitsError, match=f"made for model {name}, not for"):
        rank_units(Evidence(pre, shared=evidence.shared), Head, ["shared_size"])
    with pytest.raises(CircuitsError, match="there is no ranking 'best': choose from shared_size, bio_trace"):
        rank_units(evidence, Head, ["best"])
    with pytest.raises(CircuitsError, match="at least one metric and one draw"):
        rank_units(evidence, Head, ["random"], draws=0)
    attention_only = ParameterMask({"blocks.0.attn.W_O": evidence.shared.masks["blocks.0.attn.W_O"]}, name)
    with pytest.raises(CircuitsError, match="nothing to rank neurons by: it covers none of their parameters"):
        rank_units(Evidence(model, shared=attention_only), Neuron, ["shared_size"])
    with pytest.raises(CircuitsError, match="lacks some units"):
        agreement(rank_units(Evidence(model), Head, ["random"]).iloc[:-1])
