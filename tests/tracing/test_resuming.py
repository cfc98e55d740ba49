import os
import signal

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.models import facts_of, load_model, save_model
from circuits.storage import read_tensors
from circuits.tracing import GradientTrace, gradients, trace_checkpoints, trace_gradients
from circuits.tracing.running_trace import RunningTrace
from tests.processes import ended, forked, needs_fork


def same(one: GradientTrace, two: GradientTrace) -> bool:
    return all(
        mine.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in mine.items())
        for mine, other in ((one.gradients, two.gradients), (one.hook_points, two.hook_points))
    )


@pytest.fixture
def added(monkeypatch) -> list[int]:
    """How many examples each batch that is traced has."""
    found, add = [], RunningTrace.add

    def counted(self, model, batch):
        found.append(len(batch))
        add(self, model, batch)

    monkeypatch.setattr(RunningTrace, "add", counted)
    return found


@needs_fork
def test_a_trace_that_was_killed_goes_on_where_it_was(model, bio, tmp_path, added, monkeypatch):
    out = tmp_path / "trace.safetensors"
    add = RunningTrace.add
    with monkeypatch.context() as patch:

        def killed(self, *arguments):
            if self.done == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, *arguments)

        patch.setattr(gradients, "_SAVE_EVERY", 0.0)
        patch.setattr(RunningTrace, "add", killed)
        assert ended(forked(lambda: trace_gradients(model, bio, batch_size=2, out=out))) == -signal.SIGKILL
    assert not out.exists()
    unfinished = tmp_path / "trace.safetensors.unfinished"
    done = read_tensors(unfinished, "unfinished trace")[1]["done"]
    assert done in (2, 4, 6)
    with pytest.raises(CircuitsError, match=r"unfinished was made with statistic abs, not signed"):
        trace_gradients(model, bio, "signed", batch_size=2, out=out)
    resumed = trace_gradients(model, bio, batch_size=2, out=out)
    assert sum(added) == len(bio) - done
    assert not unfinished.exists()
    whole = trace_gradients(model, bio, batch_size=2)
    assert same(resumed, whole)
    assert resumed.provenance == whole.provenance


def test_a_finished_trace_is_read_and_another_is_refused(model, bio, tmp_path, added):
    out = tmp_path / "trace.safetensors"
    first = trace_gradients(model, bio, out=out)
    count = len(added)
    assert same(first, trace_gradients(model, bio, out=out, batch_size=3))
    assert len(added) == count
    with pytest.raises(CircuitsError, match=r"trace\.safetensors was made with loss answer, not all"):
        trace_gradients(model, bio, loss="all", out=out)
    with pytest.raises(CircuitsError, match="was made with examples"):
        trace_gradients(model, bio.select([0, 1]), out=out)
    with torch.no_grad():
        model.blocks[0].mlp.W_in[0, 0] += 1
    with pytest.raises(CircuitsError, match="was made with model"):
        trace_gradients(model, bio, out=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.safetensors"]


def test_checkpoints_are_added_up_and_gone_on_with(model, bio, tmp_path, added, monkeypatch):
    first = tmp_path / "first"
    save_model(model, first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    singles = [trace_gradients(one, bio, "square") for one in (load_model(first), model)]
    out = tmp_path / "sum.safetensors"
    monkeypatch.setattr(gradients, "_SAVE_EVERY", 0.0)
    visits, visit = [], gradients._visit

    def stopped(source, *arguments):
        visits.append(source)
        if source is model and len(visits) == 2:
            raise KeyboardInterrupt
        return visit(source, *arguments)

    monkeypatch.setattr(gradients, "_visit", stopped)
    with pytest.raises(KeyboardInterrupt):
        trace_checkpoints([first, model], bio, "square", batch_size=4, out=out)
    added.clear()
    total = trace_checkpoints([first, model], bio, "square", batch_size=4, out=out)
    assert visits == [first, model, model]
    assert sum(added) == len(bio)
    for kind in ("gradients", "hook_points"):
        for name, value in getattr(total, kind).items():
            expected = getattr(singles[0], kind)[name] + getattr(singles[1], kind)[name]
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name
    assert total.provenance["model"] == facts_of(model)["model"]
    assert [stamp.startswith(str(first)) for stamp in total.provenance["checkpoints"]] == [True, False]


def test_checkpoints_of_different_kinds_and_none_are_refused(model, bio, huggingface):
    other = type(huggingface)(type(huggingface.config)(**{**huggingface.config.to_dict(), "intermediate_size": 64}))
    with pytest.raises(CircuitsError, match="not the same kind of model: their parameters have other shapes"):
        trace_checkpoints([model, load_model(other)], bio)
    with pytest.raises(CircuitsError, match="no checkpoints are given"):
        trace_checkpoints([], bio)


def test_weights_edited_in_a_block_are_traced_as_they_are(model, bio):
    before = trace_gradients(model, bio)
    with torch.no_grad():
        model.blocks[1].mlp.W_out[7] = 0
    after = trace_gradients(model, bio)
    assert not after.gradients["blocks.1.mlp.W_in"][:, 7].any()
    assert before.gradients["blocks.1.mlp.W_in"][:, 7].any()
