import pytest
import torch

from circuits.datasets import Task
from circuits.errors import CircuitsError
from circuits.models import parameters_of
from circuits.tracing import STATISTICS, GradientTrace, example_losses, trace_gradients
from circuits.units import Head, Neuron, layout_of


def one_by_one(model, task: Task, statistic: str, loss: str) -> dict[str, torch.Tensor]:
    """The slow obvious way: a backward pass for each example, without padding, on the plain model's own loss."""
    change = {"abs": torch.abs, "square": torch.square, "signed": lambda value: value}[statistic]
    parameters = parameters_of(model)
    sums = {name: torch.zeros_like(value) for name, value in parameters.items() if layout_of(name).unit is not None}
    for example in range(len(task)):
        tokens = task.tokens[example, task.attention_mask[example]][None]
        model.zero_grad()
        log_probs = model(tokens)[0].log_softmax(-1)
        positions = range(1, tokens.shape[1])
        if loss == "answer":
            answers = task.answers[task.answers["example"] == example]
            positions = [i for a in answers.itertuples() for i in range(a.start, a.end)]
        (-sum(log_probs[i - 1, tokens[0, i]] for i in positions) / len(positions)).backward()
        for name in sums:
            sums[name] += change(parameters[name].grad)
    model.zero_grad()
    return {name: value / len(task) for name, value in sums.items()}


@pytest.mark.parametrize("statistic", list(STATISTICS))
@pytest.mark.parametrize("loss", ["answer", "all"])
def test_the_trace_equals_a_loop_of_single_example_backward_passes(model, bio, statistic, loss):
    traced = trace_gradients(model, bio, statistic, loss, batch_size=4)
    expected = one_by_one(model, bio, statistic, loss)
    assert traced.gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        assert torch.allclose(traced.gradients[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name


def test_biographies_with_several_answers_are_traced_too(model, tmp_path, tokenizer):
    from circuits.datasets import DatasetSettings, make_dataset

    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=2, biographies=1, row="biography"))
    task = Task.from_dataset(dataset, "bio", tokenizer)
    traced, expected = trace_gradients(model, task), one_by_one(model, task, "abs", "answer")
    for name, value in expected.items():
        assert torch.allclose(traced.gradients[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name


def test_the_hook_point_trace_equals_hooked_backward_passes(model, bio):
    traced = trace_gradients(model, bio)
    layers = range(model.cfg.n_layers)
    sums = {name: torch.zeros_like(value) for name, value in traced.hook_points.items()}
    for example in range(len(bio)):
        task = bio.select([example])
        kept, gradients = {}, {}
        forward = [
            (f"blocks.{layer}.{p}", lambda t, hook: kept.update({hook.name: t.detach()}))
            for layer in layers
            for p in ("attn.hook_z", "mlp.hook_post")
        ]
        backward = [(name, lambda t, hook: gradients.update({hook.name: t.detach()})) for name, _ in forward]
        with model.hooks(forward, backward):
            example_losses(model, task).sum().backward()
        model.zero_grad()
        for layer in layers:
            for kind, name, dims in ((Head, "attn.hook_z", (0, 1, 3)), (Neuron, "mlp.hook_post", (0, 1))):
                value, gradient = kept[f"blocks.{layer}.{name}"], gradients[f"blocks.{layer}.{name}"]
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
    assert not any(block.mlp._forward_pre_hooks for block in model.blocks)


def test_a_bfloat16_model_is_traced_within_its_precision(huggingface, bio):
    from circuits.models import load_model

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
