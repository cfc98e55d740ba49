"""Running the command, in a process of its own or in this one."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from circuits.cli import main

BIN = Path(sys.executable).parent / "circuits"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own."""
    return subprocess.run([BIN, *map(str, arguments)], capture_output=True, text=True)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has waited for its imports already."""
    out, err = io.StringIO(), io.StringIO()
    words = ["circuits", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(words, end.value.code or 0, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert result.returncode == 2, result
    assert result.stderr.startswith("circuits: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
