import os
import pty
import subprocess
import sys
import termios

import nbclient
import nbformat
import pytest

CODE = """
from circuits.progress import track
print(sum(track(range(3), "adding", 3)))
"""


def run(code: str, terminal: bool) -> tuple[str, str]:
    """What some code prints, and what it shows."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 80))
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, text=True)
    os.write(writer, b"end")
    return result.stdout, os.read(reader, 10_000).decode()


def test_what_was_done_before_is_counted():
    _, shown = run("from circuits.progress import bar\nwith bar('adding', 10, done=4):\n    pass", True)
    assert "4/10" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_in_a_terminal_and_not_in_a_log_file(terminal):
    printed, shown = run(CODE, terminal)
    assert printed == "3\n"
    assert ("adding" in shown) == terminal
    assert terminal or shown == "end"


def test_a_bar_is_shown_in_a_notebook_without_warnings():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("adding" in str(output) for output in outputs if output.output_type == "display_data")
