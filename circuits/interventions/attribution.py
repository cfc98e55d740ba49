"""Attribution patching: the effect of many interventions estimated from one forward and one backward pass.

1. The clean run is differentiated: the gradient of the metric, summed over answers, at every activation that an
   intervention acts on.
2. Putting a value v in the place of an activation a changes the metric by about ∂metric/∂a · (v − a), summed over the
   changed tokens: the first order of the exact effect. It is poor where the metric bends between a and v, most of all
   through the attention softmax (Kramár et al. 2024, AtP*); no correction is made for that, so look at estimates as a
   screen and verify the largest by `run_interventions`.
3. The estimate of several units together is the sum of theirs: an effect that one has through another counts for both.
   Where one is a part of another that is changed too (a head's z of its layer's output, everything of a later residual
   stream, a group's keys and values of its head's z), the sum would be wrong by as much as the effect: this is refused.
"""

from collections.abc import Sequence

import numpy
import pandas
import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.interventions.attention import Queries
from circuits.interventions.changes import sites_of
from circuits.interventions.effects import describe
from circuits.interventions.engine import Engine, Prompts
from circuits.interventions.forward import CleanRun, Forward, Visitor
from circuits.interventions.intervention import Intervention
from circuits.interventions.memory import in_halves
from circuits.metrics import Metric
from circuits.models import SITES, Model, Site, facts_of
from circuits.progress import bar
from circuits.storage import provenance
from circuits.tasks import Task
from circuits.units import AnyUnit, Component, Head, KVGroup


class _Kept(Visitor):
    """Keeps activations in the graph."""

    def __init__(self, sites: set[Site]) -> None:
        self._sites = sites
        self.found: dict[Site, Tensor] = {}

    def __call__(self, site: Site, x: Tensor, queries: Queries | None, source: Tensor | None) -> Tensor:  # noqa: ARG002
        if site in self._sites:
            self.found[site] = x
        return x


#: The order of a layer's activations.
_ORDER = tuple(site for site in SITES if site != "pattern")


def _inside(sites: Sequence[tuple[Site, AnyUnit]], heads_of_group: int) -> tuple[AnyUnit, AnyUnit] | None:
    """A unit whose activation is a part of that of another one, or the same, and that other one."""
    placed = [((layer, _ORDER.index(name)), unit) for (layer, name), unit in sites]
    # the stream after a layer is the one before the next
    placed = [((at[0] + 1, 0) if at[1] == len(_ORDER) - 1 else at, unit) for at, unit in placed]
    streams = [(at, unit) for at, unit in placed if _ORDER[at[1]].startswith("resid")]
    if streams and len(sites) > 1:
        last, stream = max(streams, key=lambda one: one[0])
        for at, unit in placed:
            if unit is not stream and at <= last:
                return unit, stream
    outputs = {(unit.layer, unit.name): unit for _, unit in sites if isinstance(unit, Component)}
    groups = {(site, unit.index): unit for site, unit in sites if isinstance(unit, KVGroup)}
    for (layer, name), unit in sites:
        output = (
            None if isinstance(unit, Component) else outputs.get((layer, "mlp_out" if name == "post" else "attn_out"))
        )
        if output is not None:
            return unit, output
        if isinstance(unit, Head):
            # keys and values act through the heads of their group alone
            theirs = ("k", "v") if name == "z" else (name,)
            group = next(
                (
                    groups[key]
                    for key in (((layer, one), unit.index // heads_of_group) for one in theirs)
                    if key in groups
                ),
                None,
            )
            if group is not None:
                return group, unit
    return None


@torch.inference_mode(False)
def screen_interventions(
    model: Model,
    task: Task,
    interventions: Intervention | Sequence[Intervention],
    *,
    source: Task | None = None,
    reference: Task | None = None,
    metric: str | Metric = "log_prob",
    seed: int = 0,
    tokens: int | None = None,
) -> pandas.DataFrame:
    """Estimate the effect of each intervention to first order.

    Args:
        model: loaded with `circuits.load_model`.
        task: the prompts and their answers.
        interventions: zero, mean, mean_by_position, resample or patch, at any site but the pattern.
        source: as in `run_interventions`.
        reference: as in `run_interventions`.
        metric: a metric that can be differentiated: ``log_prob``, ``logit_diff`` or a function.
        seed: of resampling.
        tokens: how many tokens to compute at once; by default as many as suit the device.

    Returns:
        One row for each intervention, in order: ``unit``, ``mode``, ``site``, ``positions``, ``task``, ``answers``
        (how many it acts on) and ``estimate``: of the metric's ``…_effect`` in `run_interventions`.

    Raises:
        CircuitsError: an intervention cannot be estimated, or changes a unit and a part of it; or as
            `run_interventions`.

    Source:
        Nanda 2023, Attribution patching; Syed et al. 2023 (arXiv 2310.10348); docs/method.md, section 5.

    Example:
        >>> from circuits import Head, Task, load_model
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import new_model
        >>> import tempfile
        >>> tokenizer = word_tokenizer()
        >>> task = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4)).task("qa_id", tokenizer)
        >>> model = load_model(new_model("tiny-llama", tokenizer))
        >>> screen_interventions(model, task, [Intervention((Head(2, 1),))]).columns.tolist()
        ['unit', 'layer', 'index', 'mode', 'site', 'positions', 'task', 'answers', 'estimate']
    """
    interventions = [interventions] if isinstance(interventions, Intervention) else interventions
    for one in interventions:
        if one.mode == "revert" or one.site == "pattern":
            raise CircuitsError(f"attribution cannot estimate {one}: run it exactly")
    if metric in ("exact_match", "first_token", "source_exact_match", "kl"):
        raise CircuitsError(f"the metric {metric} has no useful gradient: screen by log_prob or logit_diff")
    engine = Engine(
        model,
        task,
        interventions,
        source=source,
        reference=reference,
        pre=None,
        metrics=[metric],
        seed=seed,
        tokens=tokens,
    )
    (function,) = engine.metrics.values()
    for one in interventions:
        found = _inside(sites_of(one, engine.grouped), engine.lean.n_heads // engine.lean.n_groups)
        if found is not None:
            raise CircuitsError(
                f"attribution would count {found[0]} twice: it acts through {found[1]}, which {one} changes too: "
                "leave one of them out"
            )
    estimates = numpy.zeros(len(interventions))
    groups = engine.groups()
    with bar("attribution", len(groups) * len(engine.task), "example") as progress:

        def work(examples: list[int]) -> None:
            prompts, added = Prompts(engine, examples), numpy.zeros(len(interventions))
            for (positions, mode), members in groups.items():
                with torch.no_grad():
                    forward = Forward(engine.lean, prompts.tree(positions, mode), length=engine.length)
                    context = engine.context(prompts, forward, mode)
                sites = {site for index in members for site, _ in sites_of(interventions[index], engine.grouped)}
                kept = _Kept(sites)
                with torch.enable_grad():
                    last = CleanRun.of(forward, kept).last
                    total = function(engine.lean.unembed(last), prompts.known).sum()
                    if not total.requires_grad:
                        name = next(iter(engine.metrics))
                        raise CircuitsError(f"the metric {name} has no gradient: screen by another one")
                    gradients = torch.autograd.grad(total, [kept.found[site] for site in sites], materialize_grads=True)
                changed = context.changed
                by_unit: dict[Site, Tensor] = {}
                for site, gradient in zip(sites, gradients, strict=True):
                    change = context.table(site, changed) - kept.found[site][0, changed].detach()
                    product = (gradient[0, changed].float() * change.float()).sum(0)
                    # a head's or group's dimensions are summed; neurons and components keep theirs
                    by_unit[site] = product.sum(-1) if product.dim() == 2 else product
                for index in members:
                    for site, unit in sites_of(interventions[index], engine.grouped):
                        found = by_unit[site]
                        added[index] += float(found.sum() if isinstance(unit, Component) else found[unit.index])
                progress.update(len(examples))
            estimates[:] += added

        in_halves(engine.batches(), work, engine.task.name)
    answers = numpy.zeros(len(interventions), dtype=int)
    for (positions, mode), members in groups.items():
        answers[members] = engine.changed(positions, mode).sum()
    with numpy.errstate(invalid="ignore"):
        table = describe(interventions).assign(task=task.name, answers=answers, estimate=estimates / answers)
    table.attrs = provenance(
        **facts_of(model),
        task=task.provenance,
        seed=seed,
        arithmetic=str(engine.lean.dtype).removeprefix("torch."),
    )
    return table
