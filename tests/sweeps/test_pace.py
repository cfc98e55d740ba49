import math

import pytest

from circuits.cli.sweep import pace_line
from circuits.errors import CircuitsError
from circuits.sweeps import SweepPace, estimate_sweep, pace, run_sweep, sweep_state
from circuits.sweeps.folder import SweepFolder
from circuits.sweeps.plan import Job


def noted(folder, worker: str, *events: tuple[float, int, int, float]) -> None:
    (folder / ".workers").mkdir(exist_ok=True)
    lines = "".join(f"{at} {job} {size} {seconds}\n" for at, job, size, seconds in events)
    (folder / ".workers" / worker).write_text(lines)


def test_rate_workers_and_time_left_by_hand(tmp_path):
    folder, left = SweepFolder(tmp_path), [Job(9, "exact", "qa", 0, 300)]
    assert pace.sweep_pace(folder, left, 5000.0) == SweepPace(0.0, math.inf, 0, 0)
    # ten interventions each at 1020 and 1040, begun at 1000; another worker's ten, long ago in the end
    noted(tmp_path, "node1-17", (1020, 0, 10, 20), (1040, 1, 10, 20))
    noted(tmp_path, "node2-4", (1030, 2, 10, 30))
    (tmp_path / ".lost").write_text("1035 killed\n1036 killed\n")
    assert pace.sweep_pace(folder, left, 1060.0) == SweepPace(0.5, 600.0, 2, 2)
    # the last ten minutes count: from 1025 on, two jobs
    assert pace.sweep_pace(folder, left, 1625.0) == SweepPace(20 / 600, 9000.0, 0, 2)
    # nothing is left
    assert pace.sweep_pace(folder, [], 1060.0) == SweepPace(0.5, 0.0, 0, 2)
    # who is slow is not gone
    noted(tmp_path, "node2-4", (1030, 2, 10, 300))
    assert pace.sweep_pace(folder, left, 1625.0).workers == 1


def test_a_sweep_tells_its_pace(plan_of, tmp_path):
    run_sweep(plan_of(job_size=4), tmp_path)
    whole = sweep_state(tmp_path)
    assert sweep_state(tmp_path, rows=False).table.empty
    assert (whole.pace.left, whole.pace.workers, whole.pace.lost) == (0.0, 0, 0)
    assert whole.pace.rate > 0
    assert pace_line(whole) == "4 of 4 jobs finished, 0 losses"
    notes = SweepFolder(tmp_path).notes()
    assert [[note.job for note in worker] for worker in notes.values()] == [[0, 1, 2, 3]]
    assert all(note.interventions == 4 and note.seconds > 0 for worker in notes.values() for note in worker)
    for name in ("table.parquet", "parts/0003.parquet"):
        (tmp_path / name).unlink()
    state = sweep_state(tmp_path)
    assert (state.done, state.pace.workers) == (3, 1)
    assert state.pace.left == pytest.approx(4 / state.pace.rate)
    assert pace_line(state).startswith("3 of 4 jobs finished, ")
    assert pace_line(state).endswith(" left, 1 worker, 0 losses")


def test_an_estimate_counts_what_is_done_and_writes_nothing(plan_of, tmp_path, dataset, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # seconds of a job are a tenth, and a hundredth for each intervention
    monkeypatch.setattr(pace, "_seconds", lambda *of: 0.1 + 0.01 * of[-1])
    monkeypatch.setattr(pace, "cores", lambda: 4)
    found = estimate_sweep(plan_of(tasks=["qa_id", "bio"], modes=["zero", "mean"], job_size=5, threads=2))
    tokens = sum(int(dataset.task(name, tokenizer).sample(6, 0).attention_mask.sum()) for name in ("qa_id", "bio"))
    assert (found.interventions, found.exact, found.jobs) == ({"qa_id": 32, "bio": 32}, 64, 14)
    assert found.tokens == 32 * tokens
    assert found.seconds == pytest.approx(14 * 0.1 + 64 * 0.01)
    assert found.workers == 2
    assert found.memory > 2**26
    screened = estimate_sweep(plan_of(screen="attribution", verify=0.25, job_size=3))
    assert (screened.interventions, screened.exact, screened.jobs) == ({"qa_ood": 16}, 4, 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CircuitsError, match="there is no folder"):
        estimate_sweep(plan_of("nowhere"))


def test_short_jobs_are_really_computed(plan_of):
    plan = plan_of(units=["L0H1"])
    assert 0 < estimate_sweep(plan).seconds < 600
