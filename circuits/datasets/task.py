"""A task: tokenised examples that know which token is subject, relation and answer.

1. Each row's text is tokenised once, as a whole, by a fast tokenizer with its offset mapping.
2. A token has the role of the characters it covers, surrounding white space apart; where roles meet, answer goes
   before subject before relation.
3. An answer's tokens must cover the answer and nothing else. A token that also covers characters before or after it
   is glued to its neighbour; the row is refused, because no position would predict exactly the answer.
   A token of bare white space before an answer, which a tokenizer that splits digits makes of " 1982", carries nothing
   of it: it is the prompt's last token, so that an answer's first token is always one that tells answers apart.
   Answers of a row are kept in the order of its text, whatever the order they are listed in.
4. Rows are padded on the right; padding has its own role, so that nothing counts it as a token.
5. What comes before a text, such as a first token of its own (BOS), is what the tokenizer puts there; the task's
   provenance says it as ``begins_with``. As a chat, the text before the answer is the user's turn in the tokenizer's
   own template, which brings its own first tokens, and the answer with what follows begins the assistant's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pandas
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.datasets.facts import FactDataset, Row
from circuits.errors import CircuitsError
from circuits.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Role(IntEnum):
    """What a token is in its sentence."""

    OTHER = 0
    SUBJECT = 1
    RELATION = 2
    ANSWER = 3
    PADDING = 4


def _covering(spans: Sequence[Sequence[int]], start: int, end: int) -> bool:
    return any(start < right and left < end for left, right in spans)


def tokenise_row(row: Row, encoding: Any, index: int) -> dict[str, Any]:
    """Token roles and answer positions of one encoded row; see the module's text."""
    text: str = row["text"]
    for (left, right), (start, end) in combinations(row["answer"], 2):
        if start < right and left < end:
            raise CircuitsError(
                f"the answers {text[left:right]!r} and {text[start:end]!r} overlap in {text!r}: "
                "give each characters of its own"
            )
    roles = []
    spans: list[list[int]] = [[] for _ in row["answer"]]
    for position, (start, end) in enumerate(encoding["offset_mapping"][index]):
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        role = Role.OTHER
        for number, (left, right) in enumerate(row["answer"]):
            if start < right and left < end:
                if start < left or end > right:
                    raise CircuitsError(
                        f"the tokenizer glues the answer {text[left:right]!r} to its neighbour in {text!r} "
                        f"(token {text[start:end]!r}): use wordings that set the answer apart"
                    )
                role = Role.ANSWER
                spans[number].append(position)
        if role is Role.OTHER and _covering(row["subject"], start, end):
            role = Role.SUBJECT
        elif role is Role.OTHER and _covering(row["relation"], start, end):
            role = Role.RELATION
        roles.append(int(role))
    for number, positions in enumerate(spans):
        if not positions or positions[0] == 0:
            left, right = row["answer"][number]
            raise CircuitsError(f"no token before the answer {text[left:right]!r} can predict it in {text!r}")
    return {
        "tokens": encoding["input_ids"][index],
        "roles": roles,
        "answers": [[positions[0], positions[-1] + 1] for positions in spans],
    }


def as_chat(row: Row, tokenizer: "PreTrainedTokenizerBase") -> Row:
    """A row in the tokenizer's chat template: what stands before its answer is what the user says.

    Raises:
        CircuitsError: the tokenizer has no template or one that changes the prompt, or the row has several answers.
    """
    text, answers = row["text"], row["answer"]
    if tokenizer.chat_template is None:
        raise CircuitsError(f"{type(tokenizer).__name__} has no chat template: leave out chat=True")
    if len(answers) != 1:
        raise CircuitsError(f"a chat has one answer, but {text!r} has {len(answers)}")
    start = answers[0][0]
    prompt = text[:start].strip()
    turn: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    if not prompt or turn.count(prompt) != 1:
        raise CircuitsError(f"the chat template does not repeat the prompt {prompt!r} as it is, and once")
    before = turn.index(prompt) - text.index(prompt)

    def moved(spans: Sequence[Sequence[int]]) -> list[list[int]]:
        shifts = [before if left < start else len(turn) - start for left, _ in spans]
        return [[left + by, right + by] for (left, right), by in zip(spans, shifts, strict=True)]

    places: Any = {name: moved(row[name]) for name in ("subject", "relation", "answer")}
    return {**row, **places, "text": turn + text[start:]}


def tokenise(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool = True
) -> list[dict[str, Any]]:
    """Tokenise rows: for each its ``tokens``, ``roles``, and the ``[start, end)`` token positions of its ``answers``.

    Args:
        rows: to tokenise.
        tokenizer: a fast one.
        special_tokens: whether the tokenizer adds its own; a chat's template has brought them.

    Raises:
        CircuitsError: the tokenizer is not a fast one, or glues an answer to its neighbour.
    """
    if not tokenizer.is_fast:
        raise CircuitsError(f"{type(tokenizer).__name__} is no fast tokenizer: token roles need its offset mapping")
    texts = [row["text"] for row in rows]
    encoding = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special_tokens)
    return [tokenise_row(row, encoding, index) for index, row in enumerate(rows)]


@dataclass(frozen=True)
class Task:
    """Tokenised examples of one task, padded on the right unless said otherwise.

    Attributes:
        name: the split, such as ``bio`` or ``qa_ood``.
        tokens: token ids, ``Int[example pos]``.
        roles: the `Role` of every token, ``Int[example pos]``; padding is ``Role.PADDING``.
        answers: one row for each answer: ``example``, ``person``, ``attribute``, ``value``, ``start``, ``end``: the
            answer's tokens are ``tokens[example, start:end]``, each predicted at the position before it.
        texts: the text of every example.
        provenance: dataset fingerprint and tokenizer.
    """

    name: str
    tokens: Int[Tensor, "example pos"]
    roles: Int[Tensor, "example pos"]
    answers: pandas.DataFrame
    texts: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Iterable[Row],
        tokenizer: "PreTrainedTokenizerBase",
        provenance: dict[str, Any] | None = None,
        *,
        chat: bool = False,
    ) -> "Task":
        """Tokenise rows of a dataset.

        Args:
            name: of the task.
            rows: to tokenise.
            tokenizer: of the model; it decides what every text begins with.
            provenance: to keep with the task.
            chat: put each row into the tokenizer's chat template, the text before the answer as the user's turn.

        Raises:
            CircuitsError: there are no rows, the tokenizer is not a fast one or glues an answer to its neighbour, two
                answers of a row overlap, or there can be no chat.

        Example:
            >>> from circuits.datasets import fill, word_tokenizer
            >>> sentence = fill("{name} was [born in] {value}.", "Priscilla Oakley", "Paris")
            >>> row = {"person": 0, "attributes": ["birth_city"], "text": sentence.text,
            ...        "subject": [sentence.subject], "relation": sentence.relation, "answer": [sentence.answer]}
            >>> task = Task.from_rows("bio", [row], word_tokenizer())
            >>> [Role(role).name for role in task.roles[0].tolist()]
            ['OTHER', 'SUBJECT', 'SUBJECT', 'OTHER', 'RELATION', 'RELATION', 'ANSWER', 'OTHER']
        """
        rows = list(rows)
        if not rows:
            raise CircuitsError(f"the task {name} is empty: no rows were selected")
        if chat:
            rows = [as_chat(row, tokenizer) for row in rows]
        examples = tokenise(rows, tokenizer, special_tokens=not chat)
        begins_with = "the chat template" if chat else tokenizer.convert_ids_to_tokens(tokenizer("").input_ids)
        length = max(len(example["tokens"]) for example in examples)
        tokens = torch.full((len(rows), length), tokenizer.pad_token_id or 0)
        roles = torch.full((len(rows), length), int(Role.PADDING))
        answers = []
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            tokens[index, : len(example["tokens"])] = torch.tensor(example["tokens"])
            roles[index, : len(example["roles"])] = torch.tensor(example["roles"])
            # answer tokens are read from left to right, and each belongs to the answer whose turn it is
            listed = zip(example["answers"], row["answer"], row["attributes"], strict=True)
            for (start, end), (left, right), attribute in sorted(listed, key=lambda answer: answer[0][0]):
                answers.append((index, row["person"], attribute, row["text"][left:right], start, end))
        columns = ["example", "person", "attribute", "value", "start", "end"]
        return cls(
            name,
            tokens,
            roles,
            pandas.DataFrame(answers, columns=columns),
            [row["text"] for row in rows],
            {
                "tokenizer": type(tokenizer).__name__,
                "vocabulary": len(tokenizer),
                "begins_with": begins_with,
                **(provenance or {}),
            },
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: FactDataset,
        split: str,
        tokenizer: "PreTrainedTokenizerBase",
        people: Iterable[int] | None = None,
        *,
        chat: bool = False,
    ) -> "Task":
        """A split of a dataset as a task; biographies that say the same sentence twice count it once.

        Args:
            dataset: of made-up people.
            split: ``bio``, ``qa_id``, …
            tokenizer: of the model.
            people: only these.
            chat: as in `from_rows`.

        Raises:
            CircuitsError: there is no such split or person, or the tokenizer does not fit.
        """
        rows = {row["text"]: row for row in dataset.rows(split, people)}.values()
        return cls.from_rows(split, rows, tokenizer, {"dataset": dataset.fingerprint, "split": split}, chat=chat)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Task({self.name!r}, examples={len(self)}, answers={len(self.answers)}, pos={self.tokens.shape[1]})"

    @property
    def attention_mask(self) -> Bool[Tensor, "example pos"]:
        """True at tokens, False at padding."""
        return self.roles != Role.PADDING

    @property
    def answer_mask(self) -> Bool[Tensor, "example pos"]:
        """True at the tokens of answers."""
        return self.roles == Role.ANSWER

    def right_padded(self) -> "Task":
        """The same examples with their padding on the right; the task itself if it already is so padded.

        Example:
            >>> roles = torch.tensor([[Role.PADDING, Role.SUBJECT, Role.ANSWER]])
            >>> answers = pandas.DataFrame({"example": [0], "start": [2], "end": [3]})
            >>> task = Task("qa", torch.tensor([[0, 7, 8]]), roles, answers, ["Ada Paris"]).right_padded()
            >>> task.tokens.tolist(), task.answers["start"].tolist()
            ([[7, 8, 0]], [1])
        """
        padding = self.attention_mask.int().argmax(1)
        if not bool(padding.any()):
            return self
        order = (torch.arange(self.tokens.shape[1])[None] + padding[:, None]) % self.tokens.shape[1]
        moved = padding[torch.as_tensor(self.answers["example"].to_numpy(copy=True))].numpy()
        return type(self)(
            self.name,
            self.tokens.gather(1, order),
            self.roles.gather(1, order),
            self.answers.assign(start=self.answers["start"] - moved, end=self.answers["end"] - moved),
            self.texts,
            self.provenance,
        )

    def select(self, examples: Sequence[int] | Int[Tensor, " chosen"]) -> "Task":
        """The task with only these examples, in this order, padded no further than they need.

        Raises:
            CircuitsError: no examples are selected, or one does not exist.
        """
        task = self.right_padded()
        chosen = torch.as_tensor(examples, dtype=torch.long)
        if len(chosen) == 0:
            raise CircuitsError(f"the task {self.name} is empty: no examples were selected")
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise CircuitsError(f"the task {self.name} has examples 0 to {len(self) - 1}, not {int(chosen.max())}")
        length = int(task.attention_mask[chosen].sum(1).max())
        by_example = task.answers.groupby("example").indices
        rows = [by_example[old] for old in chosen.tolist()]
        answers = task.answers.iloc[numpy.concatenate(rows)].reset_index(drop=True)
        answers["example"] = numpy.repeat(numpy.arange(len(rows)), [len(row) for row in rows])
        return type(self)(
            self.name,
            task.tokens[chosen, :length],
            task.roles[chosen, :length],
            answers,
            [self.texts[index] for index in chosen.tolist()],
            self.provenance,
        )

    def batches(self, size: int) -> Iterator["Task"]:
        """The task in parts of ``size`` examples, in order."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def sample(self, count: int, seed: int = 0) -> "Task":
        """``count`` examples drawn without replacement, in their old order; all of them if there are fewer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:count].sort().values)

    def save(self, path: str | Path) -> None:
        """Save as safetensors."""
        metadata = {
            "kind": "task",
            "name": self.name,
            "texts": self.texts,
            "answers": self.answers.to_dict("list"),
            "provenance": self.provenance,
        }
        write_tensors(Path(path), {"tokens": self.tokens, "roles": self.roles}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Task":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        tensors, metadata = read_tensors(Path(path), "task")
        return cls(
            metadata["name"],
            tensors["tokens"],
            tensors["roles"],
            pandas.DataFrame(metadata["answers"]),
            metadata["texts"],
            metadata["provenance"],
        )
