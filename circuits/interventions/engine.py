"""Interventions by the hundred, exactly, at the cost of what they change.

1. Prompts are taken in batches in which common beginnings are adjacent. For each batch the clean run is kept
   (``forward.py``), and so is the run that values are patched from (``values.py``).
2. Interventions that act at the same positions with the same kind of values are run together.
3. They are ordered by the lowest layer they change; as many as fit the token budget form one tensor, to which each
   joins at its layer, with its changes written in (``changes.py``).
4. Only positions that predict answer tokens are unembedded, and metrics are taken from their logits.
5. If memory does not suffice, the number of rows is halved, and at one row the batch of prompts (``memory.py``).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.changes import Changes, Context, sites_of
from circuits.interventions.forward import CleanRun, Forward
from circuits.interventions.intervention import Intervention
from circuits.interventions.memory import arithmetic, in_halves, out_of_memory, token_budget
from circuits.interventions.pairing import matching_positions
from circuits.interventions.tokens import TokenTree, changed_tokens, check_positions
from circuits.interventions.values import SHARED_MODES, Matched, Means, other_examples, same_positions
from circuits.metrics import NAMED_METRICS, AnswerTokens, Metric, kl, metric_of
from circuits.models import (
    Model,
    Site,
    check_task,
    checkpoint_of,
    lean_model,
    refuse_hooks,
    require_start,
    shape_of,
)
from circuits.progress import bar
from circuits.tasks import Task
from circuits.units import AnyUnit, Component

#: Logits in memory at once: as many as an allocator gives out of memory it already has.
_LOGITS = 1 << 23

#: Sites that come before a layer's attention, or in it.
_EARLY = ("resid_pre", "q", "k", "v", "pattern")


class Prompts:
    """A batch of prompts, and what is computed of them only once.

    Args:
        engine: whose prompts they are.
        examples: which of the task's.
    """

    def __init__(self, engine: "Engine", examples: list[int]) -> None:
        self._engine, self._examples = engine, examples
        self.task = engine.task.select(examples)
        self._source = None if engine.source is None else engine.source.select(examples)
        self._matched: dict[str, Matched] = {}

    @cached_property
    def clean(self) -> CleanRun:
        """The run without intervention."""
        return CleanRun.of(Forward(self._engine.lean, TokenTree.of(self.task), length=self._engine.length))

    @cached_property
    def known(self) -> AnswerTokens:
        """The answer tokens, and what is predicted there without intervention if a metric compares with it."""
        lean = self._engine.lean
        known = AnswerTokens.of(self.task, self._source, lean.device)
        if not self._engine.compares:
            return known
        return replace(known, clean=lean.unembed(self.clean.last).float().log_softmax(-1))

    def matched(self, mode: str) -> Matched | None:
        """The run that values of one mode come from."""
        engine = self._engine
        if mode in engine.matches and mode not in self._matched:
            other = engine.reference.select(engine.partners[self._examples]) if mode == "resample" else self._source
            assert other is not None
            ours = [one for one in engine.interventions if one.mode == mode]
            sites = {site for one in ours for site, _ in sites_of(one, engine.grouped)}
            place = torch.full((len(engine.task),), -1)
            place[self._examples] = torch.arange(len(self._examples))
            matches = engine.matches[mode].clone()
            matches[:, 0] = place[matches[:, 0]]
            matches = matches[matches[:, 0] >= 0]
            whole = engine.reference if mode == "resample" or engine.source is None else engine.source
            self._matched[mode] = Matched.of(engine.lean, other, self.task, matches, sites, whole.tokens.shape[1])
        return self._matched.get(mode)

    def tree(self, positions: int | str, mode: str) -> TokenTree:
        """The tokens, with those marked that interventions of one mode change at some positions."""
        changes, matched = changed_tokens(self.task, positions), self.matched(mode)
        if matched is not None:
            changes = changes & (matched.nodes >= 0) & ~matched.same
        return TokenTree.of(self.task, changes, share=mode in SHARED_MODES)


class Engine:
    """Runs interventions over a task and scores the answers.

    Args:
        model: loaded with `circuits.load_model`.
        task: the prompts.
        interventions: what to run, one or several.
        source: the run to patch from, paired with the task; its counterfactuals if not given.
        reference: the set that means and resampled values come from; the task itself if not given.
        pre: the model before fine-tuning, to revert to.
        metrics: names or functions.
        seed: of resampling.
        tokens: how many tokens to compute at once; `token_budget` if not given.
        check_start: refuse a ``pre`` to revert to if the checkpoint of ``model`` says that it was trained from another
            model.

    Attributes:
        ran: which were run so far, ``[intervention, answer]``.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        interventions: Intervention | Sequence[Intervention],
        *,
        source: Task | None = None,
        reference: Task | None = None,
        pre: Model | None = None,
        metrics: str | Metric | Sequence[str | Metric] = ("exact_match", "log_prob"),
        seed: int = 0,
        tokens: int | None = None,
        check_start: bool = True,
    ) -> None:
        self.interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        if not self.interventions:
            raise CircuitsError("there is nothing to run: no interventions were given")
        if tokens is not None and tokens < 1:
            raise CircuitsError(f"{tokens} tokens cannot be computed at once: give one or more")
        several = [metrics] if isinstance(metrics, str) or callable(metrics) else metrics
        named = [metric_of(metric) for metric in several]
        self.metrics = dict(named)
        if len(self.metrics) < len(named):
            twice = max(self.metrics, key=[name for name, _ in named].count)
            raise CircuitsError(f"two metrics are called {twice}: give them different names")
        # kl, and perhaps a function of the user's, compares with the clean run
        self.compares = any(metric is kl or metric not in NAMED_METRICS.values() for metric in self.metrics.values())
        for each in (model, pre):
            if each is not None:
                refuse_hooks(each)
        for one in (task, source, reference):
            if one is not None:
                check_task(model, one)
        dtype = arithmetic(model)
        self.lean = lean_model(model, dtype)
        self.tokens = token_budget(self.lean) if tokens is None else tokens
        self.grouped = self.lean.n_groups != self.lean.n_heads
        self.task = task.right_padded()
        self.length = self.task.tokens.shape[1]
        modes = {intervention.mode for intervention in self.interventions}
        if source is None and "patch" in modes:
            source = self.task.counterfactuals
        self.source = None if source is None else source.right_padded()
        self.reference = self.task if reference is None else reference.right_padded()
        self._check(model, modes, pre)
        self.ran = numpy.zeros((len(self.interventions), len(self.task.answers)), dtype=bool)
        if check_start and pre is not None and "revert" in modes:
            require_start(model, pre)
        self._pre = None if pre is None or "revert" not in modes else lean_model(pre, dtype)
        self.partners: Int[Tensor, " example"] = torch.zeros(0, dtype=torch.long)
        self.matches: dict[str, Int[Tensor, "match 3"]] = {}
        if "resample" in modes:
            self.partners = other_examples(self.task, self.reference, seed)
            self.matches["resample"] = same_positions(self.task)
        if "patch" in modes and self.source is not None:
            self.matches["patch"] = matching_positions(self.source, self.task)
            self._matched = torch.zeros_like(self.task.attention_mask)
            self._matched[self.matches["patch"][:, 0], self.matches["patch"][:, 2]] = True
            for positions in {one.positions for one in self.interventions if one.mode == "patch"}:
                if not bool((changed_tokens(self.task, positions) & self._matched).any()):
                    raise CircuitsError(
                        f"no token at {positions} of {self.task.name} has a match in the source: "
                        "nothing would be changed"
                    )

    @cached_property
    def _means(self) -> Means | None:
        averaged = {site for one in self.interventions if one.mode.startswith("mean") for site, _ in self._sites(one)}
        return Means.of(self.lean, self.reference, averaged, self.tokens) if averaged else None

    def _sites(self, intervention: Intervention) -> list[tuple[Site, AnyUnit]]:
        return sites_of(intervention, self.grouped)

    def _check(self, model: Model, modes: set[str], pre: Model | None) -> None:
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
            raise CircuitsError(
                "patching needs the run to take values from: give source, or a task with counterfactuals"
            )
        if self.source is not None and len(self.source) != len(self.task):
            raise CircuitsError(
                f"a source pairs examples: it has {len(self.source)}, the task {self.task.name} has {len(self.task)}"
            )
        if self.source is not None:
            same = self.task.answers["value"].tolist() == self.source.answers["value"].tolist()
            needed = ["source_exact_match"] if self.task.foils is not None else ["logit_diff", "source_exact_match"]
            compared = [name for name in needed if name in self.metrics]
            if same and compared:
                raise CircuitsError(
                    f"{compared[0]} compares with another answer, but the source has the same ones: pair people"
                )
        needs = {"logit_diff": AnswerTokens.check_foils, "source_exact_match": AnswerTokens.check_source}
        for check in (needs[name] for name in self.metrics if name in needs):
            check(AnswerTokens.of(self.task, self.source))
        if "revert" in modes:
            if pre is None:
                raise CircuitsError("reverting needs the model before fine-tuning: give pre")
            if shape_of(pre) != shape or checkpoint_of(pre).layout.d_model != self.lean.d_model:
                raise CircuitsError("the model before fine-tuning has another shape than the one after it")

    @torch.no_grad()
    def run(self, share: int = 0, shares: int = 1) -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
        """Run them all, or a share of them.

        What is computed in one tensor does not depend on the number of shares: together they give the same numbers to
        the bit. With memory enough, every intervention is run on every answer in exactly one of them.

        Args:
            share: counted from 0.
            shares: how many there are.

        Returns:
            metric → values without intervention, ``[answer]``; and metric → values, ``[intervention, answer]``, 0 where
            another share has them.
        """
        count, answers = len(self.interventions), len(self.task.answers)
        clean = {name: numpy.zeros(answers) for name in self.metrics}
        found = {name: numpy.zeros((count, answers)) for name in self.metrics}
        rows_of = self.task.answers.groupby("example").indices
        groups = self.groups()
        for members in groups.values():
            members.sort(key=lambda index: self._start(self.interventions[index]))
        with bar("interventions", count * len(self.task), "run") as progress:

            def work(examples: list[int]) -> None:
                columns = numpy.concatenate([rows_of[example] for example in examples])
                prompts = Prompts(self, examples)
                for name, values in self._score(prompts, prompts.clean.last[None]).items():
                    clean[name][columns] = values[0]
                for (positions, mode), members in groups.items():
                    tree = prompts.tree(positions, mode)
                    forward = Forward(self.lean, tree, prompts.clean, length=self.length)
                    if forward.reaches:
                        context = self.context(prompts, forward, mode)
                        size = max(1, self.tokens // len(forward.active))
                        together = [members[start : start + size] for start in range(0, len(members), size)]
                        self._run(prompts, forward, context, together[share::shares], columns, found, progress)
                    elif share == 0:
                        self.ran[numpy.asarray(members)[:, None], columns] = True
                        for name in self.metrics:
                            found[name][numpy.asarray(members)[:, None], columns] = clean[name][columns]
                        progress.update(len(members) * len(examples))

            in_halves(self.batches(), work, self.task.name)
        return clean, found

    def groups(self) -> dict[tuple[int | str, str], list[int]]:
        """Interventions that can share one tree of tokens: by positions and mode."""
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

    def changed(self, positions: int | str, mode: str) -> Bool[numpy.ndarray, " answer"]:
        """Which answers interventions act on: a token that leads to the answer is changed at these positions."""
        changes = changed_tokens(self.task, positions)
        if mode == "patch":
            changes = changes & self._matched
        # the token before the answer's last one is the last that its prediction sees
        known = changes.cumsum(1) > 0
        example, end = (self.task.answers[name].to_numpy(copy=True) for name in ("example", "end"))
        found: numpy.ndarray = known[example, end - 2].numpy()
        return found

    def context(self, prompts: Prompts, forward: Forward, mode: str) -> Context:
        """The values that interventions of one mode put in."""
        return Context(forward, mode, self._means, prompts.matched(mode), self._pre)

    def _run(
        self,
        prompts: Prompts,
        forward: Forward,
        context: Context,
        together: list[list[int]],
        columns: numpy.ndarray,
        found: dict[str, numpy.ndarray],
        progress: Any,
    ) -> None:
        """Run interventions over one batch, those together that fit the token budget, or fewer if memory is short."""
        waiting = list(together)
        while waiting:
            chosen = waiting[0]
            rows = [self.interventions[index] for index in chosen]
            try:
                last = forward.run([self._start(one) for one in rows], Changes(rows, context, self.grouped))
                scores = self._score(prompts, last)
            except (RuntimeError, MemoryError) as error:
                if len(chosen) == 1 or not out_of_memory(error):
                    raise
                # what follows would not fit either
                size = len(chosen) // 2
                waiting = [some[start : start + size] for some in waiting for start in range(0, len(some), size)]
                continue
            for name, values in scores.items():
                found[name][numpy.asarray(chosen)[:, None], columns] = values
            self.ran[numpy.asarray(chosen)[:, None], columns] = True
            waiting.pop(0)
            progress.update(len(chosen) * len(prompts.task))

    def _start(self, intervention: Intervention) -> tuple[int, bool]:
        """The lowest layer an intervention changes, and whether only after that layer's attention."""
        layer = intervention.layer
        return layer, not any(at == layer and name in _EARLY for (at, name), _ in self._sites(intervention))

    def _score(self, prompts: Prompts, last: Float[Tensor, "row answer_token d_model"]) -> dict[str, numpy.ndarray]:
        """Metrics of each row, ``[row, answer]``; a few rows are unembedded at a time."""
        fit = max(1, _LOGITS // (last.shape[1] * self.lean.d_vocab))
        size = math.ceil(len(last) / math.ceil(len(last) / fit))  # parts of about the same size
        parts: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        for part in last.split(size):
            logits = self.lean.unembed(part)
            for name, metric in self.metrics.items():
                values = metric(logits, prompts.known)
                expected = (len(part), prompts.known.answers)
                if values.shape != expected:
                    raise CircuitsError(
                        f"the metric {name} gave values of shape {tuple(values.shape)}: "
                        f"it must give one number for each answer, {expected} here"
                    )
                parts[name].append(values.double())
        # a GPU is waited for once
        return {name: torch.cat(values).cpu().numpy() for name, values in parts.items()}
