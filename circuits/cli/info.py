"""``circuits info``: what a checkpoint is."""

from circuits.cli.options import Device, Dtype, Model
from circuits.cli.terminal import busy, cell, show


def info(model: Model, dtype: Dtype = "float32", device: Device = None) -> None:
    """Say what a checkpoint is, and whether it computes the same here as in Hugging Face's transformers."""
    with busy(f"loading {model}"):
        import pandas

        from circuits.models import describe

        facts = describe(model, dtype, device)
    show(pandas.DataFrame({"": list(facts), "value": [cell(value) for value in facts.values()]}), str(model), 100)
