"""Run a study, or the rest of it; write its page."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.storage import check_ending, read_json, write_json
from circuits.study.results_page import write_results_page
from circuits.study.settings import StudySettings, settings_of
from circuits.study.steps import Study
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
        CircuitsError: the folder holds a study with other settings.
    """
    study = Study(Path(out), settings or StudySettings())
    study.claim()
    if (study.out / "steps" / "evaluate.json").is_file():
        study.check_answers()
    for name, step in study.steps().items():
        done = study.out / "steps" / f"{name}.json"
        if done.is_file():
            continue
        if say is not None:
            say(f"{name}: {(step.__doc__ or '').splitlines()[0].rstrip('.')}")
        spent = study.out / "steps" / f"{name}.spent.json"
        with _stopwatch(spent):
            step()
        spent.rename(done)
    summary: dict[str, Any] = read_json(study.out / "summary.json")
    return summary


@contextmanager
def _stopwatch(path: Path) -> Iterator[None]:
    """Add the seconds of the block to those of earlier attempts that were interrupted."""
    before = read_json(path)["seconds"] if path.is_file() else 0.0
    begun = time.monotonic()
    try:
        yield
    finally:
        write_json(path, {"seconds": round(before + time.monotonic() - begun, 1)})


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
    if not (folder / "steps" / "evaluate.json").is_file():
        raise CircuitsError(
            f"{folder} holds no study of one seed that was evaluated: make one with 'circuits study --out DIR'"
        )
    study = Study(folder, settings_of(read_json(folder / "plan.json")))
    study.check_answers()
    missing = [name for name in study.steps() if not (folder / "steps" / f"{name}.json").is_file()]
    summary = summarise(study, list(study.steps())) if missing else read_json(folder / "summary.json")
    # a step that is not done may have written some of its tables
    written = (
        "accuracy",
        "answers",
        "curves",
        *(name for step, names in _TABLES.items() if step not in missing for name in names),
    )
    return write_results_page(page, summary, {name: study.table(name) for name in written}, missing)


#: The tables that the page shows, by the step that writes them.
_TABLES = {
    "share": ("shared", "sharing_curve", "shared_heads"),
    "ablate": ("ablation", "ablation_answers"),
    "graft": ("grafts",),
    "rank": ("rankings", "ranking_curves", "ranking_areas", "ranking_summary", "agreement"),
    "sweep": ("heads",),
    "patch": ("patches",),
}
