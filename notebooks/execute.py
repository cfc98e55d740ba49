"""Execute the notebooks: `make notebooks`. With --check nothing is written, and what no longer matches is an error.

1. A notebook whose model or study is not there, or that takes longer than --minutes, is skipped, and it is said why.
2. Figures are kept as plotly's own description, which is compared, and as an image, which every static view shows.
3. Outputs that say the same as those that are there leave the file as it was: numbers may differ by a percent, since
   processors round differently, and images of equal figures in any way, since fonts do.
"""

import argparse
import base64
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy
from choreographer.browsers.chromium import Chromium
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
#: What notebooks write; emptied first, so that nothing is found finished.
WRITTEN = ROOT / "runs" / "notebooks"
FIGURE, IMAGE, WIDGET = "application/vnd.plotly.v1+json", "image/png", "application/vnd.jupyter.widget-view+json"
MOST_BYTES = 150_000
#: On a busy machine the browser that draws images now and then sends a message in pieces, of which a warning remains.
_TRIES = 2
_NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Needed:
    """What a notebook needs: a folder, how to get it, and minutes of one thread."""

    folder: str
    command: str
    minutes: float


def on_smollm2(minutes: float) -> Needed:
    return Needed("runs/models/smollm2-135m-instruct", "python -m benchmarks.smollm2", minutes)


def on_study(minutes: float) -> Needed:
    return Needed("runs/study/comparison", "make study", minutes)


NEEDED = {
    "first_steps": on_smollm2(1),
    "two_tasks": on_smollm2(3),
    "study": on_study(1),
    "sweeps": on_smollm2(1),
    "two_checkpoints": on_study(2),
}


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in a new kernel, and keep what does not change from run to run.

    Raises:
        CellExecutionError: a cell fails, or as nbclient says, takes too long or ends the kernel.
    """
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+png"
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1800,
        resources=resources,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # what is left of a bar of progress that is gone
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
            for output in cell.outputs:
                if IMAGE in output.get("data", {}):
                    output.data[IMAGE] = smaller(output.data[IMAGE])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def smaller(image: str) -> str:
    """The same image, packed better than a browser does, and without the transparency that figures have none of."""
    shown = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
    shown.save(written := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def faults(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What is wrong with the outputs of an executed notebook."""
    places = {str(ROOT), str(ROOT.resolve()), str(Path.home())} - {"/"}
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output.get("name") == "stderr":
                yield f"cell {number} says on stderr: {output['text'].strip()[:300]}"
            if FIGURE in data and IMAGE not in data:
                yield f"cell {number}: the figure has no image"
            if len(data.get(IMAGE, "")) * 3 // 4 > MOST_BYTES:
                yield f"cell {number}: the image has {len(data[IMAGE]) * 3 // 4:,} bytes, more than {MOST_BYTES:,}"
            text = json.dumps([output.get("text", ""), {kind: value for kind, value in data.items() if kind != IMAGE}])
            if found := next((place for place in places if place in text), None):
                yield f"cell {number} names {found}, a folder of this machine"


def difference(old: Any, new: Any, at: str = "") -> str | None:
    """Where two outputs, or parts of them, first say something else; None if nowhere."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return f"{at}: {', '.join(sorted(old.keys() ^ new.keys()))}"
        if "bdata" in old:
            first, second = _numbers(old), _numbers(new)
            close = first.shape == second.shape and bool(numpy.isclose(first, second, 0.01, 0.002, True).all())
            return None if close else at
        shown = [key for key in old if not (key == IMAGE and FIGURE in old)]
        found = (difference(old[key], new[key], f"{at}.{key}") for key in shown)
        return next((place for place in found if place is not None), None)
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{at}: {len(old)} there, {len(new)} now"
        found = (
            difference(one, other, f"{at}[{place}]") for place, (one, other) in enumerate(zip(old, new, strict=True))
        )
        return next((place for place in found if place is not None), None)
    if isinstance(old, str) and isinstance(new, str):
        words = [" ".join(_NUMBER.sub("#", text).split()) for text in (old, new)]
        numbers = [[one.replace(",", "").replace("−", "-") for one in _NUMBER.findall(text)] for text in (old, new)]
        alike = words[0] == words[1] and all(map(_close, *[map(float, one) for one in numbers]))
        return None if alike else at
    if isinstance(old, float | int) and isinstance(new, float | int):
        return None if _close(old, new) else f"{at}: {old} there, {new} now"
    return None if old == new else f"{at}: {old} there, {new} now"


def _close(old: float, new: float) -> bool:
    return math.isclose(old, new, rel_tol=0.01, abs_tol=0.002)


def _numbers(packed: dict[str, str]) -> numpy.ndarray:
    """An array as plotly writes it; its shape is another of its fields."""
    return numpy.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).astype(float)


def changed_cells(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> dict[int, str]:
    """The cells whose outputs say something else, and where; the outputs of the others become the old ones."""
    changed = {}
    for number, (before, after) in enumerate(zip(old.cells, new.cells, strict=True)):
        if after.cell_type != "code":
            continue
        place = difference(before.outputs, after.outputs)
        if place is None:
            after.outputs = before.outputs
        else:
            changed[number] = place
    return changed


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell says, without its figures."""
    parts = [one.get("text") or one.get("data", {}).get("text/plain") or "" for one in cell.outputs]
    return "\n".join(part for part in parts if part).strip()


def run(path: Path, *, check: bool) -> list[str]:
    """Execute one notebook, and write it if it says something else than before; what is wrong with it."""
    old = nbformat.read(path, as_version=4)
    for _ in range(_TRIES):
        new = nbformat.read(path, as_version=4)
        try:
            execute(new, path.parent)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return [f"a cell fails: {error}"]
        wrong = [*faults(new)]
        if not wrong:
            break
    changed = changed_cells(old, new)
    if check:
        for number, place in changed.items():
            wrong.append(
                f"cell {number} no longer says what is there (outputs{place}): 'make notebooks' writes it anew\n"
                f"--- there\n{text_of(old.cells[number])}\n--- now\n{text_of(new.cells[number])}"
            )
    elif not wrong and (changed or new != old):
        nbformat.write(new, path)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"all if none is given: {', '.join(NEEDED)}")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one no longer says what is there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="skip those that take longer")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NEEDED]:
        parser.error(f"there is no notebook {unknown[0]}: choose from {', '.join(NEEDED)}")
    if Chromium.find_browser(skip_local=False) is None:
        print("all are skipped: their figures are kept as images, and no Chrome or Chromium is there to draw them")
        return int(not options.check)
    shutil.rmtree(WRITTEN, ignore_errors=True)
    failed = False
    for name, needed in NEEDED.items():
        if options.names and name not in options.names:
            continue
        if needed.minutes > options.minutes:
            print(f"{name}: skipped: it takes {needed.minutes:g} minutes", flush=True)
        elif not (ROOT / needed.folder).is_dir():
            print(f"{name}: skipped: {needed.folder} is not there; '{needed.command}' makes it", flush=True)
        else:
            wrong = run(FOLDER / f"{name}.ipynb", check=options.check)
            print(f"{name}: {'; '.join(wrong) or 'as it should be'}", flush=True)
            failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
