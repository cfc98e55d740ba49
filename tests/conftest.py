"""What every process of a test run needs; what tests themselves need is in ``fixtures.py``."""

import os
import signal
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
check_shapes = jaxtyping.jaxtyped


def shaped(*, typechecker):
    def decorate(checked):
        function = getattr(checked, "__func__", getattr(checked, "fget", checked))
        speaks = "jaxtyping" in str(list(getattr(function, "__annotations__", {}).values()))
        return (
            check_shapes(checked, typechecker=typechecker)
            if speaks and "<locals>" not in function.__qualname__
            else checked
        )

    return decorate


jaxtyping.jaxtyped = shaped
install_import_hook(SHAPED, "beartype.beartype")


def pytest_configure(config):
    # a process that hands its tests to others runs none: its imports would only keep them waiting
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")
