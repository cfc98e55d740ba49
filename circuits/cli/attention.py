"""``circuits attention``: what heads attend to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import (
    check_checkpoint,
    check_folder,
    check_heads,
    check_same_tokens,
    heads_of,
    is_folder,
    load,
    open_tasks,
    tokenizer_of,
)
from circuits.cli.options import Chat, Data, Device, DropBad, Dtype, HeadsMask, Model, Seed, Top, Width, task_option
from circuits.cli.terminal import busy, say
from circuits.errors import CircuitsError
from circuits.progress import counted

if TYPE_CHECKING:
    from circuits.tasks import Task

_ATTRIBUTE = "university"


def attention(
    model: Model,
    head: Annotated[
        list[str] | None, typer.Option(help="A head, such as L2H1; may be repeated.", show_default=False)
    ] = None,
    mask: HeadsMask = None,
    top: Top = None,
    task: Annotated[
        list[str] | None, task_option("What the head reads", "May be repeated. Default: one person's two formats.")
    ] = None,
    example: Annotated[
        list[int] | None,
        typer.Option(
            help="Which example of --task, from 0; may be repeated, for several side by side; default: 0.",
            min=0,
            show_default=False,
        ),
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Average over the task's examples; rows and columns are its spans.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Another checkpoint: its patterns beside, and the difference.", show_default=False),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(help="Of a long prompt, show this span, what is around it, and the end.", show_default=False),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Of a long prompt, show the tokens from the first to the last: 100:140.", show_default=False),
    ] = None,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="The value-weighted pattern: attention times what would be written.")
    ] = False,
    width: Annotated[
        Width | None,
        typer.Option(help="Of an image in print: a column of 84 mm or a page of 174 mm.", show_default=False),
    ] = None,
    person: Annotated[
        int | None,
        typer.Option(
            help="Number of the person, without --task; default: a QA-OOD person drawn with the seed.",
            show_default=False,
        ),
    ] = None,
    attribute: Annotated[
        str | None,
        typer.Option(
            help=f"birth_date, birth_city, university, major, employer or work_city; default: {_ATTRIBUTE}.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="The figure: .html, or of one head .png, .svg, .pdf with a browser; or a folder: a page for each head."
        ),
    ] = Path("runs/attention.html"),
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="Output tokens to name.", min=1)] = 8,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw what heads attend to: in examples of tasks, or in a biography and in the question of one person."""
    from circuits.storage import check_ending

    if is_folder(out):
        check_folder(out)
    else:
        check_ending(out, (".html", ".png", ".svg", ".pdf"), "figure")
    check_heads(head, mask, top)
    if not head and mask is None:
        raise CircuitsError("no head was named: give --head, or --mask and --top")
    if out.suffix not in ("", ".html") and len(head or ()) + (top or 0) > 1:
        raise CircuitsError(f"{out} is an image, which holds one head: name a folder or an .html file")
    if width is not None and out.suffix in ("", ".html"):
        raise CircuitsError(f"--width is of an image in print, and {out} is a page: name a .png, .svg or .pdf file")
    if width == Width.COLUMN and against is not None:
        raise CircuitsError("a column has no room for the maps of two checkpoints: give --width page with --against")
    if task and (person is not None or attribute is not None):
        raise CircuitsError("--task and a person's --person or --attribute were given: draw one of them at a time")
    if not task and (example or average or chat or drop_bad):
        raise CircuitsError("--example, --average, --chat and --drop-bad are for a task: name it with --task")
    if average and (example or span or window or weighted):
        raise CircuitsError("--average has no tokens: it goes without --example, --span, --window and --weighted")
    shown = _window(window)
    if against is not None:
        check_checkpoint(against)
    if task:
        opened = open_tasks(model, task, data, seed=seed, chat=chat, drop_bad=drop_bad, other=against)
        places = list(dict.fromkeys(example or [0]))
        prompts = [(one, place, one.name) for one in opened.tasks for place in ([0] if average else places)]
        named = " and ".join(one.name for one in opened.tasks)
        numbers = " and ".join(str(place) for place in places)
        about = f"the average of {named}" if average else f"example{'s' * (len(places) > 1)} {numbers} of {named}"
        if len(places) > 1 and not average:
            prompts = [(one, place, f"{title} {place}") for one, place, title in prompts]
        subtitle = f"{model}, {about}"
    else:
        biography, question, named, subtitle = _of_person(
            [model, *filter(None, [against])], data, person, attribute or _ATTRIBUTE, seed
        )
        prompts = [(biography, 0, "BIO"), (question, 0, "QA")]
        about = f"{named}, {(attribute or _ATTRIBUTE).replace('_', ' ')}"
    from circuits.rankings import average_head, prompt_length, read_head

    for one, place, _ in prompts:
        prompt_length(one, place)  # refuses an example that is not there
    if against is not None:
        check_same_tokens(model, against)
        about += f", against {against}"
        subtitle += f", against {against}"
    loaded = [load(one, dtype, device) for one in (model, against) if one is not None]
    from circuits.figures import attention_figure

    heads = heads_of(head, loaded[0], mask, top) or []
    names = (model.name, against.name) if against is not None else ("", "")
    with busy(f"drawing {out}"):
        figures = {}
        for chosen in heads:
            readings = [
                [
                    average_head(each, chosen, one, title=title)
                    if average
                    else read_head(each, chosen, one, example=place, title=title, top=tokens)
                    for one, place, title in prompts
                ]
                for each in loaded
            ]
            figures[str(chosen)] = attention_figure(
                readings[0],
                subtitle=subtitle,
                against=readings[1] if against is not None else None,
                models=names if names[0] != names[1] else (str(model), str(against)),
                weighted=weighted,
                window=shown,
                span=span,
                width="column" if width == Width.COLUMN else "page",
            )
        _save(figures, out, subtitle, width)
    say(f"{out}: {', '.join(figures)} on {about}")


def _window(text: str | None) -> tuple[int, int] | None:
    """The first and the last position of ``100:140``."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise CircuitsError(f"{text!r} is no window: give its first and last token, as in 100:140")
    return int(first), int(last)


def _save(figures: dict[str, Any], out: Path, subtitle: str, width: Width | None) -> None:
    """One file for each head into a folder; into a file the only one, or all on one page in their order."""
    from circuits.figures import Section, save_figure, write_report

    if is_folder(out):
        for name, figure in figures.items():
            save_figure(figure, out / f"{name}.html", "beside")
    elif len(figures) == 1:
        save_figure(
            next(iter(figures.values())),
            out,
            width=None if width is None else "column" if width == Width.COLUMN else "page",
        )
    else:
        sections = [Section(name, figure=figure) for name, figure in figures.items()]
        write_report(out, f"Attention of {counted(len(figures), 'head')}", subtitle, sections=sections)


def _of_person(
    models: Sequence[Path], data: Path | None, person: int | None, attribute: str, seed: int
) -> "tuple[Task, Task, str, str]":
    """A person's biography and question, the person's name, and what to write under the title."""
    from circuits.facts import FactDataset, check_held_out, dataset_of
    from circuits.facts.wordings import ATTRIBUTES

    if attribute not in ATTRIBUTES:
        raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    model = models[0]
    check_checkpoint(model)
    dataset = dataset_of(model) if data is None else FactDataset(data)
    people = dataset.people().set_index("person")
    if person is None:
        person = int(people[people["split"] == "qa_ood"].sample(1, random_state=seed).index[0])
    if person not in people.index:
        raise CircuitsError(f"there is no person {person}: the dataset has people 0 to {len(people) - 1}")
    split = str(people["split"][person])
    for one in models:
        check_held_out(one, dataset, [split], people=[person])
    tokenizer = tokenizer_of(model)
    from circuits.interventions import pair_formats

    questions = dataset.task(split, tokenizer, [person])
    question = questions.select(questions.answers.index[questions.answers["attribute"] == attribute].tolist())
    biography = pair_formats(question, dataset.task("bio", tokenizer, [person]))
    kind = "QA-OOD" if split == "qa_ood" else "QA-ID"
    return biography, question, str(people["name"][person]), f"{model}, person {person} ({kind})"
