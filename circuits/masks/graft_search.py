"""The search for a small graft (docs/method.md, section 4).

A graft is θ_pre + γ ⊙ Δ with Δ = θ_ft − θ_pre and γ a mask. The smallest γ that keeps a share of θ_ft's accuracy:

1. *By score.* Every parameter has a score: |Δ|, or |g · Δ| with g the gradient of the task's loss, averaged over the
   middles of four equal pieces of the straight path from θ_pre to θ_ft (at θ_ft the loss is fitted and its gradient
   says little; at θ_pre it does not know where it is going). A γ of n parameters takes the n largest scores.
2. Accuracy is measured at n spaced evenly in logarithm, from 0.01 % of all to all, and then by bisection between the
   smallest n that keeps the share and the one before it, until they are within 1 %.
3. *By optimisation.* The n of steps 1 and 2 for |Δ| gives γ_base. Every parameter gets a real number s, and
   γ = γ_base (1 − σ(s)) + (1 − γ_base) σ(s), so that s = −3 everywhere is the base patch, a little softened.
4. The model runs at θ_pre + γ ⊙ Δ. Plain gradient descent over s on the task's loss plus λ Σγ / |γ_base|; each step is
   scaled so that the entries' changes have a root mean square of 0.2 (bare gradients over s are far too small to step
   along, and Adam, tried, needs three times the memory and ends with larger grafts).
5. γ is rounded by taking its n largest entries, n as in step 2: γ is a score like the others.

Source: Panigrahi et al. 2023 (arXiv 2302.06600) for the graft and its relaxation around the top-|Δ| patch; the penalty,
the scaled step and the rounding by bisection are choices made here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import pandas
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.masks.ablation import NAMES_OF_ANSWERS
from circuits.masks.acting import graft
from circuits.masks.grafts import Graft
from circuits.masks.mask import ParameterMask, covered_parameters, unit_mask
from circuits.masks.packing import PackedTensors
from circuits.masks.selection import all_finite, largest
from circuits.metrics import evaluate
from circuits.models import Model, editing, identity, require_start, same_parameters, uninterrupted
from circuits.progress import bar, track
from circuits.storage import provenance
from circuits.tasks import Task
from circuits.tracing import loss_gradients
from circuits.units import Head, KVGroup, Neuron

#: Sizes of the curve: four for each factor of ten, from 0.01 % of the parameters to all.
_SMALLEST, _SIZES = 1e-4, 17
_TOLERANCE = 0.01
_PATH = (0.125, 0.375, 0.625, 0.875)
_START = -3.0


class GraftSearch:
    """One search for a graft: the models, what must be reached, and what was tried."""

    def __init__(
        self,
        pre: Model,
        fine_tuned: Model,
        task: Task,
        keep: float,
        units: Iterable[Head | KVGroup | Neuron] | None,
        check_start: bool = True,
    ) -> None:
        if not 0 < keep <= 1:
            raise CircuitsError(f"the share to keep is {keep}: it must be more than 0 and at most 1")
        same_parameters(fine_tuned, pre, values_of=fine_tuned)
        if check_start:
            require_start(fine_tuned, pre)
        self.pre, self.fine_tuned, self.task, self.keep = pre, fine_tuned, task, keep
        self.units = None if units is None else unit_mask(fine_tuned, units)
        if self.units is not None and not self.units.size:
            raise CircuitsError("a graft of no units has nothing to graft: name one or more")
        self.new = covered_parameters(fine_tuned)
        self.rows: list[dict[str, Any]] = []
        #: Which answers each graft that was tried gives; as many as there are rows.
        self.given: list[pandas.Series] = []
        self.whole = evaluate(fine_tuned, task)
        self.accuracy = float(self.whole["exact_match"].mean())
        if self.accuracy == 0:
            raise CircuitsError(f"the fine-tuned model gets no answer of {task.name} right: nothing to keep")

    @uninterrupted
    def started(self) -> Iterator[None]:
        """For the length of the search, fingerprints are taken once."""
        with editing(self.pre), editing(self.fine_tuned):
            yield

    # scores

    def changes(self) -> dict[str, Tensor]:
        """|Δ|; zero where nothing may be grafted."""
        old = covered_parameters(self.pre)
        return {name: self.restrict(name, self.difference(name, old).abs_()).contiguous() for name in self.new}

    def gradients_x_changes(self, batch_size: int) -> dict[str, Tensor]:
        """|g · Δ|, g averaged over the path; zero where nothing may be grafted."""
        sums: dict[str, Tensor] = {}
        with self.mixing() as (old, mix):
            for share in track(_PATH, "gradients along the path", len(_PATH), "point"):
                mix(dict.fromkeys(old, torch.tensor(share)).__getitem__)
                for batch in self.task.batches(batch_size):
                    for name, gradient in self.gradients(batch, len(self.task)).items():
                        sums[name] = sums[name].add_(gradient) if name in sums else gradient
            for name, total in sums.items():
                total.mul_(self.difference(name, old)).div_(len(_PATH)).abs_()
                sums[name] = self.restrict(name, total).contiguous()
        if not all_finite(sums):
            raise CircuitsError(f"gradients of the loss on {self.task.name} are not finite: load the models in float32")
        return sums

    def relax(
        self, base: Mapping[str, Tensor], steps: int, step_size: float, sparsity: float, batch_size: int, seed: int
    ) -> dict[str, Tensor]:
        """γ after gradient descent over s; zero where nothing may be grafted."""
        price = sparsity / max(1, sum(int(entries.sum()) for entries in base.values()))
        generator = torch.Generator().manual_seed(seed)
        logits = {name: torch.full_like(value, _START, dtype=torch.float32) for name, value in self.new.items()}

        def patch(name: str) -> Tensor:
            side = base[name].to(logits[name].device)
            return self.restrict(name, torch.where(side, -logits[name], logits[name]).sigmoid_())

        with self.mixing() as (old, mix):
            for _ in track(range(steps), "graft by optimisation", steps, "step"):
                mix(patch)
                examples = torch.randperm(len(self.task), generator=generator)[:batch_size]
                slopes = self.gradients(self.task.select(examples), len(examples))
                square = 0.0
                for name, slope in list(slopes.items()):
                    # from ∂L/∂θ to the slope over s: times Δ, plus the price of γ, times ∂γ/∂s
                    slope.mul_(self.difference(name, old)).add_(price)
                    inside = logits[name].sigmoid()
                    slope.mul_(inside.mul_(1 - inside))
                    self.restrict(name, slope)
                    slopes[name] = torch.where(base[name].to(slope.device), -slope, slope)
                    square += float(slope.double().square().sum())
                size = (square / self.candidates) ** 0.5
                if not numpy.isfinite(size):
                    raise CircuitsError(
                        f"gradients of the loss on {self.task.name} are not finite: load the models in float32"
                    )
                for name, slope in slopes.items():
                    logits[name].sub_(slope, alpha=step_size / size if size else 0.0)
        return {name: patch(name).contiguous() for name in logits}

    @property
    def candidates(self) -> int:
        """How many parameters may be grafted."""
        return sum(value.numel() for value in self.new.values()) if self.units is None else self.units.size

    def difference(self, name: str, old: Mapping[str, Tensor]) -> Tensor:
        """Δ of one parameter, in float32, on θ_pre's device."""
        return self.new[name].to(old[name].device).float() - old[name].float()

    def restrict(self, name: str, values: Tensor) -> Tensor:
        """Set to zero, in place, what belongs to none of the units that may be grafted."""
        if self.units is None:
            return values
        if name not in self.units.masks:
            return values.zero_()
        return values.masked_fill_(~self.units.masks[name].to(values.device), 0)

    def gradients(self, batch: Task, examples: int) -> dict[str, Tensor]:
        """Gradient of the mean loss where ``pre`` stands, in float32; tied embeddings have that of the one tensor."""
        found = loss_gradients(self.pre, batch)
        return {name: gradient.float().div_(examples) for name, gradient in found.items()}

    @uninterrupted
    def mixing(self) -> Iterator[tuple[dict[str, Tensor], Callable[[Callable[[str], Tensor]], None]]]:
        """θ_pre, and a function that sets ``pre`` to θ_pre + γ ⊙ Δ for any γ; restored at the end."""
        parameters = covered_parameters(self.pre)
        old = {name: value.clone() for name, value in parameters.items()}

        def mix(patch: Callable[[str], Tensor]) -> None:
            for name, value in parameters.items():
                change = self.difference(name, old).mul_(patch(name).to(value.device))
                value.copy_(change.add_(old[name]))

        try:
            yield old, mix
        finally:
            for name, value in parameters.items():
                value.copy_(old[name])

    # sizes

    def by_size(self, scores: Mapping[str, Tensor], score: str) -> tuple[PackedTensors, int]:
        """The smallest set of the largest scores that keeps the share, and its row; every size tried is a row."""
        most = sum(int(values.count_nonzero()) for values in scores.values())
        if not most:
            raise CircuitsError(
                f"{self.fine_tuned.checkpoint.source} and {self.pre.checkpoint.source} have the same weights where a "
                "graft may be: there is nothing to graft"
            )
        sizes = {round(size) for size in numpy.geomspace(max(1, _SMALLEST * most), most, _SIZES)}
        target = self.keep * self.accuracy - 1e-9
        best, row, high = PackedTensors({}), -1, most + 1

        def keeps(size: int) -> bool:
            nonlocal best, row, high
            masks = largest(scores, size)
            kept = self.measure(masks, score) >= target
            if kept and size < high:
                best, row, high = masks, len(self.rows) - 1, size
            shown.update()
            return kept

        with bar(f"graft by {score}", _SIZES + 9, "graft") as shown:
            if not keeps(most):
                raise CircuitsError(
                    f"all {most} parameters that may be grafted reach an accuracy of "
                    f"{self.rows[-1]['exact_match']:.4f} on {self.task.name}, below the {target:.4f} to keep: "
                    "take more units or a smaller share"
                )
            for size in (0, *sorted(sizes - {0, most})):
                keeps(size)
            low = max((size for size in (0, *sizes) if size < high), default=0)
            while high - low > max(1, _TOLERANCE * high):
                middle = (low + high) // 2
                low = low if keeps(middle) else middle
        return best, row

    def measure(self, masks: PackedTensors, score: str) -> float:
        """Accuracy of a graft, which becomes a row of the curve."""
        mask = ParameterMask(masks, identity(self.fine_tuned))
        with graft(self.pre, mask, self.fine_tuned, check_start=False):
            scores = evaluate(self.pre, self.task)
        accuracy = float(scores["exact_match"].mean())
        self.given.append(scores["exact_match"])
        self.rows.append(
            {
                "score": score,
                "size": mask.size,
                "fraction": mask.size / mask.total,
                "exact_match": accuracy,
                "log_prob": float(scores["log_prob"].mean()),
            }
        )
        return accuracy

    def result(self, masks: PackedTensors, row: int, **settings: object) -> Graft:
        """The graft that was chosen among those tried, with its row of the curve."""
        curve = pandas.DataFrame(self.rows)
        curve = curve.assign(chosen=curve.index == row).sort_values(["score", "size"], kind="stable")
        facts = provenance(
            pre=identity(self.pre),
            fine_tuned=identity(self.fine_tuned),
            task={"name": self.task.name, "examples": len(self.task), **self.task.provenance},
            keep=self.keep,
            fine_tuned_accuracy=self.accuracy,
            units=None if self.units is None else self.units.provenance["units"],
            **settings,
        )
        answers = self.whole[[name for name in NAMES_OF_ANSWERS if name in self.whole]].assign(
            exact_match=self.given[row], fine_tuned=self.whole["exact_match"]
        )
        mask = ParameterMask(masks, identity(self.fine_tuned), facts)
        return Graft(mask, curve.reset_index(drop=True), answers)
