"""The analyses of a study, side by side: of its models, and of the parameters that both formats updated."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from circuits.analysis import Analysis, AnalysisSettings, analyse
from circuits.analysis.comparison import claim_comparison
from circuits.processes import Call, say_from_call, side_by_side
from circuits.storage import read_json
from circuits.study.along import updated_traces
from circuits.study.folder import COMPARED, FULL_RATE, LEFT_OUT, Study
from circuits.study.settings import settings_of


def analyse_side_by_side(study: Study) -> None:
    """Make the analyses that are missing, in two processes."""
    claim_comparison(study.comparison, COMPARED)
    side_by_side([Call(name, _analyse, {"out": study.out, "name": name}) for name in _analyses(study)], say=study.say)


def _analyses(study: Study) -> Mapping[str, Callable[[], Analysis]]:
    """What is called what → how it is made; the longest first."""
    arms: dict[str, Callable[[], Analysis]] = {
        name: partial(_analysis, study, name, name, folder, study.settings.analysis, skip=LEFT_OUT)
        for name, folder in study.arms.items()
    }
    third = {FULL_RATE: partial(_of_full_rate, study)}
    return arms | third | {_updated(name): partial(_of_updated, study, name) for name in COMPARED}


def _updated(model: str) -> str:
    return f"{model}, updated"


def _brief(study: Study) -> AnalysisSettings:
    """The shared parameters, and not their curve."""
    return replace(study.settings.analysis, fractions=())


def _of_full_rate(study: Study) -> Analysis:
    only = ["consistency", "signature", "integrate"]
    return _analysis(study, FULL_RATE, FULL_RATE, study.full_rate, _brief(study), only=only)


def _of_updated(study: Study, model: str) -> Analysis:
    only, traces = ["ablate", "consistency", "localise"], updated_traces(study, model)
    return _analysis(study, model, _updated(model), study.updated[model], _brief(study), only=only, traces=traces)


def _analysis(study: Study, model: str, about: str, out: Path, settings: AnalysisSettings, **how: Any) -> Analysis:
    return analyse(
        study.model(model),
        list(study.tasks.values()),
        study.model("pre"),
        out=out,
        settings=settings,
        say=lambda line: say_from_call(f"{about}: {line}"),
        **how,
    )


def _analyse(out: Path, name: str) -> None:
    """Make one analysis of the study in a folder."""
    _analyses(Study(out, settings_of(read_json(out / "plan.json"))))[name]()
