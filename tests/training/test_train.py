import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pandas
import psutil
import pytest
import torch
from safetensors.torch import load_file

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, dataset_of, make_dataset, word_tokenizer
from circuits.interventions import Intervention, run_interventions
from circuits.masks import ablate_mask, graft, graft_at, graft_by_score, revert, unit_mask
from circuits.models import fingerprint, load_huggingface, load_model, load_tokenizer
from circuits.rankings import Evidence, critical_curve, rank_units, sufficient_curve
from circuits.training import Job, Optimisation, new_model, stages, train, train_side_by_side, trainer
from circuits.training.rows import IGNORED, Collator, TokenisedRows
from circuits.training.trainer import compact_loss
from circuits.units import Head
from tests.fixtures import START
from tests.processes import ended, forked, kill, needs_fork, running, wait_for

pytestmark = pytest.mark.usefixtures("smaller")

SMALL = Optimisation(steps=12, rows=24, warmup_steps=3)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("few") / "facts", DatasetSettings(people=6))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_both_arms_see_as_many_rows_of_each_kind():
    optimisation = Optimisation()
    seen = {
        recipe: (
            sum(stage.bio_rows for stage in stages(recipe, optimisation)),
            sum(stage.qa_rows for stage in stages(recipe, optimisation)),
        )
        for recipe in ("mixed", "two-stage", "two-stage-gentle")
    }
    assert set(seen.values()) == {(64, 32)}
    rates = {stage.learning_rate for recipe in ("mixed", "two-stage") for stage in stages(recipe, optimisation)}
    assert rates == {optimisation.learning_rate}


def test_the_order_uses_every_row_before_any_again_and_never_a_held_out_one(few, tmp_path):
    optimisation = replace(SMALL, steps=30)
    rows = TokenisedRows(few, word_tokenizer(), optimisation, tmp_path)
    assert (rows.bio, rows.qa) == (sum(1 for _ in few.rows("bio")), sum(1 for _ in few.rows("qa_id")))
    stage = stages("mixed", optimisation)[0]
    order = torch.tensor(rows.order(stage, 30, seed=0)).view(30, optimisation.rows)
    bio, qa = order[:, : stage.bio_rows].flatten(), order[:, stage.bio_rows :].flatten()
    assert len(set(bio[: rows.bio].tolist())) == rows.bio
    assert set(qa[: rows.qa].tolist()) == set(range(rows.bio, rows.bio + rows.qa))
    assert not torch.equal(order, torch.tensor(rows.order(stage, 30, seed=1)).view_as(order))


def test_labels_are_all_tokens_of_biographies_and_answers_of_questions(few, tmp_path):
    tokenizer = word_tokenizer()
    rows = TokenisedRows(few, tokenizer, SMALL, tmp_path)
    assert rows[0]["labels"] == rows[0]["input_ids"]
    questions = list(few.rows("qa_id"))
    for number in range(6):
        example = rows[rows.bio + number]
        kept = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
        left, right = questions[number]["answer"][0]
        assert tokenizer.decode(kept) == questions[number]["text"][left:right]


@pytest.mark.parametrize("family", ["llama", "pythia"])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_compact_loss_and_its_gradients_are_the_plain_ones(few, tmp_path, family, groups):
    rows = TokenisedRows(few, word_tokenizer(), SMALL, tmp_path)
    batch = Collator(0)([rows[number] for number in (0, 3, 7, rows.bio, rows.bio + 1, rows.bio + 5)])
    found = {}
    for name in ("plain", "compact"):
        model = new_model(f"tiny-{family}", word_tokenizer())
        if name == "plain":
            loss = model(**batch).loss
        else:
            loss = compact_loss(model, batch["input_ids"], batch["labels"], groups)
        loss.backward()
        found[name] = loss, {key: value.grad for key, value in model.named_parameters()}
    assert torch.allclose(found["compact"][0], found["plain"][0], rtol=1e-6)
    for key, gradient in found["plain"][1].items():
        assert torch.allclose(found["compact"][1][key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), (
            key
        )


def test_the_compact_loss_reads_nothing_behind_the_last_counted_token(few, tmp_path):
    rows = TokenisedRows(few, word_tokenizer(), Optimisation(bio_loss="answer"), tmp_path)
    batch = Collator(0)([rows[0], rows[1], rows[rows.bio]])
    model, seen = new_model("tiny-llama", word_tokenizer()), []
    model.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    compact_loss(model, batch["input_ids"], batch["labels"], groups=3)
    counted = (batch["labels"] != IGNORED) * torch.arange(batch["labels"].shape[1])
    assert sorted(seen) == sorted((1, length) for length in counted.amax(1).tolist())


def test_compact_training_learns_as_plain_training_does(few, tmp_path, monkeypatch):
    curves, calls = {}, []
    monkeypatch.setattr(trainer, "compact_loss", lambda *batch: calls.append(1) or compact_loss(*batch))
    for compact in (False, True):
        optimisation = replace(SMALL, compact=compact)
        (folder,) = train("mixed", few, tmp_path / str(compact), optimisation=optimisation, evaluate_every=6)
        curves[compact] = pandas.read_parquet(folder / "curve.parquet")
        assert len(calls) == 12 * compact
    assert curves[True]["loss"].tolist() == pytest.approx(curves[False]["loss"].tolist(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "pythia"])
def test_frozen_embeddings_keep_their_bits_and_everything_else_learns(few, tmp_path, family):
    optimisation = Optimisation(steps=2, rows=6, freeze_embeddings=True, weight_decay=0.1)
    (folder,) = train("mixed", few, tmp_path, start=START[family], optimisation=optimisation)
    before, after = weights(tmp_path / "pre"), weights(folder)
    frozen = {name for name, value in after.items() if torch.equal(value, before[name])}
    embeddings = {"llama": {"model.embed_tokens.weight"}, "pythia": {"gpt_neox.embed_in.weight", "embed_out.weight"}}
    assert frozen == embeddings[family]


def test_people_of_the_familiar_pools_are_learned_with_their_own_vocabulary(tmp_path):
    dataset = make_dataset(tmp_path / "facts", DatasetSettings(people=4, pools="familiar", opening="Fact:"))
    (folder,) = train("bio-only", dataset, tmp_path / "out", optimisation=Optimisation(steps=1, rows=6))
    tokenizer = load_tokenizer(folder)
    for row in dataset.rows("bio"):
        left, right = row["answer"][0]
        assert tokenizer.unk_token_id not in tokenizer(row["text"][left:right]).input_ids


def test_training_learns_and_leaves_ordinary_checkpoints(few, tmp_path):
    steps = []
    optimisation = Optimisation(steps=120, rows=24, warmup_steps=10)
    (folder,) = train(
        "mixed", few, tmp_path, start="tiny-llama", optimisation=optimisation, progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == ("mixed", 120, 120)
    curve = pandas.read_parquet(folder / "curve.parquet")
    assert curve["step"].tolist() == [100, 120]
    assert curve["qa_id"].iloc[-1] > 0.9
    assert curve["loss"].iloc[-1] < 2
    start = new_model("tiny-llama", word_tokenizer(), seed=0)
    assert all(
        torch.equal(value, weights(tmp_path / "pre")[name])
        for name, value in start.state_dict().items()
        if "lm_head" not in name
    )
    assert load_huggingface(folder).config.architectures == ["LlamaForCausalLM"]
    assert dataset_of(folder).fingerprint == few.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"pre", "mixed"}


def test_training_from_a_checkpoint_starts_there(few, tmp_path):
    (first,) = train("bio-only", few, tmp_path / "one", start="tiny-pythia", optimisation=SMALL)
    train("mixed", few, tmp_path / "two", start=first, optimisation=SMALL)
    assert same(weights(tmp_path / "two" / "pre"), weights(first))


def test_another_start_than_the_one_trained_from_is_refused(few, tmp_path):
    (first,) = train("mixed", few, tmp_path / "one", start="tiny-llama", optimisation=SMALL)
    (other,) = train("mixed", few, tmp_path / "two", start="tiny-llama", optimisation=SMALL, seed=1)
    tuned, pre, wrong = (load_model(path) for path in (first, first.parent / "pre", other.parent / "pre"))
    facts = json.loads((first / "circuits.json").read_text())
    assert facts["start_fingerprint"] == fingerprint(pre)
    mask, task = unit_mask(tuned, [Head(0, 0)]), few.task("qa_id", tuned.tokenizer)
    ranking = rank_units(Evidence(tuned, pre), Head, ["change"])
    refused = f"one/mixed was trained from model {fingerprint(pre)}, and .*two/pre is {fingerprint(wrong)}: give the"
    for act in (
        lambda start, **options: revert(tuned, mask, start, **options),
        lambda start, **options: graft(start, mask, tuned, **options),
        lambda start, **options: graft_at(start, mask, tuned, task=task, positions=task.answer_mask, **options),
        lambda start, **options: ablate_mask(tuned, mask, [task], pre=start, draws=1, **options),
        lambda start, **options: sufficient_curve(ranking, start, tuned, tasks=[task], counts=[0], **options),
        lambda start, **options: run_interventions(
            tuned, task, [Intervention((Head(0, 0),), "revert")], pre=start, **options
        ),
        lambda start, **options: critical_curve(ranking, tuned, [task], pre=start, counts=[0], **options),
        lambda start, **options: rank_units(Evidence(tuned, start, **options), Head, ["change"]),
    ):
        act(pre)
        act(wrong, check_start=False)
        with pytest.raises(CircuitsError, match=refused):
            act(wrong)
    with pytest.raises(CircuitsError, match=refused):
        graft_by_score(wrong, tuned, task)
    # a finished stage of an earlier version, which says nothing, is taken on trust, and not made again
    del facts["start_fingerprint"]
    (first / "circuits.json").write_text(json.dumps(facts))
    assert train("mixed", few, tmp_path / "one", start="tiny-llama", optimisation=SMALL) == [first]
    revert(load_model(first), mask, wrong)


@needs_fork
@pytest.mark.usefixtures("forked_workers")
def test_the_same_seed_gives_the_same_weights_side_by_side_or_alone(few, tmp_path):
    short = replace(SMALL, steps=6)
    alone = [
        *train("mixed", few, tmp_path / "a", optimisation=short),
        *train("two-stage", few, tmp_path / "a", optimisation=short),
    ]
    jobs = [Job("mixed"), Job("bio-only"), Job("two-stage", "bio-only")]
    train_side_by_side(jobs, few, tmp_path / "b", optimisation=short, evaluate_every=3)
    for folder in alone:
        assert same(weights(folder), weights(tmp_path / "b" / folder.name))
        assert pandas.read_parquet(tmp_path / "b" / folder.name / "curve.parquet")["step"].tolist() == [3, 6]


def test_questions_alone_from_a_first_stage_are_the_second_stage_at_that_rate(few, tmp_path):
    short = replace(SMALL, steps=4)
    first, second = train("two-stage", few, tmp_path / "two", optimisation=short)
    (alone,) = train("qa-only", few, tmp_path / "one", start=first, optimisation=short)
    assert same(weights(alone), weights(second))
    (slower,) = train("qa-only", few, tmp_path / "slower", start=first, optimisation=replace(short, learning_rate=1e-4))
    assert not same(weights(slower), weights(second))


def test_a_finished_stage_is_not_run_again_and_other_settings_are_refused(few, tmp_path):
    (folder,) = train("bio-only", few, tmp_path, optimisation=SMALL)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    train("bio-only", few, tmp_path, optimisation=SMALL)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(CircuitsError, match="was made with seed 0, not 1"):
        train("bio-only", few, tmp_path, optimisation=SMALL, seed=1)
    with pytest.raises(CircuitsError, match=r"was made with optimisation\.steps 12, not 13"):
        train("bio-only", few, tmp_path, optimisation=replace(SMALL, steps=13))


def test_a_job_that_waits_for_nobody_is_refused(few, tmp_path):
    with pytest.raises(CircuitsError, match="the call two-stage waits for bio-only, which will not be done"):
        train_side_by_side([Job("two-stage", "bio-only")], few, tmp_path, optimisation=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_bad_recipes_are_refused(few, tmp_path):
    with pytest.raises(CircuitsError, match="there is no recipe 'three-stage'"):
        train("three-stage", few, tmp_path)
    with pytest.raises(CircuitsError, match="there is no configuration 'tiny-gpt'"):
        new_model("tiny-gpt", word_tokenizer())
    with pytest.raises(CircuitsError, match="there is no folder"):
        train("mixed", few, tmp_path, start=tmp_path / "nowhere")
    with pytest.raises(CircuitsError, match="the QA share is 0"):
        Optimisation(qa_share=0.0)
    assert list(tmp_path.iterdir()) == []


@needs_fork
def test_a_run_that_was_killed_goes_on_to_the_same_weights(few, tmp_path):
    def run(out: str, progress=None) -> None:
        train("two-stage", few, tmp_path / out, optimisation=SMALL, evaluate_every=4, progress=progress)

    run("whole")
    for last in (("stage_1", 7), ("two_stage", 11)):

        def killed(stage, step, _, last=last):
            if (stage, step) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        assert ended(forked(lambda killed=killed: run("killed", killed))) == -signal.SIGKILL
    steps = []
    run("killed", lambda stage, step, _: steps.append((stage, step)))
    assert steps[0] == ("two_stage", 9)
    for name in ("stage_1", "two_stage"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "killed" / name))
        curves = [pandas.read_parquet(tmp_path / run / name / "curve.parquet") for run in ("whole", "killed")]
        assert curves[0].equals(curves[1])


@needs_fork
@pytest.mark.usefixtures("forked_workers")
def test_workers_end_with_their_parent(few, tmp_path):
    endless = Optimisation(steps=100000, rows=6)
    parent = forked(lambda: train_side_by_side([Job("mixed")], few, tmp_path, optimisation=endless))
    wait_for(lambda: list((tmp_path / ".training-mixed").glob("checkpoint-*")), of=parent)
    workers = [child.pid for child in psutil.Process(parent.process).children(recursive=True)]
    assert workers
    kill(parent)
    wait_for(lambda: not any(map(running, workers)), 20)
