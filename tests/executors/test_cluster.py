"""Clusters that are really started, and really killed; run with ``make test-cluster``."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import yaml

from circuits.executors import Ray
from circuits.sweeps import run_sweep
from tests.processes import running, wait_for
from tests.sweeps.conftest import contents, places  # noqa: F401

pytestmark = pytest.mark.cluster

#: Starting a worker takes seconds, and minutes where others keep the machine busy.
PATIENT = 900


@pytest.fixture(scope="module")
def plan(places):  # noqa: F811
    """Thousands of interventions."""
    from circuits.sweeps import SweepPlan

    modes = ["zero", "mean", "mean_by_position"]
    settings = {"units": "neurons", "modes": modes, "examples": 2, "metrics": "log_prob", "job_size": 16}
    return SweepPlan(places.model, dataset=places.dataset, tasks=["qa_id", "qa_ood"], **settings)


@pytest.fixture(scope="module")
def serial(plan, tmp_path_factory, all_unchecked):
    out = tmp_path_factory.mktemp("serial")
    table = run_sweep(plan, out)
    assert len(table) > 2000
    return kept(out)


def kept(out) -> dict[str, bytes]:
    return {name: value for name, value in contents(out).items() if not name.startswith(".")}


def parts(out) -> int:
    return len(list(out.glob("parts/[0-9]*.parquet")))


def command(plan, out, *options) -> subprocess.Popen:
    """The command, under way."""
    file = out.with_suffix(".yaml")
    settings = {name: value for name, value in asdict(plan).items() if value is not None}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    file.write_text(yaml.safe_dump(settings))
    line = [sys.executable, "-m", "circuits", "sweep", "run", file, "--out", out, *map(str, options)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> str:
    told, _ = process.communicate(timeout=PATIENT)
    assert process.returncode == 0, told
    return told


def family(process: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout.split()
    found = list(map(int, listed))
    return [*found, *(one for child in found for one in family(child))]


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes with a worker's CPU each, and one without that the command connects to."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    made.small = small
    yield made
    made.shutdown()


def test_a_node_that_is_killed_costs_its_jobs_and_one_that_joins_takes_its_share(plan, serial, cluster, tmp_path):
    out = tmp_path / "out"
    lost, _ = (cluster.add_node(num_cpus=1, **cluster.small) for _ in range(2))
    process = command(plan, out, "--executor", "ray", "--address", cluster.address)
    wait_for(lambda: parts(out) > 8 or process.poll() is not None, PATIENT)
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=1, **cluster.small)
    told = finished(process)
    assert kept(out) == serial
    assert " rows, the largest effects first" in told
    for wall in ("WARNING", "raylet", "Traceback"):
        assert wall not in told


def test_a_command_that_is_killed_ends_its_workers_and_goes_on_when_given_again(plan, serial, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    local = ("--executor", "ray", "--workers", 1)
    process = command(plan, out, *local)
    wait_for(lambda: parts(out) > 8 or process.poll() is not None, PATIENT)
    started = family(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = parts(out)
    assert 8 < before < len(serial) - 2
    wait_for(lambda: not any(map(running, started)), 120)
    process = command(plan, out, *local)
    wait_for(lambda: parts(out) > before + 8 or process.poll() is not None, PATIENT)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=PATIENT)
    assert process.returncode == 130
    assert " jobs are finished; the same command goes on from there" in told
    finished(command(plan, out, *local))
    assert kept(out) == serial


def test_parts_come_back_where_the_folder_is_not_shared(plan, serial, tmp_path):
    pytest.importorskip("ray")
    run_sweep(plan, tmp_path / "out", Ray(workers=1, shared=False))
    assert kept(tmp_path / "out") == serial


def test_a_trace_on_ray_is_the_same_to_the_bit(places, dataset, tokenizer, tmp_path):  # noqa: F811
    pytest.importorskip("ray")
    from circuits.tracing import trace_checkpoints

    task = dataset.task("qa_id", tokenizer)
    for name, executor in (("serial", "serial"), ("ray", Ray(workers=2)), ("sent", Ray(workers=1, shared=False))):
        out = tmp_path / name
        trace_checkpoints([places.model, places.other], task, batch_size=4, out=out, shards=5, executor=executor)
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "sent").read_bytes() == (tmp_path / "serial").read_bytes()


def test_an_analysis_on_ray_has_the_same_tables(places, dataset, tokenizer, tmp_path):  # noqa: F811
    pytest.importorskip("ray")
    from circuits.analysis import analyse
    from circuits.models import load_model

    model, task = load_model(places.model), dataset.task("qa_id", tokenizer)
    for name, executor in (("serial", "serial"), ("ray", Ray(workers=1))):
        analyse(model, task, out=tmp_path / name, only=["sweep"], executor=executor)
    serial, ray = ((tmp_path / name / "tables" / "sweep.parquet").read_bytes() for name in ("serial", "ray"))
    assert serial == ray


def test_a_lost_task_is_submitted_again_and_not_for_ever(tmp_path):
    pytest.importorskip("submitit")
    from circuits.errors import CircuitsError
    from circuits.executors import Slurm

    def work(job):
        if job == 13 or (job == 2 and not (tmp_path / "died").exists()):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 99:
            raise CircuitsError("there is no folder")
        return job**2

    with Slurm(2, local=True).start(work, tmp_path) as run:
        assert sorted(run(range(12))) == [(job, job**2) for job in range(12)]
        assert len((tmp_path / ".lost").read_text().splitlines()) == 1
    with pytest.raises(CircuitsError, match="^there is no folder$"), Slurm(1, local=True).start(work, tmp_path) as run:
        list(run([1, 99]))
    with pytest.raises(CircuitsError, match="5 workers died at the same job"):  # noqa: SIM117
        with Slurm(1, local=True).start(work, tmp_path) as run:
            list(run([12, 13]))


ARRAY = """
import sys
from circuits import SweepPlan, run_sweep
from circuits.executors import Slurm

run_sweep(SweepPlan.read(sys.argv[1]), sys.argv[2], Slurm(2, local=True))
"""


def test_an_array_that_is_killed_goes_on(plan, serial, tmp_path):
    pytest.importorskip("submitit")
    out, script = tmp_path / "out", tmp_path / "in_an_array.py"
    script.write_text(ARRAY)
    command(plan, out).kill()
    begin = [sys.executable, script, out.with_suffix(".yaml"), out]
    process = subprocess.Popen(begin)
    # a task alone
    wait_for(lambda: parts(out) > 8 or process.poll() is not None, PATIENT)
    before = parts(out)
    tasks = [task for task in family(process.pid) if not family(task)]
    assert len(tasks) == 2
    os.kill(tasks[0], signal.SIGKILL)
    wait_for(lambda: (out / ".lost").exists() and parts(out) > before + 8, PATIENT)
    # all of it
    for one in [process.pid, *family(process.pid)]:
        os.kill(one, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)
    assert 16 < parts(out) < len(serial) - 2
    subprocess.run(begin, check=True, timeout=PATIENT)
    assert kept(out) == serial
