import filecmp
import json
from pathlib import Path

import pytest

from circuits.errors import CircuitsError
from circuits.facts import (
    ATTRIBUTES,
    BIOGRAPHY,
    DatasetSettings,
    FactDataset,
    make_dataset,
    make_people,
)
from circuits.facts.pools import POOLS
from circuits.facts.tokenizer import word_tokenizer

REFERENCE = Path(__file__).parents[2] / "data" / "reference"
FILES = ("people.jsonl", "bio.jsonl", "qa.jsonl")


def test_the_reference_dataset_is_regenerated_byte_for_byte(tmp_path):
    made = make_dataset(tmp_path / "again", FactDataset(REFERENCE).settings)
    assert filecmp.cmpfiles(REFERENCE, made.folder, FILES, shallow=False) == (list(FILES), [], [])


def test_another_seed_makes_other_people(tmp_path):
    one, two = (make_dataset(tmp_path / str(seed), DatasetSettings(people=50, seed=seed)) for seed in (0, 1))
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize("count", [50, 2400, 2401, 5000])
def test_names_are_unique_and_the_split_has_the_asked_size(count):
    people = list(make_people(count, qa_id_fraction=0.3))
    assert len({person.name for person in people}) == count
    assert sum(person.split == "qa_id" for person in people) == round(0.3 * count)


def test_a_person_does_not_depend_on_how_many_there_are():
    few, many = list(make_people(50)), list(make_people(200))
    assert [person.facts for person in few] == [person.facts for person in many[:50]]
    assert [person.name for person in few] == [person.name for person in many[:50]]


def test_a_hundred_thousand_people_are_made_without_repetition():
    names = {person.name for person in make_people(100_000)}
    assert len(names) == 100_000


def test_spans_of_every_row_hold_what_they_name(dataset):
    people = dataset.people().set_index("person")
    rows = list(dataset.rows("bio")) + list(dataset.rows("qa_id")) + list(dataset.rows("qa_ood_unseen"))
    for row in rows:
        person = people.loc[row["person"]]
        assert [row["text"][left:right] for left, right in row["subject"]] == [person["name"]]
        for attribute, (left, right) in zip(row["attributes"], row["answer"], strict=True):
            assert row["text"][left:right] == person[attribute]
        assert row["relation"]
        assert "[" not in row["text"]


def test_counts_are_the_rows(dataset):
    for split, count in dataset.counts.items():
        assert sum(len(row["attributes"]) for row in dataset.rows(split)) == count


def test_biographies_whole_fixed_and_with_pronouns(tmp_path):
    settings = DatasetSettings(people=4, biographies=2, order="fixed", mention="pronoun", row="biography")
    dataset = make_dataset(tmp_path / "facts", settings)
    rows = list(dataset.rows("bio"))
    assert len(rows) == 8
    for row in rows:
        assert row["attributes"] == list(ATTRIBUTES)
        subjects = [row["text"][left:right] for left, right in row["subject"]]
        assert subjects == [row["name"]] + [subjects[1]] * 5
        assert subjects[1] in ("She", "He")
        people = dataset.people().set_index("person")
        for attribute, (left, right) in zip(row["attributes"], row["answer"], strict=True):
            assert row["text"][left:right] == people.loc[row["person"], attribute]


def test_familiar_people_with_few_attributes_and_an_opening(tmp_path):
    chosen = ("university", "birth_city")
    settings = DatasetSettings(people=30, biographies=1, pools="familiar", attributes=chosen, opening="Fact:")
    dataset = FactDataset(make_dataset(tmp_path / "facts", settings).folder)
    assert dataset.settings == settings
    people, pools = dataset.people().set_index("person"), POOLS["familiar"]
    assert set(people["university"]) <= set(pools.universities)
    assert all(name.split()[0] in pools.first_names and name.split()[1] in pools.last_names for name in people["name"])
    rows = list(dataset.rows("bio")) + list(dataset.rows("qa_id")) + list(dataset.rows("qa_ood"))
    assert len(rows) == 2 * 30 * 2
    for row in rows:
        ((left, right),), (attribute,) = row["answer"], row["attributes"]
        assert attribute in chosen
        assert row["text"][left:right] == people.loc[row["person"], attribute]
        ((left, right),) = row["subject"]
        assert row["text"][left:right] == people.loc[row["person"], "name"]
        assert row["text"].startswith("Fact: ")
        assert all(row["text"][start - 1] == " " for start, _ in row["relation"])


def test_familiar_words_are_known_to_their_tokenizer_and_unique(tokenizer):
    pools = POOLS["familiar"]
    known = word_tokenizer("familiar")
    for words in (pools.first_names, pools.last_names, pools.cities, pools.universities, pools.employers, pools.majors):
        assert len(set(words)) == len(words) >= 25
        assert known.unk_token_id not in known.convert_tokens_to_ids(list(words))
    assert tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(list(pools.employers))


def test_permuted_order_and_wordings_vary(dataset):
    orders, wordings = set(), set()
    rows = list(dataset.rows("bio"))
    for start in range(0, len(rows), 6):
        orders.add(tuple(row["attributes"][0] for row in rows[start : start + 6]))
    wordings = {row["wording"] for row in rows}
    assert len(orders) > 5
    assert wordings == set(range(5))
    assert all(len(texts) == 5 for texts in BIOGRAPHY.values())


def test_several_forms_of_each_question_can_be_in_training(tmp_path):
    asked = make_dataset(tmp_path / "two", DatasetSettings(people=6, questions=2))
    one = make_dataset(tmp_path / "one", DatasetSettings(people=6))
    for split in ("qa_id", "qa_ood"):
        texts = [row["text"] for row in asked.rows(split)]
        assert len(texts) == asked.counts[split] == 2 * one.counts[split]
        assert {row["wording"] for row in asked.rows(split)} == {0, 1}
        assert {row["wording"] for row in asked.rows(f"{split}_unseen")} == {2}
        assert set(texts) == {
            row["text"] for name in (split, f"{split}_unseen") for row in one.rows(name) if row["wording"] < 2
        }


def test_streaming_gives_the_rows_of_the_file(dataset):
    streamed = list(dataset.stream("qa"))
    with (dataset.folder / "qa.jsonl").open() as file:
        assert streamed == [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"people": 1}, "the number of people is 1: it must be from 2 to 144000"),
        ({"qa_id_fraction": 1.0}, "it must lie between 0 and 1"),
        ({"wordings": 6}, "it must be from 1 to 5"),
        ({"biographies": 0}, "1 is the least"),
        ({"questions": 3}, "it must be from 1 to 2, so that one is left"),
        ({"order": "random"}, "it must be permuted or fixed"),
        ({"mention": "pronoun"}, "row must be biography"),
        ({"pools": "common"}, "there are no pools 'common': choose from invented, familiar"),
        ({"attributes": ("major", "salary")}, "there is no attribute 'salary': choose from birth_date, birth_city"),
        ({"attributes": ("major", "major")}, r"the attributes are \['major', 'major'\]: name one or more, each once"),
        ({"attributes": ()}, r"the attributes are \[\]"),
        ({"opening": "Fact: "}, "the opening is 'Fact: ': leave out the spaces around it"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(CircuitsError, match=message):
        DatasetSettings(**settings)


def test_a_missing_an_empty_and_a_changed_dataset_are_refused(tmp_path):
    with pytest.raises(CircuitsError, match="there is no folder"):
        FactDataset(tmp_path / "nowhere")
    with pytest.raises(CircuitsError, match=r"it has no dataset\.json"):
        FactDataset(tmp_path)
    made = make_dataset(tmp_path / "facts", DatasetSettings(people=4))
    text = (made.folder / "qa.jsonl").read_text()
    (made.folder / "qa.jsonl").write_text("")
    with pytest.raises(CircuitsError, match=r"is empty: qa\.jsonl"):
        FactDataset(made.folder)
    (made.folder / "qa.jsonl").write_text(text.replace("born", "Born"))
    with pytest.raises(CircuitsError, match="were changed"):
        FactDataset(made.folder)


def test_a_folder_with_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CircuitsError, match="holds something that is no dataset"):
        make_dataset(tmp_path, DatasetSettings(people=4))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unknown_split_or_person_is_refused(dataset):
    with pytest.raises(CircuitsError, match="there is no split 'qa'"):
        list(dataset.rows("qa"))
    with pytest.raises(CircuitsError, match="there is no person 99"):
        list(dataset.rows("bio", [99]))
