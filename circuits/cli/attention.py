"""``circuits attention``: what heads attend to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import (
    check_checkpoint,
    check_folder,
    check_heads,
    heads_of,
    is_folder,
    load,
    open_tasks,
    tokenizer_of,
)
from circuits.cli.options import Chat, Data, Device, DropBad, Dtype, HeadsMask, Model, Seed, Top, task_option
from circuits.cli.terminal import busy, counted, say
from circuits.errors import CircuitsError

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
    task: Annotated[str | None, task_option("What the head reads", "Default: one person's two formats.")] = None,
    example: Annotated[
        int | None, typer.Option(help="Which example of --task, from 0; default: 0.", min=0, show_default=False)
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
    """Draw what heads attend to: in an example of a task, or in a biography and in the question of one person."""
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
    if task is not None and (person is not None or attribute is not None):
        raise CircuitsError("--task and a person's --person or --attribute were given: draw one of them at a time")
    if task is None and (example is not None or chat or drop_bad):
        raise CircuitsError("--example, --chat and --drop-bad are for a task: name it with --task")
    if task is not None:
        opened = open_tasks(model, [task], data, seed=seed, chat=chat, drop_bad=drop_bad)
        prompts = [(opened.tasks[0], example or 0, opened.tasks[0].name)]
        about = f"example {example or 0} of {opened.tasks[0].name}"
        subtitle = f"{model}, {about}"
    else:
        biography, question, named, subtitle = _of_person(model, data, person, attribute or _ATTRIBUTE, seed)
        prompts = [(biography, 0, "BIO"), (question, 0, "QA")]
        about = f"{named}, {(attribute or _ATTRIBUTE).replace('_', ' ')}"
    from circuits.rankings.attention import prompt_length

    for one, place, _ in prompts:
        prompt_length(one, place)  # refuses an example that is not there
    loaded = load(model, dtype, device)
    from circuits.figures import attention_figure
    from circuits.rankings import read_head

    heads = heads_of(head, loaded, mask, top) or []
    with busy(f"drawing {out}"):
        figures = {}
        for chosen in heads:
            readings = [
                read_head(loaded, chosen, one, example=place, title=title, top=tokens) for one, place, title in prompts
            ]
            figures[str(chosen)] = attention_figure(readings, subtitle=subtitle)
        _save(figures, out, subtitle)
    say(f"{out}: {', '.join(figures)} on {about}")


def _save(figures: dict[str, Any], out: Path, subtitle: str) -> None:
    """One file for each head into a folder; into a file the only one, or all on one page in their order."""
    from circuits.figures import Section, save_figure, write_report

    if is_folder(out):
        for name, figure in figures.items():
            save_figure(figure, out / f"{name}.html", "beside")
    elif len(figures) == 1:
        save_figure(next(iter(figures.values())), out)
    else:
        sections = [Section(name, figure=figure) for name, figure in figures.items()]
        write_report(out, f"Attention of {counted(len(figures), 'head')}", subtitle, sections)


def _of_person(
    model: Path, data: Path | None, person: int | None, attribute: str, seed: int
) -> "tuple[Task, Task, str, str]":
    """A person's biography and question, the person's name, and what to write under the title."""
    from circuits.facts import FactDataset, check_held_out, dataset_of
    from circuits.facts.wordings import ATTRIBUTES

    if attribute not in ATTRIBUTES:
        raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    check_checkpoint(model)
    dataset = dataset_of(model) if data is None else FactDataset(data)
    people = dataset.people().set_index("person")
    if person is None:
        person = int(people[people["split"] == "qa_ood"].sample(1, random_state=seed).index[0])
    if person not in people.index:
        raise CircuitsError(f"there is no person {person}: the dataset has people 0 to {len(people) - 1}")
    split = str(people["split"][person])
    check_held_out(model, dataset, [split], people=[person])
    tokenizer = tokenizer_of(model)
    from circuits.interventions import pair_formats

    questions = dataset.task(split, tokenizer, [person])
    question = questions.select(questions.answers.index[questions.answers["attribute"] == attribute].tolist())
    biography = pair_formats(question, dataset.task("bio", tokenizer, [person]))
    kind = "QA-OOD" if split == "qa_ood" else "QA-ID"
    return biography, question, str(people["name"][person]), f"{model}, person {person} ({kind})"
