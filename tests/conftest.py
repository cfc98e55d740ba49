"""What every process of a test run needs; what tests themselves need is in ``fixtures.py``."""

import functools
import os
import signal
from collections import Counter
from pathlib import Path

import jaxtyping
from jaxtyping import install_import_hook

# a suite started in the background ignores Ctrl-C, which some tests send
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Shapes are checked while the tests run, of every function and dataclass that speaks of them. Functions made inside
# others are left out, as each call would compile their check anew; to types without shapes mypy sees. Stays installed,
# so that it also covers what is imported late
ROOT = Path(__file__).parents[1]
SHAPED = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "circuits").rglob("*.py")
    if "from jaxtyping import" in file.read_text()
]
#: In each test, of each function: what a loop calls is checked in its first rounds.
CHECKED_CALLS = 3
calls = Counter()
check_shapes = jaxtyping.jaxtyped


def checked_at_first(function, typechecker):
    """A function whose first calls in each test are checked; the check is compiled when the first of them comes."""
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        calls[call] += 1
        if calls[call] > CHECKED_CALLS:
            return function(*args, **kwargs)
        checked = checked or check_shapes(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def shaped(*, typechecker):
    def decorate(checked):
        function = getattr(checked, "__func__", getattr(checked, "fget", checked))
        speaks = "jaxtyping" in str(list(getattr(function, "__annotations__", {}).values()))
        if not speaks or "<locals>" in function.__qualname__:
            return checked
        if isinstance(checked, type):
            return check_shapes(checked, typechecker=typechecker)
        at_first = checked_at_first(function, typechecker)
        return at_first if checked is function else type(checked)(at_first)

    return decorate


jaxtyping.jaxtyped = shaped
install_import_hook(SHAPED, "beartype.beartype")


def pytest_runtest_setup():
    calls.clear()


def pytest_configure(config):
    # a process that hands its tests to others runs none: its imports would only keep them waiting
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")
