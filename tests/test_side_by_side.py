"""Calls side by side: in order, seen, and stopped together."""

import os
import time
from functools import partial

import pytest

from circuits import progress
from circuits.errors import CircuitsError
from circuits.processes import Call, check_order, say_from_call, side_by_side
from tests.processes import needs_fork


@needs_fork
@pytest.mark.usefixtures("forked_workers")
def test_calls_wait_for_those_they_name_and_are_heard(tmp_path):
    said = []
    calls = [
        Call("second", os.mkdir, {"path": tmp_path / "first" / "second"}, after="first"),
        Call("first", os.mkdir, {"path": tmp_path / "first"}),
        Call("third", partial(say_from_call, "done"), after="second"),
    ]
    side_by_side(calls, say=said.append)
    assert (tmp_path / "first" / "second").is_dir()
    assert said == ["done"]


def test_one_worker_is_this_process(tmp_path):
    said, done = [], []
    calls = [
        Call("second", partial(done.append, 2), after="first"),
        Call("first", partial(done.append, 1)),
        Call("third", partial(say_from_call, "done")),
    ]
    side_by_side(calls, workers=1, say=said.append)
    assert (sorted(done), done.index(1) < done.index(2), said) == ([1, 2], True, ["done"])


def test_what_a_call_raises_stops_the_others(tmp_path):
    begun = time.monotonic()
    with pytest.raises(FileExistsError):
        side_by_side([Call("long", partial(time.sleep, 120)), Call("wrong", os.mkdir, {"path": tmp_path})])
    assert time.monotonic() - begun < 100


def test_a_call_that_waits_for_nobody_is_refused():
    with pytest.raises(CircuitsError, match="the call late waits for early, which will not be done"):
        check_order([Call("late", print, after="early")])
    with pytest.raises(CircuitsError, match="the call late waits for late"):
        check_order([Call("late", print, after="late")])
    with pytest.raises(CircuitsError, match="the call one waits for other"):
        check_order([Call("one", print, after="other"), Call("other", print, after="one")])
    with pytest.raises(CircuitsError, match="two calls have the name one"):
        check_order([Call("one", print), Call("one", print)])


def test_bars_of_a_process_that_nobody_sees_are_reported(monkeypatch):
    reports = []
    monkeypatch.setattr(progress, "_elsewhere", [reports.append])
    with progress.bar("work", 10, "step", 3) as bar:
        bar.update(2)
    kinds, bars, *_, before, now = zip(*reports, strict=True)
    assert (kinds[0], kinds[-1], len(set(bars)), set(before), now[0], now[-1]) == ("bar", "close", 1, {3}, 3, 5)
    assert list(progress.track("ab", "letters", 2)) == ["a", "b"]
    assert reports[-1][2:] == ("letters", 2, "it", 0, 2)
