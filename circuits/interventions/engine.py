"""Interventions by the hundred, exactly, at the cost of what they change.

1. Interventions that act at the same positions with the same kind of values are run together, over batches of prompts
   in which common beginnings are adjacent.
2. For each batch the clean run is kept (``forward.py``), and the values to put in are made ready (``values.py``).
3. Interventions are ordered by the lowest layer they change; as many as fit the token budget form one tensor, which
   runs from that layer upwards with each row's changes written in.
4. Only positions that predict answer tokens are unembedded, and metrics are taken from their logits.
5. If memory does not suffice, the number of rows is halved, and at one row the batch of prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.datasets import Task
from circuits.errors import CircuitsError
from circuits.interventions.forward import Attention, Forward, Queries, Site, Visitor
from circuits.interventions.intervention import Intervention
from circuits.interventions.pairing import matching_positions
from circuits.interventions.tokens import TokenTree, changed_tokens, check_positions
from circuits.interventions.values import SHARED_MODES, Matched, Means, other_examples, same_positions
from circuits.metrics import NAMED_METRICS, AnswerTokens, Metric, bootstrap_interval, kl, metric_of
from circuits.models import HookedTransformer, LeanModel, facts_of, shape_of
from circuits.progress import bar
from circuits.storage import provenance
from circuits.units import AnyUnit, Component, Head, KVGroup, Neuron

#: Tokens in one tensor of rows on a CPU. More fall out of its cache, fewer do not fill its pipelines.
TOKENS = 2048

#: Logits in memory at once.
_LOGITS = 1 << 24

#: Sites that come before a layer's attention, or in it.
_EARLY = ("resid_pre", "q", "k", "v", "pattern")

#: Tables of values kept ready.
_KEPT = 8


def sites_of(intervention: Intervention, grouped: bool) -> list[tuple[Site, AnyUnit]]:
    """Where an intervention acts: layer and activation, for each unit.

    Raises:
        CircuitsError: a head's keys or values belong to its group.
    """
    found: list[tuple[Site, AnyUnit]] = []
    for unit in intervention.units:
        if intervention.mode == "revert":
            names = _reverted(unit, grouped)
        elif isinstance(unit, Component):
            names = (unit.name,)
        elif isinstance(unit, Neuron):
            names = ("post",)
        elif isinstance(unit, KVGroup):
            names = ("k", "v") if intervention.site in (None, "kv") else (str(intervention.site),)
        else:
            names = (intervention.site or "z",)
            if grouped and names[0] in ("k", "v"):
                raise CircuitsError(
                    f"{unit} has no {names[0]} of its own in this model: act on its key/value group instead"
                )
        found += [((unit.layer, name), unit) for name in names]
    return found


def _reverted(unit: AnyUnit, grouped: bool) -> tuple[str, ...]:
    """The activations that a unit's own weights write."""
    if isinstance(unit, Head):
        return ("q", "attn_out") if grouped else ("q", "k", "v", "attn_out")
    return ("k", "v") if isinstance(unit, KVGroup) else ("post", "mlp_out")


class Context:
    """One tree of prompts, and the values that interventions of one mode put in.

    Args:
        forward: of the tree; its clean run is done.
        mode: of the interventions.
        means: for the mean modes.
        matched: for ``patch`` and ``resample``.
        pre: for ``revert``: the model before fine-tuning.
    """

    def __init__(
        self,
        forward: Forward,
        mode: str,
        means: Means | None = None,
        matched: Matched | None = None,
        pre: LeanModel | None = None,
    ) -> None:
        self.forward, self.mode = forward, mode
        self._lean, self._means, self._matched, self._pre = forward.lean, means, matched, pre
        self._changed = forward.tree.changed.to(self._lean.device)
        if matched is not None:
            self._changed = self._changed & (matched.node >= 0)
        self._positions = forward.tree.positions.to(self._lean.device)
        self._nodes: Tensor | None = None
        self._where: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[Site, int], Tensor] = {}

    @property
    def changed(self) -> Int[Tensor, " changed"]:
        """The nodes that are changed."""
        if self._nodes is None:
            self._nodes = self._changed.nonzero().flatten()
        return self._nodes

    def where(self, queries: Queries | None) -> tuple[Int[Tensor, " changed"], Int[Tensor, " changed"]]:
        """Where the changed nodes stand among the queries (or all active nodes), and which nodes they are."""
        key = 0 if queries is None else id(queries)
        if key not in self._where:
            nodes = self.forward.active if queries is None else queries.nodes
            chosen = self._changed[nodes].nonzero().flatten()
            self._where[key] = (chosen, nodes[chosen])
        return self._where[key]

    def value(self, site: Site, nodes: Int[Tensor, " changed"], unit: AnyUnit) -> Tensor:
        """What goes to a unit's activation at these nodes: ``[changed or 1, ...]``, or a zero."""
        table = self.table(site, nodes)
        return table if isinstance(unit, Component) or table.dim() == 0 else table[:, unit.index]

    def table(self, site: Site, nodes: Int[Tensor, " changed"]) -> Tensor:
        """What goes to a whole activation at these nodes: ``[changed or 1, ...]``, or a zero."""
        if self.mode == "zero":
            return torch.zeros((), dtype=self._lean.dtype, device=self._lean.device)
        key = (site, id(nodes))
        if key not in self._tables:
            # rows go through a layer together: tables of layers long past are not used again
            if len(self._tables) >= _KEPT:
                self._tables.pop(next(iter(self._tables)))
            if self._matched is not None:
                found = self._matched.found[site][self._matched.node[nodes]]
            else:
                assert self._means is not None
                pooled = self.mode == "mean"
                found = self._means.pooled(site) if pooled else self._means.by_position(site, self._positions[nodes])
            self._tables[key] = found.to(self._lean.dtype)
        return self._tables[key]

    def revert(self, site: Site, x: Tensor, source: Tensor, where: Tensor, unit: AnyUnit) -> None:
        """Let the weights before fine-tuning compute one unit's part of an activation of one row, in place.

        Args:
            site: layer and activation.
            x: the activation of the row, ``[node, ...]``.
            source: what it is computed from: the normalised stream, z, or the neurons.
            where: which of the nodes.
            unit: the unit.
        """
        assert self._pre is not None
        assert not isinstance(unit, Component)
        layer, name = site
        before, now, index = self._pre.layers[layer], self._lean.layers[layer], unit.index
        features = slice(index * self._lean.d_head, (index + 1) * self._lean.d_head)
        if name in ("q", "k", "v"):
            weight = {"q": before.q, "k": before.k, "v": before.v}[name]
            x[where, index] = weight.part(features)(source[where])
        elif name == "attn_out":
            x[where] += source[where, index] @ (before.o.weight - now.o.weight)[:, features].T
        elif name == "post":
            x[where, index] = before.neurons(source[where], slice(index, index + 1))[:, 0]
        else:
            x[where] += source[where, index, None] * (before.down.weight - now.down.weight)[:, index]


class Changes(Visitor):
    """Writes the changes of a batch of interventions into the activations.

    Args:
        rows: the interventions, one for each row of the activations.
        context: the values they put in.
        grouped: whether several heads share keys and values.
    """

    def __init__(self, rows: Sequence[Intervention], context: Context, grouped: bool) -> None:
        self._context = context
        self._at: dict[Site, list[tuple[int, AnyUnit]]] = {}
        for row, intervention in enumerate(rows):
            for site, unit in sites_of(intervention, grouped):
                self._at.setdefault(site, []).append((row, unit))

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:
        """Change the rows whose units write this activation."""
        if site not in self._at:
            return x
        where, nodes = self._context.where(queries)
        if len(nodes) == 0:
            return x
        x = x.clone()  # rows may still be views of one clean activation
        for row, unit in self._at[site]:
            if self._context.mode == "revert":
                assert source is not None
                self._context.revert(site, x[row], source[row], where, unit)
            elif isinstance(unit, Component):
                x[row, where] = self._context.value(site, nodes, unit)
            else:
                x[row, where, unit.index] = self._context.value(site, nodes, unit)
        return x

    def attention(self, layer: int, z: Tensor, attention: Attention) -> Tensor:
        """Change z of the rows whose heads get another pattern."""
        site = (layer, "pattern")
        where, nodes = self._context.where(attention.queries)
        if site not in self._at or len(nodes) == 0:
            return z
        z = z.clone()
        back = attention.queries.back[where]
        for row, unit in self._at[site]:
            assert isinstance(unit, Head)
            pattern = attention.pattern(row, unit.index)
            flat = pattern.flatten(0, 1)
            value = self._context.value(site, nodes, unit)
            # a reference may be shorter or longer than the prompts; padding by a negative number cuts
            flat[back] = functional.pad(value, (0, flat.shape[-1] - value.shape[-1])) if value.dim() else value
            z[row, :, unit.index] = attention.mixed(row, unit.index, flat.view_as(pattern))
        return z


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for interventions of one mode at the same positions."""

    forward: Forward
    context: Context
    known: AnswerTokens


class Engine:
    """Runs interventions over a task and scores the answers.

    Args:
        model: loaded with `circuits.load_model`.
        task: the prompts.
        interventions: what to run.
        source: the run to patch from, paired with the task.
        reference: the set that means and resampled values come from; the task itself if not given.
        pre: the model before fine-tuning, to revert to.
        metrics: names or functions.
        seed: of resampling.
        tokens: how many tokens to compute at once; `token_budget` if not given.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        interventions: Sequence[Intervention],
        source: Task | None = None,
        reference: Task | None = None,
        pre: HookedTransformer | None = None,
        metrics: Sequence[str | Metric] = ("exact_match", "log_prob"),
        seed: int = 0,
        tokens: int | None = None,
    ) -> None:
        if not interventions:
            raise CircuitsError("there is nothing to run: no interventions were given")
        if tokens is not None and tokens < 1:
            raise CircuitsError(f"{tokens} tokens cannot be computed at once: give one or more")
        self.interventions = list(interventions)
        named = [metric_of(metric) for metric in metrics]
        self.metrics = dict(named)
        if len(self.metrics) < len(named):
            twice = max(self.metrics, key=[name for name, _ in named].count)
            raise CircuitsError(f"two metrics are called {twice}: give them different names")
        # kl, and perhaps a function of the user's, compares with the clean run
        self._compares = any(metric is kl or metric not in NAMED_METRICS.values() for metric in self.metrics.values())
        dtype = arithmetic(model)
        self.lean = LeanModel(model, dtype)
        self.tokens = token_budget(model) if tokens is None else tokens
        self.grouped = self.lean.n_groups != self.lean.n_heads
        self.task = task.right_padded()
        self.source = None if source is None else source.right_padded()
        self.reference = self.task if reference is None else reference.right_padded()
        modes = {intervention.mode for intervention in interventions}
        self._check(model, modes, pre)
        self._pre = None if pre is None or "revert" not in modes else LeanModel(pre, dtype)
        self._partners, self._matches = torch.zeros(0), {}
        if "resample" in modes:
            self._partners = other_examples(self.task, self.reference, seed)
            self._matches["resample"] = same_positions(self.task)
        if "patch" in modes and self.source is not None:
            self._matches["patch"] = matching_positions(self.source, self.task)
            matched = torch.zeros_like(self.task.attention_mask)
            matched[self._matches["patch"][:, 0], self._matches["patch"][:, 2]] = True
            for positions in {one.positions for one in self.interventions if one.mode == "patch"}:
                if not bool((changed_tokens(self.task, positions) & matched).any()):
                    raise CircuitsError(
                        f"no token at {positions} of {self.task.name} has a match in the source: "
                        "nothing would be changed"
                    )
        self._means: Means | None = None
        averaged = {site for one in interventions if one.mode.startswith("mean") for site, _ in self._sites(one)}
        if averaged:
            self._means = Means.of(self.lean, self.reference, averaged, self.tokens)

    def _sites(self, intervention: Intervention) -> list[tuple[Site, AnyUnit]]:
        return sites_of(intervention, self.grouped)

    def _check(self, model: HookedTransformer, modes: set[str], pre: HookedTransformer | None) -> None:
        shape = shape_of(model)
        for unit in {unit for one in self.interventions for unit in one.units}:
            unit.check(shape)
            if isinstance(unit, Component) and unit.name == "resid_mid" and self.lean.parallel:
                raise CircuitsError(f"there is no {unit}: attention and MLP are parallel in this model")
        for one in self.interventions:
            self._sites(one)
        for positions in {one.positions for one in self.interventions}:
            check_positions(self.task, positions)
        if "patch" in modes and self.source is None:
            raise CircuitsError("patching needs the run to take values from: give source")
        if self.source is not None and len(self.source) != len(self.task):
            raise CircuitsError(
                f"a source pairs examples: it has {len(self.source)}, the task {self.task.name} has {len(self.task)}"
            )
        if "revert" in modes:
            if pre is None:
                raise CircuitsError("reverting needs the model before fine-tuning: give pre")
            if shape_of(pre) != shape or pre.cfg.d_model != model.cfg.d_model:
                raise CircuitsError("the model before fine-tuning has another shape than the one after it")

    @torch.no_grad()
    def run(self) -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
        """Run them all.

        Returns:
            metric → values without intervention, ``[answer]``; and metric → values, ``[intervention, answer]``.
        """
        count, answers = len(self.interventions), len(self.task.answers)
        clean = {name: numpy.zeros(answers) for name in self.metrics}
        found = {name: numpy.zeros((count, answers)) for name in self.metrics}
        rows_of = self.task.answers.groupby("example").indices
        with bar("interventions", count * len(self.task), "run") as progress:
            for (positions, mode), members in self.groups().items():
                members.sort(key=lambda index: self._start(self.interventions[index]))
                waiting = self.batches()
                while waiting:
                    examples = waiting.pop(0)
                    columns = numpy.concatenate([rows_of[example] for example in examples])
                    try:
                        batch = self.batch(examples, positions, mode)
                        batch.forward.run_clean()
                        if any(
                            metric is kl or metric not in NAMED_METRICS.values() for metric in self.metrics.values()
                        ):
                            logits = self.lean.unembed(batch.forward.clean.last)
                            batch = replace(batch, known=replace(batch.known, clean=logits.float().log_softmax(-1)))
                        for name, values in self._score(batch, batch.forward.clean.last[None]).items():
                            clean[name][columns] = values[0]
                        self._run_batch(batch, members, columns, found, progress)
                    except (RuntimeError, MemoryError) as error:
                        if not _out_of_memory(error):
                            raise
                        if len(examples) == 1:
                            raise CircuitsError(
                                f"memory does not suffice to run one example of {self.task.name} alone"
                            ) from None
                        half = len(examples) // 2
                        waiting[:0] = [examples[:half], examples[half:]]
        return clean, found

    def groups(self) -> dict[tuple[int | str, str], list[int]]:
        """Interventions that can share one clean run: by positions and mode."""
        groups: dict[tuple[int | str, str], list[int]] = {}
        for index, one in enumerate(self.interventions):
            groups.setdefault((one.positions, one.mode), []).append(index)
        return groups

    def batches(self) -> list[list[int]]:
        """Examples, those with common beginnings together, as many at once as the token budget allows."""
        lengths = self.task.attention_mask.sum(1).tolist()
        batches: list[list[int]] = [[]]
        size = 0
        for example in sorted(range(len(self.task)), key=lambda example: self.task.tokens[example].tolist()):
            if batches[-1] and size + lengths[example] > self.tokens:
                batches.append([])
                size = 0
            batches[-1].append(example)
            size += lengths[example]
        return batches

    def batch(self, examples: list[int], positions: int | str, mode: str, everywhere: bool = False) -> Batch:
        """Some examples, not run yet, and the values that interventions of one mode put in."""
        task = self.task.select(examples)
        source = None if self.source is None else self.source.select(examples)
        forward = Forward(self.lean, TokenTree.of(task, positions, share=mode in SHARED_MODES), everywhere)
        matched = None
        if mode in self._matches:
            other = self.reference.select(self._partners[examples]) if mode == "resample" else source
            assert other is not None
            ours = [one for one in self.interventions if (one.mode, one.positions) == (mode, positions)]
            sites = {site for one in ours for site, _ in self._sites(one)}
            place = torch.full((len(self.task),), -1)
            place[examples] = torch.arange(len(examples))
            matches = self._matches[mode].clone()
            matches[:, 0] = place[matches[:, 0]]
            matched = Matched.of(self.lean, other, matches[matches[:, 0] >= 0], forward.tree, sites)
        known = AnswerTokens.of(task, source, self.lean.device)
        return Batch(forward, Context(forward, mode, self._means, matched, self._pre), known)

    def _run_batch(
        self, batch: Batch, members: list[int], columns: numpy.ndarray, found: dict[str, numpy.ndarray], progress: Any
    ) -> None:
        """Run interventions over one batch, as many at once as the token budget and the memory allow."""
        size = max(1, self.tokens // max(1, len(batch.forward.active)))
        start = 0
        while start < len(members):
            chosen = self._alike(members[start : start + size])
            rows = [self.interventions[index] for index in chosen]
            try:
                last = batch.forward.run(len(rows), *self._start(rows[0]), Changes(rows, batch.context, self.grouped))
                scores = self._score(batch, last)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                size //= 2
                continue
            for name, values in scores.items():
                found[name][numpy.asarray(chosen)[:, None], columns] = values
            start += len(chosen)
            progress.update(len(chosen) * len(batch.forward.tree.nodes))

    def _start(self, intervention: Intervention) -> tuple[int, bool]:
        """The lowest layer an intervention changes, and whether only after that layer's attention."""
        layer = intervention.layer
        return layer, not any(at == layer and name in _EARLY for (at, name), _ in self._sites(intervention))

    def _alike(self, members: list[int]) -> list[int]:
        """The first of these interventions, and those after it that start at the same place."""
        starts = [self._start(self.interventions[index]) for index in members]
        return [index for index, start in zip(members, starts, strict=True) if start == starts[0]]

    def _score(self, batch: Batch, last: Float[Tensor, "row answer_token d_model"]) -> dict[str, numpy.ndarray]:
        """Metrics of each row, ``[row, answer]``; a few rows are unembedded at a time."""
        size = max(1, _LOGITS // (last.shape[1] * self.lean.d_vocab))
        parts: dict[str, list[numpy.ndarray]] = {name: [] for name in self.metrics}
        for part in last.split(size):
            logits = self.lean.unembed(part)
            for name, metric in self.metrics.items():
                values = metric(logits, batch.known)
                expected = (len(part), batch.known.answers)
                if values.shape != expected:
                    raise CircuitsError(
                        f"the metric {name} gave values of shape {tuple(values.shape)}: "
                        f"it must give one number for each answer, {expected} here"
                    )
                parts[name].append(values.double().cpu().numpy())
        return {name: numpy.concatenate(values) for name, values in parts.items()}


def _out_of_memory(error: BaseException) -> bool:
    said = ("not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)


def arithmetic(model: HookedTransformer) -> torch.dtype:
    """The dtype to compute in: the model's, or float32 on a processor without instructions for a half-precision one.

    There half precision is emulated: several times slower than float32, and less exact.
    """
    dtype: torch.dtype = model.cfg.dtype
    if torch.device(model.cfg.device).type != "cpu" or dtype == torch.float32:
        return dtype
    known = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    return dtype if any(known.get(name) for name in names) else torch.float32


def token_budget(model: HookedTransformer) -> int:
    """How many tokens to compute at once: what a CPU's cache likes, or what fits an eighth of a GPU's memory."""
    device = torch.device(model.cfg.device)
    if device.type != "cuda":
        return TOKENS
    # a stream before each layer in the clean run, and a layer's projections and neurons at a time
    numbers = model.cfg.d_model * (model.cfg.n_layers + 12) + 4 * model.cfg.d_mlp
    # of all its memory, not of what is free: rounding must not depend on what else runs
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(TOKENS, memory // 8 // int(numbers * model.cfg.dtype.itemsize))


def run_interventions(
    model: HookedTransformer,
    task: Task,
    interventions: Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    pre: HookedTransformer | None = None,
    metrics: Sequence[str | Metric] = ("exact_match", "log_prob"),
    seed: int = 0,
    per_answer: bool = False,
    tokens: int | None = None,
) -> pandas.DataFrame:
    """Run each intervention over a task, and measure what it does to the answers.

    Args:
        model: loaded with `circuits.load_model`.
        task: the prompts and their answers; padding may stand on either side.
        interventions: what to change, each in a run of its own.
        source: for ``patch``: the run to take values from, paired with the task by `pair_people` or `pair_formats`.
            Its answers are also the foils of ``logit_diff``.
        reference: for ``mean``, ``mean_by_position`` and ``resample``: where values come from; the task if not given.
        pre: for ``revert``: the model before fine-tuning.
        metrics: names (``exact_match``, ``first_token``, ``log_prob``, ``logit_diff``, ``source_exact_match``,
            ``kl``), or functions of the answer logits and `circuits.metrics.AnswerTokens`.
        seed: of resampling and of the bootstrap.
        per_answer: one row for each intervention and answer instead of means.
        tokens: how many tokens to compute at once, by default as many as suit the device; changes speed and memory,
            the result only by rounding.

    Returns:
        One row for each intervention, in order: ``units``, ``mode``, ``site``, ``positions``, ``task``, ``answers``,
        and for each metric its mean over answers, ``…_effect`` (the difference from the model without intervention),
        ``…_low`` and ``…_high`` (95 % bootstrap interval of the effect). With ``per_answer``, one row for each
        intervention and answer: the columns of ``task.answers``, and each metric with its ``…_effect``. Provenance is
        in ``attrs``.

    Raises:
        CircuitsError: a unit, site, position or metric does not exist, or what a mode needs is missing.

    Source:
        docs/method.md, section 6.

    Example:
        >>> from circuits import Head, Task, load_model
        >>> from circuits.datasets import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = Task.from_dataset(make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)), "qa_id", tokenizer)
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> table = run_interventions(model, task, [Intervention((Head(2, 1),)), Intervention((Head(3, 0),), "mean")])
        >>> table[["units", "mode", "answers"]].values.tolist()
        [['L2H1', 'zero', 12], ['L3H0', 'mean', 12]]
    """
    engine = Engine(model, task, interventions, source, reference, pre, metrics, seed, tokens)
    clean, found = engine.run()
    answers = engine.task.answers
    if per_answer:
        rows = describe(interventions)
        rows = rows.loc[rows.index.repeat(len(answers))].reset_index(drop=True)
        repeated = pandas.concat([answers] * len(interventions), ignore_index=True)
        table = pandas.concat([rows.assign(task=task.name), repeated], axis=1)
        for name, values in found.items():
            table[name] = values.ravel()
            table[f"{name}_effect"] = (values - clean[name]).ravel()
    else:
        table = describe(interventions).assign(task=task.name, answers=len(answers))
        for name, values in found.items():
            effects = values - clean[name]
            table[name] = values.mean(1)
            table[f"{name}_effect"] = effects.mean(1)
            table[f"{name}_low"], table[f"{name}_high"] = bootstrap_interval(effects, seed)
    table.attrs = provenance(
        **facts_of(model),
        task=task.provenance,
        seed=seed,
        arithmetic=str(engine.lean.dtype).removeprefix("torch."),
    )
    return table


def describe(interventions: Sequence[Intervention]) -> pandas.DataFrame:
    """A table of interventions: ``units`` joined by ``+``, ``mode``, ``site``, ``positions``."""
    return pandas.DataFrame(
        {
            "units": ["+".join(map(str, one.units)) for one in interventions],
            "mode": [one.mode for one in interventions],
            "site": [one.site or "" for one in interventions],
            "positions": [str(one.positions) for one in interventions],
        }
    )
