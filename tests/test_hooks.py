"""No public function ignores a function that a user hooked into the model."""

import importlib
import inspect
import tempfile
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from circuits.analysis import analyse, compare
from circuits.consistency import (
    gradient_consistency,
    gradient_consistency_along,
    input_signature,
    representation_consistency,
)
from circuits.errors import CircuitsError
from circuits.interventions import (
    Engine,
    Intervention,
    ablate_heads,
    mean_head_outputs,
    pair_people,
    patch_heads,
    patched_outputs,
    replace_heads,
    run_interventions,
    screen_interventions,
    single,
)
from circuits.masks import (
    ablate_at,
    ablate_mask,
    graft,
    graft_at,
    graft_by_optimisation,
    graft_by_score,
    mean,
    revert,
    unit_mask,
    zero,
)
from circuits.metrics import evaluate
from circuits.models import (
    answer_logits,
    capture,
    editing,
    hook_name,
    hooked,
    load_model,
    logits_at,
    parameters_of,
    positional_weights,
    save_model,
)
from circuits.rankings import (
    Evidence,
    attention_scores,
    average_head,
    behaviour_scores,
    critical_curve,
    direct_logits,
    head_patterns,
    induction_scores,
    logit_lens,
    rank_units,
    read_head,
    sufficient_curve,
)
from circuits.sweeps import sweep_heads, sweep_patches
from circuits.tracing import example_losses, loss_gradients, trace_checkpoints, trace_gradients
from circuits.units import Head
from tests.fixtures import lively, said_by
from tests.test_public_names import PACKAGES

HEAD, OTHER = Head(1, 2), Head(3, 1)

#: These do not run a model: they read its parameters, its settings or its tokenizer.
NEVER_RUN = {
    *(
        "check_task",
        "checkpoint_of",
        "covered_parameters",
        "editing",
        "facts_of",
        "fingerprint",
        "identity",
        "lean_model",
    ),
    *(
        "parameters_of",
        "positional_parameters",
        "rows_of",
        "same_parameters",
        "shape_of",
        "token_texts",
        "unit_mask",
    ),
    *("arithmetic", "refuse_hooks", "load_model", "merge_adapter", "require_start"),
    *("hook_name", "hook_points", "user_hooks"),
}


def without_head(z, hook):
    """What a user hooks in."""
    z = z.clone()
    z[:, :, HEAD.index] = 0
    return z


class Case:
    """A model, what it was before, and what functions are called with."""

    def __init__(self, model, pre, tasks, tmp_path) -> None:
        self.model, self.pre, self.tmp = model, pre, tmp_path
        self.task = tasks["qa_id"].select(range(6))
        self.bio = tasks["bio"].select(range(6))
        self.people = tasks["qa_id"].select(range(18))
        known = tasks["bio"].answers
        told = known.loc[known["group"].isin(set(self.people.answers["group"])), "example"]
        self.biographies = tasks["bio"].select(told.drop_duplicates().tolist()[::2])
        self.source = pair_people(self.task, among=tasks["qa_id"])
        self.mask = unit_mask(model, [OTHER])
        self.answered = said_by(pre, self.task)
        self.ranking = pandas.DataFrame({"unit": [str(OTHER), "L0H0"]})

    def new_folder(self):
        """Where nothing was saved before."""
        return Path(tempfile.mkdtemp(dir=self.tmp)) / "out"

    def within(self, context) -> torch.Tensor:
        """The model's answers inside a block that another function opens."""
        with context:
            return numbers(answer_logits(self.model, self.task))


def numbers(found, common=None) -> numpy.ndarray:
    """What is compared; of the curve of a search, at the ``common`` sizes if they are given."""
    if isinstance(found, pandas.DataFrame):
        if common is not None:
            found = found[found["size"].isin(common)].drop_duplicates(["score", "size"])
        return found.select_dtypes("number").to_numpy(dtype=float)
    return numpy.asarray(found.detach().double() if isinstance(found, torch.Tensor) else found, dtype=float)


#: Searches that graft other values into the weights that stand for the hook below: only that it acts can be told.
SEARCHES = {"graft_by_optimisation", "graft_by_score"}

#: Every public function that takes a model, and a number of its own that depends on what the model computes.
CALLS = {
    "Engine": lambda c: Engine(c.model, c.task, single([OTHER])).run()[1]["log_prob"],
    "Evidence": lambda c: rank_units(Evidence(c.model, task=c.task), Head, ["ablation"]),
    "ablate_at": lambda c: c.within(ablate_at(c.model, c.mask, c.task, positions=c.task.span("all"))),
    "ablate_heads": lambda c: c.within(ablate_heads(c.model, [OTHER])),
    "ablate_mask": lambda c: ablate_mask(c.model, c.mask, [c.task], mode="zero", draws=1),
    "analyse": lambda c: analysed(analyse(c.model, [c.task], c.pre, out=c.new_folder(), only=["evaluate"])),
    "answer_logits": lambda c: answer_logits(c.model, c.task),
    "attention_scores": lambda c: attention_scores(c.model, {"qa": c.task}),
    "average_head": lambda c: average_head(c.model, OTHER, c.task).values,
    "behaviour_scores": lambda c: behaviour_scores(c.model, c.task)[["score", "excess"]],
    "capture": lambda c: capture(c.model, c.task.tokens, [(2, "z")])[2, "z"],
    "compare": lambda c: analysed(compare(c.model, c.pre, [c.task], out=c.new_folder(), only=["evaluate"])),
    "critical_curve": lambda c: critical_curve(c.ranking, c.model, [c.task], mode="mean"),
    "direct_logits": lambda c: direct_logits(c.model, c.task),
    "evaluate": lambda c: evaluate(c.model, c.task),
    "example_losses": lambda c: example_losses(c.model, c.task),
    "graft": lambda c: c.within(graft(c.model, unit_mask(c.pre, [OTHER]), c.pre)),
    "graft_at": lambda c: c.within(
        graft_at(
            c.model,
            unit_mask(c.pre, [OTHER]),
            c.pre,
            task=c.task,
            positions=torch.ones_like(c.task.tokens, dtype=torch.bool),
        )
    ),
    "graft_by_optimisation": lambda c: graft_by_optimisation(c.model, c.pre, c.answered, keep=0.3, steps=1).curve,
    "graft_by_score": lambda c: graft_by_score(c.model, c.pre, c.answered, score="gradient_x_change", keep=0.3).curve,
    "gradient_consistency": lambda c: gradient_consistency(c.model, c.people, c.biographies).cosines["all"],
    "gradient_consistency_along": lambda c: gradient_consistency_along([c.model], c.people, c.biographies)["mean"],
    "head_patterns": lambda c: head_patterns(c.model, c.task).patterns,
    "hooked": lambda c: c.within(hooked(c.model, {hook_name(c.model, (3, "z")): lambda z, hook: 0 * z})),  # noqa: ARG005
    "induction_scores": lambda c: induction_scores(c.model),
    "input_signature": lambda c: input_signature(c.model, c.people, per_answer=True)[["log_prob", "effect"]],
    "logit_lens": lambda c: logit_lens(c.model, c.task)["answer_probability"],
    "logits_at": lambda c: logits_at(c.model, c.task.tokens, torch.tensor([[0, 3], [1, 2]])),
    "loss_gradients": lambda c: loss_gradients(c.model, c.task)["blocks.0.attn.W_Q"],
    "mean": lambda c: c.within(mean(c.model, c.mask)),
    "save_model": lambda c: save_model(c.model, c.new_folder()),
    "mean_head_outputs": lambda c: mean_head_outputs(c.model, c.task),
    "patch_heads": lambda c: c.within(patch_heads(c.model, [OTHER], c.source, target=c.task)),
    "patched_outputs": lambda c: patched_outputs(c.model, c.source, c.task)[2, 0, 0],
    "positional_weights": lambda c: c.within(
        positional_weights(
            c.model,
            {"blocks.3.attn.W_O": parameters_of(c.pre)["blocks.3.attn.W_O"].detach()},
            lambda tokens: torch.ones_like(tokens, dtype=torch.bool),
        )
    ),
    "read_head": lambda c: read_head(c.model, OTHER, c.task, example=0).pattern,
    "replace_heads": lambda c: c.within(replace_heads(c.model, {OTHER: torch.zeros(1)})),
    "representation_consistency": lambda c: representation_consistency(c.model, c.biographies, c.people)["cosine"],
    "revert": lambda c: c.within(revert(c.model, c.mask, c.pre)),
    "run_interventions": lambda c: run_interventions(c.model, c.task, [Intervention((OTHER,))]),
    "screen_interventions": lambda c: screen_interventions(c.model, c.task, [Intervention((OTHER,))]),
    "sufficient_curve": lambda c: sufficient_curve(c.ranking, c.model, c.pre, tasks=[c.task], rest="pre"),
    "sweep_heads": lambda c: sweep_heads(c.model, [c.task], heads=[OTHER]),
    "sweep_patches": lambda c: sweep_patches(c.model, c.source, c.task, heads=[OTHER]),
    "trace_checkpoints": lambda c: trace_checkpoints([c.model], c.task).hook_points["head.gradient_norm"],
    "trace_gradients": lambda c: _traced(c),
    "zero": lambda c: c.within(zero(c.model, c.mask)),
}


#: Those of two models, called with both; ``pre`` is the one that a function is hooked into.
WITH_TWO = {
    "Engine": lambda c: Engine(c.model, c.task, [Intervention((OTHER,), "revert")], pre=c.pre).run()[1]["log_prob"],
    "Evidence": lambda c: rank_units(Evidence(c.model, c.pre), Head, ["change"]),
    "ablate_at": lambda c: c.within(
        ablate_at(c.model, c.mask, c.task, positions=c.task.span("all"), mode="revert", pre=c.pre)
    ),
    "ablate_mask": lambda c: ablate_mask(c.model, c.mask, [c.task], pre=c.pre, draws=1),
    **{name: CALLS[name] for name in ("analyse", "compare")},
    "critical_curve": lambda c: critical_curve(c.ranking, c.model, [c.task], pre=c.pre, mode="revert"),
    **{name: CALLS[name] for name in ("graft", "graft_at", "graft_by_optimisation", "graft_by_score", "revert")},
    "run_interventions": lambda c: run_interventions(c.model, c.task, [Intervention((OTHER,), "revert")], pre=c.pre),
    "sufficient_curve": CALLS["sufficient_curve"],
}


def analysed(analysis):
    """What an analysis measured first."""
    return next(iter(analysis.tables.values()))


def _traced(case):
    """A second call reads what the first one saved."""
    return trace_gradients(case.model, case.task, out=case.tmp / "trace.safetensors").hook_points["head.gradient_norm"]


def takes_a_model(function) -> bool:
    """Or several."""
    return models_of(function) > 0


def models_of(function) -> int:
    """How many parameters are models."""
    if not callable(function) or (isinstance(function, type) and issubclass(function, Exception)):
        return 0
    try:
        annotations = [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
    except ValueError:
        return 0
    return sum(any(kind in text for kind in ("nn.modules", "PreTrainedModel")) for text in annotations)


def test_every_public_function_that_takes_a_model_is_here():
    found = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = (name for name in getattr(module, "__all__", []) if takes_a_model(getattr(module, name)))
        found |= set(names)
    assert found == CALLS.keys() | NEVER_RUN


@pytest.fixture(scope="module")
def case(tasks, tokenizer, tmp_path_factory):
    before, model = (load_model(lively("pythia", seed), tokenizer=tokenizer) for seed in (1, 0))
    return Case(model, before, tasks, tmp_path_factory.mktemp("hooks"))


def test_every_public_function_that_takes_two_models_is_here():
    found = {
        name
        for package in PACKAGES
        for name in getattr(importlib.import_module(package), "__all__", [])
        if models_of(getattr(importlib.import_module(package), name)) > 1
    }
    assert found - NEVER_RUN == WITH_TWO.keys()


@pytest.mark.parametrize(
    ("name", "which"), [*((name, "model") for name in sorted(CALLS)), *((name, "pre") for name in sorted(WITH_TWO))]
)
def test_a_hook_is_honoured_or_refused(case, name, which, coarse_search):
    call, model = {"model": CALLS, "pre": WITH_TWO}[which][name], getattr(case, which)
    clean = call(case)
    with hooked(model, {hook_name(model, (HEAD.layer, "z")): without_head}):
        try:
            found = call(case)
        except CircuitsError as error:
            assert "blocks.1.attn.hook_z" in str(error)
            return
    common = set(found["size"]) & set(clean["size"]) if name in SEARCHES else None
    found, clean = numbers(found, common), numbers(clean, common)
    assert found.shape == clean.shape
    assert found.size
    assert not numpy.allclose(found, clean, atol=1e-6, equal_nan=True)
    if name in SEARCHES:
        return
    # a head whose values are zero puts out zero
    weights = [parameters_of(model)[f"blocks.{HEAD.layer}.attn.{which}_V"] for which in "Wb"]
    before = [weight.detach().clone() for weight in weights]
    try:
        with editing(model), torch.no_grad():
            for weight in weights:
                weight[HEAD.index] = 0
            assert numpy.allclose(found, numbers(call(case)), atol=1e-4, equal_nan=True)
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


@pytest.mark.parametrize("name", ["Engine", "loss_gradients", "critical_curve", "screen_interventions"])
def test_hooks_of_every_sort_are_refused(case, name):
    point, model = hook_name(case.model, (2, "post")), case.model
    module = model.get_submodule("blocks.2.mlp")

    def act(*_, **__):
        return None

    def backward():
        model.add_hook(point, act, dir="bwd")

    def permanent():
        model.add_perma_hook(point, act)

    for hook, where in ((backward, point), (permanent, point)):
        hook()
        try:
            with pytest.raises(CircuitsError, match=f"hooked into the model at {where}: it would have no effect here"):
                CALLS[name](case)
        finally:
            model.reset_hooks(including_permanent=True)
    for register in (
        module.register_forward_pre_hook,
        module.register_forward_hook,
        module.register_full_backward_hook,
    ):
        handle = register(act)
        try:
            with pytest.raises(CircuitsError, match=r"hooked into the model at blocks\.2\.mlp: it would"):
                CALLS[name](case)
        finally:
            handle.remove()
    for register in (
        register_module_forward_pre_hook,
        register_module_forward_hook,
        register_module_full_backward_pre_hook,
        register_module_full_backward_hook,
    ):
        handle = register(act)
        try:
            with pytest.raises(CircuitsError, match=r"at every module, by torch's global hooks: it would"):
                CALLS[name](case)
        finally:
            handle.remove()


def test_a_hook_behind_the_last_layer_is_honoured(case):
    clean = evaluate(case.model, case.task)["log_prob"]
    with hooked(case.model, {"ln_final.hook_normalized": lambda x, hook: 0 * x}):  # noqa: ARG005
        found = evaluate(case.model, case.task)["log_prob"]
    # pythia's last norm has a bias, which is the same for every prompt
    assert not numpy.allclose(found, clean)


@pytest.mark.parametrize(
    ("layer", "point", "refused"),
    [
        (3, "ln_final.hook_normalized", True),
        (3, "hook_attn_out", True),
        (1, "hook_resid_post", False),
        (3, "attn.hook_z", False),
    ],
)
def test_what_a_head_says_is_not_read_past_a_hook_behind_it(case, layer, point, refused):
    def says():
        return read_head(case.model, OTHER, case.task, example=0).top_tokens

    clean, point = says(), point if point.startswith("ln_final") else f"blocks.{layer}.{point}"
    with hooked(case.model, {point: lambda x, hook: 0 * x}):  # noqa: ARG005
        if not refused:
            assert says() != clean
            return
        with pytest.raises(CircuitsError, match=f"hooked into the model at {point}: it would .* on what L3H1 says"):
            says()


@pytest.mark.parametrize("first", ["graft", "ablation"])
def test_an_ablation_acts_on_a_graft_at_positions_whichever_came_first(case, first):
    everywhere = torch.ones_like(case.task.tokens, dtype=torch.bool)

    def grafted():
        return graft_at(case.model, unit_mask(case.pre, [HEAD, OTHER]), case.pre, task=case.task, positions=everywhere)

    def ablated():
        return ablate_heads(case.model, [HEAD])

    outer, inner = (grafted, ablated) if first == "graft" else (ablated, grafted)
    with outer(), inner():
        found = evaluate(case.model, case.task)["log_prob"]
    with graft(case.model, unit_mask(case.pre, [HEAD, OTHER]), case.pre), ablated():
        expected = evaluate(case.model, case.task)["log_prob"]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
