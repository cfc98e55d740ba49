"""``circuits study`` and ``circuits report``: the paper's study, and the page of what it found."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli.options import Condition, Family
from circuits.cli.settings import options_of
from circuits.cli.terminal import busy, resumable, say
from circuits.errors import CircuitsError


@options_of("study.settings.StudySettings", "fraction", "keep", "draws")
def study(
    out: Annotated[Path, typer.Option(help="Folder for everything the study makes.")] = Path("runs/study"),
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a pretrained checkpoint to start from; default: a new small model.", show_default=False
        ),
    ] = None,
    family: Annotated[
        Family | None,
        typer.Option(help="Shape of the models; default: llama, or the checkpoint's.", show_default=False),
    ] = None,
    condition: Annotated[
        Condition | None,
        typer.Option(
            help="Facts told once, in one wording and order, or in several; default: single.",
            show_default=False,
        ),
    ] = None,
    people: Annotated[
        int | None, typer.Option(help="Number of people; default: 200, with --model 120.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps of mixed training, and of each of two stages; default: 1000, with --model 150.",
            show_default=False,
        ),
    ] = None,
    rank_examples: Annotated[
        int | None,
        typer.Option(
            help="Examples at each point of a ranking's curves; default: 50, with --model 15.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw; default: 0.", show_default=False)] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several seeds, such as 0,1,2: a study in OUT/seed-0 …, and a summary.", show_default=False),
    ] = None,
    **settings: Any,
) -> None:
    """Run the paper's study end to end, for one seed or several. Started again, it goes on where it was."""
    if seed is not None and seeds is not None:
        raise CircuitsError("--seed and --seeds were given: one study has one seed, several have seeds")
    several = None if seeds is None else _numbers(seeds)
    with busy("starting"):
        import torch

        from circuits.study import run_studies, run_study, usual_settings

    first = seed or 0
    usual = usual_settings(None if condition is None else condition.value, pretrained=model is not None)
    chosen = replace(
        usual,
        family=None if family is None else family.value,
        model=None if model is None else str(model),
        seed=first,
        data=replace(usual.data, people=usual.data.people if people is None else people, seed=first),
        optimisation=replace(usual.optimisation, steps=usual.optimisation.steps if steps is None else steps),
        rank_examples=usual.rank_examples if rank_examples is None else rank_examples,
        **settings,
    )
    # models this small are as fast on one thread, and two are many times slower when anything else runs; fading
    # weights would slow them down too
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with resumable():
        summary = run_study(out, chosen, say) if several is None else run_studies(out, several, chosen, say=say)
    for arm in ("mixed", "two_stage", "two_stage_gentle"):
        scores = {name: score if several is None else score["mean"] for name, score in summary["accuracy"][arm].items()}
        say(f"{arm}: BIO {scores['bio']:.1%}, QA-ID {scores['qa_id']:.1%}, QA-OOD {scores['qa_ood']:.1%}")
    total = summary["seconds"]["total"]
    spent = total if several is None else sum(total["values"])
    say(f"{spent:.0f} s; read {out / 'report.html'}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CircuitsError(f"--seeds is {text!r}: write whole numbers with commas, as in 0,1,2") from None


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a study of one seed; or those of studies of several seeds, each a part of the page.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page, a Markdown file; images go into figures beside it.")] = Path(
        "results.md"
    ),
) -> None:
    """Write what a study has found of each claim of the paper, as Markdown with images."""
    with busy("drawing"):
        from circuits.study import report_studies, report_study

        if len(folders) == 1 and not any(folders[0].glob("seed-*")):
            written = report_study(folders[0], out)
        else:
            written = [report_studies(folders, out)]
    images = f", {len(written) - 1} images" if len(written) > 1 else ""
    say(f"{written[-1]}{images}")
