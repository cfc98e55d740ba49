"""Attribution patching against gradients taken through hooks of the hooked model, one example at a time."""

from itertools import cycle

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.interventions import (
    Intervention,
    matching_positions,
    pair_people,
    run_interventions,
    screen_interventions,
    single,
)
from circuits.units import Component, Head, KVGroup, Neuron
from tests.interventions.test_engine import alone, hook_name, places, select


def estimate_by_hand(model, task, unit, site, values, positions, matches=None):
    """Σ gradient · (value − activation); ``values(name, example)`` gives the unit's new values, position first."""
    total = 0.0
    for example in range(len(task)):
        kept = {}

        def keep(x, hook, kept=kept):
            # what is given back goes on; the bridge may go on with something else than it shows
            kept["x"] = x.clone()
            kept["x"].retain_grad()
            return kept["x"]

        name = hook_name(unit, site)
        with torch.enable_grad():
            logits = model.run_with_hooks(alone(task, example), fwd_hooks=[(name, keep)])[0].log_softmax(-1)
            answer = task.answers.iloc[example]
            tokens = task.tokens[example, answer["start"] : answer["end"]]
            logits[answer["start"] - 1 : answer["end"] - 1].gather(1, tokens[:, None]).sum().backward()
        own, gradient = (select(value, unit, site) for value in (kept["x"].detach(), kept["x"].grad))
        for place in places(task, example, positions):
            new = values(name, example)
            if new is None:
                total += float((gradient[place] * -own[place]).sum())
            else:
                found = [theirs for _, theirs, ours in matches[matches[:, 0] == example].tolist() if ours == place]
                total += sum(float((gradient[place] * (new[theirs] - own[place])).sum()) for theirs in found)
    return total / len(task)


def units_of(model):
    found = [(Head(1, 2), "z"), (Head(2, 0), "q"), (Neuron(1, 7), "post"), (Component(3, "attn_out"), "")]
    found += [(Component(2, "resid_pre"), ""), (KVGroup(1, 1), "v"), (Head(3, 3), "z"), (Component(3, "mlp_out"), "")]
    return found


def test_estimates_equal_gradient_times_change(model, tasks):
    target, source = (task.select([0, 3]) for task in (tasks["qa_ood"], pair_people(tasks["qa_ood"])))
    matches = matching_positions(source, target)
    units = list(zip(units_of(model), cycle(["all", "subject", "last"]), strict=False))
    plan = [
        Intervention((unit,), mode, site if site in ("q", "v") else None, positions)
        for (unit, site), positions in units
        for mode in ("zero", "patch")
    ]
    found = screen_interventions(model, target, plan, source=source)["estimate"].to_numpy().reshape(-1, 2)
    for ((unit, site), positions), estimates in zip(units, found, strict=True):

        def theirs(name, example, unit=unit, site=site):
            with torch.no_grad():
                _, cache = model.run_with_cache(alone(source, example), names_filter=name)
            return select(cache[name], unit, site)

        zero = estimate_by_hand(model, target, unit, site, lambda name, example: None, positions)  # noqa: ARG005
        patch = estimate_by_hand(model, target, unit, site, theirs, positions, matches)
        assert estimates == pytest.approx([zero, patch], rel=1e-3, abs=1e-4), unit


def test_estimates_are_the_first_order_of_the_exact_effect(model, tasks):
    # a change small enough for the first order: the mean of a reference that is the example itself, almost
    task = tasks["qa_ood"].select([0, 1, 4, 5])
    heads = single([Head(layer, head) for layer in range(4) for head in range(4)], "mean_by_position")
    estimate = screen_interventions(model, task, heads, reference=task)["estimate"]
    exact = run_interventions(model, task, heads, reference=task)["log_prob_effect"]
    assert estimate.corr(exact, "spearman") > 0.6


def test_what_cannot_be_estimated_is_refused(model, tasks):
    task = tasks["qa_ood"].select([0, 1])
    with pytest.raises(CircuitsError, match="attribution cannot estimate zero L0H0 pattern: run it exactly"):
        screen_interventions(model, task, [Intervention((Head(0, 0),), site="pattern")])
    with pytest.raises(CircuitsError, match="attribution cannot estimate revert L0H0"):
        screen_interventions(model, task, [Intervention((Head(0, 0),), "revert")])
    with pytest.raises(CircuitsError, match="the metric exact_match has no useful gradient"):
        screen_interventions(model, task, [Intervention((Head(0, 0),))], metric="exact_match")


@pytest.mark.parametrize(
    ("units", "sentence"),
    [
        ((Head(1, 2), Component(1, "attn_out")), r"count L1H2 twice: it acts through L1\.attn_out"),
        ((Neuron(1, 2), Component(1, "mlp_out")), r"count L1N2 twice: it acts through L1\.mlp_out"),
        ((Component(1, "mlp_out"), Component(2, "resid_post")), r"count L1\.mlp_out twice"),
        ((Component(1, "resid_post"), Component(2, "resid_pre")), r"twice: it acts through L"),
        ((Head(1, 3), KVGroup(1, 1)), r"twice"),
    ],
)
def test_a_unit_and_a_part_of_it_are_refused(model, tasks, units, sentence):
    groups = model.cfg.n_key_value_heads or model.cfg.n_heads
    units = tuple(KVGroup(1, 3 * groups // model.cfg.n_heads) if isinstance(one, KVGroup) else one for one in units)
    task = tasks["qa_ood"].select([0, 3])
    with pytest.raises(CircuitsError, match=sentence):
        screen_interventions(model, task, [Intervention(units)])


def test_units_beside_one_another_are_estimated_together(model, tasks):
    task, units = tasks["qa_ood"].select([0, 3]), (Head(1, 2), Neuron(1, 2), Component(2, "mlp_out"))
    plan = [Intervention(units), *(Intervention((one,)) for one in units)]
    together, *apart = screen_interventions(model, task, plan)["estimate"]
    assert together == pytest.approx(sum(apart), abs=1e-5)
