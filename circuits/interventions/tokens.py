"""The tokens that a set of prompts has to be computed at, each once.

1. A token's activations depend on the tokens before it and on nothing else. Prompts that begin alike share the nodes of
   their common beginning: the prompts form a tree. Padding has no nodes, and neither has what follows the last token
   that predicts an answer.
2. An intervention changes some tokens. Prompts share a node only if they are changed at the same tokens up to it, so
   that one node stands for the same computation in all of them. Where the values put in differ from prompt to prompt,
   they share nothing from the first changed token on.
3. Active nodes are those from the first changed token on; what comes before is as in the clean run.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.tasks import Task


def check_positions(task: Task, positions: int | str) -> None:
    """Raise a `CircuitsError` unless some example of a task has a token there that its answers depend on."""
    matter = torch.arange(task.tokens.shape[1])[None] < needed_lengths(task)[:, None]
    if not bool((changed_tokens(task, positions) & matter).any()):
        what = f"position {positions}" if isinstance(positions, int) else f"{positions} token"
        raise CircuitsError(f"no example of {task.name} has a {what} before its answers' end: nothing would be changed")


def changed_tokens(task: Task, positions: int | str) -> Bool[Tensor, "example pos"]:
    """At which tokens of a right-padded task an intervention acts.

    Args:
        task: the prompts.
        positions: a position, or the name of a span, such as ``all``.

    Raises:
        CircuitsError: the task has no such span.
    """
    if not isinstance(positions, int):
        return task.span(positions)
    found = torch.zeros_like(task.attention_mask)
    found[:, positions : positions + 1] = task.attention_mask[:, positions : positions + 1]
    return found


def needed_lengths(task: Task) -> Int[Tensor, " example"]:
    """How many tokens of each example matter to its answers: those up to the last one that predicts an answer token."""
    where = task.answer_mask.nonzero()
    return torch.zeros(len(task), dtype=torch.long).scatter_reduce(0, where[:, 0], where[:, 1], "amax")


@dataclass(frozen=True)
class TokenTree:
    """The nodes of a task's tokens.

    Attributes:
        tokens: the token of each node.
        positions: its position, counted from 0.
        changed: whether the intervention acts on it.
        active: the nodes that the intervention reaches, in order.
        nodes: the node of each token of each example; ``-1`` where there is none.
        predicting: the node that predicts each answer token, in the order of ``task.answer_mask.nonzero()``.
    """

    tokens: Int[Tensor, " node"]
    positions: Int[Tensor, " node"]
    changed: Bool[Tensor, " node"]
    active: Int[Tensor, " active"]
    nodes: Int[Tensor, "example pos"]
    predicting: Int[Tensor, " answer_token"]

    @classmethod
    def of(
        cls,
        task: Task,
        changes: Bool[Tensor, "example pos"] | None = None,
        share: bool = True,
        whole: bool = False,
    ) -> "TokenTree":
        """Build the tree of a right-padded task.

        Args:
            task: the prompts.
            changes: the tokens that the intervention acts on; none if not given.
            share: whether prompts share nodes from the first changed token on.
            whole: also the tokens after the last one that predicts an answer.

        Example:
            >>> import pandas
            >>> answers = pandas.DataFrame({"example": [0, 1], "start": [2, 2], "end": [4, 3]})
            >>> tokens = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 0]])
            >>> tree = TokenTree.of(Task("qa", tokens, tokens > 0, answers, ["", ""]))
            >>> tree.nodes.tolist(), tree.predicting.tolist()
            ([[0, 1, 2], [0, 3, -1]], [1, 2, 3])
        """
        changes = torch.zeros_like(task.attention_mask) if changes is None else changes
        where = task.answer_mask.nonzero()
        lengths = task.attention_mask.sum(1) if whole else needed_lengths(task)
        nodes = torch.full((len(task), int(lengths.max())), -1)
        known: dict[tuple[int, int, bool, int], int] = {}
        rows: list[tuple[int, int, bool, bool]] = []  # token, position, changed, active
        for example, (tokens, flags, length) in enumerate(
            zip(task.tokens.tolist(), changes.tolist(), lengths.tolist(), strict=True)
        ):
            parent, path = -1, []
            for position in range(length):
                alone = flags[position] and not share
                key = (parent, tokens[position], flags[position], example if alone else -1)
                if key not in known:
                    known[key] = len(rows)
                    before = parent >= 0 and rows[parent][3]
                    rows.append((tokens[position], position, flags[position], before or flags[position]))
                parent = known[key]
                path.append(parent)
            nodes[example, :length] = torch.tensor(path)
        active = torch.tensor([row[3] for row in rows])
        return cls(
            torch.tensor([row[0] for row in rows]),
            torch.tensor([row[1] for row in rows]),
            torch.tensor([row[2] for row in rows]),
            active.nonzero().flatten(),
            nodes,
            nodes[where[:, 0], where[:, 1] - 1],
        )

    def __len__(self) -> int:
        return len(self.tokens)
