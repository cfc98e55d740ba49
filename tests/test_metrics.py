from dataclasses import replace

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.metrics import evaluate
from circuits.tasks import Task
from tests.fixtures import lively


def by_hand(huggingface, task: Task) -> list[tuple[bool, bool, float]]:
    """Greedy decoding and summed log-probabilities, one example at a time without padding."""
    found = []
    for answer in task.answers.itertuples():
        length = int(task.attention_mask[answer.example].sum())
        tokens = task.tokens[answer.example, :length]
        prompt, target = tokens[: answer.start], tokens[answer.start : answer.end]
        generated = huggingface.generate(
            prompt[None], max_new_tokens=len(target), min_new_tokens=len(target), do_sample=False, pad_token_id=0
        )[0, answer.start :]
        log_probs = huggingface(tokens[None]).logits[0].log_softmax(-1)
        log_prob = sum(float(log_probs[answer.start + i - 1, token]) for i, token in enumerate(target.tolist()))
        found.append((torch.equal(generated, target), int(generated[0]) == int(target[0]), log_prob))
    return found


@pytest.mark.parametrize("split", ["bio", "qa_id"])
def test_scores_equal_greedy_decoding_one_by_one(model, huggingface, tasks, split):
    task = tasks[split].select(range(12))
    scores = evaluate(model, task, batch_size=5)
    expected = by_hand(huggingface, task)
    assert scores["exact_match"].tolist() == [exact for exact, _, _ in expected]
    assert scores["first_token"].tolist() == [first for _, first, _ in expected]
    assert scores["log_prob"].tolist() == pytest.approx([value for _, _, value in expected], abs=1e-3)


def test_a_right_answer_is_an_exact_match(huggingface, tasks):
    # let the model answer, and take its own words for the truth: then every answer must match, and no other may
    task = tasks["qa_ood"].select(range(6))
    tokens = task.tokens.clone()
    for answer in task.answers.itertuples():
        for position in range(answer.start, answer.end):
            tokens[answer.example, position] = (
                huggingface(tokens[answer.example : answer.example + 1]).logits[0, position - 1].argmax()
            )
    right = replace(task, tokens=tokens)
    assert evaluate(huggingface, right)["exact_match"].all()
    spoiled = tokens.clone()
    last = int(right.answers["end"][2]) - 1
    spoiled[2, last] = (spoiled[2, last] + 1) % 400
    scores = evaluate(huggingface, replace(task, tokens=spoiled))
    assert scores["exact_match"].tolist() == [True, True, False, True, True, True]


def test_hugging_face_and_hooked_models_score_alike(model, huggingface, tasks):
    one, two = (evaluate(either, tasks["bio"])["log_prob"] for either in (model, huggingface))
    assert one.tolist() == pytest.approx(two.tolist(), abs=1e-3)


def test_several_answers_in_one_example_are_scored_apart(tmp_path, tokenizer):
    from circuits.facts import DatasetSettings, make_dataset

    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=3, row="biography"))
    task = dataset.task("bio", tokenizer)
    assert len(task.answers) == 6 * len(task)
    huggingface = lively("llama")
    expected = by_hand(huggingface, task.select([0, 4]))
    scores = evaluate(huggingface, task.select([0, 4]))
    assert scores["log_prob"].tolist() == pytest.approx([value for _, _, value in expected], abs=1e-3)


def test_a_foil_that_the_tokenizer_cannot_tell_from_the_answer_is_refused(untouched, tokenizer):
    task = Task.from_prompts(["Priscilla Oakley was born in"], [" Alice"], tokenizer, foils=[" Bob"])
    message = "cannot tell the answer 'Alice' from its foil, .*: give it another foil, and look whether the tokenizer"
    with pytest.raises(CircuitsError, match=message):
        evaluate(untouched, task)
