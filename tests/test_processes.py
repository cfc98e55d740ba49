import time

import pytest

from tests.processes import ended, forked, needs_fork, wait_for

pytestmark = needs_fork


def test_whoever_waits_for_a_child_that_dies_is_told_at_once_and_what_it_said():
    def dies() -> None:
        print("no room")  # noqa: T201
        raise OSError("the disk is full")

    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"ended with 1 before that(.|\n)*no room(.|\n)*the disk is full"):
        wait_for(lambda: False, 600, of=forked(dies))
    assert time.monotonic() - begun < 60


def test_what_a_child_did_last_counts(tmp_path):
    child = forked((tmp_path / "done").touch)
    wait_for((tmp_path / "done").exists, of=child)
    assert ended(child) == 0
