"""The sums of a gradient trace that is being made (docs/method.md, section 1).

For a task with examples x and per-example loss L(x; θ), the mean cross-entropy over the answer's tokens:

1. A batch of examples runs forward once, up to the last token that predicts anything. At every use of a traced tensor,
   what it is applied to, x, is kept.
2. The loss is taken at the positions that count, and only these are unembedded. One backward pass of the summed loss
   gives ∂L/∂y of what every use writes, y. Examples do not mix, so each row of it is the gradient of that example's own
   loss.
3. As soon as ∂L/∂y of a use is known, the statistic of each example's gradient, such as |Σ over positions of ∂L/∂y ⊗
   x|, is added to the parameter's sum (`circuits.tracing.accumulation`). Per batch, it is the statistic of the gradient
   of the batch's mean loss instead.
4. At the hook points of heads (z) and neurons (post) the same pass gives each example's gradient norm and gradient ×
   activation.
5. If a user has hooked functions into the model, these must be run: then every example (or batch) has a backward pass
   of its own through the hookable model.
6. In the end, sums are divided by the number of examples (or batches). Per example, the trace does not depend on batch
   size or order beyond rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import LeanModel, Model, Row, Taps, Use, checkpoint_of, hook_name, lean_model
from circuits.models.rows import Kind
from circuits.storage import provenance, read_tensors, write_tensors
from circuits.tasks import Task
from circuits.tracing.accumulation import STATISTICS, Products, add_embeddings, add_products, add_tied, add_vectors
from circuits.tracing.losses import counted_tokens, example_losses, traced_rows
from circuits.tracing.settings import TraceSettings, check_identity
from circuits.tracing.trace import MEASURES, GradientTrace
from circuits.units import Head, Neuron

#: Bytes of what modules read and of gradients of what they wrote, kept until enough is there to be worked on together.
_WAITING = 1 << 26
#: Logits formed at a time.
_LOGITS_AT_A_TIME = 1 << 23


class RunningTrace:
    """The sums of a trace that is being made.

    Attributes:
        settings: what is traced.
        sums: tensor of the checkpoint → sum of the statistic, in the checkpoint's layout.
        hook_points: sums at the hook points.
        done: examples that were added.
    """

    def __init__(self, settings: TraceSettings) -> None:
        self.settings = settings
        self.sums: dict[str, Tensor] = {}
        self.hook_points: dict[str, Tensor] = {}
        self.done = 0

    def _prepare(self, lean: LeanModel) -> None:
        """Make room, or check that there is room of the right shape and that it lies where the model does."""
        layout = lean.layout
        tensors = dict.fromkeys(row.tensor for row in traced_rows(lean.rows, self.settings.components))
        shapes = {name: tuple(lean.tensors[name].shape) for name in tensors}
        units = {Head: layout.n_heads, Neuron: layout.d_mlp}
        if not self.sums:
            self.sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
            self.hook_points = {
                f"{kind.NOUN}.{name}": torch.zeros(layout.n_layers, count)
                for kind, count in units.items()
                for name in MEASURES
            }
        elif shapes != {name: tuple(value.shape) for name, value in self.sums.items()}:
            raise CircuitsError("the checkpoints are not the same kind of model: their parameters have other shapes")
        self.to(lean.device)

    def to(self, device: str | torch.device) -> "RunningTrace":
        """Move the sums; the same object."""
        self.sums = {name: value.to(device) for name, value in self.sums.items()}
        self.hook_points = {name: value.to(device) for name, value in self.hook_points.items()}
        return self

    def add(self, lean: LeanModel, batch: Task) -> None:
        """Add the gradients of a batch at a model without hooked functions."""
        self._prepare(lean)
        settings, statistic = self.settings, self.settings.statistic
        share = 1 / len(batch) if settings.per == "batch" else 1.0
        as_one = settings.per == "batch" or statistic == "signed"
        tied = next(row.tensor for row in lean.rows if row.kind == "embedding")
        tied = tied if any(row.kind == "unembedding" and row.tensor == tied for row in lean.rows) else ""
        waiting: list[Products] = []
        start: dict[str, Use] = {}
        behind: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

        def grouped(rows: Tensor) -> Tensor:
            # the heads of a norm that sees each by itself are more rows
            rows = rows.float().flatten(1, -2)
            return rows.flatten(0, 1)[None] if as_one else rows

        def wrote(use: Use, reads: Tensor, gradient: Tensor) -> None:
            total, reads, gradient = self.sums[use.tensor], grouped(reads), grouped(gradient)
            if use.kind in ("weight", "unembedding"):
                sides = (reads, gradient) if use.inputs_first else (gradient, reads)
                waiting.append(Products(total, *sides))
            else:
                add_vectors(total, gradient if use.kind == "bias" else gradient * reads, statistic)
            if sum(one.gradients.nbytes + one.inputs.nbytes for one in waiting) > _WAITING:
                add_products(waiting, statistic)
                waiting.clear()

        def tap(use: Use) -> None:
            if use.kind in ("embedding", "position"):
                start[use.kind] = use
                return
            # the values, not what they were computed from: the graph is freed as it is gone through. A function that
            # knew the tensor it is hooked to would keep it, and the graph before it, for ever
            reads = use.read.detach()
            values = use._replace(read=reads, written=reads)
            use.written.register_hook(lambda gradient: wrote(values, reads, gradient))

        def tap_behind(use: Use) -> None:
            reads, parts = use.read.detach(), behind.setdefault((use.tensor, use.kind), [])
            use.written.register_hook(lambda gradient: parts.append((reads, gradient)))

        def look(kind: type[Head] | type[Neuron], layer: int) -> Callable[[Tensor, Tensor | None], Tensor]:
            def read(values: Tensor, gradient: Tensor) -> None:
                values, gradient = values.float(), gradient.float()
                norms, products = gradient.square().sum(1), (gradient * values).sum((0, 1))
                if kind is Head:
                    norms, products = norms.sum(-1), products.sum(-1)
                for value, total in zip(MEASURES, (norms.sqrt().sum(0), products), strict=True):
                    self.hook_points[f"{kind.NOUN}.{value}"][layer] += total / share

            def visit(x: Tensor, _: Tensor | None) -> Tensor:
                values = x.detach()
                x.register_hook(lambda gradient: read(values, gradient))
                return x

            return visit

        # the graph starts at the embeddings, traced or not
        first = {row.tensor for row in lean.rows if row.kind in ("embedding", "position")}
        taps = dict.fromkeys([*self.sums, *first], tap)
        visits = {
            (layer, site): look(kind, layer)
            for layer in range(lean.n_layers)
            for site, kind in (("z", Head), ("post", Neuron))
        }
        with torch.enable_grad():
            predicted = _predicted(batch, settings.loss, share, lean.device)
            tokens = lean.needed(batch.tokens, int(predicted.read.max()) + 1).to(lean.device)
            last = lean.run(tokens, visits=visits, taps=taps)
            gradient = _unembedded(lean, last.detach(), predicted, dict.fromkeys(self.sums, tap_behind))
            begun = torch.autograd.grad(last, [use.written for use in start.values()], gradient)
        for (tensor, kind), parts in behind.items():
            reads, gradient = (torch.cat(values) for values in zip(*parts, strict=True))
            if tensor != tied:
                wrote(Use(tensor, cast(Kind, kind), reads, reads, False), reads, gradient)
        add_products(waiting, statistic)
        for use, gradient in zip(start.values(), begun, strict=True):
            if use.tensor not in self.sums:
                continue
            own = use.read.flatten()[None] if as_one else use.read
            if use.tensor == tied and use.kind == "embedding":
                (reads, logits) = (torch.cat(values) for values in zip(*behind[tied, "unembedding"], strict=True))
                sides = grouped(gradient), grouped(logits), grouped(reads)
                add_tied(self.sums[tied], own, *sides, statistic)
            else:
                add_embeddings(self.sums[use.tensor], own, grouped(gradient), statistic)
        self.done += len(batch)

    def add_hooked(self, model: Model, batch: Task) -> None:
        """Add the gradients of a batch the slow way: through the hookable model, with what is hooked into it."""
        self._prepare(lean_model(model))
        change = STATISTICS[self.settings.statistic]
        whole = self.settings.per == "batch"
        checkpoint, hookable = checkpoint_of(model), _leaves(model)
        layers, kept = checkpoint.layout.n_layers, {}
        sites = [(layer, site, kind) for layer in range(layers) for site, kind in (("z", Head), ("post", Neuron))]

        def keep(site: tuple[int, str]) -> Callable[..., Tensor]:
            def hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                # what is given back goes on; the bridge may go on with something else than it shows
                kept[site] = activation.clone()
                return kept[site]

            return hook

        functions = [(hook_name(model, (layer, site)), keep((layer, site))) for layer, site, _ in sites]
        for part in [batch] if whole else batch.batches(1):
            with torch.enable_grad(), model.hooks(fwd_hooks=functions):
                total = example_losses(model, part, self.settings.loss).sum() / len(part)
            activations = [kept[layer, site] for layer, site, _ in sites]
            found = torch.autograd.grad(
                total, [*hookable.values(), *activations], allow_unused=True, materialize_grads=True
            )
            at_leaves = dict(zip(hookable, found[: len(hookable)], strict=True))
            for name, value in self.sums.items():
                if name in at_leaves:
                    gradient = at_leaves[name]
                else:
                    gradient = torch.zeros_like(value, dtype=found[0].dtype)
                    for row in checkpoint.rows:
                        if row.tensor == name:
                            row.stored(gradient).add_(at_leaves[row.name])
                value += change(gradient.float())
            for (layer, _, kind), x, gradient in zip(sites, activations, found[len(hookable) :], strict=True):
                x, gradient = x.detach().float(), gradient.float() * len(part)
                norms, products = gradient.square().sum(1), (gradient * x).sum((0, 1))
                if kind is Head:
                    norms, products = norms.sum(-1), products.sum(-1)
                for measure, added in zip(MEASURES, (norms.sqrt().sum(0), products), strict=True):
                    self.hook_points[f"{kind.NOUN}.{measure}"][layer] += added
        self.done += len(batch)

    def finish(self, rows: Sequence[Row], task: Task, facts: dict[str, Any]) -> GradientTrace:
        """Turn the sums into the trace of ``task``; they can't be added to any more."""
        for value in self.sums.values():
            value.div_(self.settings.count(task))
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return GradientTrace(
            task.name,
            {row.name: row.stored(sums[row.tensor]) for row in traced_rows(rows, self.settings.components)},
            {name: value.cpu() / len(task) for name, value in self.hook_points.items()},
            len(task),
            provenance(**facts, task=task.provenance, **self.settings.identity(task)),
        )

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Save the sums, and what they must be continued with."""
        tensors = {f"sums/{name}": value for name, value in self.sums.items()}
        tensors |= {f"hook_points/{name}": value for name, value in self.hook_points.items()}
        write_tensors(path, tensors, {"kind": "unfinished trace", "done": self.done, "identity": identity})

    def load(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from what `save` wrote.

        Raises:
            CircuitsError: it was made of something else or with other settings.
        """
        self.sums, self.hook_points, self.done = {}, {}, 0
        self.add_sums(path, identity)

    def add_sums(self, path: Path, identity: dict[str, Any]) -> None:
        """Add the sums over other examples, which `save` wrote.

        Raises:
            CircuitsError: they were made of something else or with other settings.
        """
        tensors, metadata = read_tensors(path, "unfinished trace")
        check_identity(path, metadata["identity"], identity)
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            held = self.sums if kind == "sums" else self.hook_points
            held[rest] = held[rest].add_(value) if rest in held else value.clone()
        self.done += metadata["done"]


def _leaves(model: Model) -> dict[str, Tensor]:
    """Where the hookable model's gradients arrive: its parameters by name, or the checkpoint's tensors themselves."""
    checkpoint, named = checkpoint_of(model), dict(model.named_parameters())
    own_name = getattr(model, "own_name", None)
    if own_name is None:
        return dict(checkpoint.tensors)
    return {row.name: named[own_name(row.name)] for row in checkpoint.rows}


@dataclass(frozen=True)
class _Predicted:
    """The tokens that carry the loss, as many columns as the example with most has.

    Attributes:
        read: the positions that predict them.
        targets: the tokens.
        weights: the share of each in the loss; zero where an example has fewer.
    """

    read: Int[Tensor, "example answer"]
    targets: Int[Tensor, "example answer"]
    weights: Float[Tensor, "example answer"]


def _predicted(batch: Task, loss: str, share: float, device: torch.device) -> _Predicted:
    counted = counted_tokens(batch, loss)
    counts = counted.sum(1, keepdim=True)
    most = int(counts.max())
    where = counted.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    present = torch.arange(most) < counts
    where = torch.where(present, where, 1)
    weights = share * present / counts
    return _Predicted(*(value.to(device) for value in (where - 1, batch.tokens.gather(1, where), weights)))


def _unembedded(
    lean: LeanModel, last: Float[Tensor, "example pos d_model"], predicted: _Predicted, taps: Taps
) -> Float[Tensor, "example pos d_model"]:
    """The gradient of the summed loss to the stream after the last layer; some examples at a time."""
    examples = torch.arange(len(last), device=last.device)[:, None]
    rows = last[examples, predicted.read]
    size = max(1, _LOGITS_AT_A_TIME // (rows.shape[1] * lean.d_vocab))
    to_rows: list[Tensor] = []
    for chosen in examples[:, 0].split(size):
        here = rows[chosen].requires_grad_()
        logits = lean.unembed(here, taps)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), predicted.targets[chosen].flatten(), reduction="none"
        )
        loss = (losses * predicted.weights[chosen].flatten()).sum()
        to_rows += torch.autograd.grad(loss, [here])
    gradient = torch.zeros_like(last)
    return gradient.index_put_((examples, predicted.read), torch.cat(to_rows), accumulate=True)
