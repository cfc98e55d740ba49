"""On a real pretrained model: loading, tracing, sweeping, and the figure of an induction head."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.gemma3 import gemma3
from benchmarks.smollm2 import smollm2
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, example_of, make_dataset
from circuits.facts.pools import POOLS
from circuits.figures import Rectangle, attention_figure, save_figure
from circuits.interventions import ablate_heads, run_interventions, single
from circuits.metrics import evaluate
from circuits.models import load_huggingface, load_model, parameters_of, shape_of
from circuits.rankings import induction_scores, read_head
from circuits.sweeps import sweep_heads
from circuits.tasks import Task, indirect_objects
from circuits.tracing import loss_gradients, trace_gradients
from circuits.units import Head, layout_of
from tests.fixtures import gradients_of

pytestmark = pytest.mark.real
TEXT = "Which university did Leonora Okonkwo attend? The capital of France is Paris, and the capital of Italy is Rome."


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("real") / "facts", DatasetSettings(people=4))


def test_logits_equal_the_hugging_face_model(folder, model):
    tokens = model.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (model(tokens) - load_huggingface(folder)(tokens).logits).abs().max()
    assert float(difference) < 1e-4
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_key_value_heads) == (30, 9, 3)


def test_it_knows_something(model):
    tokens = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("split", ["bio", "qa_id", "qa_ood_unseen"])
def test_spans_are_right_for_its_tokenizer(model, dataset, split):
    rows = list({row["text"]: row for row in dataset.rows(split)}.values())
    task = Task.from_examples(split, map(example_of, rows), model.tokenizer)
    for example, row in enumerate(rows):
        for name in ("subject", "answer"):
            left, right = row[name][0]
            found = model.tokenizer.decode(task.tokens[example][task.span(name)[example]])
            assert found.strip() == row["text"][left:right]


def test_a_chat_is_in_its_own_template(model, dataset):
    tokenizer = model.tokenizer
    task = dataset.task("qa_id", tokenizer, chat=True)
    for example, text in enumerate(dataset.task("qa_id", tokenizer).texts):
        answer = task.answers["value"][example]
        turn = [{"role": "user", "content": text.removesuffix(answer).strip()}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        expected = prompt + tokenizer(answer).input_ids
        assert task.tokens[example, task.attention_mask[example]].tolist() == expected
        assert task.answers["start"][example] == len(prompt)


def test_familiar_names_and_values_are_single_tokens(model):
    pools = POOLS["familiar"]
    for words in (pools.first_names, pools.last_names, pools.cities, pools.universities, pools.employers, pools.majors):
        assert {word: len(model.tokenizer(f" {word}").input_ids) for word in words} == dict.fromkeys(words, 1)


def test_an_opening_makes_it_read_first_names_alike_in_both_formats(model):
    """The residual stream at a last name finds the same person's in the other format; without an opening it often
    finds another person of that last name.
    """
    found = {}
    for opening in ("", "Fact:"):
        streams = []
        for text in ("{} was born in", "In which city was {} born?"):
            rows = []
            for first in ("Alice", "Henry", "Laura", "Peter", "Susan"):
                for last in ("Baker", "Carter", "Stone", "Turner"):
                    before, after = f"{opening} {text}".lstrip().split("{}")
                    end = len(model.tokenizer(f"{before}{first} {last}").input_ids) - 1
                    tokens = model.tokenizer(f"{before}{first} {last}{after}", return_tensors="pt").input_ids
                    with torch.no_grad():
                        rows.append(model(tokens, stop_at_layer=15)[0, end])
            stream = torch.stack(rows)
            streams.append(torch.nn.functional.normalize(stream - stream.mean(0), dim=-1))
        nearest = (streams[0] @ streams[1].T).argmax(1)
        found[opening] = float((nearest == torch.arange(len(nearest))).float().mean())
    assert found["Fact:"] == 1
    assert found[""] < 0.8


def test_its_trace_equals_single_backward_passes(model, dataset):
    task = dataset.task("qa_id", model.tokenizer).select([0, 5, 9])
    traced = trace_gradients(model, task)
    parameters = {name: value for name, value in parameters_of(model).items() if layout_of(name).unit is not None}
    sums, gradients = {name: torch.zeros_like(value) for name, value in parameters.items()}, gradients_of(model)
    for answer in task.answers.itertuples():
        tokens = task.tokens[answer.example, task.attention_mask[answer.example]][None]
        log_probs = model(tokens)[0].log_softmax(-1)
        positions = range(answer.start, answer.end)
        loss = -sum(log_probs[i - 1, tokens[0, i]] for i in positions) / len(positions)
        for name, gradient in gradients(loss).items():
            if name in sums:
                sums[name] += gradient.abs()
    for name, value in sums.items():
        assert torch.allclose(traced.gradients[name], value / len(task), rtol=1e-3, atol=1e-4 * float(value.max())), (
            name
        )


def test_a_sweep_of_some_heads_equals_zeroing_their_weights(model, dataset):
    task = dataset.task("qa_id", model.tokenizer).select([1, 4])
    heads = [Head(0, 0), Head(12, 4), Head(29, 8)]
    table = sweep_heads(model, [task], ["zero"], heads=heads)
    for head, row in zip(heads, table.itertuples(), strict=True):
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            by_hand.blocks[head.layer].attn.W_O[head.index] = 0
        assert row.log_prob == pytest.approx(evaluate(by_hand, task)["log_prob"].mean(), abs=1e-3)


def induction_task(model) -> Task:
    """Unrelated words said twice: what followed a word before should be said again."""
    words = " apple river seven cloud paper green north music table horse"
    once = model.tokenizer(words).input_ids
    said = f"{words}{words}"
    answer = said.split()[-1]
    task = Task.from_prompts([said.removesuffix(f" {answer}")], [f" {answer}"], model.tokenizer)
    assert task.tokens.tolist() == [[*once, *once]]
    return task


def test_an_induction_head_is_found_by_its_score_and_drawn(model):
    scores = induction_scores(model).sort_values("induction", ascending=False)
    assert scores["induction"].iloc[0] > 0.7
    assert scores["induction"].median() < 0.05
    head, task = Head.parse(scores["unit"].iloc[0]), induction_task(model)
    reading = read_head(model, head, task, example=0, title="words said twice")
    length, half = len(reading.tokens), (len(reading.tokens) + 1) // 2
    diagonal = [float(reading.pattern[query, query - half + 1]) for query in range(half, length)]
    assert sum(diagonal) / len(diagonal) > 0.6
    # what it writes speaks for the right word: among the first few percent of the vocabulary
    assert reading.answer[2] < model.cfg.d_vocab / 20
    # without it, the model repeats less surely
    with ablate_heads(model, [head]):
        without = evaluate(model, task)["log_prob"].iloc[0]
    assert without < evaluate(model, task)["log_prob"].iloc[0]
    rectangle = Rectangle(0, (half, length - 1), (1, half - 1), "what followed before")
    figure = attention_figure([reading], [rectangle], "SmolLM2-135M-Instruct: an induction head")
    save_figure(figure, Path("runs/real/induction.html"))
    try:
        save_figure(figure, Path("runs/real/induction.png"))
    except CircuitsError as error:
        assert "needs Chrome" in str(error)


def test_a_model_of_another_family_is_loaded_traced_and_ablated(dataset):
    model = load_model(gemma3())
    # longer than its window
    assert model.checkpoint.parity.tokens > 512
    tokens = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = [model.tokenizer.decode(index) for index in model(tokens)[0, -1].topk(3).indices]
    assert " Paris" in best
    task = dataset.task("qa_id", model.tokenizer).select(range(2))
    traced = trace_gradients(model, task, "signed", components=["attention"]).gradients
    expected = loss_gradients(model, task)
    for name in ("blocks.5.attn.W_Q", "blocks.16.attn.W_O", "blocks.16.attn.W_K"):
        value = expected[name] / len(task)
        assert float((traced[name] - value).abs().max()) < 1e-4 * float(value.abs().max())
    heads = [Head(5, 2), Head(17, 0)]
    table = sweep_heads(model, task, "zero", heads=heads).set_index("unit")
    for head in heads:
        with ablate_heads(model, [head]):
            found = evaluate(model, task)["log_prob"].mean()
        assert table["log_prob"][str(head)] == pytest.approx(found, abs=1e-3)


def test_the_heads_that_move_the_name_are_those_of_transformer_lens_own_patching(model):
    """Every head patched from the counterfactual run: the same numbers, so the same heads."""
    from transformer_lens import patching

    task = Task.of(indirect_objects(40, 0, model.tokenizer), model.tokenizer, "ioi")
    length = int(task.answers["start"].mode()[0])
    task = task.select(task.answers.index[task.answers["start"] == length].tolist()[:6])
    chosen, foils = task.tokens[:, length], task.foils.tokens[:, length]

    def logit_difference(logits):
        last = logits[:, -1]
        return (last.gather(1, chosen[:, None]) - last.gather(1, foils[:, None])).mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(task.counterfactuals.tokens[:, :length])
        theirs = patching.get_act_patch_attn_head_out_all_pos(model, task.tokens[:, :length], cache, logit_difference)
    heads = list(shape_of(model).heads())
    ours = run_interventions(model, task, single(heads, "patch"), metrics="logit_diff")
    by_head = torch.tensor(ours["logit_diff"].to_numpy(copy=True)).view(theirs.shape)
    assert torch.allclose(by_head.float(), theirs, atol=2e-3)
    order = ours.sort_values("logit_diff_effect", key=abs, ascending=False)
    clean = float(logit_difference(model(task.tokens[:, :length])))
    largest = (theirs - clean).abs().flatten().topk(8).indices.tolist()
    assert order["unit"].tolist()[:8] == [str(heads[place]) for place in largest]
