"""``circuits attention``: what one head attends to."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_names, load, open_dataset
from circuits.cli.options import Data, Device, Dtype, Model, Seed
from circuits.cli.terminal import busy, say
from circuits.errors import CircuitsError


def attention(
    model: Model,
    head: Annotated[str, typer.Option(help="The head, such as L2H1.", show_default=False)],
    person: Annotated[
        int | None,
        typer.Option(help="Number of the person; default: a QA-OOD person drawn with the seed.", show_default=False),
    ] = None,
    attribute: Annotated[
        str, typer.Option(help="birth_date, birth_city, university, major, employer or work_city.")
    ] = "university",
    out: Annotated[Path, typer.Option(help="The figure: .html, or .png, .svg, .pdf with a browser.")] = Path(
        "runs/attention.html"
    ),
    data: Data = None,
    top: Annotated[int, typer.Option(help="Output tokens to name.", min=1)] = 8,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw what one head attends to in a biography and in the question of one person."""
    from circuits.facts.wordings import ATTRIBUTES
    from circuits.storage import check_ending

    check_ending(out, (".html", ".png", ".svg", ".pdf"), "figure")
    check_names([head])
    if attribute not in ATTRIBUTES:
        raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    dataset = open_dataset(data, model, [])
    people = dataset.people().set_index("person")
    if person is None:
        person = int(people[people["split"] == "qa_ood"].sample(1, random_state=seed).index[0])
    if person not in people.index:
        raise CircuitsError(f"there is no person {person}: the dataset has people 0 to {len(people) - 1}")
    from circuits.facts import check_held_out

    split = str(people["split"][person])
    check_held_out(model, dataset, [split], people=[person])
    loaded = load(model, dtype, device)
    from circuits.figures import attention_figure, save_figure
    from circuits.interventions import pair_formats
    from circuits.models import shape_of
    from circuits.rankings import read_head
    from circuits.units import Head

    chosen = Head.parse(head, shape_of(loaded))
    if loaded.tokenizer is None:
        raise CircuitsError(f"{model} has no tokenizer: save one beside its weights")
    questions = dataset.task(split, loaded.tokenizer, [person])
    question = questions.select(questions.answers.index[questions.answers["attribute"] == attribute].tolist())
    biography = pair_formats(question, dataset.task("bio", loaded.tokenizer, [person]))
    readings = [
        read_head(loaded, chosen, biography, 0, "BIO", top),
        read_head(loaded, chosen, question, 0, "QA", top),
    ]
    kind = "QA-OOD" if split == "qa_ood" else "QA-ID"
    with busy(f"drawing {out}"):
        save_figure(attention_figure(readings, subtitle=f"{model}, person {person} ({kind})"), out)
    say(f"{out}: {chosen} on {people['name'][person]}, {attribute.replace('_', ' ')}")
