"""``circuits tasks``: what a tokenizer makes of prompts, and ready sources as files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import check_checkpoint, tokenizer_of
from circuits.cli.options import Chat, DropBad, Seed
from circuits.cli.terminal import busy, cell, say, show
from circuits.errors import CircuitsError
from circuits.progress import counted

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from circuits.tasks import Task

tasks = typer.Typer(help="Look at prompts as a model's tokenizer does, or make well-known ones.", no_args_is_help=True)

#: Of spans, in the order of the task, and then again from the first; of the answer.
_COLOURS = ("cyan", "magenta", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
_ANSWER = "green"
_EXAMPLES = 3
#: Lines with one fault that are named by their numbers.
_NUMBERED = 5
_SEVERAL = {"line": "lines", "row": "rows", "entry": "entries"}


@tasks.command()
def check(
    file: Annotated[
        str,
        typer.Argument(
            help="A file of prompts (.jsonl, .json, .csv, .parquet), or a ready source (ioi, greater_than, repeated).",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint whose tokenizer is asked.", show_default=False)],
    chat: Chat = False,
    drop_bad: DropBad = False,
) -> None:
    """Say what a model's tokenizer makes of prompts, and list every line that cannot be used."""
    with busy(f"reading {file}"):
        from circuits.facts import check_task_name, needs_people, open_task

        check_task_name(file)
        if needs_people(file):
            raise CircuitsError(f"{file} is a split of the people, which is checked when it is made: give a file")
        check_checkpoint(model)
    tokenizer = tokenizer_of(model)
    bad: list[str] = []
    try:
        with busy(f"reading {file}"):
            task = open_task(file, tokenizer, chat=chat, drop_bad=True)
        bad = _by_line(task.provenance.get("dropped", ()))
        _describe(task, tokenizer, file)
    except CircuitsError as error:
        # if no line can be used, its notes say why
        bad = _by_line(getattr(error, "__notes__", ()))
        if not bad:
            raise
        _list(bad)
        none = "the one line" if len(bad) == 1 else f"none of the {counted(len(bad), 'line')}"
        raise CircuitsError(f"{none} of {file} {'cannot' if len(bad) == 1 else 'can'} be used") from None
    _list(bad)
    if bad and not drop_bad:
        raise CircuitsError(
            f"{counted(len(bad), 'line')} of {file} cannot be used, and {len(task):,} can: mend them, or go on without "
            "them with --drop-bad"
        )


@tasks.command()
def make(
    source: Annotated[str, typer.Argument(help="A ready source: ioi, greater_than or repeated.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file, .jsonl.", show_default=False)],
    prompts: Annotated[int, typer.Option(help="How many.", min=1)] = 32,
    seed: Seed = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a checkpoint: use only words that are one token of its tokenizer.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the prompts of a ready source, to look at and to change."""
    from circuits.storage import check_ending

    check_ending(out, (".jsonl",), "file of prompts")
    with busy(f"making {source}"):
        from circuits.tasks import SOURCES, write_prompts

        if source not in SOURCES:
            raise CircuitsError(f"there is no ready source {source!r}: choose from {', '.join(SOURCES)}")
        if model is not None:
            check_checkpoint(model)
    tokenizer = None if model is None else tokenizer_of(model)
    made = SOURCES[source](prompts, seed, tokenizer)
    write_prompts(out, made)
    say(f"{out}: {counted(len(made), 'prompt')} of {source}")
    say(f"the first: {made[0].prompt!r} → {made[0].answer!r}")


def _by_line(messages: Sequence[str]) -> list[str]:
    """What is wrong with lines, in their order; ``line 3 of ioi.jsonl: …``."""

    def number(message: str) -> int:
        found = re.match(r"\w+ (\d+)", message)
        return int(found[1]) if found else 0

    return sorted(messages, key=number)


def _list(bad: Sequence[str]) -> None:
    if bad:
        say(f"{counted(len(bad), 'line')} that cannot be used:")
    for message in _together(bad):
        say(f"  {message}")


def _together(bad: Sequence[str]) -> Iterator[str]:
    """The messages, each once, with the numbers of all lines that it is about."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for message in bad:
        found = re.match(rf"({'|'.join(_SEVERAL)}) (\d+)( .*)", message, re.DOTALL)
        about = (found[1], found[3]) if found else ("", message)
        numbers.setdefault(about, []).append(found[2] if found else "")
    for (noun, rest), each in numbers.items():
        if not noun:
            yield rest
        elif len(each) == 1:
            yield f"{noun} {each[0]}{rest}"
        else:
            more = f" and {len(each) - _NUMBERED} more" if len(each) > _NUMBERED else ""
            yield f"{_SEVERAL[noun]} {', '.join(each[:_NUMBERED])}{more}{rest}"


def _describe(task: "Task", tokenizer: "PreTrainedTokenizerBase", file: str) -> None:
    import pandas

    lengths, answers = task.attention_mask.sum(1), task.answers["end"] - task.answers["start"]
    having = {name: int(found.any(1).sum()) for name, found in task.spans.items()}
    groups = task.answers["group"].nunique()
    rows: dict[str, Any] = {
        "prompts": len(task),
        "tokens": f"{int(lengths.sum()):,}, {_range(lengths.tolist())} in a prompt with its answer",
        "answers": f"{task.answers['value'].nunique():,} different, of {_range(answers.tolist())} "
        + ("tokens" if answers.max() > 1 else "token"),
        **{f"span {name}": f"in {_of_all(count, len(task))}" for name, count in having.items()},
        "foils": "no" if task.foils is None else "yes",
        "counterfactuals": "no" if task.counterfactuals is None else "yes",
        "groups": "each prompt is its own" if groups == len(task) else groups,
    }
    show(pandas.DataFrame({"": list(rows), "value": [cell(value) for value in rows.values()]}), file, len(rows))
    from rich.console import Console

    console = Console(highlight=False)
    for example in range(min(_EXAMPLES, len(task))):
        console.print(f"\nexample {example}", style="bold")
        for line in marked(task, example, tokenizer, console.width):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _of_all(count: int, total: int) -> str:
    return "all prompts" if count == total else f"{count:,} of {total:,} prompts"


def marked(task: "Task", example: int, tokenizer: "PreTrainedTokenizerBase", width: int = 80) -> "Iterator[Text]":
    """An example's tokens in lines of a width, and under each line the names of the spans that its tokens are in."""
    from rich.text import Text

    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(task.spans)} | {"answer": _ANSWER}
    spans = {**{name: task.spans[name][example] for name in task.spans}, "answer": task.span("answer")[example]}
    above, below = Text(), Text()
    for place, token in enumerate(task.tokens[example].tolist()):
        if not task.attention_mask[example, place]:
            continue
        named = [name for name, found in spans.items() if found[place]]
        text, label = _token_text(tokenizer, token), "+".join(named)
        room = max(Text(text).cell_len, len(label)) + 1
        if above.cell_len and above.cell_len + room > width:
            yield from (line for line in (above, below) if line.plain.strip())
            above, below = Text(), Text()
        style = colours[named[0]] if named else ""
        above.append(text, style)
        above.append(" " * (room - Text(text).cell_len))
        below.append(label, style)
        below.append(" " * (room - len(label)))
    yield from (line for line in (above, below) if line.plain.strip())


def _token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """A token as it reads, on one line, with a dot for a space."""
    raw, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if raw[:1] == "▁" and not text.startswith(" "):
        text = f" {text}"
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or raw
