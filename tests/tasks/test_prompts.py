"""Files of prompts: every kind reads the same, and every refusal names the line."""

import json
import re

import pandas
import pytest
from datasets import Dataset, DatasetDict

from circuits import CircuitsError
from circuits.tasks.prompts import Prompt, character_spans, read_prompts, write_prompts
from circuits.tasks.sources import SOURCES

ROWS = [
    {
        "prompt": "Mary met John, and John gave the key to",
        "answer": " Mary",
        "foil": " John",
        "counterfactual": "Mary met John, and Mary gave the key to",
        "group": "Mary and John",
        "spans": {"IO": "Mary", "S2": ["John", 2]},
        "order": "ABBA",
    },
    {"prompt": 'She said "no",\nand left the\u2028Café for', "answer": " good", "spans": {"who": [0, 3]}},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def said(function, *args):
    with pytest.raises(CircuitsError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def wrote(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_table():
    """The rows with their spans as JSON, as tables hold what differs from row to row."""
    return pandas.DataFrame([{**row, "spans": json.dumps(row["spans"])} for row in ROWS])


def as_file(folder, kind):
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        return wrote(folder, path.name, LINES)
    if kind == "json":
        return wrote(folder, path.name, json.dumps(ROWS, indent=1))
    if kind == "csv":
        as_table().to_csv(path, index=False)
    if kind == "parquet":
        as_table().to_parquet(path)
    if kind == "saved":
        Dataset.from_pandas(as_table()).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_every_kind_of_file_reads_the_same(tmp_path, kind):
    first, second = read_prompts(as_file(tmp_path, kind))
    known = {key: value for key, value in ROWS[0].items() if key != "order"}
    unit, start = {"jsonl": ("line", 1), "json": ("entry", 1), "csv": ("line", 2)}.get(kind, ("row", 1))
    where = [f"{unit} {start + number} of prompts.{kind}" for number in range(2)]
    assert first == Prompt(**known, about={"order": "ABBA"}, where=where[0])
    assert second == Prompt(**ROWS[1], where=where[1])


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_lines_are_counted_with_blank_ones_and_begin_with_any_mark(tmp_path, ending):
    blanks = LINES.replace("}\n{", "}\r\n  \r\n\n{") + "\n\n"
    path = wrote(tmp_path, f"a.{ending}", b"\xef\xbb\xbf" + blanks.encode())
    assert [prompt.where for prompt in read_prompts(path)] == [f"line 1 of a.{ending}", f"line 4 of a.{ending}"]


def test_lines_of_csv_are_counted_as_an_editor_does(tmp_path):
    path = wrote(tmp_path, "a.csv", '\nprompt,answer,group\n"two\nlines", A,\n\nthree, B,7\n')
    prompts = read_prompts(path)
    assert [prompt.where for prompt in prompts] == ["line 3 of a.csv", "line 6 of a.csv"]
    assert [prompt.group for prompt in prompts] == [None, "7"]


def test_spans_of_a_dataset_may_be_structs_and_whole_groups_floats(tmp_path):
    rows = [
        {"prompt": "Mary left", "answer": " us", "spans": {"who": "Mary"}, "group": 1},
        {"prompt": "Then left", "answer": " us", "spans": {"verb": "left"}, "group": None},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        prompts = read_prompts(path)
        assert [character_spans(prompt) for prompt in prompts] == [{"who": [(0, 4)]}, {"verb": [(5, 9)]}]
        assert [(prompt.group, type(prompt.group)) for prompt in prompts] == [(1, int), (None, type(None))]


def test_other_columns_are_kept_if_they_hold_one_value(tmp_path):
    row = {"prompt": "a", "answer": "b", "n": 1, "x": 0.5, "yes": True, "told": "c", "many": [1], "none": None}
    [prompt] = read_prompts(wrote(tmp_path, "a.jsonl", json.dumps(row)))
    assert prompt.about == {"n": 1, "x": 0.5, "yes": True, "told": "c"}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_is_read_again(tmp_path, name):
    made = SOURCES[name](20)
    write_prompts(tmp_path / "new" / "a.jsonl", made)
    read = read_prompts(tmp_path / "new" / "a.jsonl")
    assert [prompt.where for prompt in read[:2]] == ["line 1 of a.jsonl", "line 2 of a.jsonl"]
    assert [vars(prompt) | {"where": ""} for prompt in read] == [vars(prompt) | {"where": ""} for prompt in made]
    assert [character_spans(prompt) for prompt in read] == [character_spans(prompt) for prompt in made]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.jsonl"
    write_prompts(path, [Prompt("a", "b")])
    before = path.read_bytes()
    assert before == b'{"prompt": "a", "answer": "b"}\n'
    with pytest.raises(TypeError):
        write_prompts(path, [Prompt("c", "d"), Prompt("e", "f", spans={"who": {1}})])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert said(write_prompts, path, []) == f"there are no prompts to write to {path}"
    csv = tmp_path / "a.csv"
    message = f"a file of prompts cannot be saved as {csv}: end the name in .jsonl"
    assert said(write_prompts, csv, [Prompt("a", "b")]) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 3 of a.jsonl has no 'answer': each line needs 'prompt' and 'answer'"),
        ('{"answer": "a", "prompt": null}', "line 3 of a.jsonl has no 'prompt': each line needs 'prompt' and 'answer'"),
        ('{"prompt": "a", "answer": 5}', "line 3 of a.jsonl: the answer is 5, which is not text"),
        ('{"prompt": ["a"], "answer": "b"}', "line 3 of a.jsonl: the prompt is ['a'], which is not text"),
        ('{"prompt": "a", "answer": "b", "foil": 1}', "line 3 of a.jsonl: the foil is 1, which is not text"),
        (
            '{"prompt": "a", "answer": "\\ud800"}',
            "line 3 of a.jsonl: the answer is '\\ud800', which holds half a character (a lone surrogate)",
        ),
        ('{"prompt": "a", "answer": "b", "foils": "c"}', "line 3 of a.jsonl has 'foils': 'foil' may be meant"),
        ('{"Prompt": "a", "answer": "b"}', "line 3 of a.jsonl has 'Prompt': 'prompt' may be meant"),
        ('{"prompt": "a", "asnwer": "b"}', "line 3 of a.jsonl has 'asnwer': 'answer' may be meant"),
        (
            '{"prompt": "a", "answer": "b", "counterfactuals": "c"}',
            "line 3 of a.jsonl has 'counterfactuals': 'counterfactual' may be meant",
        ),
        (
            '{"prompt": "a", "answer": "b", "start": 1}',
            "line 3 of a.jsonl has 'start', which is a column of every task's answers: choose another name",
        ),
        (
            '{"prompt": "a", "answer": "b", "group": 1.5}',
            "line 3 of a.jsonl: the group is 1.5, which is neither text nor a whole number",
        ),
        (
            '{"prompt": "a", "answer": "b", "group": true}',
            "line 3 of a.jsonl: the group is True, which is neither text nor a whole number",
        ),
        (
            '{"prompt": "a", "answer": "b", "spans": ["c"]}',
            'line 3 of a.jsonl: the spans are [\'c\']: give names with values, as in {"subject": "Mary"}',
        ),
        (
            '{"prompt": "a", "answer": "b", "spans": "c"}',
            "line 3 of a.jsonl: the spans are not JSON: Expecting value (character 1)",
        ),
        ('{"prompt": "a" "answer": "b"}', "line 3 of a.jsonl is not JSON: Expecting ',' delimiter (character 16)"),
        ('{"prompt": "a", "prompt": "b"}', "line 3 of a.jsonl is not JSON: 'prompt' is there twice"),
        ("[" * 200_000, "line 3 of a.jsonl is not JSON: nested too deeply"),
        ('["a", "b"]', 'line 3 of a.jsonl is [\'a\', \'b\']: write an object, as in {"prompt": "…", "answer": "…"}'),
        (b'{"prompt": "caf\xe9"}', "line 3 of a.jsonl is not text in UTF-8: save the file in that encoding"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = wrote(tmp_path, "a.jsonl", b'{"prompt": "a", "answer": "b"}\n\n' + line)
    assert said(read_prompts, path) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "{path} is empty: it has no prompts"),
        ("a.json", " \n", "{path} is empty: it has no prompts"),
        ("a.json", "[]", "{path} is empty: it has no prompts"),
        ("a.csv", "", "{path} is empty: it has no prompts"),
        ("a.csv", "prompt,answer\n", "{path} is empty: it has no prompts"),
        (
            "a.txt",
            "a",
            "{path} cannot be read as prompts: give a file that ends in .jsonl, .json, .csv, .parquet, or a folder "
            "that datasets saved",
        ),
        (
            "a.json",
            '[{"prompt": "a",\n "answer"}]',
            "line 2 of a.json is not JSON: Expecting ':' delimiter (character 10)",
        ),
        ("a.json", '[{"a": 1, "a": 2}]', "a.json is not JSON: 'a' is there twice"),
        (
            "a.json",
            "[1]",
            'entry 1 of a.json is 1: write an object, as in {{"prompt": "…", "answer": "…"}}',
        ),
        (
            "a.csv",
            "prompt,answer\na,b\nc\n",
            "line 3 of a.csv has another number of cells (1) than the header (2): put cells with commas in quotes",
        ),
        ("a.csv", "prompt,answer\na,\n", "line 2 of a.csv has no 'answer': each line needs 'prompt' and 'answer'"),
        ("a.csv", 'prompt,answer\n"a" b,c\n', "line 2 of a.csv is not CSV: ',' expected after '\"'"),
        ("a.csv", "prompt,answer,prompt\n", "line 1 of a.csv names the column 'prompt' twice"),
        ("a.csv", "prompt,answers\na,b\n", "line 2 of a.csv has 'answers': 'answer' may be meant"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, name, content, message):
    path = wrote(tmp_path, name, content)
    assert said(read_prompts, path) == message.format(path=path)


def test_a_missing_file_is_refused(tmp_path):
    assert said(read_prompts, tmp_path / "a.jsonl") == f"there is no file {tmp_path / 'a.jsonl'}"
    assert said(read_prompts, str(tmp_path / "a.jsonl")) == f"there is no file {tmp_path / 'a.jsonl'}"


def test_damaged_tables_are_refused(tmp_path):
    path = wrote(tmp_path, "a.parquet", "no table")
    assert said(read_prompts, path).startswith(f"{path} is damaged or is not a parquet file: ")
    folder = tmp_path / "plain"
    folder.mkdir()
    assert said(read_prompts, folder).startswith(f"the folder {folder} is no dataset that datasets saved: ")
    saved = as_file(tmp_path, "saved")
    (saved / "state.json").write_text("{}")
    assert said(read_prompts, saved).startswith(f"the folder {saved} is no dataset that datasets saved: ")


def test_a_row_of_a_table_is_named(tmp_path):
    pandas.DataFrame({"prompt": ["a", "b"], "answer": ["c", None]}).to_parquet(tmp_path / "a.parquet")
    message = "row 2 of a.parquet has no 'answer': each line needs 'prompt' and 'answer'"
    assert said(read_prompts, tmp_path / "a.parquet") == message


def test_a_dataset_of_several_splits_is_refused_with_their_names(tmp_path):
    split = Dataset.from_list([{"prompt": "a", "answer": "b"}])
    DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved"
    message = f"{folder} has several splits (train, test): name the folder of one, such as {folder / 'train'}"
    assert said(read_prompts, folder) == message
    assert read_prompts(folder / "train") == [Prompt("a", "b", where="row 1 of train")]


TEXT = "Mary and John met; John gave Johnson the banana to"


@pytest.mark.parametrize(
    ("span", "places"),
    [
        ("Mary", ["Mary"]),
        (["John", 1], [(9, 13)]),
        (["John", 2], [(19, 23)]),
        (("John", 3), [(29, 33)]),
        ([9, 13], [(9, 13)]),
        ([0, len(TEXT)], [(0, len(TEXT))]),
        (["Mary", "banana"], ["Mary", "banana"]),
        ([["John", 2], [0, 4], "met"], [(19, 23), (0, 4), "met"]),
        ([[0, 4]], [(0, 4)]),
        (["ana", 2], [(TEXT.rindex("ana"), TEXT.rindex("ana") + 3)]),
    ],
)
def test_spans_are_where_they_say(span, places):
    expected = [
        place if isinstance(place, tuple) else (TEXT.index(place), TEXT.index(place) + len(place)) for place in places
    ]
    assert character_spans(Prompt(TEXT, " Mary", spans={"name": span})) == {"name": expected}


@pytest.mark.parametrize(
    ("name", "span", "message"),
    [
        ("IO", "Paul", f"the span 'IO' is 'Paul', which does not occur in '{TEXT}'"),
        ("IO", "", f"the span 'IO' is '', which does not occur in '{TEXT}'"),
        ("S", "John", f"the span 'S' is 'John', which occurs 3 times in '{TEXT}': say which, as [\"John\", 2]"),
        (
            "S",
            ["John", "Mary"],
            f"the span 'S' is 'John', which occurs 3 times in '{TEXT}': say which, as [\"John\", 2]",
        ),
        ("S", "ana", f"the span 'S' is 'ana', which occurs 2 times in '{TEXT}': say which, as [\"ana\", 2]"),
        ("S", ["John", 4], f"the span 'S' is occurrence 4 of 'John', which occurs 3 times in '{TEXT}': count from 1"),
        ("S", ["Mary", 0], f"the span 'S' is occurrence 0 of 'Mary', which occurs 1 time in '{TEXT}': count from 1"),
        *(
            (
                "S",
                bounds,
                f"the span 'S' is {bounds}, but the prompt has 50 characters: give a start and an end after it, within "
                "the prompt",
            )
            for bounds in ([4, 4], [5, 4], [-1, 4], [40, 51])
        ),
        ("S", [4, 5], "the span 'S' holds only white space"),
        *(
            (
                "S",
                wrong,
                f"the span 'S' is {wrong!r}: write a text, [\"John\", 2] for its second occurrence, [start, end] in "
                "characters, or a list of these",
            )
            for wrong in (3, True, 0.5, {"a": 1})
        ),
        ("S", [], "the span 'S' is an empty list: leave it out"),
        *(
            (name, "Mary", f"no span can be named {name!r}, because every task has one of that name")
            for name in ("all", "answer", "last")
        ),
        *(
            (name, "Mary", f"no span can be named {name!r}: use letters, digits and underscores, as in first_name")
            for name in ("first name", "0", "-1", "", 3)
        ),
    ],
)
def test_a_span_that_is_not_there_is_refused(name, span, message):
    prompt = Prompt(TEXT, " Mary", spans={name: span}, where="line 3 of ioi.jsonl")
    assert said(character_spans, prompt) == f"line 3 of ioi.jsonl: {message}"
    assert said(character_spans, Prompt(TEXT, " Mary", spans={name: span})) == message


def test_long_texts_are_shortened_in_messages():
    message = said(character_spans, Prompt("word " * 1000, "b", spans={"who": "Mary"}))
    assert re.fullmatch(r"the span 'who' is 'Mary', which does not occur in 'word word .*\.\.\.", message)
    assert len(message) < 140
