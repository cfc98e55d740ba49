"""Every family, at every site and in every mode, against hooks on the hookable model or the weights really replaced."""

from functools import partial
from itertools import cycle

import numpy
import pandas
import pytest
import torch

from circuits.interventions import (
    Intervention,
    ablate_heads,
    mean_head_outputs,
    patch_heads,
    run_interventions,
    screen_interventions,
)
from circuits.interventions.engine import Engine
from circuits.models import lean_model, load_model, rows_of, shape_of
from circuits.models.hookable import backends
from circuits.tasks import Task
from circuits.units import Component, Head, KVGroup, Neuron
from tests.interventions.test_engine import hook_name
from tests.models.test_families import CONFIGURATIONS, enliven, random_model

#: Longer than the windows and than the length from which some rotary angles are scaled.
LENGTHS = (19, 16, 19, 14)


#: The first configuration of each family, another of GPT-NeoX, and two of Llama that HookedTransformer cannot have.
BRIDGED = ("llama, biases, no groups", "llama, dynamic")
_FIRST: dict[str, str] = {}
for _name, (_kind, _) in CONFIGURATIONS.items():
    _FIRST.setdefault(_kind, _name)
CHOSEN = (*_FIRST.values(), *BRIDGED, "gpt_neox, sequential")
#: Every mode at every site in these; in the others each site in two of the modes, as no mode knows of families.
WHOLE = ("llama", "gpt_neox, sequential")
MODES = ("zero", "mean", "mean_by_position", "resample", "patch")


@pytest.fixture(scope="module", params=CHOSEN)
def name(request) -> str:
    return request.param


def loaded(name: str, reference):
    return load_model(reference, backend="bridge" if name in BRIDGED else None)


@pytest.fixture(scope="module")
def model(name):
    return loaded(name, random_model(name))


def made(seed: int) -> Task:
    """Prompts of unequal length with answers of two tokens; the first two begin alike."""
    tokens = torch.randint(67, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    tokens[1, :6] = tokens[0, :6]
    ends = numpy.array(LENGTHS)
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    mask, prompt = places < torch.tensor(LENGTHS)[:, None], places < torch.tensor(LENGTHS)[:, None] - 2
    subject = (places >= 9) & (places < 11) & prompt
    spans = {"subject": subject, "relation": prompt & ~subject}
    values = [f"{seed}.{example}" for example in range(len(LENGTHS))]
    answers = pandas.DataFrame({"example": range(len(LENGTHS)), "start": ends - 2, "end": ends, "value": values})
    return Task("made", tokens.where(mask, 0), mask, answers, values, spans)


TASK, SOURCE, REFERENCE = made(1), made(2), made(3)


def units_of(model) -> list[tuple[tuple, str | None]]:
    """Every site, in every layer at one of them at least."""
    shape = shape_of(model)
    # at the bridge's hook an edit reaches the MLP alone
    middle = not model.checkpoint.layout.parallel and "Bridge" not in type(model).__name__
    found = [((Head(layer, layer + 1),), site) for layer, site in ((0, "z"), (1, "q"), (0, "pattern"), (1, "pattern"))]
    if shape.n_heads == shape.n_key_value_heads:
        found += [((Head(1, 2),), "k"), ((Head(0, 3),), "v")]
    group = shape.n_key_value_heads - 1
    found += [((KVGroup(0, group),), "kv"), ((KVGroup(1, 0),), "k"), ((KVGroup(1, group),), "v")]
    found += [((Neuron(0, 7), Neuron(1, 9)), None), ((Head(2, 0), Neuron(2, 3)), None)]
    names = ("resid_pre", "attn_out", *(["resid_mid"] if middle else []), "mlp_out", "resid_post")
    found += [((Component(layer, name),), None) for layer, name in zip(cycle((0, 1)), names, strict=False)]
    return [*found, ((Component(2, "attn_out"), Component(1, "mlp_out")), None)]


def sites(one: Intervention) -> list[tuple]:
    """Each unit, its site, and the name of the hook point."""
    found = []
    for unit in one.units:
        default = "kv" if isinstance(unit, KVGroup) else "z"
        for site in one.site or default if (one.site or default) == "kv" else [one.site or default]:
            found.append((unit, site, hook_name(unit, site)))
    return found


def places(task: Task, positions) -> torch.Tensor:
    """Which tokens are changed."""
    found = torch.zeros_like(task.attention_mask)
    if positions == "all":
        return task.attention_mask
    if positions == "last":
        found[range(len(task)), task.answers["start"].to_numpy(copy=True) - 1] = True
    elif isinstance(positions, int):
        found[:, positions] = True
    else:
        found = task.span(positions)
    return found


def log_probs(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """Of each answer."""
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, task.tokens[:, 1:, None])[..., 0]
    return (chosen * task.answer_mask[:, 1:]).sum(1)


def part(x: torch.Tensor, unit, site: str) -> torch.Tensor:
    """The unit's own activation, ``[example, pos, ...]``: a view."""
    if isinstance(unit, Component):
        return x
    return x[:, unit.index] if site == "pattern" else x[:, :, unit.index]


class ByHand:
    """Log-probabilities of answers under hooks; runs that values come from are kept."""

    def __init__(self, model, partners: list[int]) -> None:
        self.model = model
        self.patched = places(TASK, "all") & ~TASK.answer_mask
        others = {"reference": REFERENCE, "source": SOURCE, "partners": REFERENCE.select(partners)}
        self.runs = {key: self.run(task) for key, task in others.items()}

    def run(self, task: Task) -> dict[str, torch.Tensor]:
        kept = {}
        names = {name for units, site in units_of(self.model) for _, _, name in sites(Intervention(units, site=site))}

        def keep(x, hook, name):
            kept[name] = x.clone()

        self.model.run_with_hooks(task.tokens, fwd_hooks=[(name, partial(keep, name=name)) for name in names])
        return kept

    def value(self, mode: str, unit, site: str, name: str) -> torch.Tensor:
        if mode == "zero":
            return torch.zeros(())
        if mode in ("patch", "resample"):
            return part(self.runs["source" if mode == "patch" else "partners"][name], unit, site)
        run, mask = part(self.runs["reference"][name], unit, site), REFERENCE.attention_mask
        if mode == "mean":
            return run[mask].mean(0)
        counted = mask.view(*mask.shape, *[1] * (run.dim() - 2))
        return (run * counted).sum(0) / counted.sum(0)

    def __call__(self, one: Intervention) -> torch.Tensor:
        changed = places(TASK, one.positions)
        changed = changed & self.patched if one.mode == "patch" else changed
        hooks = []
        for unit, site, name in sites(one):
            value = self.value(one.mode, unit, site, name)

            def hook(x, hook, unit=unit, site=site, value=value):
                x = x.clone()
                own = part(x, unit, site)
                where = changed.view(*changed.shape, *[1] * (own.dim() - 2))
                width = own.shape[1]
                new = value[:, :width] if value.dim() == own.dim() else value
                own.copy_(torch.where(where, new, own))
                return x

            hooks.append((name, hook))
        return log_probs(self.model.run_with_hooks(TASK.tokens, fwd_hooks=hooks), TASK)


@torch.no_grad()
def test_every_site_and_mode_equals_hooks(name, model):
    positions = cycle(["all", 8, "subject", "last"])
    plan = [
        Intervention(units, mode, site, next(positions))
        for number, (units, site) in enumerate(units_of(model))
        for mode in (MODES if name in WHOLE else (MODES[number % 5], MODES[(number + 2) % 5]))
        if (mode, site) != ("mean", "pattern")
    ]
    options = {"source": SOURCE, "reference": REFERENCE, "metrics": "log_prob"}
    partners = Engine(model, TASK, plan, **options).partners.tolist()
    # several batches, each narrower than the task
    table = run_interventions(model, TASK, plan, **options, tokens=64, per_answer=True)
    found = table["log_prob"].to_numpy().reshape(len(plan), -1)
    by_hand, effects = ByHand(model, partners), table["log_prob_effect"].to_numpy().reshape(len(plan), -1)
    for one, values in zip(plan, found, strict=True):
        assert values == pytest.approx(by_hand(one).numpy(), rel=2e-5, abs=2e-4), one
    # what is compared is not the model without interventions
    assert (abs(effects).max(1) > 2e-3).mean() > 0.9


@torch.no_grad()
def test_reverting_equals_the_model_with_the_old_weights(name, model):
    pre = loaded(name, enliven(random_model(name), 0.15))
    shape = shape_of(model)
    chosen = [(Head(1, 2),), (Head(2, 1), Head(2, 3), Head(0, 0)), (Neuron(0, 7), Neuron(0, 8), Neuron(2, 9))]
    chosen += [(KVGroup(1, 0),), (Head(0, 1), KVGroup(0, 0), Neuron(0, 1))]
    if shape.n_heads == shape.n_key_value_heads:
        # a head has keys and values of its own
        chosen = [one for one in chosen if not any(isinstance(unit, KVGroup) for unit in one)]
    plan = [Intervention(units, "revert") for units in chosen]
    table = run_interventions(model, TASK, plan, pre=pre, metrics="log_prob", per_answer=True)
    found = table["log_prob"].to_numpy().reshape(len(plan), -1)
    assert (abs(table["log_prob_effect"].to_numpy().reshape(len(plan), -1)).max(1) > 1e-3).all()
    tensors = model.checkpoint.tensors
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for units, values in zip(chosen, found, strict=True):
        for unit in units:
            alike = isinstance(unit, Head) and shape.n_heads == shape.n_key_value_heads
            owners = (Head, KVGroup) if alike else (type(unit),)
            for row in rows_of(model).values():
                if row.owner in owners and row.layer == unit.layer:
                    old = row.stored(pre.checkpoint.tensors[row.tensor])
                    row.stored(tensors[row.tensor]).select(row.axis, unit.index).copy_(old.select(row.axis, unit.index))
        expected = log_probs(model(TASK.tokens), TASK)
        for key, tensor in tensors.items():
            tensor.copy_(before[key])
        assert values == pytest.approx(expected.numpy(), rel=2e-5, abs=2e-4), units


def test_estimates_equal_gradients_through_hooks(model):
    plan = [Intervention(units[:1], site=site) for units, site in units_of(model) if site != "pattern"]
    found = screen_interventions(model, TASK, plan)["estimate"]
    kept, steps = {}, {}

    def keep(x, hook, name):
        kept[name], steps[name] = x.detach(), torch.zeros_like(x, requires_grad=True)
        return x + steps[name]

    names = {name for one in plan for _, _, name in sites(one)}
    with torch.enable_grad():
        logits = model.run_with_hooks(TASK.tokens, fwd_hooks=[(name, partial(keep, name=name)) for name in names])
        log_probs(logits, TASK).sum().backward()
    model.zero_grad()
    for one, estimate in zip(plan, found, strict=True):
        products = [part(-steps[name].grad * kept[name], unit, site) for unit, site, name in sites(one)]
        expected = sum(float(product.sum()) for product in products) / len(TASK)
        assert estimate == pytest.approx(expected, rel=1e-3, abs=1e-3), one


@torch.no_grad()
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox, parallel", "gemma2"])
def test_heads_are_replaced_in_either_backend(name, backend):
    model = load_model(random_model(name), backend=backend)
    lean, (layer, index) = lean_model(model), (1, 2)
    means = mean_head_outputs(model, REFERENCE)
    source = {}

    def keep(x, read):
        source["z"] = x
        return x

    lean.run(SOURCE.tokens, visits={(layer, "z"): keep})
    before_answers = places(TASK, "all") & ~TASK.answer_mask
    blocks = {
        "zero": (ablate_heads(model, [Head(layer, index)]), torch.zeros_like),
        "mean": (ablate_heads(model, [Head(layer, index)], "mean", means=means), means[layer, index].expand_as),
        "patch": (
            patch_heads(model, [Head(layer, index)], SOURCE, target=TASK),
            lambda own: torch.where(before_answers[..., None], source["z"][:, :, index], own),
        ),
    }
    real = TASK.attention_mask
    for block, value in blocks.values():

        def change(x, read, value=value):
            x = x.clone()
            x[:, :, index] = value(x[:, :, index])
            return x

        expected = lean.unembed(lean.run(TASK.tokens, visits={(layer, "z"): change}))
        with block:
            found = model(TASK.tokens)
        assert torch.allclose(found[real], expected[real], atol=1e-5 * float(expected.abs().max()), rtol=0)
        assert not torch.allclose(model(TASK.tokens)[real], expected[real], atol=1e-2)
