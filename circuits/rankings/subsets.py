"""Scoring a model with many subsets of its units changed: the inner loop of curves and of one-at-a-time ablation.

1. A subset of the heads or neurons is a table of booleans, layer × unit. A switch puts the model in the state of a
   subset: `swapping` gives its units the weights of another model, `ablating` a fixed output.
2. What enters a layer depends on the units of the layers before it alone. So the distinct subsets are sorted layer by
   layer, and from one to the next the stream is computed anew only from the first layer that differs.
3. A head owns its slices of W_Q, W_O and their biases. The keys and values of a group (grouped-query attention) are
   another unit's: with ``groups`` they change with the first of the group's heads, and are counted once; without, they
   stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.heads import OUTPUT_SITES
from circuits.metrics import AnswerTokens, answer_scores
from circuits.models import (
    Model,
    Row,
    Visits,
    check_task,
    editing,
    lean_model,
    parameters_of,
    refuse_hooks,
    rows_of,
    same_parameters,
    shape_of,
    uninterrupted,
)
from circuits.progress import bar
from circuits.tasks import Task
from circuits.units import Head, KVGroup, ModelShape, Neuron

#: The kinds of unit that can be ranked.
Kind = type[Head] | type[Neuron]


@dataclass(frozen=True)
class Switch:
    """Puts a model in the state of a subset.

    Attributes:
        to: called with the subset.
        visits: what then acts on the activations, if anything does.
    """

    to: Callable[[Bool[Tensor, "layer unit"]], None]
    visits: Visits = field(default_factory=dict)


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter whose slices belong to units of one kind.

    Attributes:
        name: of the parameter.
        layer: it lies in.
        axis: that counts the units, or their groups.
        grouped: whether each slice belongs to a group of heads.
    """

    name: str
    layer: int
    axis: int
    grouped: bool

    def owners(self, subsets: Bool[Tensor, "*subset layer unit"], shape: ModelShape) -> Bool[Tensor, "*subset slice"]:
        """Which slices of the parameter the units of each subset touch."""
        units = subsets[..., self.layer, :]
        return units.unflatten(-1, (shape.n_key_value_heads, -1)).any(-1) if self.grouped else units


def owned_parameters(model: Model, kind: Kind, groups: bool = True) -> list[OwnedParameter]:
    """The parameters whose slices belong to units of a kind; for heads with ``groups`` also their groups'."""
    owned = []
    for row in rows_of(model).values():
        grouped = groups and kind is Head and row.owner is KVGroup
        if row.layer is not None and (row.owner is kind or grouped or _ungrouped(model, kind, row)):
            owned.append(OwnedParameter(row.name, row.layer, row.axis, grouped))
    return owned


def _ungrouped(model: Model, kind: Kind, row: Row) -> bool:
    """Whether keys and values are a head's own."""
    shape = shape_of(model)
    return kind is Head and row.owner is KVGroup and shape.n_heads == shape.n_key_value_heads


def unit_sums(model: Model, kind: Kind, value: Callable[[str], Tensor | None]) -> Float[Tensor, "layer unit"]:
    """Sum a value over the parameters of each unit; a head gets its equal share of what its key/value group has.

    Args:
        model: whose units they are.
        kind: `Head` or `Neuron`.
        value: parameter name → a number for each of its entries, or None if it has none.

    Raises:
        CircuitsError: no parameter of such units has a value.
    """
    shape = shape_of(model)
    sums = torch.zeros(shape.n_layers, kind.count(shape), dtype=torch.float64)
    found = False
    for owned in owned_parameters(model, kind):
        entries = value(owned.name)
        if entries is None:
            continue
        found = True
        slices = entries.detach().movedim(owned.axis, 0)
        by_slice = slices.reshape(len(slices), -1).sum(1, dtype=torch.float64).cpu()
        if owned.grouped:
            repeats = shape.n_heads // shape.n_key_value_heads
            by_slice = by_slice.repeat_interleave(repeats) / repeats
        sums[owned.layer] += by_slice
    if not found:
        raise CircuitsError(f"there is nothing to rank {kind.NOUN}s by: it covers none of their parameters")
    return sums


def count_parameters(
    model: Model, kind: Kind, subsets: Bool[Tensor, "subset layer unit"], groups: bool = True
) -> Int[Tensor, " subset"]:
    """How many parameters the units of each subset own; with ``groups`` those of each key/value group count once."""
    shape, parameters = shape_of(model), parameters_of(model)
    counts = torch.zeros(len(subsets), dtype=torch.long)
    for owned in owned_parameters(model, kind, groups):
        parameter = parameters[owned.name]
        counts += owned.owners(subsets, shape).sum(-1) * (parameter.numel() // parameter.shape[owned.axis])
    return counts


def count_groups(model: Model, subsets: Bool[Tensor, "subset layer head"]) -> Int[Tensor, " subset"]:
    """How many key/value groups the heads of each subset read; none where keys and values are not grouped."""
    shape = shape_of(model)
    if shape.n_heads == shape.n_key_value_heads:
        return torch.zeros(len(subsets), dtype=torch.long)
    touched: Tensor = subsets.unflatten(-1, (shape.n_key_value_heads, -1)).any(-1).sum((1, 2))
    return touched


@uninterrupted
def swapping(model: Model, other: Model, kind: Kind, groups: bool = True) -> Iterator[Switch]:
    """Inside the block, a switch gives the units of a subset the weights of another model, and all others their own.

    Only slices whose owner enters or leaves the subset are written. At the end every weight is the model's own again,
    bit for bit.

    Args:
        model: which is changed.
        other: of the same shape.
        kind: `Head` or `Neuron`.
        groups: heads bring the keys and values of their groups.

    Raises:
        CircuitsError: ``other`` has other parameters or a function hooked into it, or only one of both ties its
            embeddings.
    """
    shape, owned = shape_of(model), owned_parameters(model, kind, groups)
    parameters, others = parameters_of(model), same_parameters(model, other)
    own = {row.name: parameters[row.name].detach().clone() for row in owned}
    swapped = torch.zeros(shape.n_layers, kind.count(shape), dtype=torch.bool)

    @torch.no_grad()
    def switch(subset: Bool[Tensor, "layer unit"]) -> None:
        for row in owned:
            wanted = row.owners(subset, shape)
            changed = wanted != row.owners(swapped, shape)
            for source, which in ((others, changed & wanted), (own, changed & ~wanted)):
                if which.any():
                    target = parameters[row.name].detach()
                    index = which.nonzero()[:, 0].to(target.device)
                    values = source[row.name].index_select(row.axis, index.to(source[row.name].device))
                    target.index_copy_(row.axis, index, values.to(target))
        swapped.copy_(subset)

    with editing(model):
        try:
            yield Switch(switch)
        finally:
            with torch.no_grad():
                for name, values in own.items():
                    parameters[name].copy_(values)


@uninterrupted
def ablating(model: Model, kind: Kind, outputs: Float[Tensor, "layer unit #width"] | None = None) -> Iterator[Switch]:
    """Inside the block, a switch makes the units of a subset put out a fixed value when `score_subsets` runs the model.

    Args:
        model: loaded with `circuits.load_model`.
        kind: `Head` (at z) or `Neuron` (at post).
        outputs: the value of each unit, from `circuits.interventions.heads.mean_outputs`; zero if not given.
    """
    shape = shape_of(model)
    ablated = torch.zeros(shape.n_layers, kind.count(shape), dtype=torch.bool)
    fixed = torch.zeros(*ablated.shape, 1) if outputs is None else outputs

    def switch(subset: Bool[Tensor, "layer unit"]) -> None:
        ablated.copy_(subset)

    def overwriting(layer: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        def overwrite(activation: Tensor, _: Tensor | None) -> Tensor:
            which, value = (table[layer].to(activation.device) for table in (ablated, fixed))
            if not which.any():
                return activation
            # a head's output is as wide as d_head, a neuron's is one number
            by_unit = activation if kind is Head else activation[..., None]
            return torch.where(which[:, None], value.to(activation.dtype), by_unit).view_as(activation)

        return overwrite

    yield Switch(switch, {(layer, OUTPUT_SITES[kind]): overwriting(layer) for layer in range(shape.n_layers)})


@torch.no_grad()
def score_subsets(
    model: Model,
    tasks: Sequence[Task],
    subsets: Bool[Tensor, "subset layer unit"],
    switch: Switch,
    description: str = "score subsets",
    batch_size: int = 64,
    *,
    per_answer: bool = False,
) -> pandas.DataFrame:
    """Score a model in the state of every subset.

    Args:
        model: inside a block of `swapping` or `ablating`.
        tasks: what to score.
        subsets: which units each state changes; equal ones are scored once.
        switch: what the block gave.
        description: of the progress bar.
        batch_size: examples in one pass.
        per_answer: keep every answer.

    Returns:
        One row for each subset and task, in their order: ``subset``, ``task``, ``exact_match``, ``log_prob``, means
        over answers. With ``per_answer`` one row for each of these and each answer, in the order of ``task.answers``:
        also ``answer``, its row there.

    Raises:
        CircuitsError: functions are hooked into the model.
    """
    refuse_hooks(model)
    for task in tasks:
        check_task(model, task)
    lean = lean_model(model)
    distinct, which = subsets.flatten(1).unique(dim=0, return_inverse=True)
    distinct = distinct.view(-1, *subsets.shape[1:])
    firsts = [0]
    for before, after in pairwise(distinct):
        firsts.append(int((before != after).any(1).nonzero()[0]))
    batches = [
        (number, rows, batch) for number, task in enumerate(tasks) for rows, batch in _by_length(task, batch_size)
    ]
    found = [torch.zeros(len(distinct), len(task.answers), len(_SCORES), dtype=torch.float64) for task in tasks]
    with bar(description, len(batches) * len(distinct), "pass") as shown:
        for number, rows, batch in batches:
            where = batch.answer_mask.nonzero().to(lean.device)
            # nothing after the last token that predicts an answer needs to be run
            tokens = lean.needed(batch.tokens, int(where[:, 1].max()))
            angles = lean.angles(torch.arange(tokens.shape[1]))
            known = AnswerTokens.of(batch, device=lean.device)
            streams = [lean.embed(tokens)]
            for state, (subset, first) in enumerate(zip(distinct, firsts, strict=True)):
                switch.to(subset)
                del streams[first + 1 :]
                for layer in range(first, len(subset)):
                    stream = lean.layer(layer, streams[layer], visits=switch.visits, angles=angles[layer])
                    streams.append(stream)
                scores = answer_scores(lean.unembed(streams[-1][where[:, 0], where[:, 1] - 1]), batch, known)
                found[number][state, rows] = torch.stack([scores[metric].double() for metric in _SCORES], dim=1)
                shown.update()
    tables = []
    for task, scored in zip(tasks, found, strict=True):
        # the states of equal subsets were scored once
        values = scored if per_answer else scored.mean(1, keepdim=True)
        columns = {"subset": torch.arange(len(subsets)).repeat_interleave(values.shape[1]).numpy(), "task": task.name}
        if per_answer:
            columns["answer"] = torch.arange(values.shape[1]).repeat(len(subsets)).numpy()
        columns |= dict(zip(_SCORES, values[which].flatten(0, 1).unbind(1), strict=True))
        tables.append(pandas.DataFrame(columns))
    return pandas.concat(tables, ignore_index=True)


_SCORES = ("exact_match", "log_prob")


def _by_length(task: Task, batch_size: int) -> Iterator[tuple[Int[Tensor, " answer"], Task]]:
    """The task's examples in batches, sorted by length to need little padding; each with its rows of the answers."""
    by_example = task.answers.groupby("example").indices
    for chosen in task.attention_mask.sum(1).argsort(stable=True).split(batch_size):
        rows = numpy.concatenate([by_example[example] for example in chosen.tolist()])
        yield torch.from_numpy(rows), task.select(chosen)
