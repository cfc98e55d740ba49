"""The logit lens and direct contributions equal those of the hookable model's own cache, and add up to the logit."""

from dataclasses import replace

import numpy
import pytest

from circuits.figures import direct_logits_figure, logit_lens_figure
from circuits.models import load_model
from circuits.rankings import direct_logits, logit_lens
from circuits.tasks import Task
from tests.models.test_hookable import lively


@pytest.fixture(scope="module")
def task(tokenizer):
    return Task.from_prompts(
        [f"{name} Oakley was born in" for name in ("Priscilla", "Alexandra")],
        [" Paris", " Oslo"],
        tokenizer,
        foils=[" Oslo", " Paris"],
        name="born",
    )


def normalised(model, stream):
    """The final norm by hand."""
    bias = getattr(model.ln_final, "b", None)
    if bias is not None:
        stream = stream - stream.mean(-1, keepdim=True)
    scaled = stream / (stream.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt() * model.ln_final.w
    return scaled if bias is None else scaled + bias


def test_the_lens_equals_the_cache(model, task):
    table = logit_lens(model, task, example=1)
    length = int(task.answers.query("example == 1")["start"].min())
    answer = int(task.tokens[1, length])
    _, cache = model.run_with_cache(task.tokens[1:2, :length])
    streams = [cache["blocks.0.hook_resid_pre"]]
    streams += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(model.cfg.n_layers)]
    for layer, stream in enumerate(streams):
        told = (normalised(model, stream[0]) @ model.unembed.W_U + model.unembed.b_U).softmax(-1).detach()
        rows = table[table["layer"] == layer]
        assert numpy.allclose(rows["answer_probability"], told[:, answer], atol=1e-5)
        assert numpy.allclose(rows["probability"], told.max(-1).values, atol=1e-5)
        assert rows["answer_rank"].tolist() == ((told > told[:, answer : answer + 1]).sum(-1) + 1).tolist()
    assert logit_lens_figure(table.assign(token="<s>")).layout.xaxis.ticktext[0] == "&lt;s&gt;"
    figure = logit_lens_figure(table, "answer_probability")
    assert numpy.allclose(figure.data[0].z, table.pivot(index="layer", columns="position", values="answer_probability"))


@pytest.mark.parametrize("neurons", [False, True])
def test_direct_contributions_equal_the_cache_and_add_up(model, task, neurons):
    one = task.select([0])
    table = direct_logits(model, one, neurons=neurons).set_index("unit")
    length = int(one.answers["start"].min())
    tokens = [int(one.tokens[0, length]), int(one.foils.tokens[0, length])]
    logits, cache = model.run_with_cache(one.tokens[:, :length])
    logits = logits.detach()
    answer, foil = (float(logits[0, -1, token]) for token in tokens)
    assert table["logit"].sum() == pytest.approx(answer, abs=1e-4)
    assert table["logit_diff"].sum() == pytest.approx(answer - foil, abs=1e-4)
    whole = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0, -1]
    centred = hasattr(model.ln_final, "b")
    length_of = ((whole - whole.mean() * centred).square().mean() + model.cfg.eps).sqrt()

    def added(part):
        return float((part - part.mean() * centred) / length_of * model.ln_final.w @ model.unembed.W_U[:, tokens[0]])

    assert table.loc["L2H3", "logit"] == pytest.approx(
        added(cache["blocks.2.attn.hook_z"][0, -1, 3] @ model.blocks[2].attn.W_O[3]), abs=1e-4
    )
    assert table.loc["embedding", "logit"] == pytest.approx(added(cache["blocks.0.hook_resid_pre"][0, -1]), abs=1e-4)
    written = model.blocks[1].mlp.W_out * cache["blocks.1.mlp.hook_post"][0, -1][:, None]
    if neurons:
        assert table.loc["L1N7", "logit"] == pytest.approx(added(written[7]), abs=1e-4)
    else:
        assert table.loc["L1 MLP", "logit"] == pytest.approx(added(cache["blocks.1.hook_mlp_out"][0, -1]), abs=1e-4)


@pytest.mark.usefixtures("all_unchecked")
def test_means_over_examples_have_intervals_and_post_norms_add_up(task):
    model = load_model(lively("gemma2", 0))
    foils = replace(task.foils, tokens=task.foils.tokens % model.cfg.d_vocab)
    task = replace(task, tokens=task.tokens % model.cfg.d_vocab, foils=foils)
    table = direct_logits(model, task)
    totals = [direct_logits(model, task.select([example]))["logit"].sum() for example in range(2)]
    for example, total in enumerate(totals):
        length = int(task.answers.query("example == @example")["start"].min())
        logits = model(task.tokens[example : example + 1, :length])[0, -1].detach()
        cap = getattr(model.cfg, "output_logits_soft_cap", 0)
        capped = cap * numpy.tanh(total / cap) if cap > 0 else total
        assert capped == pytest.approx(float(logits[int(task.tokens[example, length])]), abs=1e-3)
    assert table["logit"].sum() == pytest.approx(numpy.mean(totals), abs=1e-4)
    assert (table["logit_low"] < table["logit"]).any()
    heat, bars = direct_logits_figure(table).data
    assert heat.z[1][1] == pytest.approx(table.set_index("unit").loc["L1H1", "logit_diff"])
    assert heat.zmin == -heat.zmax
    assert set(bars.y) <= set(table["unit"])
