import copy
import gc
import weakref
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.facts import word_tokenizer
from circuits.models import arithmetic, lean_model, load_model, parameters_of
from circuits.models import layer as layer_module
from circuits.models.hookable import backends
from circuits.tasks import Task
from circuits.tracing import (
    LOSSES,
    STATISTICS,
    GradientTrace,
    accumulation,
    example_losses,
    loss_gradients,
    running_trace,
    trace_gradients,
)
from circuits.tracing.running_trace import RunningTrace
from circuits.tracing.settings import TraceSettings
from circuits.training import new_model
from circuits.units import COMPONENTS, Head, Neuron, component_of
from tests.fixtures import gradients_of
from tests.models.test_hookable import CONFIGS
from tests.models.test_hookable import lively as lively_of


@lru_cache
def variant(family: str, tied: bool):
    """A model of two layers with weights large enough to make every part matter; untied Llama has attention biases."""
    config = copy.deepcopy(new_model(f"tiny-{family}", word_tokenizer()).config)
    config.update({"tie_word_embeddings": tied, "num_hidden_layers": 2})
    if family == "llama":
        config.update({"attention_bias": not tied})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.02 if "norm" in name else 0.5 if "embed" in name else 0.12) * torch.randn_like(parameter)
    return load_model(model)


def single_gradients(model, task: Task, loss: str) -> list[dict[str, torch.Tensor]]:
    """The slow obvious way: a backward pass for each example, without padding, on the hooked model's own loss.

    Every parameter of the checkpoint has a gradient here; tied embeddings are one, W_E, with the sum of both uses.
    """
    gradients, found = gradients_of(model), []
    for example in range(len(task)):
        tokens = task.tokens[example, task.attention_mask[example]][None]
        log_probs = model(tokens)[0].log_softmax(-1)
        positions = range(1, tokens.shape[1])
        if loss == "answer":
            answers = task.answers[task.answers["example"] == example]
            positions = [i for a in answers.itertuples() for i in range(a.start, a.end)]
        found.append(gradients(-sum(log_probs[i - 1, tokens[0, i]] for i in positions) / len(positions)))
    return found


def mean_statistic(gradients: list[dict[str, torch.Tensor]], statistic: str) -> dict[str, torch.Tensor]:
    change = {"abs": torch.abs, "square": torch.square, "signed": lambda value: value}[statistic]
    return {name: sum(change(one[name]) for one in gradients) / len(gradients) for name in gradients[0]}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.abs().max())
        assert largest > 0, name
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-5 * largest), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant_of", ["llama", "pythia"])
def test_every_parameter_equals_a_loop_of_single_example_backward_passes(variant_of, tied, loss, tasks):
    model, task = variant(variant_of, tied), tasks["bio"].select(range(7))
    gradients = single_gradients(model, task, loss)
    batches = [mean_statistic(gradients[first : first + 3], "signed") for first in (0, 3, 6)]
    expected_names = parameters_of(model).keys() - ({"unembed.W_U"} if tied else set())
    for statistic in STATISTICS:
        for per, singles in (("example", gradients), ("batch", batches)):
            traced = trace_gradients(model, task, statistic, loss=loss, batch_size=3, per=per, components=COMPONENTS)
            assert traced.gradients.keys() == expected_names
            assert_same(traced.gradients, mean_statistic(singles, statistic))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.slow] if "-" in name and backend != backends()[0] else [])
        for name in CONFIGS
        for backend in backends()
    ],
)
def test_of_any_family_a_trace_equals_a_loop_of_backward_passes_through_the_hookable_model(name, backend, bio):
    task = replace(bio.select(range(5)), tokens=bio.tokens[:5] % 61)
    model = load_model(lively_of(name), backend=backend)
    ways = (("abs", "example"), ("square", "batch"), ("signed", "example"))
    for statistic, per in ways if "-" not in name and backend == backends()[0] else ways[:1]:
        fast, slow = (RunningTrace(TraceSettings(statistic, "answer", 3, per, COMPONENTS)) for _ in range(2))
        for batch in task.batches(3):
            fast.add(lean_model(model), batch)
            slow.add_hooked(model, batch)
        assert_same(fast.sums, slow.sums)
        assert_same(fast.hook_points, slow.hook_points)


def test_what_a_batch_was_computed_with_is_freed(model, bio, monkeypatch):
    written, tell = [], layer_module.tell

    def told(rows, taps, read, output):
        written.append(weakref.ref(output))
        tell(rows, taps, read, output)

    for module in (arithmetic, layer_module):
        monkeypatch.setattr(module, "tell", told)
    gc.collect()
    gc.disable()
    try:
        running = RunningTrace(TraceSettings("abs", "answer", 10, "example", COMPONENTS))
        running.add(lean_model(model), bio)
        assert len(written) > 4 * 6
        assert [one for one in written if one() is not None] == []
    finally:
        gc.enable()


def test_a_trace_of_a_hooked_model_is_another_trace(model, bio, tmp_path):
    out = tmp_path / "trace.safetensors"
    trace_gradients(model, bio, out=out)
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: 0 * z)]):  # noqa: ARG005
        found = trace_gradients(model, bio)
        with pytest.raises(CircuitsError, match="was made with hooks None, not"):
            trace_gradients(model, bio, out=out)
    assert not found.gradients["blocks.2.attn.W_Q"].any()
    assert found.gradients["blocks.1.attn.W_Q"].any()
    assert found.provenance["hooks"] == ["blocks.2.attn.hook_z"]


def test_gradients_of_the_loss_are_the_sum_of_those_of_single_examples(bio):
    model = variant("llama", True)
    assert_same(loss_gradients(model, bio), summed(single_gradients(model, bio, "answer")))


def summed(gradients):
    return {name: sum(one[name] for one in gradients) for name in gradients[0]}


def test_a_mask_made_from_tied_embeddings_acts_on_both_uses(bio):
    from circuits.masks import influenced_parameters, zero

    model = variant("llama", True)
    mask = influenced_parameters(trace_gradients(model, bio, components=["embeddings"]), 0.01)
    entries = mask.masks["embed.W_E"]
    before = model.W_E.detach().clone()
    assert mask.masks.keys() == {"embed.W_E"}
    with zero(model, mask):
        assert not model.W_E[entries].any()
        assert not model.W_U.T[entries].any()
        assert torch.equal(model.W_U.T[~entries], before[~entries])
    assert torch.equal(model.W_E, before)
    assert torch.equal(model.W_U.T, before)


def test_only_the_components_asked_for_are_traced(model, bio):
    everything = trace_gradients(model, bio, components=COMPONENTS).gradients
    found = {component: trace_gradients(model, bio, components=[component]).gradients for component in COMPONENTS}
    assert sorted(name for part in found.values() for name in part) == sorted(everything)
    for component, part in found.items():
        assert part.keys() == {name for name in everything if component_of(name) == component}
        assert all(torch.equal(value, everything[name]) for name, value in part.items())
    default = trace_gradients(model, bio).gradients.keys()
    assert default == found["attention"].keys() | found["mlp"].keys()
    assert everything.keys() <= parameters_of(model).keys()


def test_a_weight_larger_than_the_cache_is_traced_in_parts(model, bio, monkeypatch):
    whole = trace_gradients(model, bio, components=COMPONENTS).gradients
    monkeypatch.setattr(accumulation, "_AT_A_TIME", 1000)
    monkeypatch.setattr(accumulation, "_BLOCK", 5000)
    monkeypatch.setattr(running_trace, "_LOGITS_AT_A_TIME", 1000)
    assert_same(trace_gradients(model, bio, components=COMPONENTS).gradients, whole)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_products_of_uneven_parts_equal_single_products_to_the_bit_on_any_number_of_threads(statistic, monkeypatch):
    monkeypatch.setattr(accumulation, "_AT_A_TIME", 300)
    monkeypatch.setattr(accumulation, "_BLOCK", 500)
    generator = torch.Generator().manual_seed(0)
    given = [
        (torch.randn(11, 5, out, generator=generator), torch.randn(11, 5, into, generator=generator))
        for out, into in ((37, 23), (8, 6), (1, 400), (97, 3))
    ]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            totals = [torch.ones(g.shape[2], x.shape[2]) for g, x in given]
            products = [accumulation.Products(total, *pair) for total, pair in zip(totals, given, strict=True)]
            accumulation.add_products(products, statistic)
            assert torch.get_num_threads() == count
            found.append(totals)
    finally:
        torch.set_num_threads(threads)
    for one, two, three, (g, x) in zip(*found, given, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        expected = 1 + sum(mean_statistic([{"w": a.T @ b}], statistic)["w"] for a, b in zip(g, x, strict=True))
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_biographies_with_several_answers_are_traced_too(model, tmp_path, tokenizer):
    from circuits.facts import DatasetSettings, make_dataset

    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=2, biographies=1, row="biography"))
    task = dataset.task("bio", tokenizer)
    traced = trace_gradients(model, task, components=COMPONENTS)
    assert_same(traced.gradients, mean_statistic(single_gradients(model, task, "answer"), "abs"))


def test_the_hook_point_trace_equals_hooked_backward_passes(model, bio):
    traced = trace_gradients(model, bio)
    layers = range(model.cfg.n_layers)
    sums = {name: torch.zeros_like(value) for name, value in traced.hook_points.items()}
    for example in range(len(bio)):
        task = bio.select([example])
        kept = {}

        def keep(x, hook, name):
            # what is given back goes on; the bridge may go on with something else than it shows
            kept[name] = x.clone()
            kept[name].retain_grad()
            return kept[name]

        points = [f"blocks.{layer}.{p}" for layer in layers for p in ("attn.hook_z", "mlp.hook_post")]
        with model.hooks([(name, partial(keep, name=name)) for name in points]):
            example_losses(model, task).sum().backward()
        model.zero_grad()
        for layer in layers:
            for kind, name, dims in ((Head, "attn.hook_z", (0, 1, 3)), (Neuron, "mlp.hook_post", (0, 1))):
                at = kept[f"blocks.{layer}.{name}"]
                value, gradient = at.detach(), at.grad
                sums[f"{kind.NOUN}.gradient_norm"][layer] += gradient.square().sum(dims).sqrt()
                sums[f"{kind.NOUN}.gradient_x_activation"][layer] += (gradient * value).sum(dims)
    for name, value in sums.items():
        assert torch.allclose(traced.hook_points[name], value / len(bio), rtol=1e-3, atol=1e-6), name
    table = traced.units(Head)
    assert table["unit"].iloc[5] == "L1H1"
    assert table["gradient_norm"].iloc[5] == pytest.approx(float(traced.hook_points["head.gradient_norm"][1, 1]))


def test_batch_size_and_order_do_not_matter_beyond_rounding(model, bio):
    one = trace_gradients(model, bio, batch_size=1)
    for other in (trace_gradients(model, bio, batch_size=10), trace_gradients(model, bio.select(range(9, -1, -1)))):
        for name, value in one.gradients.items():
            assert torch.allclose(value, other.gradients[name], rtol=1e-4, atol=1e-5 * float(value.max())), name


def test_weights_and_gradients_of_the_model_are_left_alone(model, bio):
    before = {name: value.clone() for name, value in model.named_parameters()}
    trace_gradients(model, bio)
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in model.named_parameters())
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_a_bfloat16_model_is_traced_within_its_precision(huggingface, bio):
    full, half = (trace_gradients(load_model(huggingface, dtype), bio) for dtype in ("float32", "bfloat16"))
    one, two = (torch.cat([value.flatten() for value in trace.gradients.values()]) for trace in (full, half))
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.98


def test_a_trace_is_saved_and_loaded(model, bio, tmp_path):
    traced = trace_gradients(model, bio)
    traced.save(tmp_path / "trace.safetensors")
    loaded = GradientTrace.load(tmp_path / "trace.safetensors")
    assert all(torch.equal(value, loaded.gradients[name]) for name, value in traced.gradients.items())
    assert all(torch.equal(value, loaded.hook_points[name]) for name, value in traced.hook_points.items())
    assert (loaded.task, loaded.examples, loaded.provenance) == (traced.task, traced.examples, traced.provenance)
    assert {"model", "task", "statistic", "loss", "dtype", "device", "library_version", "git_commit"} <= set(
        loaded.provenance
    )
    bio.save(tmp_path / "task.safetensors")
    with pytest.raises(CircuitsError, match="holds a task, not a trace"):
        GradientTrace.load(tmp_path / "task.safetensors")


def test_bad_names_are_refused(model, bio):
    with pytest.raises(CircuitsError, match="there is no statistic 'max': choose from abs, square, signed"):
        trace_gradients(model, bio, "max")
    with pytest.raises(CircuitsError, match="there is no loss 'last'"):
        trace_gradients(model, bio, loss="last")
