"""``circuits attention``: what one head attends to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.cli.inputs import check_checkpoint, check_names, load, open_tasks, tokenizer_of
from circuits.cli.options import Chat, Data, Device, DropBad, Dtype, Model, Seed, task_option
from circuits.cli.terminal import busy, say
from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.tasks import Task

_ATTRIBUTE = "university"


def attention(
    model: Model,
    head: Annotated[str, typer.Option(help="The head, such as L2H1.", show_default=False)],
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
    out: Annotated[Path, typer.Option(help="The figure: .html, or .png, .svg, .pdf with a browser.")] = Path(
        "runs/attention.html"
    ),
    data: Data = None,
    top: Annotated[int, typer.Option(help="Output tokens to name.", min=1)] = 8,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw what one head attends to: in an example of a task, or in a biography and in the question of one person."""
    from circuits.storage import check_ending

    check_ending(out, (".html", ".png", ".svg", ".pdf"), "figure")
    check_names([head])
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
    from circuits.figures import attention_figure, save_figure
    from circuits.models import shape_of
    from circuits.rankings import read_head
    from circuits.units import Head

    chosen = Head.parse(head, shape_of(loaded))
    readings = [read_head(loaded, chosen, one, example=place, title=title, top=top) for one, place, title in prompts]
    with busy(f"drawing {out}"):
        save_figure(attention_figure(readings, subtitle=subtitle), out)
    say(f"{out}: {chosen} on {about}")


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
