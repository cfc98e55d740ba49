"""What a task is assembled from: prompts become examples, and examples tokens of one length.

1. Every prompt becomes an example, its text and answer as one, and so do its foil and its counterfactual.
2. The foil follows the same tokens as the answer. The counterfactual is as many tokens long as the prompt and takes its
   spans.
3. A prompt that breaks a rule is refused, or left out and what is wrong with it kept. Foils and counterfactuals are
   there for every prompt or for none.
4. Examples are padded on the right to the longest. Of answers that share an example, the first in its text comes first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas
import torch

from circuits.errors import CircuitsError
from circuits.storage import digest
from circuits.tasks.examples import Example, Place, TokenisedExample, as_chat, check_fast, tokenise
from circuits.tasks.prompts import Prompt, character_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt and what it becomes: the example, and those of its foil and counterfactual."""

    prompt: Prompt
    example: Example
    tokens: TokenisedExample
    foil: tuple[Example, TokenisedExample] | None = None
    counterfactual: tuple[Example, TokenisedExample] | None = None

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> "TokenisedPrompt":
        """What a prompt becomes.

        Raises:
            CircuitsError: it breaks a rule.
        """
        group = {} if prompt.group is None else {"group": prompt.group}
        spans = character_spans(prompt)

        def tokenised(text: str, answer: str, spans: Mapping[str, Any]) -> tuple[Example, TokenisedExample]:
            example = _joined(prompt, text, answer, {**group, **prompt.about}, spans)
            try:
                example = as_chat(example, tokenizer) if chat else example
                return example, tokenise([example], tokenizer, special_tokens=not chat)[0]
            except CircuitsError as error:
                raise prompt.error(str(error)) from None

        example, tokens = tokenised(prompt.prompt, prompt.answer, spans)
        start = tokens.answers[0][0]
        foil = changed = None
        if prompt.foil is not None:
            if prompt.foil.strip() == prompt.answer.strip():
                raise prompt.error(f"the foil {prompt.foil!r} is the answer: give a wrong one")
            foil = tokenised(prompt.prompt, prompt.foil, spans)
            if foil[1].tokens[:start] != tokens.tokens[:start]:
                raise prompt.error(
                    f"before the foil {prompt.foil!r} the prompt has other tokens than before the answer "
                    f"{prompt.answer!r}: begin both alike, with a space or without"
                )
        if prompt.counterfactual is not None:
            if prompt.counterfactual == prompt.prompt:
                raise prompt.error("the counterfactual is the prompt itself: change something in it")
            changed = tokenised(prompt.counterfactual, prompt.foil or prompt.answer, {})
            length = changed[1].answers[0][0]
            if length != start:
                raise prompt.error(
                    f"the counterfactual has {length} tokens and the prompt {start}: make them equal, so that "
                    "positions match"
                )
            changed = changed[0], replace(changed[1], spans=tokens.spans)
        return cls(prompt, example, tokens, foil, changed)


def _joined(
    prompt: Prompt, text: str, answer: str, about: Mapping[str, Any], spans: Mapping[str, Sequence[Place]]
) -> Example:
    """Prompt and answer as one text; the answer's characters without the space it begins with."""
    told = answer.strip()
    if not told or not text.strip():
        raise prompt.error(f"the {'answer' if text.strip() else 'prompt'} is empty: give it some text")
    if text[-1].isalpha() and answer[0].isalpha():
        raise prompt.error(
            f"the answer {answer!r} is glued to its prompt, which ends in {text[-12:]!r}: begin it with a space"
        )
    start = len(text) + len(answer) - len(answer.lstrip())
    return Example(text + answer, [(start, start + len(told))], [about], spans)


def listed_prompts(prompts: Sequence[str], **columns: Sequence[Any] | None) -> list[Prompt]:
    """Prompts of texts, with a list of the same length for each of their fields that is given.

    Raises:
        CircuitsError: something is one text and not a list of them, or a list is too short or too long.
    """
    if isinstance(prompts, str):
        raise CircuitsError("the prompts are one text: give a list of texts, even of one")
    for what, values in columns.items():
        if values is not None and (isinstance(values, str) or len(values) != len(prompts)):
            count = "one text" if isinstance(values, str) else f"{len(values)}"
            raise CircuitsError(f"there are {len(prompts)} prompts, but {count} as {what}: give one for each prompt")
    given: dict[str, list[Any]] = {what: list(values) for what, values in columns.items() if values is not None}
    return [
        Prompt(prompt, where=f"prompt {index}", **{what: values[index] for what, values in given.items()})
        for index, prompt in enumerate(prompts)
    ]


def tokenise_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    *,
    chat: bool,
    dropped: list[str] | None,
) -> list[TokenisedPrompt]:
    """The prompts of the task ``name``; what is wrong with those that cannot be used goes into a list, if there is one.

    Raises:
        CircuitsError: a prompt cannot be used and there is no list, or none can be used.
    """
    check_fast(tokenizer)
    tokenised = []
    for prompt in prompts:
        try:
            tokenised.append(TokenisedPrompt.of(prompt, tokenizer, chat))
        except CircuitsError as error:
            if dropped is None:
                raise
            dropped.append(str(error))
    for what in ("foil", "counterfactual"):
        lacking = [one.prompt for one in tokenised if getattr(one, what) is None]
        if 0 < len(lacking) < len(tokenised):
            errors = [prompt.error(f"there is no {what}, but others have one: give all or none") for prompt in lacking]
            if dropped is None:
                raise errors[0]
            dropped += map(str, errors)
            tokenised = [one for one in tokenised if getattr(one, what) is not None]
    if not tokenised:
        wrong = dropped or []
        none = CircuitsError(f"no prompt of the task {name} can be used: {wrong[0]}")
        for line in wrong:
            none.add_note(line)
        raise none
    return tokenised


def padded(
    examples: Sequence[tuple[Example, TokenisedExample]], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """What a `Task` says of these examples: the fields that are made of their texts and tokens."""
    length = max(len(tokenised.tokens) for _, tokenised in examples)
    shape = (len(examples), length)
    tokens = torch.full(shape, tokenizer.pad_token_id or 0)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    names = list(dict.fromkeys(span for _, tokenised in examples for span in tokenised.spans))
    spans = {span: torch.zeros(shape, dtype=torch.bool) for span in names}
    answers = []
    for index, (example, tokenised) in enumerate(examples):
        tokens[index, : len(tokenised.tokens)] = torch.tensor(tokenised.tokens)
        attention_mask[index, : len(tokenised.tokens)] = True
        for span, positions in tokenised.spans.items():
            spans[span][index, positions] = True
        # answer tokens are read from left to right, and each belongs to the answer whose turn it is
        listed = zip(tokenised.answers, example.answers, example.about, strict=True)
        for (start, end), (left, right), about in sorted(listed, key=lambda answer: answer[0][0]):
            value = {"value": example.text[left:right], "start": start, "end": end}
            answers.append({"example": index, "group": index, **about, **value})
    texts = [example.text for example, _ in examples]
    table, ids = pandas.DataFrame(answers), tokens[attention_mask].unique().tolist()
    known = {token: str(tokenizer.decode([token])) for token in ids}
    return {
        "tokens": tokens,
        "attention_mask": attention_mask,
        "answers": table,
        "texts": texts,
        "spans": spans,
        "token_texts": known,
    }


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase", chat: bool) -> dict[str, Any]:
    """What a task's provenance says of the tokenizer."""
    begins_with = "the chat template" if chat else tokenizer.convert_ids_to_tokens(tokenizer("").input_ids)
    return {"tokenizer": type(tokenizer).__name__, "vocabulary": len(tokenizer), "begins_with": begins_with}


def prompt_facts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a task's provenance says of the prompts: a digest of what they say, wherever they were read from."""
    contents = (json.dumps({**asdict(prompt), "where": ""}, sort_keys=True, default=str) for prompt in prompts)
    grouped = all(prompt.group is not None for prompt in prompts)
    return {"prompts": digest(*(content.encode() for content in contents)), "grouped": grouped}
