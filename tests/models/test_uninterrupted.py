import random
import signal
import threading
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
    role_positions,
    unit_mask,
    zero,
)
from circuits.models import editing, fingerprint, hooked, huggingface_view, identity, load_model
from circuits.rankings.subsets import ablating, swapping
from circuits.units import Head, Neuron
from tests.conftest import lively

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def pair(tokenizer):
    """Two models of one shape, without a family of fixtures: every kind of block, once each."""
    return [load_model(lively("llama", seed), tokenizer=tokenizer) for seed in (0, 1)]


def blocks(pair, task):
    """Every block that changes a model, the work inside it aside."""
    pre, model = pair
    mask = ParameterMask(
        {name: torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.1
         for name, value in covered_parameters(model).items()}, fingerprint(model)
    )  # fmt: skip
    heads = unit_mask(model, [Head(0, 0), Head(2, 1)])
    positions = role_positions(task, [1])

    def swapped():
        with swapping(model, pre, Neuron) as switch:
            switch(torch.ones(4, model.cfg.d_mlp, dtype=torch.bool))

    def ablated():
        with ablating(model, Head) as switch:
            switch(torch.ones(4, 4, dtype=torch.bool))

    def block(make):
        def run():
            with make():
                pass

        return run

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
        "swapping": swapped,
        "ablating": ablated,
        "graft_at": block(lambda: graft_at(pre, heads, model, task, positions)),
        "ablate_heads": block(lambda: ablate_heads(model, [Head(1, 1)])),
        "hooked": block(lambda: hooked(model, {"blocks.0.attn.hook_z": keep})),
        "huggingface_view": block(lambda: huggingface_view(model)),
        "editing": block(lambda: editing(model)),
    }


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


class Interrupter(threading.Thread):
    """Sends the main thread SIGINT after a time; real ones, at moments that nobody chose."""

    def __init__(self):
        super().__init__(daemon=True)
        self.wanted, self.sent, self.after = threading.Event(), threading.Event(), 0.0
        self.stopped = False

    def run(self):
        while self.wanted.wait() and not self.stopped:
            self.wanted.clear()
            until = time.perf_counter() + self.after
            while time.perf_counter() < until:
                time.sleep(0)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            self.sent.set()


def interrupted(interrupter, run, after):
    """Run a block with an interrupt after a time; whether it raised."""
    interrupter.after = after
    interrupter.sent.clear()
    try:
        interrupter.wanted.set()
        run()
        interrupter.sent.wait()
        time.sleep(0)
    except KeyboardInterrupt:
        interrupter.sent.wait()
        return True
    return False


def test_a_thousand_interrupts_leave_every_bit_and_every_hook_as_before(pair, tasks, monkeypatch):
    task = tasks["qa_id"].select(range(2))
    every = blocks(pair, task)
    before = [{name: value.detach().clone() for name, value in one.named_parameters()} for one in pair]
    names, hooks = [fingerprint(one) for one in pair], [hooks_of(one) for one in pair]
    handler = signal.getsignal(signal.SIGINT)
    moments = random.Random(0)
    interrupter = Interrupter()
    interrupter.start()
    damaged, raised, total = [], 0, 0
    try:
        for name, run in every.items():
            spent = []
            for _ in range(3):
                begun = time.perf_counter()
                run()
                spent.append(time.perf_counter() - begun)
            for _ in range(1 + 1000 // len(every)):
                total += 1
                raised += interrupted(interrupter, run, moments.uniform(0, min(spent)))
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
        interrupter.stopped = True
        interrupter.wanted.set()
    assert total >= 1000
    assert raised > total / 2
    assert damaged == []
    assert [identity(one) for one in pair] == names
