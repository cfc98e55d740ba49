"""Run a study, or the rest of it; write its page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from circuits.analysis.running import done, run_steps
from circuits.errors import CircuitsError
from circuits.storage import check_ending, read_json
from circuits.study.folder import Study
from circuits.study.results_page import write_results_page
from circuits.study.settings import StudySettings, settings_of
from circuits.study.steps import STEPS, analyse, compare, evaluate, report, train
from circuits.study.summary import summarise


def run_study(
    out: str | Path, settings: StudySettings | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run the study, or the rest of one that was interrupted.

    Args:
        out: the study's folder.
        settings: what to do; must be the same when a study goes on.
        say: called with a line when a step begins.

    Returns:
        The content of ``summary.json``.

    Raises:
        CircuitsError: the folder holds a study with other settings, or one of an earlier version.
    """
    study = Study(Path(out), settings or StudySettings(), say)
    study.claim()
    if done(study.out, train) and not study.along.is_dir():
        raise CircuitsError(
            f"{study.out} was trained by an earlier version, which measured nothing along training: choose another "
            "folder or delete it"
        )
    if not done(study.out, report):
        run_steps(STEPS[:2], study, study.out, {"settings": study.plan, "seed": study.settings.seed}, say)
        run_steps(STEPS[2:], study, study.out, study.facts, say)
    summary: dict[str, Any] = read_json(study.out / "summary.json")
    return summary


def report_study(folder: str | Path, page: str | Path) -> list[Path]:
    """Write what a study of one seed found of each claim of the paper, as Markdown with images.

    Args:
        folder: the study's; its models must be trained and evaluated, and the page says which later steps are missing.
        page: the Markdown file; images go into ``figures`` beside it.

    Returns:
        What was written, the page last.

    Raises:
        CircuitsError: the folder holds no study of one seed, or none that has come so far; the page does not end in
            ``.md``, or no browser is there to draw images.
    """
    folder, page = Path(folder), Path(page)
    check_ending(page, (".md",), "page")
    if not done(folder, evaluate):
        raise CircuitsError(
            f"{folder} holds no study of one seed that was evaluated: make one with 'circuits study --out DIR'"
        )
    study = Study(folder, settings_of(read_json(folder / "plan.json")))
    own = [one.name for one in STEPS if one not in (analyse, compare) and not done(folder, one)]
    missing, tables = [*study.missing(), *own], study.tables()
    summary = summarise(study, tables) if missing else read_json(folder / "summary.json")
    return write_results_page(page, summary, tables, missing)
