"""What modules read and the gradients of what they write, layer by layer from the last, without keeping all layers.

1. A forward pass keeps the stream before each layer. The loss is taken at the positions that predict what counts.
2. From the last layer to the first, a layer runs again from its stream, and the gradient behind it is taken back
   through it: to each tensor's uses, and to the stream before it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from circuits.consistency.products import Sides
from circuits.models import LeanModel, Use
from circuits.tasks import Task
from circuits.tracing.losses import counted_tokens


def sides_by_layer(lean: LeanModel, task: Task, loss: str, batch_size: int) -> Iterator[tuple[int, dict[str, Sides]]]:
    """From the last layer to the first: its number, and tensor → the sides of its gradients for all examples."""
    counted = counted_tokens(task, loss)
    length = int(counted.nonzero()[:, 1].max())
    tokens = lean.needed(task.tokens, length).to(lean.device)
    examples = [torch.arange(first, min(first + batch_size, len(task))) for first in range(0, len(task), batch_size)]
    streams: list[list[Tensor]] = []
    behind: list[Tensor] = []
    angles = lean.angles(torch.arange(tokens.shape[1]))
    for chosen in examples:
        with torch.no_grad():
            before = [lean.embed(tokens[chosen])]
            for layer in range(lean.n_layers):
                before.append(lean.layer(layer, before[-1], angles=angles[layer]))
        behind.append(_loss_gradient(lean, before.pop(), task.tokens[chosen], counted[chosen]))
        streams.append(before)
    for layer in reversed(range(lean.n_layers)):
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for number, before in enumerate(streams):
            stream = before.pop().detach().requires_grad_()
            sides, behind[number] = _back_through(lean, layer, stream, behind[number], angles[layer])
            for name, pair in sides.items():
                found.setdefault(name, []).append(pair)
        yield layer, {name: Sides(*map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


def _loss_gradient(lean: LeanModel, last: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    where = counted.nonzero().to(lean.device)
    shares = (1 / counted.sum(1)).to(lean.device)[where[:, 0]]
    last = last.detach().requires_grad_()
    with torch.enable_grad():
        logits = lean.unembed(last[where[:, 0], where[:, 1] - 1]).float()
        targets = tokens.to(lean.device)[where[:, 0], where[:, 1]]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return torch.autograd.grad((losses * shares).sum(), last)[0]


def _back_through(
    lean: LeanModel, layer: int, stream: Tensor, behind: Tensor, angles: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    uses: dict[str, Use] = {}
    names = {row.tensor for row in lean.rows if row.layer == layer and row.component in ("attention", "mlp")}
    with torch.enable_grad():
        after = lean.layer(layer, stream, taps={name: _keep(uses) for name in names}, angles=angles)
        gradients = torch.autograd.grad(after, [stream, *(use.written for use in uses.values())], behind)
    sides = {}
    for use, gradient in zip(uses.values(), gradients[1:], strict=True):
        written, read = gradient.float(), use.read.detach().float()
        written, read = written.flatten(2), read.flatten(2)
        if use.kind == "bias":
            # its gradient is the sum over positions
            written, read = written.sum(1, keepdim=True), written.new_ones(len(written), 1, 1)
        sides[use.tensor] = written, read
    return sides, gradients[0]


def _keep(uses: dict[str, Use]) -> Callable[[Use], None]:
    def keep(use: Use) -> None:
        uses[use.tensor] = use

    return keep
