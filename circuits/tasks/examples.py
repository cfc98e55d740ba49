"""Examples: texts with named spans and answers in characters, and the tokens these are of.

1. Each text is tokenised once, as a whole, by a fast tokenizer with its offset mapping.
2. A token is in a span if it covers characters of it, surrounding white space apart; spans may overlap.
3. An answer's tokens must cover the answer and nothing else. A token that also covers characters before or after it
   is glued to its neighbour; the example is refused, because no position would predict exactly the answer.
   A token of bare white space before an answer, which a tokenizer that splits digits makes of " 1982", carries nothing
   of it: it is the prompt's last token, so that an answer's first token is always one that tells answers apart.
   Answers are kept in the order of the text, whatever the order they are listed in.
4. What comes before a text, such as a first token of its own (BOS), is what the tokenizer puts there. As a chat, the
   text before the answer is the user's turn in the tokenizer's own template, which brings its own first tokens, and
   the answer with what follows begins the assistant's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Where something stands in a text: its first character, and the one after its last.
Place = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One text, its answers and its named spans.

    Attributes:
        text: prompt and answers.
        answers: where each answer stands.
        about: what a task's table keeps beside each answer; ``group`` is what belongs together, such as a person.
        spans: name → where it stands, in one or more places.
    """

    text: str
    answers: Sequence[Place]
    about: Sequence[Mapping[str, Any]]
    spans: Mapping[str, Sequence[Place]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenisedExample:
    """The tokens of an example.

    Attributes:
        tokens: their ids.
        spans: name → positions of its tokens.
        answers: the ``[start, end)`` positions of each answer's tokens, in the order of the example's answers.
    """

    tokens: list[int]
    spans: dict[str, list[int]]
    answers: list[Place]


def check_fast(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, or not a fast one."""
    if not hasattr(tokenizer, "is_fast"):
        own = hasattr(tokenizer, "tokenizer")
        mend = "give model.tokenizer, and not the model" if own else "give the model's, as in model.tokenizer"
        raise CircuitsError(f"a task needs a tokenizer, and this is a {type(tokenizer).__name__}: {mend}")
    if not tokenizer.is_fast:
        raise CircuitsError(f"{type(tokenizer).__name__} is no fast tokenizer: spans need its offset mapping")


def as_chat(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Example:
    """An example in the tokenizer's chat template: what stands before its answer is what the user says.

    Raises:
        CircuitsError: the tokenizer has no template or one that changes the prompt, or there are several answers.
    """
    if tokenizer.chat_template is None:
        raise CircuitsError(f"{type(tokenizer).__name__} has no chat template: leave out chat=True")
    if len(example.answers) != 1:
        raise CircuitsError(f"a chat has one answer, but {example.text!r} has {len(example.answers)}")
    start = example.answers[0][0]
    prompt = example.text[:start].strip()
    turn: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    if not prompt or turn.count(prompt) != 1:
        raise CircuitsError(f"the chat template does not repeat the prompt {prompt!r} as it is, and once")
    before = turn.index(prompt) - example.text.index(prompt)

    def moved(places: Sequence[Place]) -> list[Place]:
        shifts = [before if left < start else len(turn) - start for left, _ in places]
        return [(left + by, right + by) for (left, right), by in zip(places, shifts, strict=True)]

    spans = {name: moved(places) for name, places in example.spans.items()}
    return replace(example, text=turn + example.text[start:], answers=moved(example.answers), spans=spans)


def tokenise(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool = True
) -> list[TokenisedExample]:
    """Tokenise examples; see the module's text.

    Args:
        examples: to tokenise.
        tokenizer: a fast one.
        special_tokens: whether the tokenizer adds its own; a chat's template has brought them.

    Raises:
        CircuitsError: the tokenizer is not a fast one, or glues an answer to its neighbour; answers overlap; nothing
            stands before an answer.
    """
    check_fast(tokenizer)
    texts = [example.text for example in examples]
    encoding = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special_tokens)
    return [
        _tokenised(example, tokens, offsets)
        for example, tokens, offsets in zip(examples, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def _tokenised(example: Example, tokens: list[int], offsets: Sequence[Place]) -> TokenisedExample:
    text = example.text
    for (left, right), (start, end) in combinations(example.answers, 2):
        if start < right and left < end:
            raise CircuitsError(
                f"the answers {text[left:right]!r} and {text[start:end]!r} overlap in {text!r}: "
                "give each characters of its own"
            )
    covered = [_without_space(text, start, end) for start, end in offsets]
    answers = []
    for left, right in example.answers:
        positions = _positions(covered, [(left, right)])
        for position in positions:
            start, end = covered[position]
            if start < left or end > right:
                raise CircuitsError(
                    f"the tokenizer glues the answer {text[left:right]!r} to its neighbour in {text!r} "
                    f"(token {text[start:end]!r}): use wordings that set the answer apart"
                )
        if not positions or positions[0] == 0:
            raise CircuitsError(f"no token before the answer {text[left:right]!r} can predict it in {text!r}")
        answers.append((positions[0], positions[-1] + 1))
    return TokenisedExample(
        tokens, {name: _positions(covered, places) for name, places in example.spans.items()}, answers
    )


def _without_space(text: str, start: int, end: int) -> Place:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _positions(covered: Sequence[Place], places: Sequence[Place]) -> list[int]:
    """The tokens that cover something of the places."""
    return [
        position
        for position, (start, end) in enumerate(covered)
        if any(start < right and left < end for left, right in places)
    ]
