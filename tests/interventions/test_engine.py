"""The engine against hooks written by hand, one example at a time, without padding."""

import copy
from dataclasses import replace
from itertools import cycle

import numpy
import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset
from circuits.interventions import (
    Intervention,
    cumulative,
    effects_table,
    matching_positions,
    pair_formats,
    pair_people,
    pairs,
    run_interventions,
    screen_interventions,
    single,
)
from circuits.interventions import engine as engine_module
from circuits.interventions.engine import Engine
from circuits.interventions.forward import CleanRun
from circuits.interventions.memory import arithmetic
from circuits.metrics import evaluate
from circuits.models import load_model, parameters_of
from circuits.models.hookable import backends
from circuits.statistics import intervals, paired
from circuits.tasks import Task
from circuits.units import Component, Head, KVGroup, Neuron


def alone(task: Task, example: int) -> torch.Tensor:
    return task.tokens[example, task.attention_mask[example]][None]


def places(task: Task, example: int, positions) -> list[int]:
    length = int(task.attention_mask[example].sum())
    if positions == "all":
        return list(range(length))
    if isinstance(positions, int):
        return [positions] if positions < length else []
    if positions == "last":
        return [int(start) - 1 for start in task.answers["start"][task.answers["example"] == example]]
    return [place for place in range(length) if bool(task.span(positions)[example, place])]


def hook_name(unit, site: str) -> str:
    block = f"blocks.{unit.layer}."
    if isinstance(unit, Component):
        return f"{block}hook_{unit.name}"
    return f"{block}mlp.hook_post" if isinstance(unit, Neuron) else f"{block}attn.hook_{site}"


def select(x: torch.Tensor, unit, site: str) -> torch.Tensor:
    """The unit's part of one example's activation, position first."""
    if isinstance(unit, Component):
        return x[0]
    return x[0, unit.index] if site == "pattern" else x[0, :, unit.index]


@torch.no_grad()
def by_hand(model, task, intervention, source=None, reference=None, partners=None, matches=None, runs=None):
    """Log-probability of every answer under an intervention, by run_with_hooks.

    Interventions of one test may share ``runs``: every activation of each prompt that values are taken from.
    """
    reference, runs = task if reference is None else reference, {} if runs is None else runs
    found = {}

    def run(prompt):
        key = tuple(prompt[0].tolist())
        if key not in runs:
            runs[key] = model.run_with_cache(prompt)[1]
        return runs[key]

    for example in range(len(task)):
        hooks = []
        for unit in intervention.units:
            kv = isinstance(unit, KVGroup)
            sites = ["k", "v"] if kv and intervention.site in (None, "kv") else [intervention.site or "z"]
            for site in sites:
                name = hook_name(unit, site)
                changed = places(task, example, intervention.positions)
                values, rows = None, []
                if intervention.mode.startswith("mean"):
                    runs_of_reference = [run(alone(reference, other)) for other in range(len(reference))]
                    rows = [select(cache[name], unit, site) for cache in runs_of_reference]
                if intervention.mode == "mean":
                    values = torch.cat(rows).mean(0).expand(task.tokens.shape[1], *rows[0].shape[1:])
                elif intervention.mode == "mean_by_position":
                    width = reference.tokens.shape[1]
                    sums, counts = None, torch.zeros(width)
                    for row in rows:
                        if site == "pattern":
                            row = torch.nn.functional.pad(row, (0, width - row.shape[1]))
                        sums = torch.zeros(width, *row.shape[1:]) if sums is None else sums
                        sums[: len(row)] += row
                        counts[: len(row)] += 1
                    values = sums / counts.view(-1, *[1] * (sums.dim() - 1))
                elif intervention.mode in ("patch", "resample"):
                    other = alone(source, example) if partners is None else alone(reference, partners[example])
                    theirs = select(run(other)[name], unit, site)
                    if matches is None:
                        values = theirs
                    else:
                        own = matches[matches[:, 0] == example].tolist()
                        changed = [place for place in changed if place in [ours for _, _, ours in own]]
                        values = torch.zeros(task.tokens.shape[1], *theirs.shape[1:])
                        for _, position, ours in own:
                            values[ours] = theirs[position]

                def hook(x, hook, unit=unit, site=site, changed=changed, values=values):
                    x = x.clone()
                    part = select(x, unit, site)
                    for place in changed:
                        value = 0.0 if values is None else values[place]
                        part[place] = value[: part.shape[1]] if site == "pattern" and values is not None else value
                    return x

                hooks.append((name, hook))
        logits = model.run_with_hooks(alone(task, example), fwd_hooks=hooks)[0].log_softmax(-1)
        for row, answer in task.answers[task.answers["example"] == example].iterrows():
            where = range(answer["start"], answer["end"])
            found[row] = sum(float(logits[place - 1, task.tokens[example, place]]) for place in where)
    return numpy.array([found[row] for row in sorted(found)])


def log_probs(model, task, plan, **options) -> numpy.ndarray:
    """``[intervention, answer]``."""
    table = run_interventions(model, task, plan, metrics=["log_prob"], per_answer=True, **options)
    return table["log_prob"].to_numpy().reshape(len(plan), -1)


def check(model, task, plan, matches=None, partners=None, **options) -> None:
    """Compare all of a plan, run together, with each of it by hand."""
    by_engine, runs = log_probs(model, task, plan, **options), {}
    known = {name: value for name, value in options.items() if name in ("source", "reference")}
    for one, found in zip(plan, by_engine, strict=True):
        expected = by_hand(model, task, one, **known, matches=matches, partners=partners, runs=runs)
        assert found == pytest.approx(expected, abs=1e-4), one


def every_unit(model) -> list[tuple[tuple, str | None]]:
    grouped = model.cfg.n_key_value_heads is not None
    found = [((Head(1, 2),), site) for site in ("z", "q", "pattern")]
    found += [((Head(2, 1), Head(3, 0)), None), ((Neuron(1, 7), Neuron(2, 9)), None)]
    found += [((KVGroup(1, 1),), site) for site in ("kv", "k", "v")]
    found += [((Component(layer, name),), None) for layer, name in ((0, "resid_pre"), (2, "attn_out"), (1, "mlp_out"))]
    found += [((Component(1, "resid_post"),), None), ((Head(0, 0), Neuron(2, 3), Component(3, "attn_out")), None)]
    if not grouped:
        found += [((Head(1, 2),), site) for site in ("k", "v")]
    # at the bridge's resid_mid a change reaches the MLP alone
    if not model.cfg.parallel_attn_mlp and backends()[0] != "bridge":
        found.append(((Component(2, "resid_mid"),), None))
    return found


@pytest.fixture
def questions(tasks) -> Task:
    """Three questions of unequal length, some with a common beginning."""
    task = tasks["qa_ood"].select([0, 1, 6])
    assert len(set(task.attention_mask.sum(1).tolist())) > 1
    return task


@pytest.mark.parametrize("mode", ["zero", "mean", "mean_by_position"])
def test_ablations_equal_hooks_written_by_hand(model, questions, bio, mode):
    units = [(units, site) for units, site in every_unit(model) if not (mode == "mean" and site == "pattern")]
    reference = bio.select(range(4)) if mode == "mean" else questions
    positions = cycle(["all", 2, "subject", "last"])
    plan = [Intervention(chosen, mode, site, next(positions)) for chosen, site in units]
    check(model, questions, plan, reference=reference)


def test_positions_equal_hooks_written_by_hand(model, questions):
    everywhere = ["all", 0, 3, "subject", "relation", "last", "answer"]
    check(model, questions, [Intervention((Head(1, 2), Neuron(2, 9)), positions=one) for one in everywhere])


def test_several_answers_in_one_example(model, tasks):
    task = tasks["bio"].select(range(3))
    units = (Head(1, 1), Component(2, "mlp_out"))
    check(model, task, [Intervention(units, positions=positions) for positions in ("all", "last", "answer")])


def test_patching_between_people_equals_hooks_written_by_hand(model, tasks):
    chosen = [0, 3, 7]
    positions = cycle(["all", "relation", 2])
    target, source = (task.select(chosen) for task in (tasks["qa_ood"], pair_people(tasks["qa_ood"])))
    plan = [Intervention(units, "patch", site, next(positions)) for units, site in every_unit(model)]
    check(model, target, plan, matching_positions(source, target), source=source)


def test_patching_where_both_prompts_begin_alike_changes_nothing(model, tasks):
    target, source = (task.select([0, 3, 7]) for task in (tasks["qa_ood"], pair_people(tasks["qa_ood"])))
    alike = int((target.tokens == source.tokens).int().cumprod(1).sum(1).min())
    assert alike > 1
    plan = [Intervention((Head(1, 2), Component(0, "mlp_out")), "patch", positions=place) for place in range(alike + 1)]
    effects = run_interventions(model, target, plan, source=source, metrics=["log_prob"])["log_prob_effect"]
    assert (effects[:alike] == 0).all()
    assert effects[alike] != 0
    check(model, target, plan, matching_positions(source, target), source=source)


def test_patching_between_formats_equals_hooks_written_by_hand(model, tasks):
    target = tasks["qa_ood"].select([0, 3, 7])
    source = pair_formats(target, tasks["bio"])
    plan = [Intervention(units, "patch", site) for units, site in every_unit(model) if site != "pattern"]
    check(model, target, plan, matching_positions(source, target), source=source)
    with pytest.raises(CircuitsError, match="a pattern can be patched only between prompts"):
        log_probs(model, target, [Intervention((Head(1, 2),), "patch", "pattern")], source=source)


def test_resampling_equals_hooks_written_by_hand(model, questions, bio):
    plan = [Intervention(units, "resample", site, "subject") for units, site in every_unit(model)[::3]]
    for reference in (questions, bio):
        partners = Engine(model, questions, plan, reference=reference, seed=3).partners.tolist()
        check(model, questions, plan, partners=partners, reference=reference, seed=3)


def reverted(model, pre, units):
    """A copy of the model with the units' own slices of the weights from before fine-tuning."""
    changed = copy.deepcopy(model)
    own, old = parameters_of(changed), parameters_of(pre)
    grouped = model.cfg.n_key_value_heads is not None
    for unit in units:
        if isinstance(unit, Neuron):
            names = ["mlp.W_in", "mlp.b_in", "mlp.W_gate", "mlp.W_out"]
        else:
            names = ["attn.W_Q", "attn.b_Q", "attn.W_O"] if isinstance(unit, Head) else []
            if isinstance(unit, KVGroup) or not grouped:
                names += [f"attn.{kind}_{letter}" for kind in "Wb" for letter in "KV"]
        for name in (f"blocks.{unit.layer}.{name}" for name in names):
            if name in own:
                rows = (slice(None), unit.index) if name.endswith(("W_in", "W_gate")) else unit.index
                own[name][rows] = old[name][rows]
    return changed


def test_reverting_equals_a_model_with_the_old_weights(model, pre, questions):
    units = [(Head(1, 2),), (Head(2, 1), Head(2, 3), Head(0, 0)), (Neuron(1, 7), Neuron(3, 9)), (KVGroup(2, 0),)]
    for chosen in [one for one in units if model.cfg.n_key_value_heads or not isinstance(one[0], KVGroup)]:
        expected = evaluate(reverted(model, pre, chosen), questions)["log_prob"]
        (found,) = log_probs(model, questions, [Intervention(chosen, "revert")], pre=pre)
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(backends()[0] == "bridge", reason="computes with HookedTransformer's own modules")
def test_reverting_at_some_tokens_equals_hooks_written_by_hand(model, pre, questions):
    head, neuron = Head(1, 2), Neuron(2, 5)
    (found,) = log_probs(model, questions, [Intervention((head, neuron), "revert", positions="subject")], pre=pre)
    kept = {}
    old, new = pre.blocks[1].attn, model.blocks[1].attn
    grouped = model.cfg.n_key_value_heads is not None
    expected = []
    for example in range(len(questions)):
        changed = places(questions, example, "subject")

        def keep(x, hook):
            kept[hook.name] = x

        def project(x, hook, changed=changed):
            letter = hook.name[-1].upper()
            normed = model.blocks[1].ln1(kept["blocks.1.hook_resid_pre"])
            weight, bias = (getattr(old, f"{kind}_{letter}")[head.index] for kind in "Wb")
            x[0, changed, head.index] = normed[0, changed] @ weight + bias
            return x

        def output(x, hook, changed=changed):
            z = kept["blocks.1.attn.hook_z"][0, changed, head.index]
            x[0, changed] += z @ (old.W_O[head.index] - new.W_O[head.index])
            return x

        def hidden(x, hook, changed=changed):
            block, before = model.blocks[2], pre.blocks[2].mlp
            stream = kept["blocks.2.hook_resid_pre" if model.cfg.parallel_attn_mlp else "blocks.2.hook_resid_mid"]
            normed = block.ln2(stream)[0, changed]
            up = normed @ before.W_in[:, neuron.index] + before.b_in[neuron.index]
            gate = normed @ before.W_gate[:, neuron.index] if model.cfg.gated_mlp else up
            value = before.act_fn(gate) * (up if model.cfg.gated_mlp else 1)
            kept["neuron"] = value
            x[0, changed, neuron.index] = value
            return x

        def written(x, hook, changed=changed):
            change = pre.blocks[2].mlp.W_out[neuron.index] - model.blocks[2].mlp.W_out[neuron.index]
            x[0, changed] += kept["neuron"][:, None] * change
            return x

        names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"]
        names += [] if model.cfg.parallel_attn_mlp else ["blocks.2.hook_resid_mid"]
        hooks = [(name, keep) for name in names]
        hooks += [(f"blocks.1.attn.hook_{letter}", project) for letter in ("q" if grouped else "qkv")]
        hooks += [("blocks.1.hook_attn_out", output), ("blocks.2.mlp.hook_post", hidden)]
        hooks += [("blocks.2.hook_mlp_out", written)]
        with torch.no_grad():
            logits = model.run_with_hooks(alone(questions, example), fwd_hooks=hooks)[0].log_softmax(-1)
        answer = questions.answers.iloc[example]
        tokens = questions.tokens[example, answer["start"] : answer["end"]]
        expected.append(float(logits[answer["start"] - 1 : answer["end"] - 1].gather(1, tokens[:, None]).sum()))
    assert found == pytest.approx(numpy.array(expected), abs=1e-4)


def left_padded(task: Task) -> Task:
    width = task.tokens.shape[1]
    shift = width - task.attention_mask.sum(1)
    order = (torch.arange(width)[None] - shift[:, None]) % width
    moved = shift[torch.as_tensor(task.answers["example"].to_numpy(copy=True))].numpy()
    answers = task.answers.assign(start=task.answers["start"] + moved, end=task.answers["end"] + moved)
    moved = {name: at.gather(1, order) for name, at in task.spans.items()}
    mask = task.attention_mask.gather(1, order)
    return replace(task, tokens=task.tokens.gather(1, order), attention_mask=mask, answers=answers, spans=moved)


def test_padding_on_either_side_gives_the_same_as_one_by_one(model, questions):
    plan = single([Head(1, 1), Head(3, 2)], "zero") + single([Head(2, 1)], "zero", positions="subject")
    options = {"metrics": ["log_prob"], "per_answer": True}
    right = run_interventions(model, questions, plan, **options)["log_prob"].to_numpy()
    left = run_interventions(model, left_padded(questions), plan, **options)["log_prob"].to_numpy()
    assert left.tolist() == right.tolist()
    assert (
        evaluate(model, left_padded(questions))["log_prob"].tolist() == evaluate(model, questions)["log_prob"].tolist()
    )
    for example in range(len(questions)):
        one = run_interventions(model, questions.select([example]), plan, **options)["log_prob"]
        assert right.reshape(len(plan), -1)[:, example] == pytest.approx(one.to_numpy(), abs=1e-4)


def test_the_batch_changes_nothing_beyond_rounding(model, questions):
    plan = single([Head(layer, head) for layer in range(4) for head in range(4)]) + pairs([Head(0, 1), Head(3, 1)])
    tables = [run_interventions(model, questions, plan, tokens=tokens) for tokens in (16, 100, 4096)]
    for table in tables[1:]:
        assert table["log_prob"].to_numpy() == pytest.approx(tables[0]["log_prob"].to_numpy(), abs=1e-4)
        assert table["unit"].tolist() == [str("+".join(map(str, one.units))) for one in plan]


def test_memory_that_does_not_suffice_makes_batches_smaller(model, questions, monkeypatch):
    plan = single([Head(layer, head) for layer in range(4) for head in range(4)])
    expected = run_interventions(model, questions, plan)["log_prob"].to_numpy()
    run, refused = engine_module.Forward.run, []

    def scarce(self, starts, *rest):
        if len(starts) * len(self.active) > 30:
            refused.append(len(starts))
            raise torch.OutOfMemoryError("no room")
        return run(self, starts, *rest)

    monkeypatch.setattr(engine_module.Forward, "run", scarce)
    assert run_interventions(model, questions, plan)["log_prob"].to_numpy() == pytest.approx(expected, abs=1e-4)
    assert refused

    def none(self, starts, *rest):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:129] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(engine_module.Forward, "run", none)
    with pytest.raises(CircuitsError, match="memory does not suffice to run one example of qa_ood alone"):
        run_interventions(model, questions, plan)


def test_means_and_estimates_shrink_with_memory_too(model, questions, monkeypatch):
    plan = single([Head(1, 1), Head(3, 2)], "mean_by_position") + single([Head(2, 0)], "zero")
    exact = run_interventions(model, questions, plan)["log_prob"].to_numpy()
    estimated = screen_interventions(model, questions, plan)["estimate"].to_numpy()
    of, refused = CleanRun.of.__func__, []

    def scarce(cls, layers, *rest):
        if len(layers.tree.nodes) > 1:
            refused.append(len(layers.tree.nodes))
            raise MemoryError
        return of(cls, layers, *rest)

    monkeypatch.setattr(CleanRun, "of", classmethod(scarce))
    assert run_interventions(model, questions, plan)["log_prob"].to_numpy() == pytest.approx(exact, abs=1e-4)
    assert screen_interventions(model, questions, plan)["estimate"].to_numpy() == pytest.approx(estimated, abs=1e-4)
    assert len(refused) > 3


def test_means_that_fail_half_way_are_not_counted_twice(model, questions, monkeypatch):
    plan = [Intervention((Head(1, 1), Neuron(2, 3)), "mean")]
    expected = run_interventions(model, questions, plan)["log_prob"].to_numpy()
    add, calls = torch.Tensor.index_add_, []

    def scarce(self, *rest):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return add(self, *rest)

    monkeypatch.setattr(torch.Tensor, "index_add_", scarce)
    assert run_interventions(model, questions, plan)["log_prob"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_cumulative_changes_are_all_in_place(model, questions):
    ranking = [Head(3, 1), Head(0, 2), Head(1, 0)]
    table = run_interventions(model, questions, cumulative(ranking), metrics=["log_prob"], per_answer=True)
    for count in (1, 2, 3):
        expected = by_hand(model, questions, Intervention(tuple(ranking[:count])))
        found = table["log_prob"].to_numpy().reshape(3, -1)[count - 1]
        assert found == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_metrics_equal_their_definitions(model, tasks):
    target, source = (task.select([0, 3, 4]) for task in (tasks["qa_ood"], pair_people(tasks["qa_ood"])))
    one, head = Intervention((Head(2, 1),)), Head(2, 1)

    def twice(logits, known):
        return 2 * known.total(known.chosen(logits, known.targets))

    names = ["exact_match", "first_token", "log_prob", "logit_diff", "kl", twice]
    table = run_interventions(model, target, [one], source=source, metrics=names, per_answer=True)

    def zero(z, hook):
        z[:, :, head.index] = 0
        return z

    for example in range(len(target)):
        tokens, start, end = alone(target, example), target.answers["start"][example], target.answers["end"][example]
        logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.attn.hook_z", zero)])[0, start - 1 : end - 1]
        clean = model(tokens)[0, start - 1 : end - 1].log_softmax(-1)
        targets, foil = tokens[0, start:end], source.tokens[example, source.answers["start"][example]]
        row = table.iloc[example]
        assert row["exact_match"] == float((logits.argmax(-1) == targets).all())
        assert row["first_token"] == float(logits[0].argmax() == targets[0])
        chosen = logits.gather(1, targets[:, None])
        assert row["log_prob"] == pytest.approx(float((chosen[:, 0] - logits.logsumexp(-1)).sum()), abs=1e-4)
        assert row["twice"] == pytest.approx(2 * float(chosen.sum()), abs=1e-3)
        assert row["logit_diff"] == pytest.approx(float(logits[0, targets[0]] - logits[0, foil]), abs=1e-4)
        divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), clean, log_target=True, reduction="sum")
        assert row["kl"] == pytest.approx(float(divergence), abs=1e-4)
        assert row["kl_effect"] == pytest.approx(row["kl"], abs=1e-5)


def test_a_divergence_is_not_tested_against_none(model, questions):
    one = [Intervention((Head(1, 0),))]
    table = run_interventions(model, questions, one, metrics=("log_prob", "kl"))
    again = effects_table(run_interventions(model, questions, one, metrics=("log_prob", "kl"), per_answer=True))
    for found in (table, again):
        assert {"log_prob_effect_p", "log_prob_effect_q", "kl_effect", "kl_effect_low"} <= set(found)
        assert not {"kl_effect_p", "kl_effect_q"} & set(found)


def test_a_table_made_from_answers_is_the_one_that_the_run_makes(model, tasks):
    plan = single([Head(1, 1), Head(2, 2)]) + single([Head(2, 2)], "mean")
    asked = {"source": pair_people(tasks["qa_ood"]), "metrics": ["exact_match", "log_prob", "logit_diff", "kl"]}
    table = run_interventions(model, tasks["qa_ood"], plan, **asked)
    again = effects_table(run_interventions(model, tasks["qa_ood"], plan, per_answer=True, **asked))
    pandas.testing.assert_frame_equal(again[list(table)], table, check_exact=True)


def test_effects_have_the_intervals_and_tests_of_their_people(model, tasks):
    task = tasks["qa_ood"].select(range(24))
    assert task.answers["group"].nunique() < len(task.answers)
    plan = single([Head(1, 1), Head(2, 2), Head(3, 0)])
    table = run_interventions(model, task, plan, metrics=["log_prob", "first_token"])
    answers = run_interventions(model, task, plan, metrics=["log_prob", "first_token"], per_answer=True)
    clean = evaluate(model, task)
    assert answers["changed"].all()
    for metric in ("log_prob", "first_token"):
        for row, units in enumerate(["L1H1", "L2H2", "L3H0"]):
            own = answers[answers["unit"] == units]
            before = (own[metric] - own[f"{metric}_effect"]).to_numpy()
            assert before == pytest.approx(clean[metric].to_numpy(dtype=float), abs=1e-4)
            kind = "real" if metric == "log_prob" else "binary_difference"
            alone = paired(own[metric].tolist(), before, own["group"].tolist(), kind=kind)
            found = [table[f"{metric}_effect{ending}"][row] for ending in ("", "_low", "_high", "_p")]
            assert found == pytest.approx([alone.difference, alone.low, alone.high, alone.p_value], abs=1e-6)
        p, q = (table[f"{metric}_effect_{name}"].to_numpy() for name in "pq")
        order = numpy.argsort(p)
        by_hand = [min(min(p[order[j]] * 3 / (j + 1) for j in range(i, 3)), 1) for i in range(3)]
        assert q[order] == pytest.approx(by_hand)


def test_an_interval_follows_from_the_metric_and_not_from_the_values(model, tasks):
    def constant(logits, known):
        return known.total(0 * logits[..., 0])

    task = tasks["qa_ood"].select(range(8))
    table = run_interventions(model, task, single([Head(1, 1)]), metrics=["exact_match", constant])
    assert table["constant_effect"].tolist() == [0]
    assert table[["constant_effect_low", "constant_effect_high"]].isna().all(axis=None)
    assert table["constant_effect_p"].tolist() == [1]
    answers = run_interventions(model, task, single([Head(1, 1)]), metrics="exact_match", per_answer=True)
    low, high = intervals(
        answers["exact_match_effect"].to_numpy(), answers["group"].to_numpy(), kind="binary_difference"
    )
    assert table[["exact_match_effect_low", "exact_match_effect_high"]].values.tolist() == [[float(low), float(high)]]
    assert low < high


@pytest.fixture
def unequal(tasks) -> Task:
    """Questions of several lengths, so that late positions are in few of them."""
    task = tasks["qa_ood"]
    starts = task.answers["start"].to_numpy()
    chosen = [int(numpy.flatnonzero(starts == start)[0]) for start in numpy.unique(starts)]
    assert len(chosen) > 2
    return task.select([*chosen, *[place for place in range(6) if place not in chosen]])


def test_an_effect_at_a_position_is_the_mean_over_the_prompts_that_have_it(model, unequal):
    longest = int(unequal.answers["end"].max())
    plan = [Intervention((Component(1, "resid_post"),), positions=position) for position in range(longest - 1)]
    clean = by_hand(model, unequal, Intervention((Head(0, 0),), positions=longest))
    counts, means = [], []
    for one in plan:
        changed = by_hand(model, unequal, one) - clean
        acted = [row for row, end in enumerate(unequal.answers["end"]) if one.positions < end - 1]
        counts.append(len(acted))
        means.append(sum(changed[row] for row in acted) / len(acted))
    assert min(counts) < max(counts) == len(unequal)
    table = run_interventions(model, unequal, plan, metrics=["log_prob"])
    assert table["answers"].tolist() == counts
    assert table["log_prob_effect"].tolist() == pytest.approx(means, abs=1e-4)
    ranked = table["log_prob_effect"].abs().sort_values(ascending=False, kind="stable").index.tolist()
    assert ranked == sorted(range(len(plan)), key=lambda place: -abs(means[place]))
    answers = run_interventions(model, unequal, plan, metrics=["log_prob"], per_answer=True)
    assert answers.groupby("positions", sort=False)["changed"].sum().tolist() == counts
    assert (answers.loc[~answers["changed"], "log_prob_effect"] == 0).all()
    screened = screen_interventions(model, unequal, plan)
    assert screened["answers"].tolist() == counts
    for row in (0, len(plan) - 1):
        having = [place for place, end in enumerate(unequal.answers["end"]) if row < end - 1]
        alone = screen_interventions(model, unequal.select(having), [plan[row]])["estimate"][0]
        assert screened["estimate"][row] == pytest.approx(alone, abs=1e-4)


def test_only_answers_behind_a_position_count_and_patches_need_a_match(model, tasks, tmp_path, tokenizer):
    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=3, row="biography"))
    biographies = dataset.task("bio", tokenizer).select([0, 1])
    middle = int(biographies.answers["start"].median())
    table = run_interventions(model, biographies, [Intervention((Head(1, 1),), positions=middle)])
    assert table["answers"][0] == sum(middle < end - 1 for end in biographies.answers["end"])
    target = tasks["qa_ood"].select([0, 3, 7])
    source = pair_formats(target, tasks["bio"])
    matched = set(map(tuple, matching_positions(source, target)[:, [0, 2]].tolist()))
    places_ = sorted({place for _, place in matched})
    plan = [Intervention((Head(1, 2),), "patch", positions=place) for place in places_]
    found = run_interventions(model, target, plan, source=source)["answers"].tolist()
    assert found == [sum((example, place) in matched for example in range(3)) for place in places_]
    assert min(found) < 3


def test_half_precision_follows_float32(huggingface, tokenizer, questions):
    plan = single([Head(layer, head) for layer in range(4) for head in range(4)])
    full = run_interventions(load_model(huggingface, tokenizer=tokenizer), questions, plan)
    model = load_model(huggingface, dtype="bfloat16", tokenizer=tokenizer)
    half = run_interventions(model, questions, plan)
    assert half.attrs["arithmetic"] == str(arithmetic(model)).removeprefix("torch.")
    assert half["log_prob_effect"].corr(full["log_prob_effect"], "spearman") > 0.9


def test_the_model_is_left_as_it_was(model, questions):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_interventions(model, questions, single([Head(1, 1)]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def one_per_token(logits, known):
    return logits[..., 0] + len(known.targets)


@pytest.mark.parametrize(
    ("units", "positions", "sentence"),
    [
        ("L0H0", "all", r"the units of an intervention are 'L0H0': give a tuple, such as \(Head\(2, 1\),\)"),
        (Head(0, 0), "all", "give a tuple"),
        (("L0H0",), "all", r"'L0H0' is no unit: give one such as Head\(2, 1\) or parse_unit"),
        ((Head(0, 0),), 1.5, "there are no positions 1.5: give a number or the name of a span"),
        ((Head(0, 0),), None, "there are no positions None"),
    ],
)
def test_what_is_no_unit_or_position_is_refused(units, positions, sentence, unchecked):
    with pytest.raises(CircuitsError, match=sentence):
        Intervention(units, positions=positions)


def test_positions_may_come_from_a_table(unchecked):
    assert Intervention((Head(0, 0),), positions=numpy.int64(2)) == Intervention((Head(0, 0),), positions=2)


@pytest.mark.parametrize(
    ("units", "options", "extra", "sentence"),
    [
        ((), {}, {}, "an intervention needs a unit"),
        ((Head(0, 0), Head(0, 0)), {}, {}, "names a unit twice"),
        ((Head(0, 0),), {}, {"metrics": ["kl", "kl"]}, "two metrics are called kl"),
        ((Head(0, 0),), {"mode": "max"}, {}, "there is no mode 'max': choose from zero, mean"),
        ((Head(0, 0),), {"site": "post"}, {}, "L0H0 has no site 'post': choose from z, q, k, v, pattern"),
        ((Component(0, "attn_out"),), {"site": "z"}, {}, "L0.attn_out has no site 'z': leave it out"),
        ((Head(0, 0),), {"positions": "verb"}, {}, "has no span 'verb': choose from all, answer, last, subject"),
        ((Head(0, 0),), {"positions": -1}, {}, "positions count from 0"),
        ((Head(0, 0),), {"positions": 99}, {}, "no example of qa_ood has a position 99"),
        ((Head(0, 0),), {"mode": "mean", "site": "pattern"}, {}, "use mean_by_position"),
        ((Head(0, 0),), {"mode": "revert", "site": "z"}, {}, "leave the site out"),
        ((Component(0, "attn_out"),), {"mode": "revert"}, {}, "has no weights of its own to revert"),
        ((Head(0, 0),), {"mode": "revert"}, {}, "give pre"),
        ((Head(0, 0),), {"mode": "patch"}, {}, "give source"),
        ((Head(9, 0),), {}, {}, "there is no head L9H0: the model has layers 0 to 3"),
        ((Component(9, "attn_out"),), {}, {}, "there is no L9.attn_out: the model has layers 0 to 3"),
        ((Head(0, 0),), {}, {"metrics": ["speed"]}, "there is no metric 'speed'"),
        ((Head(0, 0),), {}, {"metrics": ["logit_diff"]}, "needs a foil for each answer"),
        ((Head(0, 0),), {}, {"tokens": 0}, "give one or more"),
        ((Head(0, 0),), {}, {"metrics": [one_per_token]}, "must give one number for each answer"),
    ],
)
def test_bad_input_is_refused(model, questions, units, options, extra, sentence):
    with pytest.raises(CircuitsError, match=sentence):
        run_interventions(model, questions, [Intervention(units, **options)], **extra)


def test_what_an_architecture_has_not_is_refused(model, questions):
    if model.cfg.parallel_attn_mlp:
        with pytest.raises(CircuitsError, match="attention and MLP are parallel in this model"):
            run_interventions(model, questions, [Intervention((Component(0, "resid_mid"),))])
    if model.cfg.n_key_value_heads is not None:
        with pytest.raises(CircuitsError, match="L0H0 has no k of its own in this model: act on its key/value group"):
            run_interventions(model, questions, [Intervention((Head(0, 0),), site="k")])
    source = questions.select([0, 1])
    with pytest.raises(CircuitsError, match="a source pairs examples: it has 2, the task qa_ood has 3"):
        run_interventions(model, questions, [Intervention((Head(0, 0),))], source=source, metrics=["logit_diff"])
    with pytest.raises(CircuitsError, match="no token at answer of qa_ood has a match in the source"):
        run_interventions(
            model, questions, [Intervention((Head(0, 0),), "patch", positions="answer")], source=questions
        )
    with pytest.raises(CircuitsError, match="logit_diff compares with another answer, but the source has the same"):
        run_interventions(model, questions, [Intervention((Head(0, 0),))], source=questions, metrics=["logit_diff"])
    with pytest.raises(CircuitsError, match="nothing to run"):
        run_interventions(model, questions, [])
    with pytest.raises(CircuitsError, match="no other example of"):
        run_interventions(model, questions.select([0]), [Intervention((Head(0, 0),), "resample")])
    short = questions.select([0])
    longer = max(range(len(questions)), key=lambda example: int(questions.attention_mask[example].sum()))
    if int(questions.attention_mask[longer].sum()) > int(short.attention_mask.sum()):
        with pytest.raises(CircuitsError, match="has no token at position"):
            run_interventions(
                model,
                questions.select([longer]),
                [Intervention((Head(0, 0),), "mean_by_position")],
                reference=short,
            )


def test_what_stands_later_in_the_model_prevails(model, questions):
    later = Component(1, "attn_out")
    for units in ((Head(1, 2), later), (later, Head(1, 2))):
        both, alone_, head = log_probs(model, questions, [Intervention(u) for u in (units, (later,), (Head(1, 2),))])
        assert both == pytest.approx(alone_, abs=1e-6)
        assert both != pytest.approx(head, abs=1e-3)


def test_a_source_that_is_no_pair_is_refused(model, tasks):
    target = tasks["qa_ood"].select(range(6))
    source = pair_people(target, among=tasks["qa_ood"])
    patch = [Intervention((Head(1, 1),), "patch")]
    attributes = target.answers["attribute"].tolist()
    other = next(place for place, attribute in enumerate(attributes) if attribute != attributes[0])
    order = [other, *(place for place in range(6) if place != other)]
    with pytest.raises(CircuitsError, match="example 0 of qa_ood is no pair of that of qa_ood: it tells the"):
        run_interventions(model, target, patch, source=source.select(order))
    biographies = pair_formats(source, tasks["bio"])
    with pytest.raises(CircuitsError, match="example 0 of bio is no pair of .*: it is about another person in other"):
        run_interventions(model, target, patch, source=biographies)


def test_the_logit_difference_is_taken_where_the_answers_first_differ(model, tasks):
    target = tasks["qa_ood"].select(range(6))
    source = pair_people(target, among=tasks["qa_ood"])
    long = [
        i
        for i in range(6)
        if min(int(task.answers["end"][i] - task.answers["start"][i]) for task in (target, source)) > 1
    ]
    target, source = target.select(long), source.select(long)
    foils = source.tokens.clone()
    for ours, theirs in zip(target.answers.itertuples(), source.answers.itertuples(), strict=True):
        foils[theirs.example, theirs.start] = target.tokens[ours.example, ours.start]
        if foils[theirs.example, theirs.start + 1] == target.tokens[ours.example, ours.start + 1]:
            foils[theirs.example, theirs.start + 1] = 5
    alike = replace(source, tokens=foils)
    head = Intervention((Head(1, 1),))
    table = run_interventions(model, target, [head], source=alike, metrics="logit_diff", per_answer=True)
    clean = (table["logit_diff"] - table["logit_diff_effect"]).tolist()
    for ours, theirs, found in zip(target.answers.itertuples(), alike.answers.itertuples(), clean, strict=True):
        logits = model(target.tokens[ours.example, : ours.start + 1][None])[0, -1]
        one, two = target.tokens[ours.example, ours.start + 1], foils[theirs.example, theirs.start + 1]
        assert found == pytest.approx(float(logits[one] - logits[two]), abs=1e-3)
        assert found != 0
    # one is the beginning of the other: nothing tells them apart
    ends = source.answers["start"] + 1
    shorter = replace(alike, answers=source.answers.assign(end=ends))
    message = f"cannot tell the answer {target.answers['value'][0]!r} from its .*: give a source with another answer"
    with pytest.raises(CircuitsError, match=message):
        run_interventions(model, target, [head], source=shorter, metrics="logit_diff")


@pytest.mark.parametrize("which", ["model", "pre"])
def test_functions_hooked_into_a_model_are_refused(model, pre, questions, which):
    hooked = model if which == "model" else pre
    with (
        hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)]),  # noqa: ARG005
        pytest.raises(CircuitsError, match=r"a function is hooked into the model at blocks\.1\.attn\.hook_z"),
    ):
        run_interventions(model, questions, [Intervention((Head(1, 2),), "revert")], pre=pre)


def test_one_intervention_is_run_as_a_list_of_it_is(model, questions):
    head = Intervention((Head(1, 2),))
    for run in (run_interventions, screen_interventions):
        pandas.testing.assert_frame_equal(run(model, questions, head), run(model, questions, [head]))
