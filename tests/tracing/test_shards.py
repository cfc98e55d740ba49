"""Traces whose examples are shared out."""

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.executors import Serial
from circuits.models import load_model
from circuits.tracing import GradientTrace, shards, trace_checkpoints, trace_gradients
from tests.fixtures import FAMILIES, lively


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Two checkpoints of a family on disk."""
    folders = [tmp_path_factory.mktemp("saved") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        lively(FAMILIES[0], seed).save_pretrained(folder)
    return folders


class Backwards:
    """Runs jobs in the wrong order, each as in a process of its own that does not see the folder."""

    def __init__(self, shared: bool, lost: int | None = None) -> None:
        self.shared, self.lost, self.ran = shared, lost, []

    def start(self, work, _, **_settings):
        from contextlib import contextmanager
        from pickle import dumps, loads

        @contextmanager
        def started():
            def run(jobs):
                for job in reversed(jobs):
                    if len(self.ran) == self.lost:
                        raise KeyboardInterrupt
                    self.ran.append(job)
                    yield job, loads(dumps(loads(dumps(work))(job)))

            yield run

        return started()


def same(one: GradientTrace, two: GradientTrace) -> bool:
    return all(
        torch.equal(getattr(one, part)[name], value)
        for part in ("gradients", "hook_points")
        for name, value in getattr(two, part).items()
    )


@pytest.mark.parametrize("shared", [True, False])
def test_the_order_of_workers_changes_no_bit_and_shards_change_rounding_alone(saved, tasks, tmp_path, shared):
    task = tasks["qa_id"].select(range(9))
    given = {"task": task, "batch_size": 2}
    serial = trace_checkpoints(saved, **given, out=tmp_path / "serial", shards=3)
    other = trace_checkpoints(saved, **given, out=tmp_path / "other", shards=3, executor=Backwards(shared))
    assert (tmp_path / "serial").read_bytes() == (tmp_path / "other").read_bytes()
    assert same(serial, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "serial"]
    whole = trace_checkpoints(saved, **given)
    for name, value in whole.gradients.items():
        torch.testing.assert_close(serial.gradients[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
    assert whole.provenance == serial.provenance
    # the same trace, whoever made it
    assert same(trace_checkpoints(saved, **given, out=tmp_path / "serial"), serial)


@pytest.mark.parametrize("per", ["example", "batch"])
def test_shards_are_whole_batches(saved, tasks, tmp_path, per):
    task = tasks["qa_id"].select(range(9))
    executor = Backwards(True)
    given = {"task": task, "statistic": "square", "batch_size": 4, "per": per}
    found = trace_checkpoints(saved[:1], **given, out=tmp_path / "out", shards=8, executor=executor)
    assert [job[1:3] for job in reversed(executor.ran[:-1])] == [(0, 4), (4, 8), (8, 9)]
    expected = trace_checkpoints(saved[:1], **given)
    for name, value in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_finished_shards_are_kept_and_not_summed_again(saved, tasks, tmp_path):
    task = tasks["qa_id"].select(range(8))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trace_checkpoints(saved, task, batch_size=2, out=out, shards=4, executor=Backwards(False, lost=3))
    folder = tmp_path / "out.shards"
    assert len(list(folder.glob("*.safetensors"))) == 3
    with pytest.raises(CircuitsError, match=r"out.shards holds a trace with shards 4, not 2: choose another folder"):
        trace_checkpoints(saved, task, batch_size=2, out=out, shards=2)
    again = Backwards(True)
    found = trace_checkpoints(saved, task, batch_size=2, out=out, shards=4, executor=again)
    assert len([job for job in again.ran if isinstance(job, shards.Shard)]) == 8 - 3
    assert same(found, trace_checkpoints(saved, task, batch_size=2, out=tmp_path / "other", shards=4))
    assert not folder.exists()


def test_models_that_workers_cannot_load_are_refused(saved, tasks, tmp_path, tokenizer):
    task = tasks["qa_id"].select(range(4))
    memory = load_model(lively(FAMILIES[0]), tokenizer=tokenizer)
    with pytest.raises(CircuitsError, match="a model in memory cannot be sent to workers: save it"):
        trace_checkpoints([memory], task, out=tmp_path / "out", executor="processes")
    with pytest.raises(CircuitsError, match="a trace in shards needs a file for the trace: give out"):
        trace_checkpoints(saved, task, shards=2)
    with pytest.raises(CircuitsError, match="there are to be 0 shards: 1 is the least"):
        trace_checkpoints(saved, task, out=tmp_path / "out", shards=0)
    with pytest.raises(CircuitsError, match="there is no executor 'banana'"):
        trace_checkpoints(saved, task, out=tmp_path / "out", executor="banana")
    assert list(tmp_path.iterdir()) == []
    # a model that was loaded, and is what its folder holds
    loaded = load_model(saved[0])
    found = trace_checkpoints([loaded], task, out=tmp_path / "out", shards=1, executor=Serial())
    expected = trace_gradients(loaded, task)
    for name, value in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
    with torch.no_grad():
        next(iter(loaded.checkpoint.tensors.values())).add_(1.0)
    with pytest.raises(CircuitsError, match="is not the model that was given"):
        trace_checkpoints([loaded], task, out=tmp_path / "changed", shards=1)
