"""Cross-task gradient trace (arXiv 2505.16178, Fig. 1b; docs/method.md, section 1).

For a task with examples x and per-example loss L(x; θ), the mean cross-entropy over the answer's tokens:

1. A batch of examples runs forward once, up to the last token that predicts anything. At every module that applies a
   traced parameter, its input x is kept.
2. The loss is taken at the positions that count, and only these are unembedded. One backward pass of the summed loss
   gives ∂L/∂y at every module's output y. Examples do not mix, so each row of it is the gradient of that example's own
   loss.
3. As soon as ∂L/∂y of a module is known, the statistic of each example's gradient, such as |Σ over positions of ∂L/∂y ⊗
   x|, is added to the parameter's sum (`circuits.tracing.accumulation`). Per batch, it is the statistic of the gradient
   of the batch's mean loss instead.
4. At the hook points of heads (z) and neurons (post) the same pass gives each example's gradient norm and gradient ×
   activation.
5. Sums are divided by the number of examples (or batches). Per example, the trace does not depend on batch size or
   order beyond rounding. Over several checkpoints, their traces are added up.
6. If the trace goes to a file, its sums are saved beside it from time to time, whole or not at all, with the number of
   examples they hold; a trace that was interrupted goes on from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from circuits.datasets import Role, Task
from circuits.errors import CircuitsError
from circuits.models import (
    COMPONENTS,
    Model,
    ParameterSource,
    checkpoint_of,
    facts_of,
    final_residual,
    fingerprint,
    huggingface_view,
    load_model,
    projections_of,
    refuse_hooks,
    unembed,
    unit_readers,
    watching,
)
from circuits.progress import track
from circuits.storage import digest, provenance, read_tensors, write_tensors
from circuits.tracing.accumulation import STATISTICS, Products, add_embeddings, add_products, add_tied, add_vectors
from circuits.units import Head, Neuron

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

    Raises:
        CircuitsError: there is no such loss.
    """
    counted = _counted(task, loss)
    where = counted.nonzero().to(model.cfg.device)
    residual = final_residual(model, task.tokens)
    logits = unembed(model, residual[where[:, 0], where[:, 1] - 1]).float()
    targets = task.tokens.to(model.cfg.device)[where[:, 0], where[:, 1]]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(task), device=losses.device).index_add(0, where[:, 0], losses)
    return sums / counted.sum(1).to(losses.device)


def _counted(task: Task, loss: str) -> Tensor:
    """Which tokens carry the loss: ``Bool[example pos]``, and at least one of each example."""
    if loss not in LOSSES:
        raise CircuitsError(f"there is no loss {loss!r}: choose from {', '.join(LOSSES)}")
    counted = task.answer_mask if loss == "answer" else task.roles != Role.PADDING
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
        return facts | {"examples": digest(*(value.numpy().tobytes() for value in (task.tokens, task.roles)))}

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

    def _prepare(self, model: PreTrainedModel, tensors: Sequence[str]) -> None:
        """Make room, or check that there is room of the right shape and that it lies where the model does."""
        config, device = model.config, model.device
        shapes = {name: tuple(model.get_parameter(name).shape) for name in tensors}
        units = {Head: config.num_attention_heads, Neuron: config.intermediate_size}
        if not self.sums:
            self.sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
            self.hook_points = {
                f"{kind.NOUN}.{name}": torch.zeros(config.num_hidden_layers, count)
                for kind, count in units.items()
                for name in _HOOKED
            }
        elif shapes != {name: tuple(value.shape) for name, value in self.sums.items()}:
            raise CircuitsError("the checkpoints are not the same kind of model: their parameters have other shapes")
        self.sums = {name: value.to(device) for name, value in self.sums.items()}
        self.hook_points = {name: value.to(device) for name, value in self.hook_points.items()}

    def add(self, model: PreTrainedModel, sources: Sequence[ParameterSource], batch: Task) -> None:
        """Add the gradients of a batch at a model."""
        settings, statistic = self.settings, self.settings.statistic
        projections = projections_of(model, sources, settings.components)
        self._prepare(model, [projection.tensor for projection in projections])
        readers = unit_readers(sources)
        by_module: dict[str, list[tuple[str, Tensor]]] = {}
        for projection in projections:
            by_module.setdefault(projection.module, []).append((projection.kind, self.sums[projection.tensor]))
        of_uses = {kind: total for pairs in by_module.values() for kind, total in pairs if "embedding" in kind}
        share = 1 / len(batch) if settings.per == "batch" else 1.0
        as_one = settings.per == "batch" or statistic == "signed"

        waiting: list[Products] = []

        def grouped(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1)[None] if as_one else rows

        def wrote(name: str, reads: Tensor, gradient: Tensor) -> None:
            reads, gradient = grouped(reads.float()), grouped(gradient.float())
            for kind, total in by_module[name]:
                if kind == "weight":
                    waiting.append(Products(total, gradient, reads))
                else:
                    add_vectors(total, gradient if kind == "bias" else gradient * reads, statistic)
            if sum(one.gradients.nbytes + one.inputs.nbytes for one in waiting) > _WAITING:
                add_products(waiting, statistic)
                waiting.clear()

        def read(name: str, reads: Tensor, gradient: Tensor) -> None:
            kind, layer = readers[name]
            gradient = gradient.float()
            norms, products = gradient.square().sum(1), (gradient * reads.float()).sum((0, 1))
            if kind is Head:
                heads = (model.config.num_attention_heads, -1)
                norms, products = norms.unflatten(1, heads).sum(2), products.unflatten(0, heads).sum(1)
            for value, total in zip(_HOOKED, (norms.sqrt().sum(0), products), strict=True):
                self.hook_points[f"{kind.NOUN}.{value}"][layer] += total / share

        weights = {name for name, pairs in by_module.items() if all("embedding" not in kind for kind, _ in pairs)}
        with torch.enable_grad(), watching(model, weights, wrote, readers, read) as start:
            predicted = _predicted(batch, settings.loss, share, model.device)
            tokens = batch.tokens[:, : int(predicted.read.max()) + 1].to(model.device)
            hidden = final_residual(model, tokens)
            gradient, unembedded, logits = _unembedded(model, hidden.detach(), predicted, bool(of_uses))
            (embedded,) = torch.autograd.grad(hidden, start, gradient)
        add_products(waiting, statistic)
        if logits is not None:
            own = tokens.flatten()[None] if as_one else tokens
            embedded, logits, unembedded = (grouped(rows.float()) for rows in (embedded, logits, unembedded))
            if len(of_uses) == 1:
                add_tied(of_uses["embedding"], own, embedded, logits, unembedded, statistic)
            else:
                add_embeddings(of_uses["embedding"], own, embedded, statistic)
                add_products([Products(of_uses["unembedding"], logits, unembedded)], statistic)
        self.done += len(batch)

    def finish(self, sources: Sequence[ParameterSource], task: Task, facts: dict[str, Any]) -> GradientTrace:
        """Turn the sums into the trace of ``task``; they can't be added to any more."""
        for value in self.sums.values():
            value.div_(self.settings.count(task))
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return GradientTrace(
            task.name,
            {row.hooked: row.to_hooked(sums[row.checkpoint]) for row in sources if row.checkpoint in sums},
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
    model: PreTrainedModel, hidden: Float[Tensor, "example pos d_model"], predicted: _Predicted, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of the summed loss to the final residual, what the unembedding read, and the logits' gradient."""
    examples = torch.arange(len(hidden), device=hidden.device)[:, None]
    rows = hidden[examples, predicted.read]
    size = max(1, _LOGITS_AT_A_TIME // (rows.shape[1] * model.config.vocab_size))
    to_rows: list[Tensor] = []
    to_logits: list[Tensor] = []
    for chosen in examples[:, 0].split(size):
        here = rows[chosen].requires_grad_()
        logits = unembed(model, here)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), predicted.targets[chosen].flatten(), reduction="none"
        )
        loss = (losses * predicted.weights[chosen].flatten()).sum()
        found = torch.autograd.grad(loss, [here, logits] if keep else [here])
        to_rows.append(found[0])
        to_logits += found[1:]
    gradient = torch.zeros_like(hidden).index_put_((examples, predicted.read), torch.cat(to_rows), accumulate=True)
    return gradient, rows, torch.cat(to_logits) if keep else None


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
    """Trace a task's gradients at the parameters of a model.

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
            `circuits.load_model` or has functions hooked into it, or ``out`` holds another trace.

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
        >>> task = Task.from_dataset(dataset, "qa_id", tokenizer)
        >>> trace_gradients(model, task)
        GradientTrace('qa_id', parameters=737,280, examples=12)
        >>> sorted(trace_gradients(model, task, per="batch", components=["norms"]).gradients)[:3]
        ['blocks.0.ln1.w', 'blocks.0.ln2.w', 'blocks.1.ln1.w']
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    checkpoint_of(model)
    refuse_hooks(model)  # also where a finished trace is read
    facts = facts_of(model)
    identity = {name: facts[name] for name in ("model", "dtype")}
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
        >>> from circuits.datasets import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> models = [load_model(new_model("tiny-llama", tokenizer, seed)) for seed in (0, 1)]
        >>> trace_checkpoints(models, Task.from_dataset(dataset, "qa_id", tokenizer))
        GradientTrace('qa_id', parameters=737,280, examples=12)
    """
    settings = TraceSettings(statistic, loss, batch_size, per, tuple(components))
    if not sources:
        raise CircuitsError("no checkpoints are given: a trace needs one at least")
    visits = [partial(_visit, source, dtype, device) for source in sources]
    identity = {"checkpoints": [_stamp(source, dtype) for source in sources]}
    return _trace(visits, task, settings, identity, lambda last: identity | facts_of(last), out)


def _visit(source: str | Path | Model, dtype: str, device: str | None) -> Model:
    return source if isinstance(source, Model) else load_model(source, dtype, device)


def _stamp(source: str | Path | Model, dtype: str) -> str:
    """What tells one source from another without loading it: a model's content, or the names and times of its files."""
    if isinstance(source, Model):
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
        sources = checkpoint_of(model).sources
        rest = range(max(begun, 0), len(task))
        batches = [rest[first : first + settings.batch_size] for first in range(0, len(rest), settings.batch_size)]
        with huggingface_view(model) as view:
            for batch in track(batches, f"trace {task.name}", len(batches), "batch"):
                running.add(view, sources, task.select(batch))
                if unfinished is not None and time.monotonic() - saved > pause:
                    begun_saving = time.monotonic()
                    running.save(unfinished, identity)
                    saved = time.monotonic()
                    pause = max(_SAVE_EVERY, 10 * (saved - begun_saving))
        if unfinished is not None and number < len(visits) - 1:
            running.save(unfinished, identity)
    trace = running.finish(sources, task, facts(model))
    if out is None or unfinished is None:
        return trace
    trace.save(out)
    unfinished.unlink(missing_ok=True)
    # the sums make room for the trace that is read
    del trace, running
    return GradientTrace.load(out)
