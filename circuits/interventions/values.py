"""What takes the place of an activation, for each mode, at the changed nodes of a tree.

1. ``mean`` and ``mean_by_position``: the reference set runs once, and sums are taken over all its tokens, or over the
   tokens at each position. Padding is not counted.
2. ``patch``: the source runs once; a node takes the value of the source's token that matches it. Up to where both
   begin with the same tokens the values are the same, and nothing is changed.
3. ``resample``: the same, with another example of the reference set as the source, drawn among those at least as long,
   and the same position as the match.
4. ``revert``: the weights before fine-tuning compute the unit anew from what stands before it.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.forward import CleanRun, Forward, Recorder
from circuits.interventions.memory import in_halves
from circuits.interventions.tokens import TokenTree, needed_lengths
from circuits.models import LeanModel, Site
from circuits.tasks import Task

#: Modes whose values are the same for every prompt, so that prompts may share nodes.
SHARED_MODES = ("zero", "mean", "mean_by_position", "revert")


@dataclass
class Means:
    """Mean activations of a reference set.

    Attributes:
        sums: site → sums over the tokens at each position, ``[pos, ...]`` in double precision.
        counts: how many tokens stand at each position.
        name: of the reference set.
    """

    sums: dict[Site, Tensor] = field(default_factory=dict)
    counts: Int[Tensor, " pos"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    name: str = ""

    @classmethod
    @torch.no_grad()
    def of(cls, lean: LeanModel, reference: Task, sites: Collection[Site], tokens: int) -> "Means":
        """Run the reference set.

        Args:
            lean: the model.
            reference: a right-padded task.
            sites: which activations.
            tokens: how many tokens to run at once.
        """
        length = int(reference.attention_mask.sum(1).max())
        means = cls(counts=reference.attention_mask.sum(0)[:length].to(lean.device), name=reference.name)

        def add(examples: list[int]) -> None:
            tree = TokenTree.of(reference.select(examples), whole=True)
            recorder = Recorder(sites)
            CleanRun.of(Forward(lean, tree, length=reference.tokens.shape[1]), recorder)
            # a node counts once for every prompt that goes through it
            times = torch.bincount(tree.nodes[tree.nodes >= 0], minlength=len(tree)).to(lean.device)
            positions = tree.positions.to(lean.device)
            sums: dict[Site, Tensor] = {}
            for site, found in recorder.found.items():
                if site[1] == "pattern":
                    found = torch.nn.functional.pad(found, (0, length - found.shape[-1]))
                weights = times.double().view(-1, *[1] * (found.dim() - 1))
                zeros = found.new_zeros((length, *found.shape[1:]), dtype=torch.float64)
                sums[site] = zeros.index_add_(0, positions, found.double() * weights)
            # nothing that can fail for lack of memory stands behind this
            for site, added in sums.items():
                means.sums[site] = means.sums[site].add_(added) if site in means.sums else added

        size = max(1, tokens // length)
        batches = [list(range(start, min(start + size, len(reference)))) for start in range(0, len(reference), size)]
        in_halves(batches, add, reference.name)
        return means

    def pooled(self, site: Site) -> Float[Tensor, "1 ..."]:
        """The mean over all tokens."""
        return self.sums[site].sum(0, keepdim=True) / self.counts.sum()

    def by_position(self, site: Site, positions: Int[Tensor, " node"]) -> Float[Tensor, "node ..."]:
        """The mean at each of these positions.

        Raises:
            CircuitsError: no reference example is so long.
        """
        if len(positions) and int(positions.max()) >= len(self.counts):
            raise CircuitsError(
                f"the reference {self.name} has no token at position {int(positions.max())}: "
                "take a reference with longer examples, or the mode mean"
            )
        sums = self.sums[site]
        return sums[positions] / self.counts[positions].view(-1, *[1] * (sums.dim() - 1))


@dataclass(frozen=True)
class Matched:
    """Values of another run of paired prompts.

    Attributes:
        found: site → activations of the other run.
        nodes: where they stand in it, for each example and position of ours; ``-1`` where there is no match.
        same: where they are our own, since both prompts are the same up to there.
    """

    found: dict[Site, Tensor]
    nodes: Int[Tensor, "example pos"]
    same: Bool[Tensor, "example pos"]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        lean: LeanModel,
        source: Task,
        task: Task,
        matches: Int[Tensor, "match 3"],
        sites: Collection[Site],
        length: int,
    ) -> "Matched":
        """Run the source.

        Args:
            lean: the model.
            source: the other prompts, right-padded, one for each of the task's.
            task: the prompts.
            matches: rows of example, source position, position.
            sites: which activations.
            length: of the longest of the other prompts, here or elsewhere.

        Raises:
            CircuitsError: patterns of prompts whose tokens do not match one by one.
        """
        tree = TokenTree.of(source, whole=True)
        recorder = Recorder(sites)
        CleanRun.of(Forward(lean, tree, length=length), recorder)
        matches = matches[matches[:, 2] < int(needed_lengths(task).max())]
        example, theirs, ours = matches.T
        nodes = torch.full(task.tokens.shape, -1)
        nodes[example, ours] = tree.nodes[example, theirs]
        width = min(source.tokens.shape[1], task.tokens.shape[1])
        alike = torch.zeros_like(task.attention_mask)
        alike[:, :width] = (source.tokens[:, :width] == task.tokens[:, :width]).cumprod(1).bool()
        same = torch.zeros_like(alike)
        same[example, ours] = alike[example, ours] & (theirs == ours)
        counts, last = torch.bincount(example), torch.zeros(len(source), dtype=torch.long)
        last = last.scatter_reduce(0, example, ours, "amax")
        one_by_one = torch.equal(theirs, ours) and torch.equal(counts, last + 1)
        if any(name == "pattern" for _, name in sites) and not one_by_one:
            raise CircuitsError(
                "a pattern can be patched only between prompts whose tokens match one by one: "
                "pair people in one template"
            )
        return cls(recorder.found, nodes, same)

    def at(self, tree: TokenTree) -> Int[Tensor, " node"]:
        """For each node of a tree of the task, the matching node of the other run."""
        found = torch.full((len(tree),), -1)
        real = tree.nodes >= 0
        found[tree.nodes[real]] = self.nodes[:, : tree.nodes.shape[1]][real]
        return found


def other_examples(task: Task, reference: Task, seed: int) -> Int[Tensor, " example"]:
    """For each example of a task another one of the reference set that has all the positions needed.

    Raises:
        CircuitsError: there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    known = reference.attention_mask.sum(1)
    chosen = []
    for example, length in enumerate(needed_lengths(task).tolist()):
        tokens = task.tokens[example, :length]
        long = (known >= length).nonzero().flatten().tolist()
        others = [other for other in long if not torch.equal(reference.tokens[other, :length], tokens)]
        if not others:
            raise CircuitsError(
                f"the reference {reference.name} has no other example of {length} tokens or more to resample "
                f"{task.texts[example]!r} from"
            )
        chosen.append(others[int(torch.randint(len(others), (1,), generator=generator))])
    return torch.tensor(chosen)


def same_positions(task: Task) -> Int[Tensor, "match 3"]:
    """Every token that matters matches the one at its own position."""
    where = (torch.arange(task.tokens.shape[1])[None] < needed_lengths(task)[:, None]).nonzero()
    return torch.cat([where, where[:, 1:]], 1)
