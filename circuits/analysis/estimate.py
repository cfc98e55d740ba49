"""How long an analysis will take, from a short probe: said before it begins.

The probe times a forward pass over a few examples. Steps are counted in such passes; how many each comes to, for
gradients or for runs from a layer on, was measured on SmolLM2-135M, and is right to a factor of about 1.5.
"""

import time
from collections.abc import Mapping, Sequence

from circuits.analysis.case import Case
from circuits.analysis.consistency import DONORS, PATH, asked_of, told_twice
from circuits.analysis.running import Step
from circuits.analysis.steps import sources_of
from circuits.masks import SCOPES, SCORES, covered_parameters
from circuits.metrics import evaluate
from circuits.models import shape_of
from circuits.rankings import default_counts
from circuits.units import Head, Neuron

_PROBED = 4
#: Forward passes that a per-example gradient, and the run of one head from its layer on, come to.
_GRADIENT, _FROM_A_LAYER = 4.0, 0.35
#: Forward passes that one step along the path of integrated gradients comes to.
_STEP = 3.0
#: Forward passes that comparing the gradients and activations of one fact comes to, inside masks and outside them.
_COMPARED = 40.0
#: Seconds to select a set of one parameter, and models that the search for a graft tries.
_SELECT, _TRIED = 1.8e-8, 20


def estimate(case: Case, steps: Sequence[Step]) -> Mapping[str, float]:
    """Seconds that each step will take, by its name.

    Args:
        case: what is analysed; its model is run on a few examples.
        steps: that will be done.
    """
    probes = [task.select(range(min(_PROBED, len(task)))) for task in case.tasks.values()]
    evaluate(case.model, probes[0])  # what is slow the first time alone
    begun = time.monotonic(), time.process_time()
    for probe in probes:
        evaluate(case.model, probe)
    # on a machine that others use now the clock runs ahead of what is computed
    spent = min(time.monotonic() - begun[0], time.process_time() - begun[1])
    forward = spent / sum(map(len, probes))
    settings, shape = case.settings, shape_of(case.model)

    def passes(step: str) -> float:
        return sum(map(len, case.of(step).values())) * forward

    heads = Head.count(shape) * shape.n_layers
    parameters = sum(value.numel() for value in covered_parameters(case.model).values())
    sets = (1 + settings.draws) * len(SCOPES) * len({settings.fraction, *settings.fractions})
    facts = sum(map(len, told_twice(case).values()))
    # two tasks' activations and one's answers, of each set of parameters reverted and alone
    sets_of_facts = 2 + 2 * len(SCOPES) * (1 + settings.draws)
    localised = 3 * sets_of_facts * sum(map(len, told_twice(case, "localise").values()))
    curves = 1 if case.pre is None else 2
    rankings = len(settings.rankings) + len(case.of("trace")) + settings.draws
    points = sum(
        len(default_counts(kind.count(shape) * shape.n_layers, halvings=settings.halvings, tenths=settings.tenths))
        for kind in (Head, Neuron)
    )
    found = {
        "evaluate": passes("evaluate"),
        "trace": _GRADIENT * passes("trace"),
        "share": sets * parameters * _SELECT,
        "ablate": len(SCOPES) * (2 + settings.draws) * passes("ablate"),
        "graft": 0.0 if case.pre is None else len(SCORES) * _TRIED * passes("graft"),
        "sweep": _FROM_A_LAYER * heads * len(settings.modes) * passes("sweep"),
        "neurons": _FROM_A_LAYER * settings.neurons * passes("neurons"),
        "patch": _FROM_A_LAYER * heads * sum(len(target) for _, target in sources_of(case).values()) * forward,
        "rank": curves * rankings * points * passes("rank"),
        "attend": passes("attend"),
        "consistency": _COMPARED * facts * forward,
        "localise": localised * forward,
        "signature": sum(
            (1 + min(settings.draws, DONORS) * (1 + len(task.spans))) * len(task) for task in asked_of(case).values()
        )
        * forward,
        "integrate": _STEP * PATH * sum(map(len, asked_of(case, "integrate").values())) * forward,
    }
    return {step.name: found[step.name] for step in steps if step.lacking(case) is None}
