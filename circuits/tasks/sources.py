"""Well-known tasks, made to order: indirect objects, greater-than, repeated words.

1. Every prompt is drawn from templates and words with ``random.Random`` of the seed; one that is there already is drawn
   again, so that all are different.
2. With a tokenizer only words are used that are one token of it with a space before them, measured within a text. So
   a prompt and its counterfactual have equally many tokens, and their spans stand at the same positions.
3. A counterfactual changes as little as turns the answer into the foil, where there is one that does: patching from one
   to the other then moves exactly what decides between the two.
"""

from collections.abc import Callable, Sequence
from math import perm
from random import Random
from typing import TYPE_CHECKING, Any

from circuits.errors import CircuitsError
from circuits.tasks.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# no name is part of another name or of a template, so that a span can be told by its text
_NAMES = (
    "Mary John Peter Susan Robert Linda David Karen Michael Sarah Thomas Laura Kevin Emily Daniel Rachel Steven Julia "
    "George Helen Richard Alice Edward Diana Brian Nancy Jason Amy Scott Claire Simon Ruth Adam Lucy Frank Emma"
).split()
_PLACES = (
    "library office market station garden kitchen museum hospital theater church hotel school beach airport farm cafe"
).split()
_OBJECTS = "book letter key map ring coat lamp camera ticket phone cake basket bottle bag guitar box".split()
_GIVING = (
    "While {first} and {second} were waiting at the {place}, {subject} passed the {object} to",
    "Before {first} and {second} left the {place}, {subject} showed the {object} to",
    "As soon as {first} and {second} reached the {place}, {subject} handed the {object} to",
    "Since the rain kept {first} and {second} inside the {place}, {subject} lent the {object} to",
    "Long after {first} had met {second} near the {place}, {subject} sent the {object} to",
    "Although {first} and {second} quarrelled at the {place}, {subject} returned the {object} to",
)

_EVENTS = (
    "war siege project strike trial drought plague trade journey debate campaign reign revolt dispute feud study "
    "search mission contest alliance exhibition conflict festival voyage"
).split()
_LASTING = (
    "The {noun} began in {year} and was over in",
    "The {noun} went on from {year} until",
    "They say that the {noun} of {year} came to its end in",
)
_CENTURIES = range(11, 19)

_WORDS = (
    "river table cloud horse paper window stone music bread winter garden silver market finger engine summer "
    "bridge doctor forest island yellow carpet pocket rabbit school temple violin bottle candle dragon flower "
    "guitar hammer jacket kitten ladder mirror needle orange pencil rocket saddle ticket valley wallet apple "
    "basket camera desert evening feather glass honey iron jungle knife lemon morning night ocean pepper queen "
    "road salt train uncle village water yard chair door earth fire gold house ice king lake moon nose oil pipe "
    "rain ship tree wind bird cat dog fish milk rice shoe soap star tower wheel wood wool bell boat cup farm gate "
    "hill key leaf map nest pond ring sand tent"
).split()
_SEQUENCE = 10
_OPENING = "Words:"


def indirect_objects(
    count: int = 32, seed: int = 0, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> list[Prompt]:
    """Indirect object identification: who is handed something, when two people were named and one of them acts.

    The answer is the name that was said once (IO), the foil the one that was said twice (S). Half of the prompts, by
    chance, name IO first ("ABBA"), the others S ("BABA"). In the counterfactual the second S becomes IO's name: one
    word differs, the two names have changed roles, and the answer is the foil. What is patched from one to the other
    is therefore which name to give, not which names there are, as it would be with a third name.

    Args:
        count: how many prompts.
        seed: of every draw.
        tokenizer: of the model; only names, places and objects that are one token of it are used.

    Returns:
        Prompts with the spans ``IO``, ``S1`` and ``S2``. Those about the same two names are a group, whoever acts: the
        same people in other words. ``template`` and ``order`` are kept beside the answer.

    Raises:
        CircuitsError: there are not that many different prompts, or the tokenizer has too few of the words.

    Source:
        Wang et al. 2022, Interpretability in the Wild, arXiv 2211.00593. Templates and words are our own.

    Example:
        >>> prompt = indirect_objects(1)[0]
        >>> prompt.prompt, prompt.answer, prompt.foil
        ('While Alice and Brian were waiting at the museum, Brian passed the bottle to', ' Alice', ' Brian')
        >>> prompt.counterfactual
        'While Alice and Brian were waiting at the museum, Alice passed the bottle to'
        >>> prompt.spans
        {'IO': ['Alice', 1], 'S1': ['Brian', 1], 'S2': ['Brian', 2]}
    """
    names = _words(_NAMES, tokenizer, "names", 2)
    places = _words(_PLACES, tokenizer, "places", 1)
    objects = _words(_OBJECTS, tokenizer, "objects", 1)

    def draw(random: Random) -> dict[str, Any]:
        template = random.randrange(len(_GIVING))
        giver, receiver = random.sample(names, 2)
        order = random.choice(("ABBA", "BABA"))
        first, second = (receiver, giver) if order == "ABBA" else (giver, receiver)
        fixed = {"first": first, "second": second, "place": random.choice(places), "object": random.choice(objects)}
        return {
            "prompt": _GIVING[template].format(**fixed, subject=giver),
            "answer": f" {receiver}",
            "foil": f" {giver}",
            "counterfactual": _GIVING[template].format(**fixed, subject=receiver),
            "group": " and ".join(sorted((giver, receiver))),
            "spans": {"IO": [receiver, 1], "S1": [giver, 1], "S2": [giver, 2]},
            "about": {"template": template, "order": order},
        }

    total = len(_GIVING) * 2 * perm(len(names), 2) * len(places) * len(objects)
    return _different(draw, total, count, seed, "ioi")


def greater_than(count: int = 32, seed: int = 0, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[Prompt]:
    """Greater-than: something began in a year, and its last year must be a later one of the same century.

    The prompt ends in the century, and the answer is the two digits that follow, of a later decade than the start; the
    foil is of an earlier one. Any later year would do: the answer is one of them. As the decades differ, the first
    token of the answer tells it from the foil whether a tokenizer takes the two digits together or one by one. A
    tokenizer that takes digits of the century together with those that follow decides where the prompt ends: with
    ``1|758`` after the first digit, with ``175|8`` before the year, and answer and foil are what is left of it, with
    the space. In the counterfactual the start is the century's year 01: answer and foil are both later, so it asks for
    no preference between them rather than for the foil.

    Args:
        count: how many prompts.
        seed: of every draw.
        tokenizer: of the model; only years that it splits as it splits 01 of their century are used, and nouns that are
            one token. Without one, all years are used, and the prompts end in the century.

    Returns:
        Prompts with the spans ``noun`` and ``year``: the last two digits of the start. Those with the same start are a
        group; it is kept beside the answer as ``begun``.

    Raises:
        CircuitsError: there are not that many different prompts, or the tokenizer has too few of the words or years.

    Source:
        Hanna et al. 2023, How does GPT-2 compute greater-than?, arXiv 2305.00586. Templates and words are our own.

    Example:
        >>> prompt = greater_than(1)[0]
        >>> prompt.prompt, prompt.answer, prompt.foil
        ('The plague began in 1477 and was over in 14', '84', '66')
        >>> prompt.counterfactual
        'The plague began in 1401 and was over in 14'
    """
    nouns = _words(_EVENTS, tokenizer, "nouns", 1)
    shown, years = _years(tokenizer)

    def draw(random: Random) -> dict[str, Any]:
        begun = random.choice(list(years))
        noun, template = random.choice(nouns), random.choice(_LASTING)
        century, (later, earlier) = begun // 100, years[begun]
        answer, foil = (f" {random.choice(ends)}" for ends in (later, earlier))
        shape = f"{template}{answer[:shown]}"
        start, place = shape.index("{noun}"), shape.format(noun=noun, year=begun).index(str(begun))
        return {
            "prompt": shape.format(noun=noun, year=begun),
            "answer": answer[shown:],
            "foil": foil[shown:],
            "counterfactual": shape.format(noun=noun, year=century * 100 + 1),
            "group": begun,
            "spans": {"noun": [start, start + len(noun)], "year": [place + 2, place + 4]},
            "about": {"begun": begun},
        }

    return _different(draw, len(_LASTING) * len(nouns) * len(years), count, seed, "greater_than")


def repeated_words(count: int = 32, seed: int = 0, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[Prompt]:
    """Repeated words: common words in random order, said twice; the second time breaks off, and the next word follows.

    The answer is the word that came after the last word's first occurrence. The foil is a word that comes later in the
    sequence, so that the prompt has said both exactly once. In the counterfactual these two have changed places in the
    first half: the second half is the same, and the answer is the foil.

    Args:
        count: how many prompts.
        seed: of every draw.
        tokenizer: of the model; only words that are one token of it are used.

    Returns:
        Prompts with the spans ``previous``, the first occurrence of the last word, and ``next``, the word after it,
        which induction looks at. ``said`` is how many words are repeated.

    Raises:
        CircuitsError: there are not that many different prompts, or the tokenizer has too few of the words.

    Source:
        Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895. Words are our own.

    Example:
        >>> prompt = repeated_words(1)[0]
        >>> prompt.prompt
        'Words: farm rain horse hill forest ladder yellow river pipe soap farm rain horse'
        >>> prompt.answer, prompt.foil
        (' hill', ' yellow')
    """
    words = _words(_WORDS, tokenizer, "words", _SEQUENCE)

    def draw(random: Random) -> dict[str, Any]:
        first = random.sample(words, _SEQUENCE)
        said = random.randrange(2, _SEQUENCE - 1)
        other = random.randrange(said + 1, _SEQUENCE)
        changed = list(first)
        changed[said], changed[other] = first[other], first[said]
        place = len(" ".join([_OPENING, *first[: said - 1], ""]))
        after = place + len(first[said - 1]) + 1
        return {
            "prompt": " ".join([_OPENING, *first, *first[:said]]),
            "answer": f" {first[said]}",
            "foil": f" {first[other]}",
            "counterfactual": " ".join([_OPENING, *changed, *first[:said]]),
            "spans": {"previous": [place, after - 1], "next": [after, after + len(first[said])]},
            "about": {"said": said},
        }

    return _different(draw, perm(len(words), _SEQUENCE) * (_SEQUENCE - 3), count, seed, "repeated")


#: Name → what makes its prompts.
SOURCES: dict[str, Callable[..., list[Prompt]]] = {
    "ioi": indirect_objects,
    "greater_than": greater_than,
    "repeated": repeated_words,
}


def _different(draw: Callable[[Random], dict[str, Any]], total: int, count: int, seed: int, name: str) -> list[Prompt]:
    if not 1 <= count <= total:
        raise CircuitsError(
            f"{count} prompts of {name} were asked for: it must be from 1 to {total}, as all are different"
        )
    random = Random(f"{seed}/{name}")
    found: dict[str, Prompt] = {}
    while len(found) < count:
        drawn = draw(random)
        found.setdefault(drawn["prompt"], Prompt(**drawn, where=f"prompt {len(found)} of {name}"))
    return list(found.values())


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return tokens


def _words(words: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None", what: str, least: int) -> list[str]:
    """The words that are one token within a text, where some tokenizers treat a space otherwise than at its start."""
    if tokenizer is None:
        return list(words)
    before, *all_tokens = _tokens(tokenizer, ["the", *(f"the {word}" for word in words)])
    one = [
        word
        for word, tokens in zip(words, all_tokens, strict=True)
        if tokens[:-1] == before and tokens[-1] != tokenizer.unk_token_id
    ]
    if len(one) < least:
        raise CircuitsError(
            f"{len(one)} of the {len(words)} {what} are one token of {type(tokenizer).__name__}: it takes {least}"
        )
    return one


def _years(tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, dict[int, tuple[list[int], list[int]]]]:
    """How much of `` 1784`` a prompt shows; the year something begins → the later and the earlier decades' years.

    The century is shown if the tokenizer sets it apart; if not, its first digit if that is; or else nothing.
    """
    for shown in (len(" 17"), len(" 1"), 0):
        usable = {}
        for century in _CENTURIES:
            years = _alike(tokenizer, [100 * century + end for end in range(1, 100)], shown)
            for begun in years if century * 100 + 1 in years else []:
                later = [year for year in years if year // 10 > begun // 10]
                # year 01 is the counterfactual's start, and so no year before it
                earlier = [year for year in years if year // 10 < begun // 10 and year % 100 > 1]
                if later and earlier:
                    usable[begun] = later, earlier
        if usable:
            return shown, usable
    raise CircuitsError(
        f"{type(tokenizer).__name__} has no years to compare: it must split them alike and know their digits"
    )


def _alike(tokenizer: "PreTrainedTokenizerBase | None", years: list[int], shown: int) -> list[int]:
    """The years of a century that can follow what is shown of them, and are as many tokens as the first one."""
    if tokenizer is None:
        return years
    start, *all_tokens = _tokens(tokenizer, [f"in{f' {years[0]}'[:shown]}", *(f"in {year}" for year in years)])
    return [
        year
        for year, tokens in zip(years, all_tokens, strict=True)
        if tokens[: len(start)] == start
        and len(start) < len(tokens) == len(all_tokens[0])
        and tokenizer.unk_token_id not in tokens[len(start) :]
    ]
