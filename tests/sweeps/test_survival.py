"""Sweeps that are really killed."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest

from circuits.errors import CircuitsError
from circuits.sweeps import folder as sweep_folder
from circuits.sweeps import jobs, run_sweep, sweep_state
from circuits.sweeps.folder import SweepFolder
from tests.processes import ended, forked, kill, needs_fork, running, wait_for
from tests.sweeps.conftest import contents

pytestmark = [needs_fork, pytest.mark.usefixtures("unchecked")]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Whoever runs a plan takes the model that is there: a fork waits for no loading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "load_model", cache(jobs.load_model))
        yield


def parts(out) -> list[str]:
    return sorted(path.name for path in out.glob("parts/[0-9]*.parquet"))


def hidden(out) -> list[str]:
    """Files left half written."""
    return [path.name for path in out.rglob(".*") if path.name not in (".locks", ".workers")]


@pytest.fixture
def long(plan_of):
    """A plan of many short jobs."""
    return plan_of(modes=["zero", "mean", "mean_by_position"], job_size=1, examples=2, metrics="log_prob")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs a plan once without any disturbance: contents and seconds."""
    known = {}

    def run(plan):
        if plan not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            begun = time.monotonic()
            run_sweep(plan, out)
            known[plan] = contents(out), time.monotonic() - begun
        return known[plan]

    return run


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_times_change_no_byte(long, tmp_path, undisturbed, kills):
    expected, seconds = undisturbed(long)
    count = sum(name.startswith("parts/") for name in expected)
    assert count == 48
    draw = random.Random(0)
    seen = []
    for attempt in range(kills):
        child = forked(lambda: run_sweep(long, tmp_path))
        if attempt % 4:
            # in the midst of jobs; otherwise mostly before the first
            before = len(parts(tmp_path))
            wait_for(lambda before=before: len(parts(tmp_path)) > before, of=child)
            time.sleep(draw.uniform(0, 1.5 * seconds / count))
        else:
            time.sleep(draw.uniform(0, seconds / 10))
        kill(child)
        seen.append(len(parts(tmp_path)))
        assert not (tmp_path / "table.parquet").exists()
    assert seen == sorted(seen)
    assert len(set(seen)) > kills / 2
    run_sweep(long, tmp_path)
    assert contents(tmp_path) == expected


def test_killed_at_every_write(plan_of, tmp_path, undisturbed):
    plan = plan_of()
    expected, _ = undisturbed(plan)

    def killed_at_its_second_write() -> None:
        written = []

        def fsync(handle: int) -> None:
            if written:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(handle)

        os.fsync = fsync
        run_sweep(plan, tmp_path)

    # of plan.json, four parts and two tables, each but the first is killed once before it is whole
    for _ in range(6):
        assert ended(forked(killed_at_its_second_write)) == -signal.SIGKILL
        assert len(hidden(tmp_path)) == 1
    assert ended(forked(killed_at_its_second_write)) == 0
    assert contents(tmp_path) == expected


def test_two_processes_share_the_jobs_of_one_folder(plan_of, tmp_path, undisturbed, monkeypatch):
    plan = plan_of(job_size=1)
    expected, _ = undisturbed(plan)
    out, log = tmp_path / "out", tmp_path / "log"
    keep = SweepFolder.write_part

    def write_part(self, job, rows) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {job.index}\n")
        # both are to get some jobs, however busy the machine is
        time.sleep(0.01)
        keep(self, job, rows)

    monkeypatch.setattr(SweepFolder, "write_part", write_part)
    children = [forked(lambda: run_sweep(plan, out)) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    done = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(job) for _, job in done) == list(range(16))
    assert {int(process) for process, _ in done} == {child.process for child in children}
    assert contents(out) == expected


def test_a_job_of_a_process_that_dies_is_taken_over(plan_of, tmp_path, undisturbed, monkeypatch):
    plan = plan_of(units=["L0H0", "L0H1"], job_size=1)
    expected, _ = undisturbed(plan)
    claimed = tmp_path / "claimed"

    def hang(self, job, rows) -> None:
        claimed.touch()
        time.sleep(100)

    with monkeypatch.context() as patch:
        patch.setattr(SweepFolder, "write_part", hang)
        hanging = forked(lambda: run_sweep(plan, tmp_path / "out"))
    wait_for(claimed.exists, of=hanging)
    other = forked(lambda: run_sweep(plan, tmp_path / "out"))
    wait_for(lambda: parts(tmp_path / "out") == ["0001.parquet"], of=other)
    time.sleep(0.5)
    assert not other.has_ended()
    kill(hanging)
    assert ended(other) == 0
    assert contents(tmp_path / "out") == expected


@contextmanager
def small_disk(folder, size: str):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_finished_work_is_kept(plan_of, tmp_path, undisturbed):
    plan = plan_of(job_size=1)
    expected, _ = undisturbed(plan)
    with small_disk(tmp_path / "disk", "96k") as disk:
        out = disk / "out"
        for _ in range(2):
            with pytest.raises(CircuitsError) as error:
                run_sweep(plan, out)
            state = sweep_state(out)
            assert str(error.value) == (
                f"the disk of {out} is full: {state.done} of 16 jobs are finished and kept; make room, and the same "
                "command goes on from there"
            )
            assert 2 < state.done < 16
            assert hidden(out) == []
            for name in parts(out):
                assert (out / "parts" / name).read_bytes() == expected[f"parts/{name}"]
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run_sweep(plan, out)
        assert contents(out) == expected


def test_a_disk_that_is_full_from_the_start(plan_of, tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(OSError, match="No space left"):
            (disk / "other").write_bytes(b"0" * 100_000)
        with pytest.raises(CircuitsError, match="is full: 0 of 4 jobs are finished and kept"):
            run_sweep(plan_of(), disk / "out")
        assert not (disk / "out" / "plan.json").exists()


def test_an_interruption_leaves_whole_parts_and_says_how_to_go_on(plan_of, tmp_path, undisturbed, monkeypatch):
    plan = plan_of()
    expected, _ = undisturbed(plan)
    keep = sweep_folder.atomic_file

    @contextmanager
    def interrupted(path):
        with keep(path) as temporary:
            yield temporary
            if path.name == "0002.parquet":
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sweep_folder, "atomic_file", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        run_sweep(plan, tmp_path)
    monkeypatch.setattr(sweep_folder, "atomic_file", keep)
    assert error.value.__notes__ == ["2 of 4 jobs are finished; the same command goes on from there"]
    assert hidden(tmp_path) == []
    run_sweep(plan, tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.usefixtures("forked_workers")
def test_workers_give_the_same_bytes_and_end_when_their_parent_is_killed(long, tmp_path, undisturbed):
    plan = replace(long, per_answer=True)
    expected, _ = undisturbed(plan)
    out = tmp_path / "out"
    child = forked(lambda: run_sweep(plan, out, "processes", workers=2))
    wait_for(lambda: len(parts(out)) > 4, of=child)
    family = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.process)], capture_output=True, text=True
    ).stdout.split()
    assert len(family) >= 2
    kill(child)
    wait_for(lambda: not any(running(int(process)) for process in family), 10)
    done = [f"{folder}/{name}" for folder in ("parts", "answers") for name in parts(out)]
    assert {name: (out / name).read_bytes() for name in done} == {name: expected[name] for name in done}
    run_sweep(plan, out)
    assert contents(out) == expected
