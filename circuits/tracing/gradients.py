"""Cross-task gradient trace (arXiv 2505.16178, Fig. 1b; docs/method.md, section 1).

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
5. Sums are divided by the number of examples (or batches). Per example, the trace does not depend on batch size or
   order beyond rounding. Over several checkpoints, their traces are added up.
6. If the trace goes to a file, its sums are saved beside it from time to time, whole or not at all, with the number of
   examples they hold; a trace that was interrupted goes on from there.
7. If a user has hooked functions into the model, these must be run: then every example (or batch) has a backward pass
   of its own through the hookable model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.errors import CircuitsError
from circuits.html import html_table
from circuits.models import (
    LeanModel,
    Model,
    Row,
    Taps,
    Use,
    checkpoint_of,
    facts_of,
    fingerprint,
    hook_name,
    lean_model,
    load_model,
    logits_at,
    refuse_hooks,
    user_hooks,
)
from circuits.models.rows import Kind
from circuits.progress import track
from circuits.storage import digest, provenance, read_tensors, write_tensors
from circuits.tasks import Task
from circuits.tracing.accumulation import STATISTICS, Products, add_embeddings, add_products, add_tied, add_vectors
from circuits.units import COMPONENTS, Head, Neuron, layer_of

LOSSES: tuple[str, ...] = ("answer", "all")
PER: tuple[str, ...] = ("example", "batch")
_HOOKED = ("gradient_norm", "gradient_x_activation")
#: Seconds between two saves of an unfinished trace; more if saving takes long.
_SAVE_EVERY = 120.0
#: Bytes of what modules read and of gradients of what they wrote, kept until enough is there to be worked on together.
_WAITING = 1 << 26
#: Logits formed at a time.
_LOGITS_AT_A_TIME = 1 << 23


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


def example_losses(model: Model, task: Task, loss: str = "answer") -> Float[Tensor, " example"]:
    """Each example's loss: mean cross-entropy in nats over its answer tokens, or over ``all`` its tokens but the first.

    Functions hooked into the model are run.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        loss: over ``answer`` tokens or ``all`` tokens.

    Raises:
        CircuitsError: there is no such loss.
    """
    counted = _counted(task, loss)
    where = counted.nonzero()
    before = where.clone()
    before[:, 1] -= 1
    logits = logits_at(model, task.tokens, before).float()
    return _losses(logits, task, counted, where)


def _losses(logits: Tensor, task: Task, counted: Tensor, where: Tensor) -> Float[Tensor, " example"]:
    where = where.to(logits.device)
    targets = task.tokens.to(logits.device)[where[:, 0], where[:, 1]]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(task), device=losses.device).index_add(0, where[:, 0], losses)
    return sums / counted.sum(1).to(losses.device)


def loss_gradients(model: Model, task: Task, loss: str = "answer") -> dict[str, Tensor]:
    """The gradient of the sum of the examples' losses at every parameter, as it is stored.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        loss: as in `example_losses`.

    Returns:
        Parameter → gradient, in the parameter's shape. Tied embeddings are one parameter, ``embed.W_E``.

    Raises:
        CircuitsError: there is no such loss, or functions are hooked into the model.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> tuple(loss_gradients(load_model(new_model("tiny-llama", tokenizer)), task)["blocks.0.attn.W_Q"].shape)
        (4, 128, 32)
    """
    refuse_hooks(model)
    checkpoint = checkpoint_of(model)
    lean_model(model)  # refuses a model whose parameters were replaced
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in checkpoint.tensors.items()}
    counted = _counted(task, loss)
    where = counted.nonzero()
    before = where.clone()
    before[:, 1] -= 1
    with torch.enable_grad():
        logits = LeanModel(tensors, checkpoint.rows, checkpoint.layout).logits_at(task.tokens, before).float()
        total = _losses(logits, task, counted, where).sum()
        found = dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))
    return {row.name: row.stored(found[row.tensor]) for row in _traced_rows(checkpoint.rows, COMPONENTS)}


def _traced_rows(rows: Sequence[Row], components: Sequence[str]) -> list[Row]:
    """The rows of some components; of tied embeddings, which are one tensor, the embedding alone."""
    embedded = {row.tensor for row in rows if row.kind == "embedding"}
    return [
        row
        for row in rows
        if row.component in components and not (row.kind == "unembedding" and row.tensor in embedded)
    ]


def _counted(task: Task, loss: str) -> Tensor:
    """Which tokens carry the loss: ``Bool[example pos]``, and at least one of each example."""
    if loss not in LOSSES:
        raise CircuitsError(f"there is no loss {loss!r}: choose from {', '.join(LOSSES)}")
    counted = task.answer_mask if loss == "answer" else task.attention_mask
    counted = counted.clone()
    counted[:, 0] = False
    if not counted.any(1).all():
        example = int((~counted.any(1)).nonzero()[0])
        raise CircuitsError(f"example {example} of the task {task.name} has no token that carries the loss")
    return counted


@dataclass(frozen=True)
class TraceSettings:
    """What is traced: see `trace_gradients`."""

    statistic: str = "abs"
    loss: str = "answer"
    batch_size: int = 32
    per: str = "example"
    components: tuple[str, ...] = ("attention", "mlp")

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("statistic", self.statistic, tuple(STATISTICS)),
            ("loss", self.loss, LOSSES),
            ("gradient per", self.per, PER),
            *(("component", component, COMPONENTS) for component in self.components),
        ):
            if value not in choices:
                raise CircuitsError(f"there is no {name} {value!r}: choose from {', '.join(choices)}")
        if not self.components:
            raise CircuitsError(f"no component is to be traced: choose from {', '.join(COMPONENTS)}")
        if self.batch_size < 1:
            raise CircuitsError(f"the batch size is {self.batch_size}: the least is 1")

    def identity(self, task: Task) -> dict[str, Any]:
        """What a trace with these settings depends on besides the model."""
        components = [name for name in COMPONENTS if name in self.components]
        facts: dict[str, Any] = {
            "statistic": self.statistic,
            "loss": self.loss,
            "per": self.per,
            "components": components,
        }
        if self.per == "batch":
            facts["batch_size"] = self.batch_size
        examples = (task.tokens, task.attention_mask, task.answer_mask)
        return facts | {"examples": digest(*(value.numpy().tobytes() for value in examples))}

    def count(self, task: Task) -> int:
        """How many gradients a trace of the task takes the mean of."""
        return len(task) if self.per == "example" else -(-len(task) // self.batch_size)


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
        tensors = dict.fromkeys(row.tensor for row in _traced_rows(lean.rows, self.settings.components))
        shapes = {name: tuple(lean.tensors[name].shape) for name in tensors}
        units = {Head: layout.n_heads, Neuron: layout.d_mlp}
        if not self.sums:
            self.sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
            self.hook_points = {
                f"{kind.NOUN}.{name}": torch.zeros(layout.n_layers, count)
                for kind, count in units.items()
                for name in _HOOKED
            }
        elif shapes != {name: tuple(value.shape) for name, value in self.sums.items()}:
            raise CircuitsError("the checkpoints are not the same kind of model: their parameters have other shapes")
        self.sums = {name: value.to(lean.device) for name, value in self.sums.items()}
        self.hook_points = {name: value.to(lean.device) for name, value in self.hook_points.items()}

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
                for value, total in zip(_HOOKED, (norms.sqrt().sum(0), products), strict=True):
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
                for measure, added in zip(_HOOKED, (norms.sqrt().sum(0), products), strict=True):
                    self.hook_points[f"{kind.NOUN}.{measure}"][layer] += added
        self.done += len(batch)

    def finish(self, rows: Sequence[Row], task: Task, facts: dict[str, Any]) -> GradientTrace:
        """Turn the sums into the trace of ``task``; they can't be added to any more."""
        for value in self.sums.values():
            value.div_(self.settings.count(task))
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return GradientTrace(
            task.name,
            {row.name: row.stored(sums[row.tensor]) for row in _traced_rows(rows, self.settings.components)},
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
        tensors, metadata = read_tensors(path, "unfinished trace")
        _check_identity(path, metadata["identity"], identity)
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            (self.sums if kind == "sums" else self.hook_points)[rest] = value.clone()
        self.done = metadata["done"]


def _leaves(model: Model) -> dict[str, Tensor]:
    """Where the hookable model's gradients arrive: its parameters by name, or the checkpoint's tensors themselves."""
    checkpoint, named = checkpoint_of(model), dict(model.named_parameters())
    own_name = getattr(model, "own_name", None)
    if own_name is None:
        return dict(checkpoint.tensors)
    return {row.name: named[own_name(row.name)] for row in checkpoint.rows}


def _check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CircuitsError(
                f"{path} was made with {name} {found.get(name)}, not {value}: choose another file or delete it"
            )


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
    counted = _counted(batch, loss)
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


def trace_gradients(
    model: Model,
    task: Task,
    statistic: str = "abs",
    loss: str = "answer",
    batch_size: int = 32,
    per: str = "example",
    components: Sequence[str] = ("attention", "mlp"),
    out: str | Path | None = None,
) -> GradientTrace:
    """Trace a task's gradients at the parameters of a model, slowly if functions are hooked into it, which are run.

    Args:
        model: loaded with `circuits.load_model`.
        task: the examples.
        statistic: of each gradient: ``abs``, ``square`` (diagonal Fisher) or ``signed``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass. Per example it changes speed and memory, not the result.
        per: ``example``: the statistic of each example's gradient; ``batch``: of the gradient of each batch's mean
            loss.
        components: some of ``attention``, ``mlp`` (both with their biases), ``embeddings`` and ``norms``.
        out: a safetensors file for the trace. If tracing is interrupted, the same call goes on where it was; if the
            file is there already, it is read. The trace then stays on disk until it is looked at.

    Raises:
        CircuitsError: there is no such statistic, loss or component, the model was not loaded with
            `circuits.load_model`, or ``out`` holds another trace.

    Source:
        arXiv 2505.16178, section 3 and Fig. 1b.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> task = dataset.task("qa_id", tokenizer)
        >>> trace_gradients(model, task)
        GradientTrace('qa_id', parameters=737,280, examples=12)
        >>> sorted(trace_gradients(model, task, per="batch", components=["norms"]).gradients)[:3]
        ['blocks.0.ln1.w', 'blocks.0.ln2.w', 'blocks.1.ln1.w']
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    checkpoint_of(model)
    facts = facts_of(model)
    identity = {name: facts[name] for name in ("model", "dtype")}
    hooks = sorted(found.name for found in user_hooks(model))
    if hooks:
        # what was traced with other functions, or none, is another trace
        identity = facts = facts | {"hooks": hooks}
    return _trace([lambda: model], task, settings, identity, lambda _: facts, out)


def trace_checkpoints(
    sources: Sequence[str | Path | Model],
    task: Task,
    statistic: str = "abs",
    loss: str = "answer",
    batch_size: int = 32,
    per: str = "example",
    components: Sequence[str] = ("attention", "mlp"),
    out: str | Path | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> GradientTrace:
    """Trace a task's gradients at several checkpoints, and add the traces up.

    Args:
        sources: checkpoints of one model along its training, in order; folders are loaded one at a time.
        task: the examples.
        statistic: as in `trace_gradients`, and so are ``loss``, ``batch_size``, ``per``, ``components`` and ``out``.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass.
        per: ``example`` or ``batch``.
        components: which parts of the model.
        out: a file for the trace.
        dtype: that folders are loaded in.
        device: that they are loaded to.

    Returns:
        The sum over checkpoints. It belongs to the model of the last one: masks made from it act there.

    Raises:
        CircuitsError: as `trace_gradients`; no sources are given, or they are not the same kind of model.

    Source:
        arXiv 2505.16178, section 3; docs/method.md, section 1.

    Example:
        >>> from circuits import load_model, Task
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> models = [load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1)]
        >>> trace_checkpoints(models, dataset.task("qa_id", tokenizer))
        GradientTrace('qa_id', parameters=737,280, examples=12)
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    if not sources:
        raise CircuitsError("no checkpoints are given: a trace needs one at least")
    visits = [partial(_visit, source, dtype, device) for source in sources]
    identity = {"checkpoints": [_stamp(source, dtype) for source in sources]}
    return _trace(visits, task, settings, identity, lambda last: identity | facts_of(last), out)


def _visit(source: str | Path | Model, dtype: str, device: str | None) -> Model:
    return source if isinstance(source, nn.Module) else load_model(source, dtype, device)


def _stamp(source: str | Path | Model, dtype: str) -> str:
    """What tells one source from another without loading it: a model's content, or the names and times of its files."""
    if isinstance(source, nn.Module):
        refuse_hooks(source)
        return fingerprint(source)
    files = sorted(Path(source).glob("*.safetensors"))
    stats = [(file.name, file.stat()) for file in files]
    return f"{source} {dtype} {digest(*(f'{name} {stat.st_size} {stat.st_mtime_ns}' for name, stat in stats))}"


def _trace(
    visits: Sequence[Callable[[], Model]],
    task: Task,
    settings: TraceSettings,
    identity: dict[str, Any],
    facts: Callable[[Model], dict[str, Any]],
    out: str | Path | None,
) -> GradientTrace:
    """Trace at each model in turn, on from where an earlier call was interrupted."""
    identity = identity | settings.identity(task)
    out = None if out is None else Path(out)
    unfinished = None if out is None else out.with_name(f"{out.name}.unfinished")
    if out is not None and out.exists():
        finished = GradientTrace.load(out)
        _check_identity(out, finished.provenance, identity)
        return finished
    running = RunningTrace(settings)
    if unfinished is not None and unfinished.exists():
        running.load(unfinished, identity)
    saved, pause = time.monotonic(), _SAVE_EVERY
    for number, visit in enumerate(visits):
        begun = running.done - number * len(task)
        if begun >= len(task) and number < len(visits) - 1:
            continue
        model = visit()
        rows, hooked = checkpoint_of(model).rows, bool(user_hooks(model))
        rest = range(max(begun, 0), len(task))
        batches = [rest[first : first + settings.batch_size] for first in range(0, len(rest), settings.batch_size)]
        lean = lean_model(model)
        for batch in track(batches, f"trace {task.name}", len(batches), "batch"):
            if hooked:
                running.add_hooked(model, task.select(batch))
            else:
                running.add(lean, task.select(batch))
            if unfinished is not None and time.monotonic() - saved > pause:
                begun_saving = time.monotonic()
                running.save(unfinished, identity)
                saved = time.monotonic()
                pause = max(_SAVE_EVERY, 10 * (saved - begun_saving))
        if unfinished is not None and number < len(visits) - 1:
            running.save(unfinished, identity)
    trace = running.finish(rows, task, facts(model))
    if out is None or unfinished is None:
        return trace
    trace.save(out)
    unfinished.unlink(missing_ok=True)
    # the sums make room for the trace that is read
    del trace, running
    return GradientTrace.load(out)
