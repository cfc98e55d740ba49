import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.masks import (
    ParameterMask,
    ablate_at,
    ablate_mask,
    ablation_summary,
    covered_parameters,
    graft,
    graft_at,
    mean,
    revert,
    unit_mask,
    zero,
)
from circuits.metrics import evaluate
from circuits.models import (
    fingerprint,
    load_huggingface,
    parameters_of,
    positional_parameters,
    save_model,
)
from circuits.units import Head, KVGroup, Neuron
from tests.fixtures import loaded


@pytest.fixture(scope="session")
def task(tasks):
    return tasks["qa_id"].select(range(12))


def state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def units_of_all_kinds(model):
    units = [Head(0, 1), Head(2, 3), KVGroup(1, 0), KVGroup(3, 1)]
    return units + [Neuron(layer, neuron) for layer in (0, 1, 3) for neuron in range(0, 96, 2)]


@pytest.fixture
def distant(family):
    """Two models that differ much, so that a mistake shows."""
    return loaded(family), loaded(family, seed=1)


def test_a_graft_at_all_positions_is_a_graft_and_at_none_is_none(distant, task):
    pre, fine_tuned = distant
    mask = unit_mask(fine_tuned, units_of_all_kinds(pre))
    before, plain = state(pre), pre(task.tokens)
    with graft(pre, mask, fine_tuned):
        grafted = pre(task.tokens)
    assert (grafted - plain).abs().max() > 0.5
    with graft_at(pre, mask, fine_tuned, task=task, positions=torch.ones_like(task.tokens, dtype=torch.bool)):
        assert torch.allclose(pre(task.tokens), grafted, atol=1e-4)
    with graft_at(pre, mask, fine_tuned, task=task, positions=torch.zeros_like(task.tokens, dtype=torch.bool)):
        assert torch.equal(pre(task.tokens), plain)
    assert equal(state(pre), before)
    assert torch.equal(pre(task.tokens), plain)


def test_a_graft_at_some_positions_is_reading_token_by_token_with_the_weights_of_each(distant, task, tmp_path):
    pre, fine_tuned = distant
    mask = unit_mask(fine_tuned, units_of_all_kinds(pre)).permuted(1)
    positions = task.span("subject") | task.span("last")
    assert 0.2 < positions.float().mean() < 0.8
    save_model(pre, tmp_path / "pre")
    with graft(pre, mask, fine_tuned):
        save_model(pre, tmp_path / "grafted")
    own, other = (load_huggingface(tmp_path / name) for name in ("pre", "grafted"))
    task = task.select(range(5))
    positions = positions[:5, : task.tokens.shape[1]]
    with graft_at(pre, mask, fine_tuned, task=task, positions=positions), torch.no_grad():
        logits = pre(task.tokens)
        scores = evaluate(pre, task, batch_size=2)
    for example in range(len(task)):
        cache = None
        for place in range(int(task.attention_mask[example].sum())):
            model = other if positions[example, place] else own
            with torch.no_grad():
                read = model(task.tokens[example, place][None, None], past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            # embeddings, norms and unembedding are alike in both
            assert torch.allclose(logits[example, place], read.logits[0, 0], atol=1e-3)
    log_probs = logits.log_softmax(-1)
    for row in scores.itertuples():
        at = torch.arange(row.start, row.end)
        expected = log_probs[row.example, at - 1, task.tokens[row.example, at]].sum()
        assert row.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_grafting_at_positions_refuses_what_it_cannot_do(distant, task, tasks):
    pre, fine_tuned = distant
    mask = unit_mask(fine_tuned, [Head(0, 0)])
    positions = task.span("subject")
    with (
        pytest.raises(CircuitsError, match="no example of qa_id"),
        graft_at(pre, mask, fine_tuned, task=task, positions=positions),
    ):
        evaluate(pre, tasks["bio"].select([0]))
    with pytest.raises(CircuitsError, match="the positions have shape .* they must be alike"):
        graft_at(pre, mask, fine_tuned, task=task, positions=positions[:3])
    with (
        pytest.raises(CircuitsError, match="was never run"),
        graft_at(pre, mask, fine_tuned, task=task, positions=positions),
    ):
        pass
    everything = ParameterMask(
        {name: torch.ones_like(value, dtype=torch.bool) for name, value in covered_parameters(fine_tuned).items()},
        fingerprint(fine_tuned),
    )
    with (
        pytest.raises(CircuitsError, match="cannot differ from"),
        graft_at(pre, everything, fine_tuned, task=task, positions=positions),
    ):
        pass
    with pytest.raises(CircuitsError, match=f"not for {fingerprint(pre)}"):
        graft_at(fine_tuned, mask, pre, task=task, positions=positions)
    # hooks are gone after an error
    with torch.no_grad():
        assert torch.isfinite(pre(tasks["bio"].select([0]).tokens)).all()


@pytest.fixture
def some(distant):
    """A fifth of all that can differ from position to position, norms and biases too."""
    model = distant[0]
    drawn = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(parameters_of(model)[name].shape, generator=drawn) < 0.2
        for name in positional_parameters(model)
    }
    return ParameterMask(masks, fingerprint(model))


def without(model, mask, pre, mode):
    """The weights themselves, ablated."""
    if mode == "revert":
        return revert(model, mask, pre, check_start=False)
    return {"zero": zero, "mean": mean}[mode](model, mask)


@pytest.mark.parametrize("mode", ["zero", "revert", "mean"])
def test_an_ablation_at_all_positions_is_one_of_the_weights_and_at_none_is_none(distant, some, task, mode):
    model, pre = distant
    before, plain = state(model), model(task.tokens)
    with without(model, some, pre, mode):
        ablated = model(task.tokens)
    assert (ablated - plain).abs().max() > 0.5
    everywhere, options = torch.ones_like(task.tokens, dtype=torch.bool), {"mode": mode, "pre": pre}
    with ablate_at(model, some, task, positions=everywhere, **options):
        assert torch.allclose(model(task.tokens), ablated, atol=1e-4)
    with ablate_at(model, some, task, positions=~everywhere, **options):
        assert torch.equal(model(task.tokens), plain)
    assert equal(state(model), before)


@pytest.mark.parametrize("mode", ["zero", "revert"])
def test_an_ablation_at_some_positions_is_reading_token_by_token_with_the_weights_of_each(
    distant, some, task, tmp_path, mode
):
    model, pre = distant
    save_model(model, tmp_path / "own")
    with without(model, some, pre, mode):
        save_model(model, tmp_path / "ablated")
    own, ablated = (load_huggingface(tmp_path / name) for name in ("own", "ablated"))
    task = task.select(range(5))
    positions = task.span("subject")
    assert 0.1 < positions.float().mean() < 0.8
    with ablate_at(model, some, task, positions=positions, mode=mode, pre=pre), torch.no_grad():
        logits = model(task.tokens)
    log_probs = []
    for example in range(len(task)):
        cache, read = None, []
        for place in range(int(task.attention_mask[example].sum())):
            chosen = ablated if positions[example, place] else own
            with torch.no_grad():
                found = chosen(task.tokens[example, place][None, None], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            read.append(found.logits[0, 0])
            # the final norm and the unembedding are alike in both
            assert torch.allclose(logits[example, place], read[-1], atol=1e-3)
        log_probs.append(torch.stack(read).log_softmax(-1))
    table = ablate_mask(model, some, [task], pre=pre, mode=mode, draws=0, span="subject")
    expected = [
        sum(float(log_probs[row.example][at - 1, task.tokens[row.example, at]]) for at in range(row.start, row.end))
        for row in task.answers.itertuples()
    ]
    [at_span] = table[table["condition"] == "shared"].itertuples()
    assert at_span.log_prob == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert at_span.span == "subject"


def test_an_ablation_and_its_random_controls_act_at_the_tokens_of_one_span(distant, some, task):
    model, pre = distant
    tables = {
        span: ablate_mask(model, some, [task], pre=pre, mode="zero", draws=2, seed=3, span=span)
        for span in ("all", "subject", "last")
    }
    for span, table in tables.items():
        assert table["condition"].tolist() == ["none", "shared", "random", "random"]
        assert set(table["span"]) == {span}
        rows = table.set_index(["condition", "draw"])["log_prob"]
        assert rows["none", 0] == pytest.approx(evaluate(model, task)["log_prob"].mean(), abs=1e-5)
        for draw in range(2):
            with ablate_at(model, some.control(f"3/{draw}")[1], task, positions=task.span(span)):
                expected = evaluate(model, task)["log_prob"].mean()
            assert rows["random", draw] == pytest.approx(expected, abs=1e-5)
    found = [table.set_index("condition")["log_prob"]["shared"] for table in tables.values()]
    assert len({round(value, 2) for value in found}) == 3
    summary = ablation_summary(pandas.concat(tables.values()))
    assert summary["span"].tolist() == ["all", "subject", "last"]


def test_ablating_at_positions_refuses_what_it_cannot_do(distant, some, task, tasks):
    model, pre = distant
    positions = task.span("subject")
    with (
        pytest.raises(CircuitsError, match="no example of qa_id: only those may be run inside the block"),
        ablate_at(model, some, task, positions=positions),
    ):
        evaluate(model, tasks["bio"].select([0]))
    with pytest.raises(CircuitsError, match="the positions have shape .* they must be alike"):
        ablate_at(model, some, task, positions=positions[:3])
    with pytest.raises(CircuitsError, match="there is no mode 'invert'"):
        ablate_at(model, some, task, positions=positions, mode="invert")
    with pytest.raises(CircuitsError, match="reverting needs the model before fine-tuning: give pre"):
        ablate_at(model, some, task, positions=positions, mode="revert")
    with pytest.raises(CircuitsError, match=f"not for {fingerprint(pre)}"):
        ablate_at(pre, some, task, positions=positions)
    with pytest.raises(CircuitsError, match="qa_id has no span 'banana'"):
        ablate_mask(model, some, [task], mode="zero", span="banana")
    everything = {name: torch.ones_like(value, dtype=torch.bool) for name, value in covered_parameters(model).items()}
    with pytest.raises(CircuitsError, match=r"\w+\.\w+ cannot differ from position to position"):
        ablate_mask(model, ParameterMask(everything, fingerprint(model)), [task], mode="zero", span="subject")
    with torch.no_grad():
        assert torch.isfinite(model(tasks["bio"].select([0]).tokens)).all()
