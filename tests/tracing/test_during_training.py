import copy

import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.models import fingerprint, load_model
from circuits.tracing import GradientTrace, TraceCallback, trace_gradients
from circuits.training import Optimisation, train
from circuits.units import COMPONENTS

pytestmark = pytest.mark.usefixtures("all_unchecked", "smaller")

SMALL = Optimisation(steps=9, rows=12, warmup_steps=3)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("few") / "facts", DatasetSettings(people=4))


@pytest.fixture(scope="module")
def probes(few):
    return [few.task(split, word_tokenizer()).sample(6) for split in ("bio", "qa_ood")]


class Losses(TrainerCallback):
    """Keeps the gradients' norms and the state of the random numbers at every step, and a few copies of the model."""

    def __init__(self, copies=()):
        self.seen, self.copies, self.models = [], copies, []

    def on_pre_optimizer_step(self, args, state, control, **others):  # noqa: ARG002
        norms = [parameter.grad.norm() for parameter in others["model"].parameters()]
        self.seen.append(torch.stack(norms).tolist())

    def on_step_end(self, args, state, control, **others):  # noqa: ARG002
        assert others["model"].training
        self.seen.append(torch.random.get_rng_state().sum().item())
        if state.global_step in self.copies:
            self.models.append(copy.deepcopy(others["model"]).eval())


def run(few, folder, family, *callbacks, **settings):
    train(
        "bio-only",
        few,
        folder,
        start=f"tiny-{family}",
        optimisation=SMALL,
        callbacks={"stage_1": callbacks},
        **settings,
    )
    return load_file(folder / "stage_1" / "model.safetensors"), pandas.read_parquet(folder / "stage_1/curve.parquet")


def test_training_is_the_same_to_the_bit_and_the_traces_are_those_of_its_steps(few, probes, family, tmp_path):
    alone = Losses()
    weights, curve = run(few, tmp_path / "alone", family, alone, evaluate_every=2)
    traced = Losses(copies=(4, 8))
    tracing = TraceCallback(probes, 4, tmp_path / "traces", batch_size=4, components=COMPONENTS)
    same_weights, same_curve = run(few, tmp_path / "traced", family, tracing, traced, evaluate_every=2)
    assert traced.seen == alone.seen
    assert curve.equals(same_curve)
    assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())
    for task in probes:
        trace = tracing.traces[task.name]
        singles = [
            trace_gradients(load_model(model), task, batch_size=4, components=COMPONENTS) for model in traced.models
        ]
        for name, value in trace.gradients.items():
            expected = singles[0].gradients[name] + singles[1].gradients[name]
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())), name
        for name, value in trace.hook_points.items():
            expected = singles[0].hook_points[name] + singles[1].hook_points[name]
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6), name
        assert trace.provenance["steps"] == [4, 8]
        assert trace.provenance["model"] == fingerprint(load_model(tmp_path / "traced" / "stage_1"))
        loaded = GradientTrace.load(tmp_path / "traces" / f"{task.name}.safetensors")
        assert loaded.provenance == trace.provenance
        assert all(torch.equal(value, loaded.gradients[name]) for name, value in trace.gradients.items())


class StoppedError(Exception):
    pass


def stopping(at: int):
    def progress(stage, step, steps):
        if step == at:
            raise StoppedError

    return progress


def test_training_that_was_stopped_goes_on_with_its_traces(few, probes, tmp_path):
    whole, stopped = TraceCallback(probes, 2), TraceCallback(probes, 2)
    run(few, tmp_path / "whole", "llama", whole)
    with pytest.raises(StoppedError):
        run(few, tmp_path / "stopped", "llama", stopped, evaluate_every=3, progress=stopping(8))
    assert stopped.traces == {}
    states = sorted(path.name for path in (tmp_path / "stopped" / ".training-stage_1").glob("*-*"))
    assert states == ["checkpoint-6", "traces-6"]
    again = TraceCallback(probes, 2)
    run(few, tmp_path / "stopped", "llama", again, evaluate_every=3)
    for name, trace in whole.traces.items():
        assert again.traces[name].provenance == trace.provenance
        for parameter, value in trace.gradients.items():
            assert torch.equal(value, again.traces[name].gradients[parameter])


def test_going_on_from_a_state_without_traces_or_with_others_is_refused(few, probes, tmp_path):
    with pytest.raises(StoppedError):
        run(few, tmp_path / "one", "llama", evaluate_every=3, progress=stopping(5))
    with pytest.raises(CircuitsError, match="goes on from step 3, but there are no traces up to it in"):
        run(few, tmp_path / "one", "llama", TraceCallback(probes, 2), evaluate_every=3)
    with pytest.raises(StoppedError):
        run(few, tmp_path / "two", "llama", TraceCallback(probes, 2), evaluate_every=3, progress=stopping(5))
    with pytest.raises(CircuitsError, match="was made with statistic abs, not square"):
        run(few, tmp_path / "two", "llama", TraceCallback(probes, 2, statistic="square"), evaluate_every=3)


def test_bad_settings_are_refused(few, probes, tmp_path):
    with pytest.raises(CircuitsError, match="traces every 0 steps are none"):
        TraceCallback(probes, 0)
    with pytest.raises(CircuitsError, match="must have names of their own"):
        TraceCallback([probes[0], probes[0]], 1)
    with pytest.raises(CircuitsError, match="traces every 10 steps are none in 9 steps of training"):
        run(few, tmp_path / "one", "llama", TraceCallback(probes, 10))
    with pytest.raises(CircuitsError, match="callbacks for a stage 'mixed', but the stages of bio-only are stage_1"):
        train("bio-only", few, tmp_path / "two", callbacks={"mixed": []})
