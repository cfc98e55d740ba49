"""Prompts as text, with answers, foils, counterfactuals and named spans; reading and writing files of them."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.storage import atomic_file, check_ending

#: Spans that every task has.
RESERVED = ("all", "answer", "last")

_KEYS = ("prompt", "answer", "foil", "counterfactual", "group", "spans")
#: What a task's table of answers keeps in columns of these names.
_COLUMNS = ("example", "value", "start", "end")

#: Where a row stands, for messages, and what it holds, or what is wrong with it.
_Row = tuple[str, dict[str, Any] | CircuitsError]


@dataclass(frozen=True)
class Prompt:
    """One prompt with its answer, as text.

    Attributes:
        prompt: what the model reads.
        answer: what should follow; begins with a space where the tokenizer's words do, as in ``" Mary"``.
        foil: a wrong answer.
        counterfactual: the prompt with something changed; its answer is the foil, if there is one.
        group: what belongs together, such as prompts about one person.
        spans: name → ``"Mary"``, or ``["John", 2]`` for its second occurrence, or ``[start, end]`` in characters of the
            prompt, or a list of these.
        where: where it was read, such as ``line 3 of ioi.jsonl``; error messages begin with it.
        about: what else is known of it; a task's table keeps it beside the answer.

    Raises:
        CircuitsError: something that must be text is not.

    Example:
        >>> Prompt("The capital of France is", 5, where="line 3 of capitals.jsonl")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: line 3 of capitals.jsonl: the answer is 5, which is not text
    """

    prompt: str
    answer: str
    foil: str | None = None
    counterfactual: str | None = None
    group: str | int | None = None
    spans: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "foil", "counterfactual"):
            value: Any = getattr(self, name)
            if value is None and name in ("foil", "counterfactual"):
                continue
            if not isinstance(value, str):
                raise self.error(f"the {name} is {_shown(value)}, which is not text")
            if re.search("[\ud800-\udfff]", value):
                raise self.error(f"the {name} is {_shown(value)}, which holds half a character (a lone surrogate)")
        group: Any = self.group
        if isinstance(group, bool) or not isinstance(group, str | int | None):
            raise self.error(f"the group is {_shown(group)}, which is neither text nor a whole number")
        for name, held in (("spans", self.spans), ("about", self.about)):
            if not isinstance(held, Mapping):
                raise self.error(f'the {name} are {_shown(held)}: give names with values, as in {{"subject": "Mary"}}')

    def error(self, message: str) -> CircuitsError:
        """The error that says ``message`` of this prompt, and where it was read."""
        return CircuitsError(f"{self.where}: {message}" if self.where else message)


def character_spans(prompt: Prompt) -> dict[str, list[tuple[int, int]]]:
    """The spans of a prompt as ``[start, end)`` ranges of its characters; spans that are ``None`` are left out.

    Raises:
        CircuitsError: a span's name is reserved or is not a name, its text does not occur or occurs more often without
            a number, its range is empty or outside the prompt, or it is something else.

    Example:
        >>> spans = {"IO": "Mary", "S2": ["John", 2]}
        >>> character_spans(Prompt("Mary met John, and John gave the key to", " Mary", spans=spans))
        {'IO': [(0, 4)], 'S2': [(19, 23)]}
    """
    found = {}
    for name, given in prompt.spans.items():
        if name in RESERVED:
            raise prompt.error(f"no span can be named {name!r}, because every task has one of that name")
        if not isinstance(name, str) or not name.isidentifier():
            raise prompt.error(f"no span can be named {name!r}: use letters, digits and underscores, as in first_name")
        if given is None:
            continue
        several = _listed(given) and not _is_numbered(given) and not _is_range(given)
        if several and not given:
            raise prompt.error(f"the span {name!r} is an empty list: leave it out")
        found[name] = [_place(prompt, name, one) for one in (given if several else [given])]
    return found


def _listed(given: Any) -> bool:
    return isinstance(given, list | tuple)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_numbered(given: Any) -> bool:
    return _listed(given) and len(given) == 2 and isinstance(given[0], str) and _whole(given[1])


def _is_range(given: Any) -> bool:
    return _listed(given) and len(given) == 2 and all(_whole(bound) for bound in given)


def _place(prompt: Prompt, name: str, given: Any) -> tuple[int, int]:
    text = prompt.prompt
    if _is_range(given):
        start, end = given
        if not 0 <= start < end <= len(text):
            raise prompt.error(
                f"the span {name!r} is {[start, end]}, but the prompt has {len(text)} characters: "
                "give a start and an end after it, within the prompt"
            )
    elif isinstance(given, str) or _is_numbered(given):
        part, number = (given, None) if isinstance(given, str) else given
        # occurrences may overlap: better to ask which than to choose in silence
        starts = [match.start() for match in re.finditer(f"(?={re.escape(part)})", text)] if part else []
        if not starts:
            raise prompt.error(f"the span {name!r} is {_shown(part)}, which does not occur in {_shown(text)}")
        if number is None and len(starts) > 1:
            which = json.dumps([part, 2], ensure_ascii=False)
            raise prompt.error(
                f"the span {name!r} is {_shown(part)}, which occurs {len(starts)} times in {_shown(text)}: "
                f"say which, as {which}"
            )
        if number is not None and not 1 <= number <= len(starts):
            raise prompt.error(
                f"the span {name!r} is occurrence {number} of {_shown(part)}, which occurs {len(starts)} "
                f"{'time' if len(starts) == 1 else 'times'} in {_shown(text)}: count from 1"
            )
        start = starts[(number or 1) - 1]
        end = start + len(part)
    else:
        raise prompt.error(
            f'the span {name!r} is {_shown(given)}: write a text, ["John", 2] for its second occurrence, '
            "[start, end] in characters, or a list of these"
        )
    if text[start:end].isspace():
        raise prompt.error(f"the span {name!r} holds only white space")
    return start, end


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def read_prompts(path: str | Path, *, bad: list[str] | None = None) -> list[Prompt]:
    r"""Read prompts from a file or a dataset.

    Each line or row has ``prompt`` and ``answer``, and may have ``foil``, ``counterfactual``, ``group`` and ``spans``;
    other columns are kept in `Prompt.about` where they hold text, a number or true and false, and are left out
    otherwise. Blank lines are skipped, but counted. Empty cells of CSV and missing values are as if they were not
    there; ``spans`` may be JSON in a text.

    Args:
        path: ``.jsonl``; ``.json`` with lines or one list; ``.csv`` with a header; ``.parquet``; or a folder that
            ``datasets.Dataset.save_to_disk`` wrote.
        bad: a list to which is added what is wrong with each line that is no prompt, instead of refusing the first.

    Raises:
        CircuitsError: there is no such file, it cannot be read or is empty, or a line of it is not a prompt.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "capitals.csv"
        ...     _ = file.write_text("prompt,answer,continent\nThe capital of France is, Paris,Europe\n")
        ...     read_prompts(file)
        [Prompt(prompt='The capital of France is', answer=' Paris', ..., where='line 2 of capitals.csv',
                about={'continent': 'Europe'})]
    """
    path = Path(path)
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if not path.exists():
        raise CircuitsError(f"there is no file {path}")
    reader = _dataset if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise CircuitsError(
            f"{path} cannot be read as prompts: give a file that ends in {', '.join(readers)}, or a folder that "
            "datasets saved"
        )
    prompts = []
    for where, row in reader(path):
        try:
            prompts.append(_prompt(where, row))
        except CircuitsError as error:
            if bad is None:
                raise
            bad.append(str(error))
    if not prompts and not bad:
        raise CircuitsError(f"{path} is empty: it has no prompts")
    return prompts


def _prompt(where: str, row: Mapping[str, Any] | CircuitsError) -> Prompt:
    if isinstance(row, CircuitsError):
        raise row
    row = {key: value for key, value in row.items() if value is not None}
    for key in row:
        if key in _KEYS:
            continue
        if meant := get_close_matches(key.casefold(), _KEYS, n=1, cutoff=0.82):
            raise CircuitsError(f"{where} has {key!r}: {meant[0]!r} may be meant")
        if key in _COLUMNS:
            raise CircuitsError(f"{where} has {key!r}, which is a column of every task's answers: choose another name")
    for key in ("prompt", "answer"):
        if key not in row:
            raise CircuitsError(f"{where} has no {key!r}: each line needs 'prompt' and 'answer'")
    if isinstance(row.get("spans"), str):
        try:
            row["spans"] = _parsed(row["spans"])
        except (ValueError, RecursionError) as error:
            raise CircuitsError(f"{where}: the spans are not JSON: {_reason(error)}") from None
    group = row.get("group")
    if isinstance(group, float) and group.is_integer():
        row["group"] = int(group)  # a table keeps whole numbers so, if some are missing
    about = {key: value for key, value in row.items() if key not in _KEYS and isinstance(value, str | int | float)}
    return Prompt(where=where, about=about, **{key: row[key] for key in _KEYS if key in row})


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CircuitsError(
            f"line {line} of {path.name} is not text in UTF-8: save the file in that encoding"
        ) from None


def _parsed(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return held

    return json.loads(text, object_pairs_hook=once)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]


def _object(where: str, held: Any) -> _Row:
    if not isinstance(held, dict):
        held = CircuitsError(f'{where} is {_shown(held)}: write an object, as in {{"prompt": "…", "answer": "…"}}')
    return where, held


def _json_lines(path: Path) -> Iterator[_Row]:
    # not splitlines, which also splits at characters that JSON allows in a text
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            yield _object(where, _parsed(line))
        except (ValueError, RecursionError) as error:
            broken = line.lstrip().startswith("{") and not line.rstrip().endswith("}")
            hint = ": write each prompt on one line" if broken else ""
            yield where, CircuitsError(f"{where} is not JSON: {_reason(error)}{hint}")


def _json(path: Path) -> Iterator[_Row]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        held = _parsed(text)
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno} of {path.name}" if isinstance(error, json.JSONDecodeError) else path.name
        raise CircuitsError(f"{line} is not JSON: {_reason(error)}") from None
    for number, one in enumerate(held, start=1):
        yield _object(f"entry {number} of {path.name}", one)


def _csv(path: Path) -> Iterator[_Row]:
    reader = csv.reader(StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    while True:
        where = f"line {reader.line_num + 1} of {path.name}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CircuitsError(f"{where} is not CSV: {error}") from None
        if not cells:
            continue
        if not header:
            header = cells
            if twice := [name for name in header if header.count(name) > 1]:
                raise CircuitsError(f"{where} names the column {twice[0]!r} twice")
            continue
        if len(cells) != len(header):
            yield (
                where,
                CircuitsError(
                    f"{where} has another number of cells ({len(cells)}) than the header ({len(header)}): "
                    "put cells with commas in quotes"
                ),
            )
        else:
            yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _parquet(path: Path) -> Iterator[_Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (ArrowException, OSError) as error:
        raise CircuitsError(f"{path} is damaged or is not a parquet file: {_reason(error)}") from None
    yield from _rows(path, rows)


def _dataset(path: Path) -> Iterator[_Row]:
    from datasets import DatasetDict, load_from_disk
    from pyarrow import ArrowException

    try:
        dataset = load_from_disk(str(path))
    except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CircuitsError(f"the folder {path} is no dataset that datasets saved: {_reason(error)}") from None
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(dataset)
        raise CircuitsError(
            f"{path} has several splits ({splits}): name the folder of one, such as {path / next(iter(dataset), '')}"
        )
    yield from _rows(path, dataset.with_format(None))


def _rows(path: Path, rows: Any) -> Iterator[_Row]:
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {path.name}", row


def write_prompts(path: str | Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSON lines, atomically; `read_prompts` reads them.

    Args:
        path: ends in ``.jsonl``.
        prompts: to write; `Prompt.where` is not kept.

    Raises:
        CircuitsError: the name ends otherwise, or there are no prompts.
    """
    path = Path(path)
    check_ending(path, (".jsonl",), "file of prompts")
    if not prompts:
        raise CircuitsError(f"there are no prompts to write to {path}")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for prompt in prompts:
            held = {key: getattr(prompt, key) for key in _KEYS}
            told = {key: value for key, value in held.items() if value not in (None, {})}
            file.write(json.dumps({**told, **prompt.about}, ensure_ascii=False) + "\n")
