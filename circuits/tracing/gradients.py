"""Cross-task gradient trace (arXiv 2505.16178, Fig. 1b; docs/method.md, section 1).

For a task with examples x and per-example loss L(x; θ), the mean cross-entropy over the answer's tokens:

1. A batch of examples runs forward once. At every weight of a head or neuron, its input a and its output y are kept.
2. One backward pass of the summed loss gives ∂L/∂y at every position. Examples do not mix, so each row of it is the
   gradient of that example's own loss.
3. Example by example, the weight's gradient is the matrix product Σ over positions a ⊗ ∂L/∂y, a bias's is Σ ∂L/∂y,
   written into one reused buffer; its absolute value, square or itself is added to the accumulator.
4. At the hook points of heads (z) and neurons (post) the same pass gives each example's gradient norm and gradient ×
   activation.
5. Sums are divided by the number of examples: the trace does not depend on batch size or order beyond rounding.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.datasets import Role, Task
from circuits.errors import CircuitsError
from circuits.models import (
    HookedTransformer,
    HookPoints,
    Projection,
    Recording,
    facts_of,
    final_residual,
    recording,
    unembed,
    unit_projections,
)
from circuits.progress import track
from circuits.storage import provenance, read_tensors, write_tensors
from circuits.units import Head, Neuron

if TYPE_CHECKING:
    from collections.abc import Callable

STATISTICS: "dict[str, Callable[[Tensor], Tensor]]" = {
    "abs": Tensor.abs_,
    "square": Tensor.square_,
    "signed": lambda gradient: gradient,
}
LOSSES: tuple[str, ...] = ("answer", "all")
_HOOKED = ("gradient_norm", "gradient_x_activation")


@dataclass(frozen=True)
class GradientTrace:
    """How strongly one task's loss depends on each parameter of heads and neurons.

    Attributes:
        task: name of the task.
        gradients: parameter name → mean over examples of the statistic of its gradient, float32, in the parameter's
            shape.
        hook_points: ``head.gradient_norm`` and ``head.gradient_x_activation`` as ``[layer, head]``, and the same for
            ``neuron`` as ``[layer, neuron]``: means over examples.
        examples: number of examples.
        provenance: model and dataset fingerprints, statistic, loss, versions.
    """

    task: str
    gradients: dict[str, Tensor]
    hook_points: dict[str, Tensor]
    examples: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(gradient.numel() for gradient in self.gradients.values())
        return f"GradientTrace({self.task!r}, parameters={count:,}, examples={self.examples})"

    def units(self, kind: type[Head] | type[Neuron]) -> pandas.DataFrame:
        """The hook-point trace as a table: ``unit``, ``layer``, ``index``, ``gradient_norm`` and so on."""
        values = {name: self.hook_points[f"{kind.NOUN}.{name}"] for name in _HOOKED}
        layers, count = values[_HOOKED[0]].shape
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
        """Save as safetensors."""
        tensors = {f"gradients/{name}": value for name, value in self.gradients.items()}
        tensors |= {f"hook_points/{name}": value for name, value in self.hook_points.items()}
        metadata = {"kind": "trace", "task": self.task, "examples": self.examples, "provenance": self.provenance}
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

        return cls(
            metadata["task"],
            part("gradients/"),
            part("hook_points/"),
            metadata["examples"],
            metadata["provenance"],
        )


def example_losses(model: HookedTransformer, task: Task, loss: str = "answer") -> Float[Tensor, " example"]:
    """Each example's loss: mean cross-entropy in nats over its answer tokens, or over ``all`` its tokens but the first.

    Raises:
        CircuitsError: there is no such loss.
    """
    if loss not in LOSSES:
        raise CircuitsError(f"there is no loss {loss!r}: choose from {', '.join(LOSSES)}")
    counted = task.answer_mask if loss == "answer" else task.roles != Role.PADDING
    counted = counted.clone()
    counted[:, 0] = False
    where = counted.nonzero().to(model.cfg.device)
    residual = final_residual(model, task.tokens)
    logits = unembed(model, residual[where[:, 0], where[:, 1] - 1]).float()
    targets = task.tokens.to(model.cfg.device)[where[:, 0], where[:, 1]]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(task), device=losses.device).index_add(0, where[:, 0], losses)
    return sums / counted.sum(1).to(losses.device)


def trace_gradients(
    model: HookedTransformer,
    task: Task,
    statistic: str = "abs",
    loss: str = "answer",
    batch_size: int = 32,
) -> GradientTrace:
    """Trace a task's gradients at every parameter of heads and neurons, example by example.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        statistic: of each example's gradient: ``abs``, ``square`` (diagonal Fisher) or ``signed``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass; changes speed and memory, not the result.

    Raises:
        CircuitsError: there is no such statistic or loss, or the model was not loaded with `circuits.load_model`.

    Source:
        arXiv 2505.16178, section 3 and Fig. 1b.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.datasets import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> trace_gradients(model, Task.from_dataset(dataset, "qa_id", tokenizer))
        GradientTrace('qa_id', parameters=737,280, examples=12)
    """
    if statistic not in STATISTICS:
        raise CircuitsError(f"there is no statistic {statistic!r}: choose from {', '.join(STATISTICS)}")
    projections = unit_projections(model)
    sums: dict[str, Tensor] = {}
    hooked = {name: torch.zeros(0) for name in (f"{kind.NOUN}.{value}" for kind in (Head, Neuron) for value in _HOOKED)}
    batches = -(-len(task) // batch_size)
    for batch in track(task.batches(batch_size), f"trace {task.name}", batches, "batch"):
        with torch.enable_grad(), recording(model) as record:
            losses = example_losses(model, batch, loss)
        names = list(record.activations)
        wanted = [name for name in names if record.activations[name].requires_grad]
        gradients = dict(
            zip(wanted, torch.autograd.grad(losses.sum(), [record.activations[name] for name in wanted]), strict=True)
        )
        for projection in projections:
            _accumulate(sums, projection, record, gradients, statistic)
        _accumulate_hook_points(hooked, model, record, gradients)
    return GradientTrace(
        task.name,
        {row.parameter: row.arrange(sums[row.parameter] / len(task)).cpu() for row in projections},
        {name: (value / len(task)).cpu() for name, value in hooked.items()},
        len(task),
        provenance(
            **facts_of(model),
            task=task.provenance,
            statistic=statistic,
            loss=loss,
        ),
    )


def _accumulate(
    sums: dict[str, Tensor],
    projection: Projection,
    record: Recording,
    gradients: dict[str, Tensor],
    statistic: str,
) -> None:
    """Add the statistic of every example's gradient of one parameter."""
    change = STATISTICS[statistic]
    outputs = record.flat(projection.writes, gradients[projection.writes]).detach().float()
    if projection.reads is None:
        total = change(outputs.sum(1)).sum(0)
        sums[projection.parameter] = sums[projection.parameter] + total if projection.parameter in sums else total
        return
    inputs = record.flat(projection.reads).detach().float()
    if projection.parameter not in sums:
        sums[projection.parameter] = inputs.new_zeros(inputs.shape[2], outputs.shape[2])
    buffer = inputs.new_empty(inputs.shape[2], outputs.shape[2])
    for example_inputs, example_outputs in zip(inputs, outputs, strict=True):
        torch.mm(example_inputs.T, example_outputs, out=buffer)
        sums[projection.parameter] += change(buffer)


def _accumulate_hook_points(
    hooked: dict[str, Tensor], model: HookedTransformer, record: Recording, gradients: dict[str, Tensor]
) -> None:
    """Add every example's gradient norm and gradient × activation at heads and neurons."""
    layers = [HookPoints(layer) for layer in range(model.cfg.n_layers)]
    for kind, names in ((Head, [hooks.z for hooks in layers]), (Neuron, [hooks.post for hooks in layers])):
        norms, products = [], []
        for name in names:
            activation, gradient = record.activations[name].detach().float(), gradients[name].float()
            dims = (1, 3) if kind is Head else (1,)
            norms.append(gradient.square().sum(dims).sqrt().sum(0))
            products.append((gradient * activation).sum(dims).sum(0))
        for value, per_layer in zip(_HOOKED, (norms, products), strict=True):
            name, total = f"{kind.NOUN}.{value}", torch.stack(per_layer)
            hooked[name] = hooked[name] + total if hooked[name].numel() else total
