"""The same study from several seeds, and a summary over them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.statistics import mean_interval
from circuits.storage import check_ending, provenance, read_json, write_json
from circuits.study.folder import Study
from circuits.study.results_page import write_seeds_results
from circuits.study.running import run_study
from circuits.study.seeds_page import write_seeds_report
from circuits.study.settings import StudySettings, settings_of

#: What may lie in the folder of several seeds, beside the folders of the seeds.
_BESIDE_SEEDS = ("summary.json", "report.html")


def run_studies(
    out: str | Path,
    seeds: Sequence[int],
    settings: StudySettings | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the study once for each seed, or the rest of it, and sum up over the seeds.

    Args:
        out: gets a study's folder for each seed, ``seed-0`` and so on, ``summary.json`` and ``report.html``.
        seeds: which; those that are finished are not run again.
        settings: of all of them but for the seed.
        say: called with a line when a step begins.

    Returns:
        The content of ``summary.json``: in place of each number of a study's summary a ``mean`` over seeds, its 95 %
        interval ``interval_95`` and the ``values`` in the order of ``seeds``. The mean is None if a seed has no such
        number, the interval also if there is a single seed, or all are alike.

    Raises:
        CircuitsError: there are no seeds, one is given twice, or the folder holds something else or studies with other
            settings.
    """
    out, settings = Path(out), settings or StudySettings()
    if not seeds:
        raise CircuitsError("there are no seeds: name one or more")
    if len(set(seeds)) < len(seeds):
        raise CircuitsError(f"the seed {max(seeds, key=list(seeds).count)} is given twice: seeds must differ")
    if out.exists():
        for path in out.iterdir():
            if not path.name.startswith((".", "seed-")) and path.name not in _BESIDE_SEEDS:
                raise CircuitsError(f"{out} holds something that is no set of studies: choose another folder")
    chosen = {seed: replace(settings, seed=seed, data=replace(settings.data, seed=seed)) for seed in seeds}
    # a folder that does not fit is refused before the hours of the seeds before it
    for seed, one in chosen.items():
        Study(out / f"seed-{seed}", one).claim()
    summaries = []
    for seed, one in chosen.items():
        if say is not None:
            say(f"seed {seed}: {out / f'seed-{seed}'}")
        summaries.append(run_study(out / f"seed-{seed}", one, say))
    single = {"settings", "seeds", "versions", "machine", "provenance"}
    numbers = {name for summary in summaries for name in summary} - single
    summary = {
        **_over_seeds([{name: value for name, value in one.items() if name in numbers} for one in summaries]),
        "settings": {name: value for name, value in summaries[0]["settings"].items() if name != "seed"},
        "seeds": list(seeds),
        "versions": summaries[0]["versions"],
        "machine": summaries[0].get("machine"),
        "provenance": provenance(datasets=[one["provenance"]["dataset"] for one in summaries]),
    }
    summary["settings"]["data"] = {name: value for name, value in summary["settings"]["data"].items() if name != "seed"}
    write_json(out / "summary.json", summary)
    write_seeds_report(
        out / "report.html",
        summaries,
        [Study(out / f"seed-{seed}", one).tables() for seed, one in chosen.items()],
    )
    return summary


def report_studies(folders: Sequence[str | Path], page: str | Path) -> Path:
    """Write what studies of several seeds found of each claim of the paper, as Markdown: a part for each study.

    Args:
        folders: of `run_studies`.
        page: the Markdown file.

    Returns:
        The page.

    Raises:
        CircuitsError: a folder holds no finished studies, or the page does not end in ``.md``.
    """
    check_ending(Path(page), (".md",), "page")
    studies = []
    for folder in map(Path, folders):
        if not (folder / "summary.json").is_file():
            raise CircuitsError(f"{folder} holds no finished studies: make them with 'circuits study --seeds 0,1,2'")
        seeds = [folder / f"seed-{seed}" for seed in read_json(folder / "summary.json")["seeds"]]
        summaries = [read_json(seed / "summary.json") for seed in seeds]
        plans = [settings_of(read_json(seed / "plan.json")) for seed in seeds]
        studies.append((summaries, [Study(*each).tables() for each in zip(seeds, plans, strict=True)]))
    return write_seeds_results(page, studies)


#: Parts of a summary, and numbers in the others, that are shares.
_SHARES = ("accuracy", "ablation", "ablation_per_tensor", "splits")
_SHARE_NAMES = ("share", "jaccard", "gini", "top_tenth", "fraction", "auc", "retrieval")


def _over_seeds(values: list[Any], share: bool = False) -> Any:
    """Mean, interval and values of a number; of a dictionary, the same of what all seeds have in it."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, dict):
        names = [name for name in first if all(name in value for value in values)]
        return {
            name: _over_seeds(
                [value[name] for value in values], share or name in _SHARES or name.endswith(_SHARE_NAMES)
            )
            for name in names
        }
    if first is None or isinstance(first, str | list):
        return values
    if None in values:
        return {"mean": None, "interval_95": [None, None], "values": values}
    mean, *ends = mean_interval([float(value) for value in values])
    if share:  # what cannot be the mean needs no place in its interval
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    return {
        "mean": round(mean, 6),
        "interval_95": [None if math.isnan(end) else round(end, 6) for end in ends],
        "values": values,
    }
