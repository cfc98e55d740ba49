import sys
from dataclasses import replace
from functools import cache

import numpy
import pandas
import pytest
import torch
from captum.attr import IntegratedGradients

from circuits.consistency import input_signature, signature_means
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.models import editing, hook_name, hooked, load_model, parameters_of
from circuits.tasks import Task
from tests.fixtures import lively

PROMPTS = ["Rosalind Quinlan was born in", "Sabrina Merriweather is employed by"]
ANSWERS = [" Istanbul", " Ridgeline Group"]
SPANS = [
    {"subject": "Rosalind Quinlan", "relation": "born in"},
    {"subject": "Sabrina Merriweather", "relation": "employed by"},
]
#: Where each stands; the first token is the tokenizer's own.
PLACES = {"subject": [1, 2], "relation": [4, 5], "context": [3]}


def two_people(tokenizer, spans=SPANS):
    """Each is the only donor of the other."""
    return Task.from_prompts(PROMPTS, ANSWERS, tokenizer, spans=spans, groups=["Rosalind", "Sabrina"])


def log_probs(model, tokens, start, end):
    """A Hugging Face model's, of the tokens of each row from start to end."""
    with torch.no_grad():
        logits = model(tokens[:, :end]).logits.log_softmax(-1)
    chosen = logits[:, start - 1 : end - 1].gather(2, tokens[:, start:end, None])
    return chosen.sum((1, 2)).tolist()


def log_prob(model, tokens, start, end):
    return log_probs(model, tokens[None], start, end)[0]


@cache
def deaf(family):
    """No token hears of another: an answer hangs on the one before it alone."""
    model = load_model(lively(family), tokenizer=word_tokenizer())
    with editing(model), torch.no_grad():
        for name, weight in parameters_of(model).items():
            if name.endswith(("W_O", "b_O")):
                weight.zero_()
    return model


@pytest.fixture
def bio(tasks):
    return tasks["bio"].select(range(0, 179, 8))


def test_replacement_by_hand(huggingface, untouched, tokenizer):
    task = two_people(tokenizer)
    found = input_signature(untouched, task, per_answer=True).set_index(["example", "span"])
    assert len(found) == 6
    for answer in task.answers.itertuples():
        own, other = task.tokens[answer.example], task.tokens[1 - answer.example]
        clean = log_prob(huggingface, own, answer.start, answer.end)
        for span, places in PLACES.items():
            changed = own.clone()
            changed[places] = other[places]
            expected = clean - log_prob(huggingface, changed, answer.start, answer.end)
            row = found.loc[answer.example, span]
            assert row["effect"] == pytest.approx(expected, abs=1e-4)
            assert abs(expected) > 1e-3
            assert row["log_prob"] == pytest.approx(clean, abs=1e-4)
            assert (row["tokens"], row["donors"], row["place"]) == (len(places), 1, 0)


def test_the_effect_is_the_mean_over_donors(huggingface, untouched, bio):
    """With as many draws as there are answers every donor is drawn; who they are, by the slow obvious way."""
    found = input_signature(untouched, bio, per_answer=True, draws=len(bio)).set_index(["example", "span"])
    about = list(bio.answers.itertuples())

    def places(answer, span):
        named = [bio.spans[name][answer.example] for name in ("subject", "relation")]
        if span == "context":
            return [place for place in range(1, answer.start) if not any(at[place] for at in named)]
        return [place for place in range(answer.start) if bio.spans[span][answer.example, place]]

    seen = set()
    for answer in about[:6]:
        own = bio.tokens[answer.example]
        clean = log_prob(huggingface, own, answer.start, answer.end)
        for span in ("subject", "relation", "context"):
            at, rows = places(answer, span), []
            for other in about:
                theirs = places(other, span)
                tokens = bio.tokens[other.example]
                if other.group == answer.group or other.attribute == answer.attribute or other.value == answer.value:
                    continue
                if len(theirs) == len(at) and tokens[theirs].tolist() != own[at].tolist():
                    changed = own.clone()
                    changed[at] = tokens[theirs]
                    rows.append(changed)
            row = found.loc[answer.example, span]
            if at and rows:
                left = log_probs(huggingface, torch.stack(rows), answer.start, answer.end)
                assert row["donors"] == len(rows)
                assert row["effect"] == pytest.approx(clean - numpy.mean(left), abs=1e-4)
                seen.add(span)
            elif not at:
                assert (row["effect"], row["donors"], row["tokens"]) == (0, 0, 0)
    assert seen == {"subject", "relation", "context"}


@pytest.mark.parametrize("method", ["replacement", "integrated_gradients"])
@pytest.mark.parametrize("span", ["relation", "context"])
def test_an_answer_that_hangs_on_one_span_gives_it_all_of_the_signature(family, tokenizer, method, span):
    """Which span that is, is a matter of what the last words are called."""
    spans = (
        SPANS
        if span == "relation"
        else [{"subject": "Rosalind", "relation": "born"}, {"subject": "Sabrina", "relation": "employed"}]
    )
    prompts = replace(two_people(tokenizer, spans))
    each = input_signature(deaf(family), prompts, method=method, per_answer=True, steps=16)
    others = each[each["span"] != span]
    assert others["effect"].abs().max() < 1e-4
    assert each.loc[each["span"] == span, "effect"].abs().min() > 0.01
    table = signature_means(each).set_index("span")
    assert table.loc[span, "share"] == pytest.approx(1, abs=1e-3)
    assert table["share"].sum() == pytest.approx(1)


def test_integrated_gradients_by_hand(family, tokenizer):
    """A Riemann sum over Hugging Face's model, and captum's own on it."""
    # one of whose answers much is gained on the way
    huggingface = lively(family, seed=2)
    untouched = load_model(lively(family, seed=2), tokenizer=tokenizer)
    task = two_people(tokenizer)
    found = input_signature(untouched, task, method="integrated_gradients", per_answer=True, steps=32)
    embedding = huggingface.get_input_embeddings().weight.detach()
    before = [task.tokens[answer.example, 1 : answer.start] for answer in task.answers.itertuples()]
    mean = embedding[torch.cat(before)].mean(0)
    for answer in task.answers.itertuples():
        tokens = task.tokens[answer.example, : answer.end]
        stream = embedding[tokens]
        baseline = stream.clone()
        baseline[1 : answer.start] = mean

        def scored(inputs, tokens=tokens, answer=answer):
            logits = huggingface(inputs_embeds=inputs).logits.log_softmax(-1)
            return sum(logits[:, place - 1, tokens[place]] for place in range(answer.start, answer.end))

        steps = 100
        alphas = (torch.arange(steps) + 0.5) / steps
        path = (baseline + alphas[:, None, None] * (stream - baseline)).requires_grad_()
        mean_gradient = torch.autograd.grad(scored(path).sum(), path)[0].mean(0)
        summed = (mean_gradient * (stream - baseline)).sum(-1)
        captums = IntegratedGradients(scored).attribute(stream[None], baseline[None], n_steps=32)[0].sum(-1)
        rows = found[found["example"] == answer.example].set_index("span")
        for span, places in PLACES.items():
            assert rows.loc[span, "effect"] == pytest.approx(float(captums[places].sum()), abs=2e-3)
            assert rows.loc[span, "effect"] == pytest.approx(float(summed[places].sum()), abs=0.02)
        # what the spans' attributions add up to
        with torch.no_grad():
            gained = float(scored(stream[None]) - scored(baseline[None]))
        assert rows["effect"].sum() - gained == pytest.approx(rows["delta"].iloc[0], abs=1e-3)
        assert rows["delta"].abs().max() < 0.01 * abs(gained)
        assert abs(gained) > 0.1


def test_more_steps_come_nearer(untouched, bio):
    few, many = (
        input_signature(untouched, bio.select(range(3)), method="integrated_gradients", steps=steps)["delta"].iloc[0]
        for steps in (4, 32)
    )
    assert many < few / 4


def test_learned_positions_stay_in_the_baseline(tokenizer):
    """With all embeddings alike the baseline is the prompt, wherever its tokens stand."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    gpt2 = GPT2LMHeadModel(config)
    with torch.no_grad():
        gpt2.transformer.wte.weight.copy_(gpt2.transformer.wte.weight[:1].expand(len(tokenizer), -1))
        gpt2.transformer.wpe.weight.normal_()
    model = load_model(gpt2, tokenizer=tokenizer)
    found = input_signature(model, two_people(tokenizer), method="integrated_gradients", per_answer=True)
    assert found["effect"].abs().max() < 1e-6


def test_answers_of_a_biography_have_places_and_relations_of_their_own(huggingface, untouched, tokenizer, tmp_path):
    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=4, row="biography", biographies=2))
    task = dataset.task("bio", tokenizer)
    each = input_signature(untouched, task, per_answer=True)
    answers = task.answers.assign(place=task.answers.groupby("example").cumcount())
    everywhere = input_signature(untouched, task, local=(), per_answer=True)
    for span, found in each.groupby("span", sort=False):
        assert found["place"].tolist() == answers["place"].tolist()
        assert found["attribute"].tolist() == answers["attribute"].tolist()
        whole = everywhere[everywhere["span"] == span]
        for answer, row, all_of_it in zip(answers.itertuples(), found.itertuples(), whole.itertuples(), strict=True):
            earlier = answers[(answers["example"] == answer.example) & (answers["place"] < answer.place)]
            since = int(earlier["end"].max()) if len(earlier) else 0
            count = {name: int(at[answer.example, : answer.start].sum()) for name, at in task.spans.items()}
            own = int(task.spans["relation"][answer.example, since : answer.start].sum())
            count["context"] = answer.start - 1 - count["subject"] - own
            assert row.tokens == {**count, "relation": own}[span]
            assert all_of_it.tokens == {**count, "context": answer.start - 1 - sum(count[n] for n in task.spans)}[span]
            tokens = task.tokens[answer.example]
            if span == "subject":
                assert row.log_prob == pytest.approx(log_prob(huggingface, tokens, answer.start, answer.end), abs=1e-4)
    known = each.groupby(["example", "start"])["effect"].transform(lambda effects: effects.notna().all())
    by_place = signature_means(each[known], by=["place"])
    chosen = each[known & (each["place"] == 0) & (each["span"] == "subject")]["effect"]
    first = by_place[(by_place["place"] == 0) & (by_place["span"] == "subject")].iloc[0]
    assert (first["effect"], first["answers"]) == (pytest.approx(chosen.mean()), len(chosen))


def test_a_context_that_is_always_the_same_carries_nothing(untouched, tokenizer):
    prompts = [f"{name} was born in" for name in ("Rosalind Quinlan", "Sabrina Merriweather")]
    spans = [{"subject": prompt.removesuffix(" was born in")} for prompt in prompts]
    task = Task.from_prompts(prompts, [" Istanbul", " Paris"], tokenizer, spans=spans, groups=[0, 1])
    table = input_signature(untouched, task, ["subject"]).set_index("span")
    assert table.loc["context", "effect"] == pytest.approx(0, abs=1e-5)
    assert table.loc["subject", "share"] == pytest.approx(1, abs=1e-4)


def test_what_has_no_donor_is_left_out_and_counted(untouched, tokenizer):
    prompts = [*PROMPTS, "Priscilla Oakley earned a degree from"]
    spans = [*SPANS, {"subject": "Priscilla Oakley", "relation": "earned a degree from"}]
    task = Task.from_prompts(
        prompts, [*ANSWERS, " Pinecrest"], tokenizer, spans=spans, groups=["Rosalind", "Sabrina", "Priscilla"]
    )
    each = input_signature(untouched, task, per_answer=True)
    lacking = each[each["effect"].isna()]
    assert list(zip(lacking["example"], lacking["span"], strict=True)) == [(2, "relation")]
    table = signature_means(each).set_index("span")
    assert table["answers"].tolist() == [2, 2, 2]
    assert table["left_out"].tolist() == [1, 1, 1]
    assert table["without_donor"].to_dict() == {"subject": 0, "relation": 1, "context": 0}
    assert table.loc["subject", "effect"] == pytest.approx(each[(each["span"] == "subject")]["effect"][:2].mean())
    by_group = signature_means(each, by=["group"]).set_index(["group", "span"])
    assert by_group.loc["Priscilla", "answers"].tolist() == [0, 0, 0]
    assert by_group.loc["Priscilla", "share"].isna().all()
    assert by_group.loc["Sabrina", "share"].sum() == pytest.approx(1)
    with pytest.raises(CircuitsError, match="no answer has donors for all spans, not for relation: give more examples"):
        input_signature(untouched, task.select([1, 2]))


def test_shares_are_ratios_whose_intervals_hold_the_true_one():
    generator = numpy.random.default_rng(0)
    people, answers, held = 40, 3, 0
    for _ in range(300):
        # answers of one person go together
        level = generator.gamma(4, 1, people).repeat(answers)
        subject, context = (level * generator.gamma(9, scale / 9, people * answers) for scale in (3, 1))
        about = {"example": range(people * answers), "start": 4, "group": numpy.arange(people).repeat(answers)}
        rows = [
            pandas.DataFrame({**about, "span": name, "effect": value})
            for name, value in (("subject", subject), ("context", context))
        ]
        row = signature_means(pandas.concat(rows)).iloc[0]
        assert row["share"] == pytest.approx(subject.sum() / (subject + context).sum())
        held += row["share_low"] <= 0.75 <= row["share_high"]
    assert 0.91 < held / 300 < 0.99


def test_rows_apart(untouched, bio):
    each = input_signature(untouched, bio, per_answer=True)
    each = each[each.groupby(["example"])["effect"].transform(lambda effects: effects.notna().all())]
    table = signature_means(each, by=["attribute"])
    assert set(table["attribute"]) == set(bio.answers["attribute"])
    for (attribute, span), row in table.set_index(["attribute", "span"]).iterrows():
        effects = each[(each["attribute"] == attribute) & (each["span"] == span)]["effect"]
        assert (row["effect"], row["answers"]) == (pytest.approx(effects.mean()), len(effects))
    twice = pandas.concat([each.assign(model=name) for name in ("one", "two")])
    assert len(signature_means(twice, by=["model"])) == 6
    with pytest.raises(
        CircuitsError, match="an answer has several rows for one span, or none: give each model that was"
    ):
        signature_means(twice)
    with pytest.raises(CircuitsError, match="the answers say no 'colour': take rows apart by columns of theirs"):
        signature_means(each, by=["colour"])


def test_donors_are_drawn_by_the_seed(untouched, bio):
    one, same, other = (
        input_signature(untouched, bio, ["subject"], draws=2, seed=seed)["effect"].tolist() for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_what_cannot_be_done_is_refused(untouched, bio, monkeypatch):
    for options, message in (
        ({"method": "guess"}, "no method 'guess': choose from replacement, integrated_gradients"),
        ({"spans": ["verb"]}, "bio has no span 'verb': choose from"),
        ({"spans": ["context"]}, "the span 'context' is that of all other tokens: give this one another name"),
        ({"draws": 0}, "the number of draws is 0: 1 is the least"),
        ({"steps": 0}, "the number of steps is 0: 1 is the least"),
        ({"by": ["colour"]}, "the answers say no 'colour': take rows apart by columns of theirs"),
    ):
        with pytest.raises(CircuitsError, match=message):
            input_signature(untouched, bio, **options)
    with (
        hooked(untouched, {hook_name(untouched, (1, "z")): lambda z, hook: z}),  # noqa: ARG005
        pytest.raises(
            CircuitsError, match=r"hooked into the model at blocks\.1\.attn\.hook_z: integrated gradients are"
        ),
    ):
        input_signature(untouched, bio, method="integrated_gradients")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(CircuitsError, match=r"need the package captum: install fact-circuits\[attributions\]"):
        input_signature(untouched, bio, method="integrated_gradients")
