"""What executors keep book of, without any cluster."""

import re
import socket
import sys
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import psutil
import pytest

from circuits.errors import CircuitsError
from circuits.executors import EXECUTORS, Executor, Processes, Ray, Serial, Slurm, choose_executor
from circuits.executors import ray_cluster as ray_module
from circuits.executors.tries import Tries, cut
from tests.processes import forked, kill, needs_fork, running, wait_for


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("banana", {}, "there is no executor 'banana': choose from serial, processes, ray, slurm"),
        ("serial", {"workers": 2}, "the executor serial is one worker, not 2: choose processes"),
        ("processes", {"workers": 0}, "there are to be 0 workers: 1 is the least"),
        ("ray", {"workers": 0}, "there are to be 0 workers: 1 is the least"),
        ("ray", {"gpus_per_worker": -1}, "a worker is to have -1 GPUs: 0 is the least"),
        ("ray", {"cpus_per_worker": 0}, "a worker is to have 0 CPUs: 1 is the least"),
        ("ray", {"address": "ray://head"}, "ray://head is no address of a Ray cluster: give auto, or HOST:PORT"),
        ("slurm", {}, "the executor slurm needs the number of workers, the tasks of its job array"),
        ("slurm", {"workers": 0}, "there are to be 0 workers: 1 is the least"),
        ("slurm", {"workers": 2, "gpus_per_worker": 0.5}, "a task has whole GPUs, not 0.5"),
        ("processes", {"address": "auto"}, "the executor processes has no address: choose ray"),
        ("serial", {"gpus_per_worker": 1}, "the executor serial has no gpus-per-worker: choose ray or slurm"),
        ("ray", {"sbatch": {"time": 3}}, "the executor ray has no sbatch: choose slurm"),
        (Serial(), {"workers": 2}, "workers is given beside an executor: give it to the executor"),
    ],
)
def test_what_is_wrong_with_an_executor_is_told_in_a_sentence(name, settings, sentence):
    with pytest.raises(CircuitsError, match=f"^{re.escape(sentence)}$"):
        choose_executor(name, **settings)


def test_executors_are_chosen_by_name_or_given():
    assert choose_executor("ray", workers=3, address=None) == Ray(workers=3)
    assert choose_executor("processes", workers=None) == Processes()
    given = Slurm(4, sbatch={"time": 5})
    assert choose_executor(given) is given
    assert all(isinstance(kind(1), Executor) for kind in EXECUTORS.values())


@pytest.mark.parametrize(("executor", "extra"), [(Ray(), "cluster"), (Slurm(1), "slurm")])
def test_what_is_not_installed_is_named_with_its_extra(executor, extra, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.__import__", _without("ray", "submitit"))
    with pytest.raises(CircuitsError, match=re.escape(f"pip install 'fact-circuits[{extra}]'")):
        executor.start(print, tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def _without(*packages):
    keep = __import__

    def load(name, *args, **kwargs):
        if name.split(".")[0] in packages:
            raise ImportError(name)
        return keep(name, *args, **kwargs)

    return load


def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as taken:
        # nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CircuitsError, match=f"^there is no Ray cluster at {address}: start one with 'ray start"):
            Ray(address=address).start(print, tmp_path).__enter__()


def test_slurm_is_refused_where_there_is_none(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CircuitsError, match="there is no sbatch here: give the command where"):
        Slurm(2).start(print, tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_options_of_sbatch_reach_slurm(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", classmethod(lambda _: 1))
    executor = Slurm(3, 2, 4, sbatch={"partition": "gpu", "time": 120, "reservation": "course"})
    text = executor._executor(tmp_path, 1)._make_submission_file_text("work", "name")
    for line in ("--partition=gpu", "--time=120", "--gpus-per-node=2", "--cpus-per-task=4", "--reservation=course"):
        assert f"#SBATCH {line}\n" in text


def test_ranges_keep_the_order_and_none_is_empty():
    for count in range(12):
        for ranges in range(1, 6):
            found = cut(range(count), ranges)
            assert [job for some in found for job in some] == list(range(count))
            lengths = [len(some) for some in found]
            assert len(found) == min(count, ranges)
            assert not lengths or max(lengths) - min(lengths) <= 1


def test_a_job_is_tried_so_often_and_each_is_counted_alone():
    tries = Tries(3)
    for job in (1, 2, 1, 2):
        tries.lose(job)
    with pytest.raises(CircuitsError, match=r"3 workers died at the same job, perhaps for lack of memory \(killed\)"):
        tries.lose(2, "killed")


class LostError(Exception):
    pass


class RaisedError(Exception):
    def __init__(self, cause):
        self.cause = cause


class Reference(SimpleNamespace):
    __hash__, __eq__ = object.__hash__, object.__eq__


class Pretended:
    """Ray as far as a crew uses it, in this process: everything is done when it is waited for, the last thing first.

    Attributes:
        nodes_now: CPUs of each node; a worker that is on none never answers.
        dies: called with a job before it is done; true if the worker dies at it.
    """

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=RaisedError)

    def __init__(self, nodes: list[int], dies=lambda _: False, stillborn: bool = False) -> None:
        self.nodes_now, self.dies, self.stillborn = nodes, dies, stillborn
        self.most, self.hired, self.killed = 0, [], []

    def put(self, value):
        return value

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._hire))

    def _hire(self, work, _):
        actor = SimpleNamespace(dead=False, queue=[])
        self.hired.append(actor)

        def do(job):
            actor.queue.append(Reference(actor=actor, call=lambda: work(job), job=job))
            self.most = max(self.most, len(actor.queue))
            return actor.queue[-1]

        actor.node = SimpleNamespace(remote=lambda: Reference(actor=actor, call=lambda: "node", job=None))
        actor.do = SimpleNamespace(remote=do)
        return actor

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in self.nodes_now]

    def wait(self, refs, **_):
        for ref in reversed(refs):
            if ref.actor.dead or ref.job is None or ref is ref.actor.queue[0]:
                return [ref], []
        raise AssertionError("nothing is ever ready")

    def get(self, ref):
        if self.stillborn or ref.actor.dead:
            raise LostError("it is dead")
        if ref.job is None:
            return ref.call()
        if self.dies(ref.job):
            ref.actor.dead = True
            raise LostError("it died")
        ref.actor.queue.remove(ref)
        try:
            return ref.call()
        except Exception as error:
            raise RaisedError(error) from None

    def kill(self, actor):
        self.killed.append(actor)


def crew(ray, work=lambda job: job**2, workers=None):
    return ray_module._Crew(ray, work, Tries(), workers=workers, cpus=1, gpus=0)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(ray_module, "_LOOK_EVERY", 0.0)


def test_every_job_is_done_once_and_few_are_pending():
    ray = Pretended([2, 1])
    found = list(crew(ray).run(range(50)))
    assert sorted(found) == [(job, job**2) for job in range(50)]
    assert len(ray.hired) == 3
    assert ray.most == 2


def test_no_more_workers_than_asked_for():
    ray = Pretended([8])
    list(crew(ray, workers=2).run(range(5)))
    assert len(ray.hired) == 2


def test_a_worker_that_dies_loses_its_jobs_and_nothing_else():
    done, died = [], []

    def dies(job):
        # the next job of a worker that dies is not blamed: it may be lost as often itself
        if job in (3, 4, 17) and died.count(job) < 4:
            died.append(job)
            return True
        return False

    def work(job):
        done.append(job)
        return -job

    ray = Pretended([2], dies)
    found = list(crew(ray, work).run(range(30)))
    assert sorted(found) == sorted((job, -job) for job in range(30))
    assert sorted(done) == list(range(30))
    assert len(ray.hired) == 2 + 12
    assert len(ray.killed) == 12


def test_a_job_that_kills_its_workers_is_given_up():
    ray = Pretended([1], lambda job: job == 3)
    with pytest.raises(CircuitsError, match=r"5 workers died at the same job, .* \(it died\); finished jobs are kept"):
        list(crew(ray).run(range(10)))
    assert len(ray.killed) == 5


def test_nodes_that_join_get_workers():
    ray = Pretended([1])
    results = crew(ray).run(range(20))
    for _ in range(5):
        next(results)
    assert len(ray.hired) == 1
    ray.nodes_now.append(2)
    assert len(list(results)) == 15
    assert len(ray.hired) == 3


def test_what_a_job_raises_is_raised():
    def work(job):
        raise CircuitsError("there is no folder")

    with pytest.raises(CircuitsError, match="^there is no folder$"):
        list(crew(Pretended([1]), work).run([1]))


def test_a_cluster_without_room_is_refused_and_so_are_workers_that_cannot_begin(monkeypatch):
    with pytest.raises(CircuitsError, match="no node of the cluster has room for a worker of 1 CPUs: ask for less"):
        list(crew(Pretended([0])).run([1]))
    with pytest.raises(CircuitsError, match="5 workers died before they had begun: it is dead"):
        list(crew(Pretended([1], stillborn=True)).run([1]))
    # all nodes go away, and none comes back
    ray = Pretended([1])
    results = crew(ray).run(range(9))
    next(results)
    monkeypatch.setattr(ray_module, "_PATIENCE", 0.0)
    ray.nodes_now.clear()
    ray.dies = lambda _: True
    with pytest.raises(CircuitsError, match="no worker of 1 CPUs has been there for 0 minutes; finished jobs are kept"):
        list(results)


def test_serial_runs_one_after_another():
    with Serial().start(lambda job: job + 1, Path()) as run:
        assert list(run([3, 1])) == [(3, 4), (1, 2)]


@needs_fork
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_processes_begin_anew_do_the_work_and_end_when_their_parent_is_killed(tmp_path):
    def parent() -> None:
        with Processes(1).start(sleep, tmp_path) as run:
            results = run([0, 600])
            assert next(results) == (0, None)
            (tmp_path / "works").touch()
            next(results)

    child = forked(parent)
    wait_for((tmp_path / "works").exists, of=child)
    family = psutil.Process(child.process).children(recursive=True)
    assert family
    kill(child)
    wait_for(lambda: not any(running(one.pid) for one in family), 20)
