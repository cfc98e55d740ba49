"""A gradient trace: what it holds, what a notebook shows of it, and its file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
from torch import Tensor

from circuits.html import html_table
from circuits.storage import read_tensors, write_tensors
from circuits.units import Head, Neuron, layer_of

#: What is measured at the hook points of heads and neurons.
MEASURES: tuple[str, ...] = ("gradient_norm", "gradient_x_activation")


@dataclass(frozen=True)
class GradientTrace:
    """How strongly one task's loss depends on each parameter.

    Attributes:
        task: name of the task.
        gradients: parameter name → mean over examples (or batches) of the statistic of its gradient, float32, in the
            parameter's shape. Tied embeddings are one parameter, ``embed.W_E``, whose gradient comes from both uses.
        hook_points: ``head.gradient_norm`` and ``head.gradient_x_activation`` as ``[layer, head]``, and the same for
            ``neuron`` as ``[layer, neuron]``: means over examples of each one's own loss.
        examples: number of examples.
        provenance: model and dataset fingerprints, statistic, loss, versions. The model of a trace over several
            checkpoints or over training is the last one.
    """

    task: str
    gradients: dict[str, Tensor]
    hook_points: dict[str, Tensor]
    examples: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(gradient.numel() for gradient in self.gradients.values())
        return f"GradientTrace({self.task!r}, parameters={count:,}, examples={self.examples})"

    def _repr_html_(self) -> str:
        """What Jupyter shows: what was traced, and the sum by layer."""
        by_layer: dict[str, float] = {}
        for name, gradient in self.gradients.items():
            layer = layer_of(name)
            key = "–" if layer is None else str(layer)
            by_layer[key] = by_layer.get(key, 0.0) + float(gradient.double().sum())
        total = sum(by_layer.values())
        rows = [(layer, value, f"{value / total:.1%}" if total else "") for layer, value in by_layer.items()]
        made = [(self.task, str(self.provenance.get("statistic", "–")), self.examples)]
        shown = html_table(made, ["trace of", "statistic", "examples"])
        return f"<div>{shown}{html_table(rows, ['layer', 'sum', 'share'])}</div>"

    def units(self, kind: type[Head] | type[Neuron]) -> pandas.DataFrame:
        """The hook-point trace as a table: ``unit``, ``layer``, ``index``, ``gradient_norm`` and so on."""
        values = {name: self.hook_points[f"{kind.NOUN}.{name}"] for name in MEASURES}
        layers, count = values[MEASURES[0]].shape
        units = [kind(layer, index) for layer in range(layers) for index in range(count)]
        return pandas.DataFrame(
            {
                "unit": [str(unit) for unit in units],
                "layer": [unit.layer for unit in units],
                "index": [unit.index for unit in units],
                **{name: value.flatten().numpy() for name, value in values.items()},
            }
        )

    def save(self, path: str | Path) -> None:
        """Save as safetensors, with axes in their order in memory, so that nothing is copied."""
        orders = {name: _order_in_memory(value) for name, value in self.gradients.items()}
        tensors = {f"gradients/{name}": value.permute(orders[name]) for name, value in self.gradients.items()}
        tensors |= {f"hook_points/{name}": value for name, value in self.hook_points.items()}
        metadata = {
            "kind": "trace",
            "task": self.task,
            "examples": self.examples,
            "provenance": self.provenance,
            "orders": {name: order for name, order in orders.items() if order != sorted(order)},
        }
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "GradientTrace":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        tensors, metadata = read_tensors(Path(path), "trace")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        gradients = part("gradients/")
        for name, order in metadata.get("orders", {}).items():
            gradients[name] = gradients[name].permute([order.index(axis) for axis in range(len(order))])
        return cls(
            metadata["task"],
            gradients,
            part("hook_points/"),
            metadata["examples"],
            metadata["provenance"],
        )


def _order_in_memory(value: Tensor) -> list[int]:
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda axis: -strides[axis])
