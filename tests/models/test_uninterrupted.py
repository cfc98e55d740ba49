import importlib
import random
import signal
import time

import pytest
import torch

from circuits.interventions import ablate_heads
from circuits.masks import (
    ParameterMask,
    covered_parameters,
    graft,
    graft_at,
    mean,
    revert,
    unit_mask,
    zero,
)
from circuits.masks.graft_search import GraftSearch
from circuits.models import editing, fingerprint, hooked, identity, load_model
from circuits.rankings.subsets import ablating, swapping
from circuits.units import Head, Neuron
from tests.fixtures import lively, said_by

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def pair(tokenizer):
    """Two models of one shape, without a family of fixtures: every kind of block, once each."""
    return [load_model(lively("llama", seed), tokenizer=tokenizer) for seed in (0, 1)]


def blocks(pair, task):
    """Every block that changes a model, the work inside it aside."""
    pre, model = pair
    parameters = covered_parameters(model)
    some = [name for name in parameters if name.startswith("blocks.1.") or "embed" in name]
    mask = ParameterMask({name: torch.ones(parameters[name].shape) > 0 for name in some}, fingerprint(model))
    heads = unit_mask(model, [Head(0, 0), Head(2, 1)])
    positions = task.span("subject")

    def swapped():
        with swapping(model, pre, Neuron) as switch:
            switch.to(torch.ones(4, model.cfg.d_mlp, dtype=torch.bool))

    def ablated():
        with ablating(model, Head) as switch:
            switch.to(torch.ones(4, 4, dtype=torch.bool))

    def block(make):
        def run():
            with make():
                pass

        return run

    def at_positions():
        with graft_at(pre, heads, model, task=task, positions=positions):
            pre(task.tokens)

    def without_a_head():
        with ablate_heads(model, [Head(0, 1)]):
            model(task.tokens, stop_at_layer=1)

    search = GraftSearch(pre, model, said_by(model, task), 0.9, None, check_start=False)

    def mixed():
        with search.mixing() as (_, mix):
            mix(lambda name: torch.tensor(0.5))  # noqa: ARG005

    def nested():
        with editing(model), revert(model, mask, pre), zero(model, heads), hooked(model, {"hook_embed": keep}):
            pass

    def keep(activation, hook):
        return None

    return {
        "revert": block(lambda: revert(model, mask, pre)),
        "zero": block(lambda: zero(model, mask)),
        "mean": block(lambda: mean(model, heads)),
        "graft": block(lambda: graft(pre, mask, model)),
        "nested": nested,
        "mixing": mixed,
        "swapping": swapped,
        "ablating": ablated,
        "graft_at": at_positions,
        "ablate_heads": without_a_head,
        "hooked": block(lambda: hooked(model, {"blocks.0.attn.hook_z": keep})),
        "editing": block(lambda: editing(model)),
    }


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def interrupted(run, after):
    """Run a block, with a SIGINT after a time; whether it raised."""
    fired = []

    def alarm(*_):
        fired.append(True)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))
        run()
        while not fired:
            time.sleep(1e-5)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


@pytest.mark.parametrize("least", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_interrupts_leave_every_bit_and_every_hook_as_before(pair, tasks, least):
    task = tasks["qa_id"].select(range(2))
    every = blocks(pair, task)
    before = [{name: value.detach().clone() for name, value in one.named_parameters()} for one in pair]
    names, hooks = [fingerprint(one) for one in pair], [hooks_of(one) for one in pair]
    handler = signal.getsignal(signal.SIGINT)
    moments = random.Random(0)
    damaged, raised, total = [], 0, 0
    try:
        for name, run in every.items():
            spent = []
            for _ in range(3):
                begun = time.perf_counter()
                run()
                spent.append(time.perf_counter() - begun)
            for _ in range(1 + least // len(every)):
                total += 1
                raised += interrupted(run, moments.uniform(0, min(spent)))
                whole = all(
                    torch.equal(value, state[key])
                    for one, state in zip(pair, before, strict=True)
                    for key, value in one.named_parameters()
                )
                if not whole or [hooks_of(one) for one in pair] != hooks or signal.getsignal(signal.SIGINT) != handler:
                    damaged.append(name)
                    for one, state in zip(pair, before, strict=True):
                        one.reset_hooks(including_permanent=True)
                        with torch.no_grad():
                            for key, value in one.named_parameters():
                                value.copy_(state[key])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert total >= least
    assert raised > total / 2
    assert damaged == []
    assert [identity(one) for one in pair] == names


@pytest.mark.parametrize("when", ["entering", "leaving an inner one"])
def test_an_interrupt_after_the_last_look_for_one_does_not_wait_for_the_block_to_end(monkeypatch, when):
    module = importlib.import_module("circuits.models.uninterrupted")
    real, state, looks = module._pass_on, [], 0

    def late():
        nonlocal looks
        real()
        looks += 1
        # each change looks once when it is entered and once when it is left
        if looks == (1 if when == "entering" else 3):
            signal.raise_signal(signal.SIGINT)

    @module.uninterrupted
    def changed(name):
        state.append(name)
        try:
            yield
        finally:
            state.remove(name)

    monkeypatch.setattr(module, "_pass_on", late)
    handler, reached = signal.getsignal(signal.SIGINT), []

    def run():
        with changed("outer"):
            reached.append("outer")
            with changed("inner"):
                reached.append("inner")
            reached.append("after")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ([] if when == "entering" else ["outer", "inner"])
    assert state == []
    assert signal.getsignal(signal.SIGINT) is handler
