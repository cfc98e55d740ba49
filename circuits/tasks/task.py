"""A task: prompts and answers as tokens, with named spans, foils and counterfactuals.

1. Examples are tokenised as `circuits.tasks.examples` says, and padded on the right; an attention mask tells tokens
   from padding, so that nothing counts padding as a token.
2. A span is a name for some of the tokens: ``subject``, ``IO``, whatever the author of the task calls it. Spans may
   overlap. Three names are always there: ``all``, ``answer`` (the answers' tokens) and ``last`` (the token that
   predicts an answer's first one).
3. A foil is a wrong answer to the same prompt. A counterfactual is the prompt with something changed, as many tokens
   long, so that positions match and its spans are the prompt's; its answer is the foil, if there is one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pandas
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.html import html_legend, html_table, html_tokens
from circuits.storage import digest, read_tensors, write_tensors
from circuits.tasks.assembly import listed_prompts, padded, prompt_facts, tokenise_prompts, tokenizer_facts
from circuits.tasks.examples import Example, as_chat, tokenise
from circuits.tasks.prompts import RESERVED, Prompt, read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The companions of a task: other tasks with the same examples in the same order.
_COMPANIONS = ("foils", "counterfactuals")
#: The columns that say where an answer is.
_WHERE = ("example", "start", "end")
#: Examples that a notebook shows, and tokens of each.
_SHOWN, _TOKENS_SHOWN = 3, 64


@dataclass(frozen=True)
class Task:
    """Tokenised examples of one task, padded on the right unless said otherwise.

    Attributes:
        name: of the task.
        tokens: token ids, ``Int[example pos]``.
        attention_mask: true at tokens, false at padding.
        answers: one row for each answer: ``example``, ``group`` (what belongs together, such as a person), what else is
            known of it, ``value``, ``start``, ``end``: the answer's tokens are ``tokens[example, start:end]``, each
            predicted at the position before it.
        texts: the text of every example.
        spans: name → where its tokens are.
        foils: the same prompts with a wrong answer each, if there are any.
        counterfactuals: the changed prompts, if there are any.
        provenance: where the examples come from, and the tokenizer.
        token_texts: token id → its text, to show tokens without the tokenizer; empty in tasks of earlier versions.
    """

    name: str
    tokens: Int[Tensor, "example pos"]
    attention_mask: Bool[Tensor, "example pos"]
    answers: pandas.DataFrame
    texts: list[str]
    spans: Mapping[str, Bool[Tensor, "example pos"]] = field(default_factory=dict)
    foils: "Task | None" = None
    counterfactuals: "Task | None" = None
    provenance: dict[str, Any] = field(default_factory=dict)
    token_texts: Mapping[int, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[str],
        answers: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        foils: Sequence[str] | None = None,
        counterfactuals: Sequence[str] | None = None,
        spans: Sequence[Mapping[str, Any]] | None = None,
        groups: Sequence[str | int] | None = None,
        name: str = "task",
        chat: bool = False,
    ) -> "Task":
        """A task of your own prompts.

        Args:
            prompts: one text for each example.
            answers: what should follow each; begins with a space where the tokenizer's words do, as in ``" Mary"``.
            tokenizer: of the model; it decides what every text begins with.
            foils: a wrong answer for each.
            counterfactuals: for each prompt one with something changed, of as many tokens.
            spans: for each prompt name → text in it, ``[text, n]`` for its n-th occurrence (from 1), ``[start, end]``
                in characters, or a list of these.
            groups: what belongs together, such as the same person; every prompt on its own if not given.
            name: of the task.
            chat: put each prompt into the tokenizer's chat template, as the user's turn.

        Raises:
            CircuitsError: there are no prompts or not as many answers; a tokenizer that is not a fast one, or glues an
                answer to its prompt; a span that is not there, or ambiguous; a counterfactual of other length.

        Example:
            >>> from circuits.facts import word_tokenizer
            >>> task = Task.from_prompts(
            ...     ["Priscilla Oakley was born in"], [" Paris"], word_tokenizer(), spans=[{"who": "Priscilla Oakley"}]
            ... )
            >>> task
            Task('task', examples=1, answers=1, pos=7, spans=[who])
            >>> task.spans["who"][0].tolist()
            [False, True, True, False, False, False, False]
        """
        rows = listed_prompts(
            prompts, answer=answers, foil=foils, counterfactual=counterfactuals, spans=spans, group=groups
        )
        return cls.of(rows, tokenizer, name, chat=chat)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        name: str | None = None,
        *,
        chat: bool = False,
        drop_bad: bool = False,
    ) -> "Task":
        """A task from a file of prompts: JSON lines, CSV, parquet, or a folder of Hugging Face's datasets.

        Args:
            path: with ``prompt``, ``answer``, and if wanted ``foil``, ``counterfactual``, ``group`` and ``spans``, as
                `circuits.tasks.read_prompts` reads them.
            tokenizer: of the model.
            name: of the task; the file's if not given.
            chat: as in `from_prompts`.
            drop_bad: go on without the lines that cannot be used; ``provenance["dropped"]`` says what is wrong with
                each.

        Raises:
            CircuitsError: the file cannot be read, or a line of it cannot be used; if none can, its notes say what is
                wrong with each.
        """
        dropped: list[str] | None = [] if drop_bad else None
        prompts = read_prompts(path, bad=dropped)
        return cls._of(prompts, tokenizer, name or Path(path).stem, chat, dropped)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        name: str = "task",
        *,
        chat: bool = False,
        drop_bad: bool = False,
    ) -> "Task":
        """A task of prompts that were read from a file or made by a source.

        Raises:
            CircuitsError: as `from_prompts` and `from_file`.
        """
        if not prompts:
            raise CircuitsError(f"the task {name} is empty: it has no prompts")
        return cls._of(prompts, tokenizer, name, chat, [] if drop_bad else None)

    @classmethod
    def _of(
        cls,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        chat: bool,
        dropped: list[str] | None,
    ) -> "Task":
        """A task of prompts; what is wrong with those that cannot be used goes into a list, if there is one."""
        tokenised = tokenise_prompts(prompts, tokenizer, name, chat=chat, dropped=dropped)
        facts = tokenizer_facts(tokenizer, chat) | prompt_facts([one.prompt for one in tokenised])
        if dropped is not None:
            facts["dropped"] = dropped
        fields = padded([(one.example, one.tokens) for one in tokenised], tokenizer)
        task = cls(name, **fields, provenance=facts)
        companions: dict[str, Any] = {
            companion: cls(
                f"{name}, {companion}", **padded([getattr(one, what) for one in tokenised], tokenizer), provenance=facts
            )
            for companion, what in zip(_COMPANIONS, ("foil", "counterfactual"), strict=True)
            if getattr(tokenised[0], what) is not None
        }
        return replace(task, **companions)

    @classmethod
    def from_examples(
        cls,
        name: str,
        examples: Iterable[Example],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        provenance: dict[str, Any] | None = None,
        chat: bool = False,
    ) -> "Task":
        """A task of texts with several answers each, or with answers in their midst; `from_prompts` is for all others.

        Args:
            name: of the task.
            examples: texts that say where answers and spans stand.
            tokenizer: of the model; it decides what every text begins with.
            provenance: to keep with the task.
            chat: put each example into the tokenizer's chat template, the text before the answer as the user's turn.

        Raises:
            CircuitsError: there are no examples, the tokenizer is not a fast one or glues an answer to its neighbour,
                two answers of an example overlap, or there can be no chat.
        """
        examples = list(examples)
        if not examples:
            raise CircuitsError(f"the task {name} is empty: no examples were selected")
        if chat:
            examples = [as_chat(example, tokenizer) for example in examples]
        tokenised = tokenise(examples, tokenizer, special_tokens=not chat)
        facts = tokenizer_facts(tokenizer, chat) | (provenance or {})
        fields = padded(list(zip(examples, tokenised, strict=True)), tokenizer)
        return cls(name, **fields, provenance=facts)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        parts = [f"examples={len(self)}", f"answers={len(self.answers)}", f"pos={self.tokens.shape[1]}"]
        parts += [f"spans=[{', '.join(self.spans)}]"] if self.spans else []
        parts += [companion for companion in _COMPANIONS if getattr(self, companion) is not None]
        return f"Task({self.name!r}, {', '.join(parts)})"

    def _repr_html_(self) -> str:
        """What Jupyter shows: counts, and the first examples with their tokens coloured by span."""
        counts = {"examples": len(self), "answers": len(self.answers), "tokens": int(self.attention_mask.sum())}
        spans = {**self.spans, "answer": self.answer_mask} if len(self.answers) else dict(self.spans)
        parts = [html_table([(self.name, *counts.values(), ", ".join(self.companions()))], ["task", *counts, "with"])]
        for example in range(min(_SHOWN, len(self))):
            places = self.attention_mask[example].nonzero().flatten().tolist()
            tokens = [
                (
                    self.token_texts.get(token := int(self.tokens[example, place]), str(token)),
                    [name for name, at in spans.items() if at[example, place]],
                )
                for place in places[:_TOKENS_SHOWN]
            ]
            parts.append(html_tokens(tokens + [("…", [])] * (len(places) > _TOKENS_SHOWN), list(spans)))
        return f"<div>{''.join(parts)}{html_legend(list(spans))}</div>"

    @property
    def answer_mask(self) -> Bool[Tensor, "example pos"]:
        """True at the tokens of answers."""
        example, start, end = (torch.as_tensor(self.answers[name].to_numpy(copy=True)) for name in _WHERE)
        places = torch.arange(self.tokens.shape[1])
        inside = (places >= start[:, None]) & (places < end[:, None])
        return torch.zeros(self.tokens.shape, dtype=torch.int).index_add_(0, example, inside.int()) > 0

    def span(self, name: str) -> Bool[Tensor, "example pos"]:
        """Where the tokens of a span are; ``all``, ``answer`` and ``last`` are spans of every task.

        Raises:
            CircuitsError: the task has no such span.

        Example:
            >>> from circuits.facts import word_tokenizer
            >>> task = Task.from_prompts(["Priscilla Oakley was born in"], [" Paris"], word_tokenizer())
            >>> task.span("last").tolist()
            [[False, False, False, False, False, True, False]]
        """
        if name == "all":
            return self.attention_mask
        if name == "answer":
            return self.answer_mask
        if name == "last":
            found = torch.zeros_like(self.attention_mask)
            found[self.answers["example"].to_numpy(copy=True), self.answers["start"].to_numpy(copy=True) - 1] = True
            return found
        if name not in self.spans:
            raise CircuitsError(f"{self.name} has no span {name!r}: choose from {', '.join([*RESERVED, *self.spans])}")
        return self.spans[name]

    def identity(self) -> dict[str, Any]:
        """Digests of what the task asks, by which a saved result knows it again."""
        named = [self.attention_mask, self.answer_mask, *(self.spans[name] for name in sorted(self.spans))]
        found: dict[str, Any] = {
            "examples": len(self),
            "tokens": digest(self.tokens.numpy().tobytes()),
            "spans": digest(" ".join(sorted(self.spans)), *(at.numpy().tobytes() for at in named)),
        }
        return found | {name: companion.identity()["tokens"] for name, companion in self.companions().items()}

    def right_padded(self) -> "Task":
        """The same examples with their padding on the right; the task itself if it already is so padded.

        Example:
            >>> answers = pandas.DataFrame({"example": [0], "start": [2], "end": [3]})
            >>> tokens = torch.tensor([[0, 7, 8]])
            >>> task = Task("qa", tokens, tokens > 0, answers, ["Ada Paris"]).right_padded()
            >>> task.tokens.tolist(), task.answers["start"].tolist()
            ([[7, 8, 0]], [1])
        """
        padding = self.attention_mask.int().argmax(1)
        if not bool(padding.any()):
            return self
        order = (torch.arange(self.tokens.shape[1])[None] + padding[:, None]) % self.tokens.shape[1]
        moved = padding[torch.as_tensor(self.answers["example"].to_numpy(copy=True))].numpy()
        return replace(
            self,
            tokens=self.tokens.gather(1, order),
            attention_mask=self.attention_mask.gather(1, order),
            answers=self.answers.assign(start=self.answers["start"] - moved, end=self.answers["end"] - moved),
            spans={name: found.gather(1, order) for name, found in self.spans.items()},
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
        if length == task.tokens.shape[1] and torch.equal(chosen, torch.arange(len(task))):
            return task  # as when it is one batch
        of, wanted = task.answers["example"].to_numpy(), chosen.numpy()
        order = of.argsort(kind="stable")
        first, last = (numpy.searchsorted(of, wanted, side, order) for side in ("left", "right"))
        rows = numpy.concatenate([order[start:end] for start, end in zip(first, last, strict=True)])
        answers = task.answers.take(rows)
        answers.index = pandas.RangeIndex(len(rows))
        answers["example"] = numpy.repeat(numpy.arange(len(wanted)), last - first)
        return replace(
            task,
            tokens=task.tokens[chosen, :length],
            attention_mask=task.attention_mask[chosen, :length],
            answers=answers,
            texts=[self.texts[index] for index in chosen.tolist()],
            spans={name: found[chosen, :length] for name, found in task.spans.items()},
            **{name: companion.select(chosen) for name, companion in self.companions().items()},
        )

    def companions(self) -> "dict[str, Any]":
        """What the task has of ``foils`` and ``counterfactuals``, as tasks."""
        found = {name: getattr(self, name) for name in _COMPANIONS}
        return {name: companion for name, companion in found.items() if companion is not None}

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
        tensors, metadata = self._packed()
        for name, companion in self.companions().items():
            packed, metadata[name] = companion._packed()
            tensors |= {f"{name}/{key}": value for key, value in packed.items()}
        write_tensors(Path(path), tensors, {"kind": "task", **metadata})

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"tokens": self.tokens, "attention_mask": self.attention_mask}
        tensors |= {f"spans/{name}": found for name, found in self.spans.items()}
        metadata = {
            "name": self.name,
            "texts": self.texts,
            "answers": self.answers.to_dict("list"),
            "spans": list(self.spans),
            "provenance": self.provenance,
            "token_texts": {str(token): text for token, text in self.token_texts.items()},
        }
        return tensors, metadata

    @classmethod
    def load(cls, path: str | Path) -> "Task":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        tensors, metadata = read_tensors(Path(path), "task")
        if "spans" not in metadata:
            raise CircuitsError(
                f"{path} was saved by an earlier version, whose tasks had no named spans: make it again"
            )
        companions: dict[str, Any] = {
            name: cls._unpacked(tensors, metadata[name], f"{name}/") for name in _COMPANIONS if name in metadata
        }
        return replace(cls._unpacked(tensors, metadata, ""), **companions)

    @classmethod
    def _unpacked(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], under: str) -> "Task":
        return cls(
            metadata["name"],
            tensors[f"{under}tokens"],
            tensors[f"{under}attention_mask"],
            pandas.DataFrame(metadata["answers"]),
            metadata["texts"],
            {name: tensors[f"{under}spans/{name}"] for name in metadata["spans"]},
            provenance=metadata["provenance"],
            token_texts={int(token): text for token, text in metadata.get("token_texts", {}).items()},
        )
