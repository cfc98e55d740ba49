from dataclasses import replace

import numpy
import pytest
import torch

from circuits.consistency import linear_cka, representation_consistency
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset
from circuits.models import hook_name, shape_of
from circuits.statistics import intervals
from circuits.tasks import Task

KEYS = ["group", "attribute"]


@pytest.fixture
def formats(tasks):
    """Biographies and questions of four people, six facts each; of several biographies the first counts."""
    chosen = [
        task.select(task.answers.loc[task.answers["group"].isin(people), "example"].tolist())
        for people in [sorted(set(tasks["qa_id"].answers["group"]))[:4]]
        for task in (tasks["bio"], tasks["qa_id"])
    ]
    return chosen


def by_hand(model, task, site, layer, place):
    """Activations at one place of each fact's first example, one forward pass each, ``{fact: activation}``."""
    found = {}
    for answer in task.answers.itertuples():
        fact = (answer.group, answer.attribute)
        if fact in found:
            continue
        tokens = task.tokens[answer.example][task.attention_mask[answer.example]][None]
        _, cache = model.run_with_cache(tokens, names_filter=hook_name(model, (layer, site)))
        found[fact] = cache[hook_name(model, (layer, site))][0, place(task, answer)].double()
    return found


def last(task, answer):
    return answer.start - 1


def last_of_subject(task, answer):
    return max(position for position in range(answer.start) if task.spans["subject"][answer.example, position])


def cosine(one, two):
    return float(one @ two / one.norm() / two.norm())


def hsic(x, y):
    """Gretton et al. 2005, with linear kernels."""
    centring = torch.eye(len(x)).double() - 1 / len(x)
    return float(torch.trace(x @ x.T @ centring @ y @ y.T @ centring)) / (len(x) - 1) ** 2


@pytest.mark.parametrize(("count", "width", "other"), [(30, 4, 7), (6, 20, 3), (5, 40, 50)])
def test_cka_is_that_of_its_definition(count, width, other):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator).double() + 3
    y = torch.randn(count, other, generator=generator).double() + x[:, :1] - 5
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 1


def test_cka_knows_no_rotation_and_no_scale_and_no_shift():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation - 7) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x.square()) < 0.9
    assert numpy.isnan(linear_cka(x, torch.ones(12, 3)))
    assert numpy.isnan(linear_cka(x, 5 + 1e-6 * torch.rand(12, 3, generator=generator)))


@pytest.mark.parametrize(
    ("site", "span", "place"),
    [
        ("resid_post", "last", last),
        ("mlp_out", "subject", last_of_subject),
        ("z", "last", last),
        ("k", "subject", last_of_subject),
    ],
)
def test_every_number_by_hand(untouched, formats, site, span, place):
    model, (bio, questions) = untouched, formats
    layer = 2
    ours, theirs = (by_hand(model, task, site, layer, place) for task in (bio, questions))
    facts = [fact for fact in ours if fact in theirs]
    assert len(facts) == 24
    each = representation_consistency(model, bio, questions, sites=[site], spans=[span], per_pair=True, batch_size=7)
    table = representation_consistency(model, bio, questions, sites=[site], spans=[span])
    some = next(iter(ours.values()))
    for head in range(1 if some.dim() == 1 else len(some)):
        x, y = (
            torch.stack([one[fact] if one[fact].dim() == 1 else one[fact][head] for fact in facts])
            for one in (ours, theirs)
        )
        cka = linear_cka(x, y)
        x, y = x - x.mean(0), y - y.mean(0)
        index = head if some.dim() > 1 else -1
        rows = table[(table["layer"] == layer) & (table["index"] == index)].set_index("kind")
        pairs = each[(each["layer"] == layer) & (each["index"] == index)]
        assert rows.loc["matched", "cka"] == pytest.approx(cka, abs=1e-4)
        for kind in ("matched", "same_attribute", "same_group"):
            cosines, hits = [], []
            for own, (group, attribute) in enumerate(facts):
                rivals = [
                    other
                    for other, (their_group, their_attribute) in enumerate(facts)
                    if other != own
                    and (kind != "same_attribute" or (their_group != group and their_attribute == attribute))
                    and (kind != "same_group" or (their_group == group and their_attribute != attribute))
                ]
                near = [cosine(x[own], y[other]) for other in rivals]
                cosines.append(cosine(x[own], y[own]) if kind == "matched" else sum(near) / len(near))
                hits.append(float(cosine(x[own], y[own]) > max(near) + 1e-5))
            found = pairs[pairs["kind"] == kind]
            assert list(zip(found["group"], found["attribute"], strict=True)) == facts
            assert found["cosine"].tolist() == pytest.approx(cosines, abs=1e-4)
            assert found["retrieved"].tolist() == hits
            row, groups = rows.loc[kind], [group for group, _ in facts]
            assert row["cosine"] == pytest.approx(numpy.mean(cosines), abs=1e-4)
            low, high = intervals(cosines, groups, kind="bounded_difference")
            assert (row["cosine_low"], row["cosine_high"]) == pytest.approx((float(low), float(high)), abs=1e-3)
            low, high = intervals(hits, groups, kind="share")
            expected = (numpy.mean(hits), float(low), float(high))
            assert (row["retrieval"], row["retrieval_low"], row["retrieval_high"]) == pytest.approx(expected)
            assert row["chance"] == pytest.approx(1 / (1 + len(rivals)))
            assert row["pairs"] == 24


def test_the_stream_is_that_of_hugging_faces_model(huggingface, untouched, formats):
    bio, questions = formats
    states = []
    for task in formats:
        answers = task.answers.drop_duplicates(KEYS)
        rows = [
            huggingface(task.tokens[[a.example], : a.start], output_hidden_states=True) for a in answers.itertuples()
        ]
        states.append(torch.stack([row.hidden_states[2][0, -1].double().detach() for row in rows]))
    merged = [
        dict(zip(zip(*(t.answers.drop_duplicates(KEYS)[k] for k in KEYS), strict=True), s, strict=True))
        for t, s in zip(formats, states, strict=True)
    ]
    x, y = (torch.stack([one[fact] for fact in merged[0]]) for one in merged)
    expected = [cosine(*pair) for pair in zip(x - x.mean(0), y - y.mean(0), strict=True)]
    found = representation_consistency(untouched, bio, questions, per_pair=True)
    found = found[(found["layer"] == 1) & (found["kind"] == "matched")]["cosine"]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_same_text_is_the_same_everywhere(untouched, tasks):
    table = representation_consistency(untouched, tasks["qa_id"], tasks["qa_id"], sites=["resid_post", "z", "attn_out"])
    matched = table[table["kind"] == "matched"]
    for name in ("cosine", "cka"):
        assert matched[name].to_numpy() == pytest.approx(1, abs=1e-5)
    # a head that looks at one word alone cannot tell everybody apart
    assert (matched.loc[matched["site"] != "z", "retrieval"] == 1).all()
    others = table[table["kind"] != "matched"]
    assert others["cosine"].mean() < 0.5
    assert others["cka"].max() < 0.995


def test_texts_that_have_nothing_in_common_are_near_nothing(untouched, tokenizer):
    generator = torch.Generator().manual_seed(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]

    def task(name):
        prompts = [" ".join(words[i] for i in torch.randint(len(words), (6,), generator=generator)) for _ in range(60)]
        return Task.from_prompts(prompts, [" Paris"] * 60, tokenizer, groups=range(60), name=name)

    table = representation_consistency(untouched, task("one"), task("two"))
    assert set(table["kind"]) == {"matched", "same_attribute"}
    matched, others = (table[table["kind"] == kind].reset_index() for kind in ("matched", "same_attribute"))
    assert matched["cosine"].abs().max() < 0.15
    assert others["cosine"].abs().max() < 0.02
    assert matched["retrieval"].max() < 0.1
    assert matched["chance"].to_numpy() == pytest.approx(1 / 60)
    # a set of this size is not near zero by itself: the mismatched say how near
    assert (matched["cka"] - others["cka"]).abs().max() < 0.1
    assert others["cka"].min() > 0.1


def test_facts_that_lie_at_one_place_are_not_told_apart(untouched, tasks):
    """Biographies begin with the name: at its last token nothing is known of the attribute."""
    bio = tasks["bio"]
    # other sentences, read in other company: what rounding alone sets apart is no nearer
    back = bio.select(range(len(bio) - 1, -1, -1))
    table = representation_consistency(untouched, bio, back, spans=["subject"], batch_size=5)
    rows = table.set_index("kind")
    assert rows.loc["same_group", "cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert rows.loc["same_group", "retrieval"].max() == 0
    assert rows.loc["same_attribute", "retrieval"].min() == 1


def test_activations_that_are_all_alike_have_no_direction(untouched, tasks):
    """All questions end in a question mark."""
    table = representation_consistency(untouched, tasks["qa_id"], tasks["qa_id"], sites=["resid_pre"])
    first = table[table["layer"] == 0]
    assert first[["cosine", "cosine_low", "cka", "retrieval", "retrieval_high"]].isna().all(axis=None)
    assert table[table["layer"] > 0][["cosine", "cka", "retrieval"]].notna().all(axis=None)


def test_units_are_named(untouched, formats):
    shape = shape_of(untouched)
    table = representation_consistency(untouched, *formats, sites=["attn_out", "z", "k"])
    first = table[(table["layer"] == 1) & (table["kind"] == "matched")]
    letter = "G" if shape.n_key_value_heads < shape.n_heads else "H"
    assert first["unit"].tolist() == [
        "L1.attn_out",
        *(f"L1H{head}" for head in range(shape.n_heads)),
        *(f"L1{letter}{group}" for group in range(shape.n_key_value_heads)),
    ]


def test_each_answer_of_a_biography_is_read_at_its_own_place(untouched, tokenizer, tmp_path):
    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=4, row="biography", biographies=1))
    bio, questions = dataset.task("bio", tokenizer), dataset.task("qa_ood", tokenizer)
    ours = by_hand(untouched, bio, "resid_post", 1, last)
    theirs = by_hand(untouched, questions, "resid_post", 1, last)
    facts = [fact for fact in ours if fact in theirs]
    assert len(facts) == 12
    x, y = (torch.stack([one[fact] for fact in facts]) for one in (ours, theirs))
    found = representation_consistency(untouched, bio, questions, per_pair=True)
    found = found[(found["layer"] == 1) & (found["kind"] == "matched")]["cosine"]
    expected = [cosine(*pair) for pair in zip(x - x.mean(0), y - y.mean(0), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_padding_on_the_left_changes_nothing(untouched, formats):
    bio, questions = formats
    shift = questions.tokens.shape[1] - questions.attention_mask.sum(1)
    assert shift.max() > 0
    order = (torch.arange(questions.tokens.shape[1])[None] - shift[:, None]) % questions.tokens.shape[1]
    moved = shift[torch.tensor(questions.answers["example"].tolist())].numpy()
    left = replace(
        questions,
        tokens=questions.tokens.gather(1, order),
        attention_mask=questions.attention_mask.gather(1, order),
        answers=questions.answers.assign(
            start=questions.answers["start"] + moved, end=questions.answers["end"] + moved
        ),
        spans={name: at.gather(1, order) for name, at in questions.spans.items()},
    )
    found = representation_consistency(untouched, bio, left, spans=["last", "subject"])
    expected = representation_consistency(untouched, bio, questions, spans=["last", "subject"])
    assert found["cosine"].tolist() == pytest.approx(expected["cosine"].tolist(), abs=1e-6)


def test_mismatched_sets_are_drawn_by_the_seed(untouched, formats):
    one, same, other = (
        representation_consistency(untouched, *formats, seed=seed, draws=2)["cka"] for seed in (0, 0, 1)
    )
    assert one.tolist() == same.tolist()
    assert one.tolist() != other.tolist()


def test_what_cannot_be_compared_is_refused(untouched, formats, tokenizer):
    bio, questions = formats
    alone = Task.from_prompts(["What is the birth date of"], [" Paris"], tokenizer, name="alone")
    for call, message in (
        (lambda: representation_consistency(untouched, bio, alone), "the task alone names no groups"),
        (
            lambda: representation_consistency(untouched, bio.select([0, 1]), questions),
            "bio and qa_id have [012] facts in",
        ),
        (lambda: representation_consistency(untouched, bio, questions, sites=["pattern"]), "no site 'pattern': choose"),
        (
            lambda: representation_consistency(untouched, bio, questions, spans=["verb"]),
            "bio has no span 'verb': choose",
        ),
        (lambda: representation_consistency(untouched, bio, questions, spans=["all"]), "'all' is no place in a prompt"),
        (lambda: representation_consistency(untouched, bio, questions, draws=0), "the number of draws is 0: 1 is"),
    ):
        with pytest.raises(CircuitsError, match=message):
            call()
    nowhere = replace(questions, spans={**questions.spans, "subject": torch.zeros_like(questions.attention_mask)})
    with pytest.raises(
        CircuitsError, match="0 facts have the span 'subject' before their answers in both tasks: 3 are"
    ):
        representation_consistency(untouched, bio, nowhere, spans=["subject"])
