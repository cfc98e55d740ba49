"""A word-level tokenizer for small models trained from scratch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from circuits.facts.pools import DAYS, MONTHS, POOLS, YEARS
from circuits.facts.wordings import BIOGRAPHY, QUESTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, PAD, UNKNOWN = "<s>", "<pad>", "<unk>"


def _texts(pools: str) -> Iterable[str]:
    for wordings in (*BIOGRAPHY.values(), *QUESTIONS.values()):
        for wording in wordings:
            yield wording.replace("{name}", " ").replace("{value}", " ").replace("[", " ").replace("]", " ")
    words = POOLS[pools]
    for pool in (words.first_names, words.last_names, MONTHS, words.cities, words.universities, words.employers):
        yield from pool
    yield from words.majors
    yield from (f"{day}," for day in DAYS)
    yield from map(str, YEARS)
    yield "She He"


def word_tokenizer(pools: str = "invented") -> "PreTrainedTokenizerFast":
    """A tokenizer whose tokens are the words of the made-up people's texts; ``.`` and ``?`` stand alone.

    Every sequence begins with ``<s>``. A date is three tokens (``April``, ``11,``, ``1982``).

    Args:
        pools: what the people are made of, ``invented`` or ``familiar``; each has a vocabulary of its own.

    Example:
        >>> tokenizer = word_tokenizer()
        >>> tokenizer.convert_ids_to_tokens(tokenizer("Ada Oakley was born on April 11, 1982.").input_ids)
        ['<s>', '<unk>', 'Oakley', 'was', 'born', 'on', 'April', '11,', '1982', '.']
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.?]$"), behavior="isolated")]
    )
    words = sorted({word for text in _texts(pools) for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, BOS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN, padding_side="right"
    )
