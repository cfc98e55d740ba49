import torch

from circuits.analysis import STEPS
from circuits.analysis.artifacts import Masks, Traces
from circuits.analysis.page import _random_drop
from circuits.analysis.running import run_steps, step
from circuits.masks import ParameterMask
from circuits.tracing import GradientTrace


def test_what_a_step_takes_is_written_before_it():
    written = set()
    for one in STEPS:
        assert {*one.needs, *one.uses} <= written, one.name
        written |= {*one.writes}
    [rank] = (one for one in STEPS if one.name == "rank")
    assert [artifact.name for artifact in rank.uses] == ["grafts"]


def test_a_step_runs_without_what_it_only_uses_and_takes_it_where_it_is(tmp_path):
    mask = ParameterMask({"w": torch.tensor([True, False])}, model="a")
    grafts, seen = Masks("grafts"), []

    @step(grafts, lacking=lambda there: None if there else "nothing to graft")
    def graft(_there):
        """Graft."""
        return ({"qa": mask},)

    @step(uses=[grafts])
    def rank(_there, found):
        """Rank."""
        seen.append(list(found))
        return ()

    assert run_steps([graft, rank], False, tmp_path / "a", {}) == {"graft": "nothing to graft"}
    assert run_steps([graft, rank], True, tmp_path / "b", {}) == {}
    assert seen == [[], ["qa"]]


def test_an_interval_of_few_draws_that_holds_every_drop_is_not_shown():
    row = {"before": 0.5, "random_drop": 0.25, "random_drop_low": -0.5, "random_drop_high": 0.5}
    assert _random_drop(row) == "25.0% (too few draws to tell)"
    assert _random_drop(row | {"random_drop_low": -0.25}) == "25.0% (-25.0% to 50.0%)"


def test_what_a_kill_left_half_written_is_neither_trace_nor_mask(tmp_path):
    for artifact in (Traces("traces"), Masks("masks")):
        artifact.path(tmp_path).mkdir()
        (artifact.path(tmp_path) / ".qa.safetensors.t46x3q1m.safetensors").write_bytes(b"half")
    GradientTrace("qa", {"w": torch.ones(2)}, {}, 1).save(tmp_path / "traces" / "qa.safetensors")
    assert list(Traces("traces").load(tmp_path)) == ["qa"]
    assert Masks("masks").load(tmp_path) == {}
