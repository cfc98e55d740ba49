"""Studies that start from a pretrained checkpoint, as far as that makes a difference."""

import json
import shutil
from dataclasses import replace

import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.facts import FAMILIAR, DatasetSettings, word_tokenizer
from circuits.models import fingerprint, load_model, parameters_of, save_model
from circuits.study import AUGMENTED_STUDY, PRETRAINED_STUDY, StudySettings, run_study
from circuits.training import PRETRAINED, new_model
from tests.cli.commands import call, refused
from tests.fixtures import of_size

pytestmark = pytest.mark.usefixtures("all_unchecked")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Two checkpoints that know the familiar words."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = word_tokenizer("familiar")
    for family in ("llama", "pythia"):
        with of_size(num_hidden_layers=2, hidden_size=64, intermediate_size=96):
            new_model(f"tiny-{family}", tokenizer, seed=5).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


def test_a_study_starts_from_a_pretrained_checkpoint(without_workers, pretrained, tmp_path):
    settings = replace(
        PRETRAINED_STUDY,
        family=None,
        model=str(pretrained / "pythia"),
        data=replace(FAMILIAR, people=8, biographies=1),
        optimisation=replace(PRETRAINED, steps=6),
        evaluate_every=3,
        evaluate_examples=10,
        rates=(),
    )
    assert settings.family == "pythia"

    def until_it_traces(line: str) -> None:
        if line.startswith("analyse"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "study", settings, until_it_traces)
    plan = json.loads((tmp_path / "study" / "plan.json").read_text())
    start = fingerprint(load_model(pretrained / "pythia"))
    assert plan["model_fingerprint"] == start == fingerprint(load_model(tmp_path / "study" / "checkpoints" / "pre"))
    assert fingerprint(load_model(tmp_path / "study" / "checkpoints" / "mixed")) != start
    tables = {path.stem: pandas.read_parquet(path) for path in (tmp_path / "study" / "tables").glob("*.parquet")}
    assert set(tables["accuracy"]["answers"]) == {10}
    assert tables["curves"].groupby("model")["step"].agg(list).tolist() == [[3, 6]] * 4
    # another checkpoint under the same name
    moved = pretrained / "other"
    shutil.copytree(pretrained / "pythia", moved)
    again = replace(settings, model=str(moved))
    with pytest.raises(CircuitsError, match=r"holds a study with model .*pythia, not .*other"):
        run_study(tmp_path / "study", again)
    (tmp_path / "study" / "plan.json").write_text(json.dumps(plan | {"model": str(moved)}))
    changed = load_model(moved)
    with torch.no_grad():
        parameters_of(changed)["blocks.0.mlp.W_in"].add_(1e-3)
    save_model(changed, moved)
    with pytest.raises(CircuitsError, match=f"a study with model_fingerprint {start}, not {fingerprint(changed)}"):
        run_study(tmp_path / "study", again)


def test_a_model_brings_its_own_defaults(pretrained, tmp_path, monkeypatch):
    asked = []

    def run_nothing(out, settings, say):
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("circuits.study.run_study", run_nothing)
    model = ("study", "--out", tmp_path / "out", "--model")
    assert call(*model, pretrained / "pythia", "--seed", 3, "--people", 20).returncode == 130
    data = replace(PRETRAINED_STUDY.data, people=20, seed=3)
    assert asked == [
        replace(PRETRAINED_STUDY, family="pythia", model=str(pretrained / "pythia"), seed=3, data=data)
    ]  # fmt: skip
    assert call("study", "--out", tmp_path / "out").returncode == 130
    assert asked[1] == StudySettings()
    assert call("study", "--out", tmp_path / "out", "--condition", "augmented").returncode == 130
    assert asked[2] == AUGMENTED_STUDY
    assert asked[2].data == DatasetSettings()
    assert asked[0].data == replace(
        FAMILIAR, biographies=1, wordings=1, order="fixed", row="biography", people=20, seed=3
    )
    assert call(*model, pretrained / "llama", "--condition", "augmented").returncode == 130
    assert (asked[3].data, asked[3].optimisation) == (FAMILIAR, PRETRAINED)
    refused(call(*model, tmp_path / "nowhere"), "there is no folder")
    refused(call(*model, tmp_path), "is no checkpoint: it has no config.json")
    refused(call(*model, pretrained / "llama", "--family", "pythia"), "is a llama, not a pythia: leave out the family")
    assert not (tmp_path / "out").exists()
    for change, sentence in {
        "rank_halvings": "halvings is 0",
        "evaluate_examples": "the number of examples for evaluate is 0",
        "evaluate_every": "steps between evaluations",
    }.items():
        with pytest.raises(CircuitsError, match=sentence):
            replace(PRETRAINED_STUDY, **{change: 0})
