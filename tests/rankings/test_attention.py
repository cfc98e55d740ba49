import pytest
import torch

from circuits.errors import CircuitsError
from circuits.models import load_model
from circuits.rankings import BEHAVIOURS, Behaviour, attention_scores, average_head, induction_scores, read_head
from circuits.units import Head


def test_a_reading_equals_the_raw_model(model, tasks, tokenizer):
    task, head = tasks["qa_ood"], Head(2, 3)
    reading = read_head(model, head, task, example=4, title="QA", top=5)
    length = int(task.answers["start"][4])
    _, cache = model.run_with_cache(task.tokens[4:5, :length])
    assert torch.allclose(reading.pattern, cache["blocks.2.attn.hook_pattern"][0, 3], atol=1e-6)
    output = cache["blocks.2.attn.hook_z"][0, -1, 3] @ model.blocks[2].attn.W_O[3]
    expected = model.unembed(model.ln_final(output[None, None]))[0, 0]
    best = expected.topk(5)
    assert [value for _, value in reading.top_tokens] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [token for token, _ in reading.top_tokens] == tokenizer.convert_ids_to_tokens(best.indices)
    token, logit, rank = reading.answer
    answer = int(task.tokens[4, length])
    assert token == tokenizer.convert_ids_to_tokens(answer)
    assert logit == pytest.approx(float(expected[answer]), abs=1e-4)
    assert rank == expected.argsort(descending=True).tolist().index(answer) + 1
    assert reading.tokens == tokenizer.convert_ids_to_tokens(task.tokens[4, :length])


def test_scores_by_hand():
    spans = {"subject": [1, 2], "relation": [3]}
    linking, focusing = (behaviour.cells(spans, 5) for behaviour in BEHAVIOURS)
    assert linking.nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2], [4, 1], [4, 2]]
    assert focusing.nonzero().tolist() == [[4, 3]]
    assert Behaviour("back", "relation", "subject").cells(spans, 5).nonzero().tolist() == [[3, 1], [3, 2]]
    assert Behaviour("forth", "subject", "relation").cells(spans, 5) is None
    assert all(behaviour.cells({}, 5) is None for behaviour in BEHAVIOURS)


def test_scores_of_all_heads_equal_reading_one_by_one(model, tasks):
    task = tasks["qa_ood"].select(range(7))
    table = attention_scores(model, {"qa": task}, batch_size=3).set_index("unit")
    for head in (Head(0, 1), Head(3, 2)):
        readings = [read_head(model, head, task, example=example) for example in range(7)]
        for name in ("subject_linking", "relation_focusing"):
            score, uniform = (sum(reading.scores[name][i] for reading in readings) / 7 for i in (0, 1))
            assert table[f"{name}.qa"][str(head)] == pytest.approx(score, abs=1e-5)
            assert table[f"{name}.qa.uniform"][str(head)] == pytest.approx(uniform, abs=1e-5)
            assert table[name][str(head)] == pytest.approx(score - uniform, abs=1e-5)


def test_a_planted_induction_head_is_found(huggingface, family):
    # attention of one head is overwritten with exact induction: its score must be 1, and the others' must not
    model = load_model(huggingface)

    def induct(pattern, hook):
        length = pattern.shape[-1]
        pattern[:, 2] = torch.eye(length)
        queries = torch.arange(length // 2, length - 1)
        pattern[:, 2, queries] = 0
        pattern[:, 2, queries, queries - length // 2 + 1] = 1
        return pattern

    with model.hooks([("blocks.1.attn.hook_pattern", induct)]):
        table = induction_scores(model, length=16, sequences=2).set_index("unit")
    assert table["induction"]["L1H2"] == pytest.approx(1)
    assert (table["induction"].drop("L1H2") < 0.9).all()


def test_bad_input_is_refused(model, tasks, huggingface):
    with pytest.raises(CircuitsError, match="there is no head L99H0"):
        read_head(model, Head(99, 0), tasks["bio"], example=0)
    with pytest.raises(CircuitsError, match="needs a tokenizer"):
        read_head(load_model(huggingface), Head(0, 0), tasks["bio"], example=0)
    with pytest.raises(CircuitsError, match="there is no example 99 of bio: it has 0 to "):
        read_head(model, Head(0, 0), tasks["bio"].select(range(9)), example=99)
    with pytest.raises(CircuitsError, match="'banana' is not a head"):
        read_head(model, "banana", tasks["bio"], example=0)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_head_is_refused(model, tasks):
    for read, options in ((read_head, {"example": 0}), (average_head, {})):
        with pytest.raises(CircuitsError, match=r"^\(23, 3\) is not a head: write layer and head as in L21H17"):
            read(model, (23, 3), tasks["bio"], **options)


def test_a_head_may_be_named(model, tasks):
    assert torch.equal(*(read_head(model, head, tasks["bio"], example=0).pattern for head in ("L1H2", Head(1, 2))))
