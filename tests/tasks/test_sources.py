"""Sources of prompts: drawn as told, all different, and position by position like their counterfactuals."""

import re
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuits import CircuitsError
from circuits.tasks import sources
from circuits.tasks.prompts import character_spans
from circuits.tasks.sources import SOURCES, greater_than, indirect_objects, repeated_words

#: How tokenizers take the digits of a year.
DIGITS = {"17|58": r"\d{2}", "1|7|5|8": r"\d", "175|8": r"\d{1,3}", "1|758": r"\d{1,3}(?=(\d{3})*(?!\d))"}


@cache
def byte_level(digits: str = "17|58", size: int = 5000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the sources' own texts, words with the space before them, as GPT-2 has."""
    steps = [pre_tokenizers.Split(Regex(DIGITS[digits]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    texts = [prompt.prompt + prompt.answer for make in SOURCES.values() for prompt in make(1500)]
    texts += [f"{before}{end:03}" for end in range(1000) for before in ("", "1", "0")]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", SOURCES)
def test_the_seed_decides_all(name):
    make = SOURCES[name]
    first = make(40, seed=3)
    assert first == make(40, 3)
    assert first[:7] == make(7, 3)
    assert len({prompt.prompt for prompt in first} & {prompt.prompt for prompt in make(40, seed=4)}) < 10


@pytest.mark.parametrize("name", SOURCES)
def test_prompts_are_all_different_and_say_where_they_are_from(name):
    made = SOURCES[name](300)
    assert len({prompt.prompt for prompt in made}) == len(made) == 300
    assert [prompt.where for prompt in made[:2]] == [f"prompt 0 of {name}", f"prompt 1 of {name}"]
    assert all(prompt.prompt != prompt.counterfactual and prompt.answer != prompt.foil for prompt in made)


@pytest.mark.parametrize("digits", DIGITS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_tokenizer_reads_prompt_counterfactual_and_answers_alike(name, digits):
    tokenizer = byte_level(digits)
    for prompt in SOURCES[name](60, 0, tokenizer):
        read = tokens(tokenizer, prompt.prompt)
        assert len(read) == len(tokens(tokenizer, prompt.counterfactual))
        followed, foiled = (tokens(tokenizer, prompt.prompt + end) for end in (prompt.answer, prompt.foil))
        assert followed[: len(read)] == foiled[: len(read)] == read
        # a bare space is no part of an answer; what comes after it decides
        follows, foils = (([part for part in ends[len(read) :] if part != "Ġ"]) for ends in (followed, foiled))
        assert follows[0] != foils[0]
        if name != "greater_than":
            assert [follows, foils] == [[f"Ġ{end.strip()}"] for end in (prompt.answer, prompt.foil)]


def test_indirect_objects_swap_two_roles():
    made = indirect_objects(300)
    orders = set()
    for prompt in made:
        receiver, giver = prompt.answer.strip(), prompt.foil.strip()
        # who was named is read off the text, not off the spans
        named = [(match.group(), match.start()) for match in re.finditer(r"[A-Z]\w+", prompt.prompt)][1:]
        [io] = [place for who, place in named if who == receiver]
        first, second = (place for who, place in named if who == giver)
        assert len(named) == 3
        found = {"IO": io, "S1": first, "S2": second}
        assert character_spans(prompt) == {
            name: [(place, place + len(receiver if name == "IO" else giver))] for name, place in found.items()
        }
        assert prompt.counterfactual == prompt.prompt[:second] + receiver + prompt.prompt[second + len(giver) :]
        assert prompt.about["order"] == ("ABBA" if io < first else "BABA")
        assert prompt.group == " and ".join(sorted([receiver, giver]))
        orders.add((prompt.about["template"], prompt.about["order"]))
    assert orders == {(template, order) for template in range(len(sources._GIVING)) for order in ("ABBA", "BABA")}


def test_no_name_hides_in_another_or_in_a_template():
    others = " ".join([*sources._GIVING, *sources._PLACES, *sources._OBJECTS])
    for name in sources._NAMES:
        assert not any(name in other for other in sources._NAMES if other != name)
        assert name not in others


@pytest.mark.parametrize("digits", DIGITS)
def test_greater_than_compares_decades_of_one_century(digits):
    shown = {"175|8": "", "1|758": " 1"}.get(digits, " 17")
    for prompt in greater_than(200, 1, byte_level(digits)):
        begun = re.search(r"\d{4}", prompt.prompt).group()
        assert prompt.group == prompt.about["begun"] == int(begun)
        left = prompt.prompt[-len(shown) :] if shown else ""
        assert re.fullmatch(re.sub(r"\d", r"\\d", shown), left)
        assert not prompt.prompt[: len(prompt.prompt) - len(left)][-1].isdigit()
        later, earlier = (f"{left}{end}".strip() for end in (prompt.answer, prompt.foil))
        assert len(later) == len(earlier) == 4
        assert later[:2] == earlier[:2] == begun[:2]
        assert later[2] > begun[2] > earlier[2]
        assert earlier[2:] > "01"
        assert prompt.counterfactual == prompt.prompt.replace(begun, f"{begun[:2]}01")
        spans = {name: prompt.prompt[slice(*places[0])] for name, places in character_spans(prompt).items()}
        assert spans == {"noun": re.search(r"[Tt]he (\w+)", prompt.prompt).group(1), "year": begun[2:]}
        assert character_spans(prompt)["year"][0][0] == prompt.prompt.index(begun) + 2


def test_greater_than_shows_the_century_without_a_tokenizer():
    assert all(re.search(r" 1[1-8]$", prompt.prompt) for prompt in greater_than(50))


def test_repeated_words_say_answer_and_foil_once():
    lengths = set()
    for prompt in repeated_words(200):
        said = prompt.prompt.split()[1:]
        repeats = said[10:]
        assert len(set(said[:10])) == 10
        assert said[: len(repeats)] == repeats
        assert prompt.answer == f" {said[len(repeats)]}"
        assert said.count(prompt.answer.strip()) == said.count(prompt.foil.strip()) == 1
        swapped = {prompt.answer.strip(): prompt.foil.strip(), prompt.foil.strip(): prompt.answer.strip()}
        assert prompt.counterfactual.split()[1:] == [swapped.get(word, word) for word in said]
        starts = [match.start() for match in re.finditer(r"\S+", prompt.prompt)]
        at = len(repeats)  # of the last repeated word, as the opening is word 0
        assert character_spans(prompt) == {
            "previous": [(starts[at], starts[at] + len(repeats[-1]))],
            "next": [(starts[at + 1], starts[at + 1] + len(said[at]))],
        }
        lengths.add(len(repeats))
    assert lengths == set(range(2, 9))


def few_words(*known: str) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<unk>", "the", "in", *known])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_only_words_of_one_token_are_used():
    tokenizer = few_words("Mary", "John", "office", "key", "map")
    made = indirect_objects(48, 0, tokenizer)
    assert {prompt.group for prompt in made} == {"John and Mary"}
    assert {(" office" in prompt.prompt, " key" in prompt.prompt or " map" in prompt.prompt) for prompt in made} == {
        (True, True)
    }
    with pytest.raises(
        CircuitsError, match=r"^49 prompts of ioi were asked for: it must be from 1 to 48, as all are diff"
    ):
        indirect_objects(49, 0, tokenizer)


def test_years_of_one_token_are_compared_whole():
    made = greater_than(2, 0, few_words("war", "1701", "1712", "1734", "1758"))
    assert {prompt.about["begun"] for prompt in made} == {1734}
    assert {(prompt.answer, prompt.foil) for prompt in made} == {(" 1758", " 1712")}


@pytest.mark.parametrize(
    ("make", "known", "message"),
    [
        (indirect_objects, ["Mary"], "1 of the 36 names are one token of {}: it takes 2"),
        (indirect_objects, ["Mary", "John"], "0 of the 16 places are one token of {}: it takes 1"),
        (repeated_words, ["river", "table"], "2 of the 113 words are one token of {}: it takes 10"),
        (greater_than, [], "0 of the 24 nouns are one token of {}: it takes 1"),
        (
            greater_than,
            ["war", "1712", "1734", "1758"],
            "{} has no years to compare: it must split them alike and know their digits",
        ),
    ],
)
def test_a_tokenizer_with_too_few_words_is_refused(make, known, message):
    tokenizer = few_words(*known)
    with pytest.raises(CircuitsError) as caught:
        make(1, 0, tokenizer)
    assert str(caught.value) == message.format(type(tokenizer).__name__)


@pytest.mark.parametrize(("name", "total"), [("ioi", 6 * 2 * 36 * 35 * 16 * 16), ("greater_than", 3 * 24 * 8 * 80)])
def test_a_source_makes_no_more_than_there_are(name, total):
    for count in (0, total + 1):
        message = f"{count} prompts of {name} were asked for: it must be from 1 to {total}, as all are different"
        with pytest.raises(CircuitsError, match=f"^{message}$"):
            SOURCES[name](count)


def test_every_prompt_that_is_counted_can_be_made():
    made = greater_than(12, 0, few_words("war", "feud", "1701", "1712", "1734", "1745", "1758"))
    assert len({prompt.prompt for prompt in made}) == 12
