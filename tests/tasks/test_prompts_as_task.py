"""Tasks of a reader's own prompts: tokens, spans, foils and counterfactuals, and what is refused."""

import json
from types import SimpleNamespace

import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuits.errors import CircuitsError
from circuits.interventions import Intervention, pair_people, run_interventions
from circuits.metrics import evaluate
from circuits.tasks import Task
from circuits.tasks.examples import Example
from circuits.units import Head
from tests.fixtures import lively
from tests.tasks.test_task import CHATML

CLEAN = "When Mary and John went to the store, John gave a drink to"
CHANGED = "When Mary and John went to the store, Mary gave a drink to"
IO = {"prompt": CLEAN, "answer": " Mary", "foil": " John", "counterfactual": CHANGED}
SPANS = {"IO": "Mary", "S1": ["John", 1], "S2": ["John", 2], "names": [["John", 1], "Mary"], "store": [27, 36]}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Byte-level, one token for each of these words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([CLEAN, CHANGED, " Mary John Anna"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture
def task(words) -> Task:
    return Task.from_prompts(
        [CLEAN, CHANGED],
        [" Mary", " John"],
        words,
        foils=[" John", " Mary"],
        counterfactuals=[CHANGED, CLEAN],
        spans=[SPANS, {"IO": "John", "S1": ["Mary", 1], "S2": ["Mary", 2]}],
    )


def said(tokenizer, task: Task, name: str, example: int = 0) -> str:
    return tokenizer.decode(task.tokens[example][task.span(name)[example]]).strip()


def test_spans_are_the_words_they_name(words, task):
    assert [said(words, task, name) for name in ("IO", "S1", "S2")] == ["Mary", "John", "John"]
    assert said(words, task, "names") == "Mary John"
    assert said(words, task, "store") == CLEAN[27:36].strip()
    assert said(words, task, "last") == "to"
    assert said(words, task, "answer") == "Mary"
    assert said(words, task, "all") == f"{CLEAN} Mary"
    first, second = (task.spans[name][0].nonzero()[0, 0] for name in ("S1", "S2"))
    assert first < second
    # a span of one prompt alone is nowhere in the others
    assert not task.spans["store"][1].any()


def test_foils_and_counterfactuals_go_along(words, task, tmp_path):
    start = int(task.answers["start"][0])
    assert torch.equal(task.foils.tokens[:, :start], task.tokens[:, :start])
    assert task.foils.answers["value"].tolist() == ["John", "Mary"]
    assert words.decode(task.counterfactuals.tokens[0]).startswith(CHANGED)
    assert torch.equal(task.counterfactuals.spans["IO"], task.spans["IO"])
    chosen = task.select([1])
    assert chosen.foils.texts == [f"{CHANGED} Mary"]
    task.save(tmp_path / "task.safetensors")
    loaded = Task.load(tmp_path / "task.safetensors")
    assert torch.equal(loaded.counterfactuals.tokens, task.counterfactuals.tokens)
    assert loaded.foils.answers.equals(task.foils.answers)
    assert repr(loaded) == repr(task)
    assert "foils, counterfactuals" in repr(task)


def test_patching_and_logit_difference_need_nothing_but_the_task(words, task):
    from circuits.models import load_model
    from circuits.training import new_model

    model = load_model(new_model("tiny-llama", words), tokenizer=words)
    plan = [Intervention((Head(2, 1),), "patch", positions="S2")]
    found = run_interventions(model, task, plan, metrics=["logit_diff", "log_prob"], per_answer=True)
    tokens, changed = task.tokens, task.counterfactuals.tokens
    _, cache = model.run_with_cache(changed)
    for example in range(2):
        (place,) = task.spans["S2"][example].nonzero()[:, 0].tolist()

        def patched(z, hook, example=example, place=place):
            z[0, place, 1] = cache["blocks.2.attn.hook_z"][example, place, 1]
            return z

        length = int(task.answers["start"][example])
        logits = model.run_with_hooks(tokens[example, :length][None], fwd_hooks=[("blocks.2.attn.hook_z", patched)])
        right, wrong = tokens[example, length], task.foils.tokens[example, length]
        by_hand = logits[0, -1, right] - logits[0, -1, wrong]
        assert found["logit_diff"][example] == pytest.approx(float(by_hand), abs=1e-4)
    assert (found["logit_diff_effect"] != 0).all()


def test_prompts_are_groups_of_their_own_unless_said_otherwise(words):
    prompts = [CLEAN, CHANGED, "Mary gave a drink to"]
    alone = Task.from_prompts(prompts, [" John"] * 3, words)
    assert alone.answers["group"].tolist() == [0, 1, 2]
    together = Task.from_prompts(prompts, [" John"] * 3, words, groups=["a", "a", "b"])
    assert together.answers["group"].tolist() == ["a", "a", "b"]


def test_columns_of_a_table_are_taken_as_they_are(words):
    columns = {"prompt": [CLEAN, CHANGED], "answer": [" Mary", " John"], "foil": [" John", " Mary"]}
    table = pandas.DataFrame(columns, index=[7, 3])
    task = Task.from_prompts(table["prompt"], table["answer"], words, foils=table["foil"])
    assert task.foils.answers["value"].tolist() == ["John", "Mary"]


def test_a_file_is_the_same_task_as_its_prompts(words, tmp_path):
    file = tmp_path / "ioi.jsonl"
    file.write_text(json.dumps({**IO, "spans": SPANS, "template": "store"}) + "\n")
    task = Task.from_file(file, words)
    by_hand = Task.from_prompts(
        [CLEAN], [" Mary"], words, foils=[" John"], counterfactuals=[CHANGED], spans=[SPANS], name="ioi"
    )
    assert torch.equal(task.tokens, by_hand.tokens)
    assert all(torch.equal(task.spans[name], at) for name, at in by_hand.spans.items())
    assert (task.name, task.texts, task.answers["template"].tolist()) == ("ioi", by_hand.texts, ["store"])


def test_bad_lines_are_named_or_dropped(words, tmp_path):
    file = tmp_path / "ioi.jsonl"
    lines = [IO, {**IO, "answer": "Mary"}, {**IO, "spans": {"S": "John"}}]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CircuitsError, match="line 2 of ioi.jsonl: the answer .Mary. is glued to its prompt"):
        Task.from_file(file, words)
    task = Task.from_file(file, words, drop_bad=True)
    assert len(task) == 1
    assert len(task.provenance["dropped"]) == 2
    file.write_text(json.dumps(IO, indent=1))
    with pytest.raises(CircuitsError, match="line 1 of ioi.jsonl is not JSON: .*: write each prompt on one line"):
        Task.from_file(file, words)
    file.write_text(json.dumps(lines[1]))
    with pytest.raises(CircuitsError, match="no prompt of the task ioi can be used: line 1 of ioi.jsonl: the answer"):
        Task.from_file(file, words, drop_bad=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": CLEAN}, "the prompts are one text: give a list of texts"),
        ({"answers": " Mary"}, "there are 1 prompts, but one text as answer: give one for each"),
        ({"foils": [" John", " John"]}, "there are 1 prompts, but 2 as foil"),
        ({"answers": ["Mary"]}, "prompt 0: the answer 'Mary' is glued to its prompt"),
        ({"foils": [" Mary"]}, "prompt 0: the foil ' Mary' is the answer: give a wrong one"),
        ({"counterfactuals": [CLEAN]}, "prompt 0: the counterfactual is the prompt itself: change something"),
        ({"answers": [" "]}, "prompt 0: the answer is empty: give it some text"),
        ({"prompts": [" "]}, "prompt 0: the prompt is empty"),
        ({"prompts": [], "answers": []}, "the task task is empty: it has no prompts"),
        (
            {"counterfactuals": ["Mary gave a drink to"]},
            "prompt 0: the counterfactual has 6 tokens and the prompt 14: make them equal",
        ),
        ({"spans": [{"S": "John"}]}, "the span 'S' is 'John', which occurs 2 times in 'When Mary"),
        ({"chat": True}, "prompt 0: .* has no chat template: leave out chat=True"),
    ],
)
def test_what_makes_no_task_is_refused(words, changes, message):
    given = {"prompts": [CLEAN], "answers": [" Mary"], **changes}
    with pytest.raises(CircuitsError, match=message):
        Task.from_prompts(given.pop("prompts"), given.pop("answers"), words, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            SimpleNamespace(tokenizer=None),
            "a task needs a tokenizer, and this is a .*: give model.tokenizer, and",
        ),
        (None, "a task needs a tokenizer, and this is a NoneType: give the model's, as in model.tokenizer"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_tokenizer_is_refused(given, message):
    for make in (
        lambda: Task.from_prompts([CLEAN], [" Mary"], given),
        lambda: Task.from_examples("task", [Example("I am Mary", [(5, 9)], [{}], {})], given),
    ):
        with pytest.raises(CircuitsError, match=message):
            make()


def test_a_span_that_is_not_there_is_refused(words, task):
    with pytest.raises(CircuitsError, match="task has no span 'subject': choose from all, answer, last, IO, S1, S2"):
        task.span("subject")


def test_a_chat_keeps_spans_foils_and_counterfactuals(words):
    words = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token="<pad>")
    words.chat_template = CHATML
    task = Task.from_prompts(
        [CLEAN], [" Mary"], words, foils=[" John"], counterfactuals=[CHANGED], spans=[SPANS], chat=True
    )
    assert said(words, task, "S2") == "John"
    assert said(words, task, "answer") == "Mary"
    start = int(task.answers["start"][0])
    differ = (task.tokens[0, :start] != task.counterfactuals.tokens[0, :start]).nonzero().flatten().tolist()
    assert differ == task.spans["S2"][0].nonzero().flatten().tolist()


def test_own_prompts_are_scored_like_any_others(words, task):
    huggingface = lively("llama")
    huggingface.resize_token_embeddings(len(words))
    scores = evaluate(huggingface, task)
    for example, row in enumerate(scores.itertuples()):
        logits = huggingface(task.tokens[example, : row.start][None]).logits[0, -1].log_softmax(-1)
        assert row.log_prob == pytest.approx(float(logits[task.tokens[example, row.start]].detach()), abs=1e-4)


def test_prompts_in_words_of_their_own_have_nobody_to_be_paired_with(task):
    with pytest.raises(CircuitsError, match="nobody else is asked in the words of"):
        pair_people(task)
