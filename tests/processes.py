"""Processes that tests start and kill. They are forked, so that none of them waits for imports."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@dataclass
class Child:
    """A process that a test started: its id, what it wrote, and how it ended, as far as that is known."""

    process: int
    output: IO[str]
    code: int | None = None

    def has_ended(self) -> bool:
        """Whether it has: its exit code, or the negative number of the signal that killed it, is then known."""
        if self.code is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()


def forked(work: Callable[[], object]) -> Child:
    """A child that does some work and ends with code 0, or 1 if the work raises."""
    output = tempfile.TemporaryFile("w+", buffering=1)  # noqa: SIM115
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = output
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            output.flush()
            os._exit(code)
    return Child(process, output)


def ended(child: Child, within: float = 600) -> int:
    """How a child ended. What it said is shown if the test fails."""
    until = time.monotonic() + within
    while not child.has_ended():
        if time.monotonic() > until:
            os.kill(child.process, signal.SIGKILL)
            os.waitpid(child.process, 0)
            raise AssertionError(f"the child did not end; it said:\n{child.said()}")
        time.sleep(0.002)
    print(child.said())  # noqa: T201
    return child.code


def kill(child: Child) -> None:
    """Kill a child that is still running."""
    os.kill(child.process, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL


def wait_for(condition: Callable[[], bool], within: float = 600, *, of: Child | None = None) -> None:
    """Wait for a condition; fail at once if the child that is to bring it about has ended without."""
    until = time.monotonic() + within
    while not condition():
        # what it did last may have been just that
        if of is not None and of.has_ended() and not condition():
            raise AssertionError(f"the child ended with {of.code} before that; it said:\n{of.said()}")
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
