from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuits.errors import CircuitsError
from circuits.facts import example_of, word_tokenizer
from circuits.metrics import evaluate
from circuits.tasks import Task
from circuits.training import new_model


def trained(texts: list[str], kind: str) -> PreTrainedTokenizerFast:
    """A real subword tokenizer of each common kind."""
    special = ["<pad>", "<unk>"]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
@pytest.mark.parametrize("split", ["qa_ood", "qa_id_unseen"])
def test_spans_are_right_for_subword_tokenizers(dataset, kind, split):
    rows = list(dataset.rows(split))
    subwords = trained([row["text"] for row in rows], kind)
    task = Task.from_examples(split, map(example_of, rows), subwords)
    squeezed = [
        {
            "subject": "".join(row["text"][slice(*span)] for span in row["subject"]),
            "relation": "".join(row["text"][slice(*span)] for span in row["relation"]),
            "answer": "".join(row["text"][slice(*span)] for span in row["answer"]),
        }
        for row in rows
    ]
    for example, wanted in enumerate(squeezed):
        for span, text in wanted.items():
            found = "".join(subwords.convert_ids_to_tokens(task.tokens[example][task.span(span)[example]]))
            for mark in ("Ġ", "▁", "##"):
                found = found.replace(mark, "")
            assert found.lower() == text.replace(" ", "").lower()


def test_spans_of_a_sentence_by_hand(tokenizer, dataset):
    row = next(row for row in dataset.rows("qa_id") if row["attributes"] == ["work_city"])
    task = Task.from_examples("qa", [example_of(row)], tokenizer)
    words = tokenizer.convert_ids_to_tokens(task.tokens[0])
    assert words[:4] == ["<s>", "In", "which", "city"]
    places = {name: task.span(name)[0].nonzero().flatten().tolist() for name in (*task.spans, "answer", "last", "all")}
    assert places == {"subject": [5, 6], "relation": [3, 7], "answer": [9], "last": [8], "all": list(range(10))}
    assert task.answers[["start", "end"]].values.tolist() == [[9, 10]]


def test_a_glued_answer_is_refused_and_never_shifted(dataset):
    row = next(dataset.rows("bio"))
    words = sorted({word for text in (row["text"],) for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: 1 + i for i, word in enumerate(words)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    glued = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    with pytest.raises(CircuitsError, match="the tokenizer glues the answer"):
        Task.from_examples("bio", [example_of(row)], glued)


def test_an_answer_that_nothing_precedes_is_refused(tokenizer):
    row = {"person": 0, "attributes": ["major"], "text": "", "subject": [], "relation": [], "answer": [[0, 0]]}
    with pytest.raises(CircuitsError, match="no token before the answer"):
        Task.from_examples("bio", [example_of(row)], tokenizer)


def test_an_empty_task_is_refused(tokenizer, tasks):
    with pytest.raises(CircuitsError, match="the task bio is empty"):
        Task.from_examples("bio", [], tokenizer)
    with pytest.raises(CircuitsError, match="the task bio is empty"):
        tasks["bio"].select([])


def test_padding_is_no_token(tasks):
    task = tasks["bio"]
    lengths = task.attention_mask.sum(1)
    assert lengths.min() < task.tokens.shape[1] == lengths.max()
    for example, length in enumerate(lengths.tolist()):
        assert task.attention_mask[example, :length].all()
        for name in (*task.spans, "answer", "last", "all"):
            assert not task.span(name)[example, length:].any()


def test_select_batches_and_sample_keep_answers_with_their_examples(tasks):
    task = tasks["qa_id"]
    chosen = task.select([5, 2])
    assert chosen.texts == [task.texts[5], task.texts[2]]
    assert chosen.answers["value"].tolist() == [task.answers["value"][5], task.answers["value"][2]]
    assert chosen.answers["example"].tolist() == [0, 1]
    joined = [text for batch in task.batches(7) for text in batch.texts]
    assert joined == task.texts
    assert task.sample(5, seed=1).texts == task.sample(5, seed=1).texts != task.sample(5, seed=2).texts


def test_a_task_is_saved_and_loaded(tasks, tmp_path):
    task = tasks["bio"]
    task.save(tmp_path / "task.safetensors")
    loaded = Task.load(tmp_path / "task.safetensors")
    assert torch.equal(loaded.tokens, task.tokens)
    assert torch.equal(loaded.attention_mask, task.attention_mask)
    assert loaded.spans.keys() == task.spans.keys()
    assert all(torch.equal(loaded.spans[name], at) for name, at in task.spans.items())
    assert loaded.answers.equals(task.answers)
    assert (loaded.name, loaded.texts, loaded.provenance) == (task.name, task.texts, task.provenance)
    with pytest.raises(CircuitsError, match="there is no file"):
        Task.load(tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CircuitsError, match="is damaged"):
        Task.load(tmp_path / "damaged.safetensors")


def two_sentences(dataset):
    """Two biographies as one row: two answers in one text."""
    one, two = list(dataset.rows("bio"))[:2]
    by = len(one["text"]) + 1
    row = {"person": one["person"], "text": f"{one['text']} {two['text']}"}
    for name in ("subject", "relation", "answer"):
        row[name] = [*one[name], *([left + by, right + by] for left, right in two[name])]
    return row | {"attributes": [*one["attributes"], *two["attributes"]]}


def test_answers_listed_out_of_order_keep_their_own_tokens(model, dataset, tokenizer):
    row = two_sentences(dataset)
    backwards = row | {"answer": row["answer"][::-1], "attributes": row["attributes"][::-1]}
    task, same = (Task.from_examples("bio", [example_of(one)], tokenizer) for one in (row, backwards))
    assert same.answers.equals(task.answers)
    assert evaluate(model, same)["log_prob"].tolist() == evaluate(model, task)["log_prob"].tolist()


def test_answers_that_overlap_are_refused(dataset, tokenizer):
    row = two_sentences(dataset)
    (left, _), (_, right) = row["answer"][:2]
    with pytest.raises(CircuitsError, match="the answers '.*' and '.*' overlap in '.*': give each characters of its"):
        Task.from_examples("bio", [example_of(row | {"answer": [[left, right], *row["answer"][1:]]})], tokenizer)


def digits_apart(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits digits, so that the space before a number is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_a_bare_space_before_an_answer_is_the_end_of_its_prompt():
    text = "Ada Oak was born in 1982 in Paris."
    tokenizer = digits_apart([text])
    row = {"person": 0, "attributes": ["year", "city"], "text": text, "subject": [[0, 7]], "relation": [[12, 19]]}
    task = Task.from_examples("bio", [example_of(row | {"answer": [[20, 24], [28, 33]]})], tokenizer)
    words = tokenizer.convert_ids_to_tokens(task.tokens[0])
    (year, city) = task.answers.itertuples()
    assert words[year.start - 1 : year.end] == ["Ġ", "1", "9", "8", "2"]
    assert not any(at[0, year.start - 1] for at in task.spans.values())
    assert "".join(words[city.start : city.end]) == "ĠParis"
    # the prompt goes on with the answer as greedy decoding finds it, one token after the other
    huggingface = new_model("tiny-llama", tokenizer)
    prompt = task.tokens[:, : year.start]
    told = huggingface.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    tokens = task.tokens.clone()
    tokens[0, year.start : year.end] = told[0, year.start :]
    assert evaluate(huggingface, replace(task, tokens=tokens))["exact_match"].tolist()[0]
    tokens[0, year.end - 1] += 1 if tokens[0, year.end - 1] < 2 else -1
    assert not evaluate(huggingface, replace(task, tokens=tokens))["exact_match"].tolist()[0]


CHATML = (
    "{{ bos_token or '' }}{% for message in messages %}<user> {{ message['content'] | trim }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def test_a_chat_is_the_tokenizers_template_around_the_prompt_and_the_answer_after_it(dataset):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHATML
    plain, chat = (dataset.task("qa_id", tokenizer, chat=chat) for chat in (False, True))
    assert len(plain) == len(chat)
    for example in range(len(chat)):
        (one,), (other,) = (
            task.answers[task.answers["example"] == example].to_dict("records") for task in (plain, chat)
        )
        prompt = plain.texts[example].split("?")[0] + "?"
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert chat.texts[example] == f"{turn}{one['value']}"
        ids = tokenizer(chat.texts[example], add_special_tokens=False).input_ids
        assert chat.tokens[example, chat.attention_mask[example]].tolist() == ids
        assert other["value"] == one["value"]
        tokens = [task.tokens[example, row["start"] : row["end"]] for task, row in ((plain, one), (chat, other))]
        assert torch.equal(*tokens)
        for span in ("subject", "relation"):
            said = [task.tokens[example][task.span(span)[example]] for task in (plain, chat)]
            assert torch.equal(*said)
            assert len(said[0])
    assert chat.provenance["begins_with"] == "the chat template"
    assert plain.provenance["begins_with"] == ["<s>"]


def test_what_cannot_be_a_chat_is_refused(dataset):
    tokenizer = word_tokenizer()
    with pytest.raises(CircuitsError, match="has no chat template"):
        dataset.task("qa_id", tokenizer, chat=True)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(CircuitsError, match="does not repeat the prompt '.*' as it is, and once"):
        dataset.task("qa_id", tokenizer, chat=True)
    tokenizer.chat_template = CHATML
    row = next(iter(dataset.rows("qa_id")))
    twice = {**row, "answer": row["answer"] * 2, "attributes": row["attributes"] * 2}
    with pytest.raises(CircuitsError, match="a chat has one answer, but .* has 2"):
        Task.from_examples("two", [example_of(twice)], tokenizer, chat=True)
