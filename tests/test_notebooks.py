"""The notebooks, and what executes them: `notebooks/execute.py`."""

import base64
import copy
import importlib.util
import io
import sys
from pathlib import Path

import nbformat
import numpy
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_notebook_is_executed_in_the_site_and_has_outputs(tool):
    there = {path.stem: path for path in FOLDER.glob("*.ipynb")}
    assert there.keys() == tool.NEEDED.keys()
    index = (FOLDER.parent / "docs" / "index.md").read_text(encoding="utf-8")
    for name, path in there.items():
        assert f"../notebooks/{name}\n" in index, name
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert [*tool.faults(notebook)] == [], name
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], name
        assert any(tool.IMAGE in one.get("data", {}) for cell in cells for one in cell.outputs), name
        assert path.stat().st_size < 1_500_000, name


def packed(*numbers):
    return {"dtype": "f8", "bdata": base64.b64encode(numpy.array(numbers, float).tobytes()).decode()}


def figure(tool, numbers, image=None):
    if image is None:
        Image.new("RGBA", (2, 2), (255, 0, 0, 255)).save(written := io.BytesIO(), "PNG")
        image = base64.b64encode(written.getvalue()).decode()
    return {tool.FIGURE: {"data": [{"z": packed(*numbers), "name": "L2H1"}]}, tool.IMAGE: image}


def test_outputs_say_the_same_if_their_words_do_and_their_numbers_nearly(tool):
    assert tool.difference("L2H1  0.531\n", "L2H1 0.530") is None
    assert tool.difference("L2H1 0.53", "L2H3 0.53") is not None
    assert tool.difference("L2H1 0.53", "L2H1 0.63") is not None
    assert tool.difference("−0.53", "0.53") is not None
    assert tool.difference("1,234 parameters", "1,434 parameters") is not None
    assert tool.difference(["a"], ["a", "b"]) is not None
    assert tool.difference({"a": 1}, {"b": 1}) is not None


def test_figures_are_compared_by_what_they_show_and_images_only_where_nothing_else_is(tool):
    shown = figure(tool, [1.0, numpy.nan])
    assert tool.difference(shown, figure(tool, [1.0, numpy.nan], image="another font")) is None
    assert tool.difference(shown, figure(tool, [1.5, numpy.nan])) is not None
    assert tool.difference(shown, figure(tool, [1.0, numpy.nan, 2.0])) is not None
    assert tool.difference(shown, {tool.FIGURE: shown[tool.FIGURE]}) is not None
    assert tool.difference({tool.IMAGE: "aaaa"}, {tool.IMAGE: "bbbb"}) is not None


def test_faults_of_outputs_are_told(tool):
    def told(*outputs):
        cell = new_code_cell("1")
        cell.outputs = list(outputs)
        return " ".join(tool.faults(new_notebook(cells=[cell])))

    assert told(new_output("stream", name="stdout", text="fine")) == ""
    assert "stderr: careful" in told(new_output("stream", name="stderr", text="careful"))
    shown = {tool.FIGURE: {}, tool.IMAGE: "a"}
    assert told(new_output("display_data", shown)) == ""
    assert "no image" in told(new_output("display_data", {tool.FIGURE: {}}))
    assert "more than 150,000" in told(new_output("display_data", {tool.IMAGE: "a" * 210_000}))
    assert "this machine" in told(new_output("stream", name="stdout", text=f"in {tool.ROOT}/runs"))


def test_a_notebook_is_executed_and_written_and_then_left_as_it_is(tool, tmp_path, monkeypatch):
    path = tmp_path / "two_cells.ipynb"
    text = (
        "from IPython.display import display\n"
        f"display({{'{tool.WIDGET}': {{'model_id': '1'}}}}, raw=True)\n"
        f"display({figure(tool, [1.0])}, raw=True)\n"
        "print('a'), print('b')"
    )
    nbformat.write(new_notebook(cells=[new_markdown_cell("words"), new_code_cell(text), new_code_cell("1 + 1")]), path)
    assert tool.run(path, check=False) == []
    written = nbformat.read(path, as_version=4)
    outputs = written.cells[1].outputs
    assert [one.output_type for one in outputs] == ["display_data", "stream", "execute_result"]
    assert outputs[1].text == "a\nb\n"
    assert "execution" not in written.cells[1].metadata
    assert set(written.metadata) == {"kernelspec", "language_info"}
    assert written.cells[2].outputs[0].data["text/plain"] == "2"

    image = outputs[0].data[tool.IMAGE]
    assert Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").getpixel((1, 1)) == (255, 0, 0)

    # what another run gives, without the time that a kernel takes to start
    again = copy.deepcopy(written)
    monkeypatch.setattr(tool, "execute", lambda notebook, _: notebook.update(copy.deepcopy(again)))
    before = path.read_bytes()
    again.cells[1].outputs[0].data[tool.IMAGE] = "another font"
    assert tool.run(path, check=True) == tool.run(path, check=False) == []
    assert path.read_bytes() == before

    again.cells[2].outputs[0].data["text/plain"] = "3"
    (wrong,) = tool.run(path, check=True)
    assert "cell 2 no longer says what is there" in wrong
    assert "--- there\n2\n--- now\n3" in wrong
    assert path.read_bytes() == before
    assert tool.run(path, check=False) == []
    kept = nbformat.read(path, as_version=4)
    assert kept.cells[2].outputs[0].data["text/plain"] == "3"
    assert kept.cells[1].outputs[0].data[tool.IMAGE] == image


def test_what_is_skipped_is_said_with_the_reason(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "WRITTEN", tmp_path / "written")
    monkeypatch.setattr(tool.Chromium, "find_browser", lambda **_: "/usr/bin/chromium")
    monkeypatch.setattr(sys, "argv", ["execute.py", "--check", "--minutes", "2"])
    assert tool.main() == 0
    said = capsys.readouterr().out
    assert "first_steps: skipped: runs/models/smollm2-135m-instruct is not there" in said
    assert "two_tasks: skipped: it takes 3 minutes" in said
    assert "study: skipped: runs/study/comparison is not there; 'make study' makes it" in said
    monkeypatch.setattr(tool.Chromium, "find_browser", lambda **_: None)
    assert tool.main() == 0
    assert "all are skipped: their figures are kept as images" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["execute.py"])
    assert tool.main() == 1
