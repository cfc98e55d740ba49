import json
import re
import shutil
import warnings

import pytest

from circuits.errors import CircuitsError, CircuitsWarning
from circuits.facts import DatasetSettings, FactDataset, check_held_out, dataset_of, make_dataset
from circuits.training import Optimisation, train
from tests.fixtures import of_size


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the dataset ``facts``, checkpoints trained on it, and other datasets."""
    folder = tmp_path_factory.mktemp("trained")
    facts = make_dataset(folder / "facts", DatasetSettings(people=12))
    for recipe in ("mixed", "two-stage"):
        with of_size(num_hidden_layers=2, hidden_size=64):
            train(recipe, facts, folder / "checkpoints", optimisation=Optimisation(steps=1, rows=6))
    make_dataset(folder / "split", DatasetSettings(people=12, qa_id_fraction=0.25))
    make_dataset(folder / "larger", DatasetSettings(people=30))
    make_dataset(folder / "people", DatasetSettings(people=12, seed=1))
    return folder


@pytest.mark.parametrize("name", ["split", "larger"])
@pytest.mark.parametrize("model", ["mixed", "two_stage"])
def test_people_whose_questions_were_trained_on_are_not_held_out(trained, model, name):
    asked = {(row["name"], row["text"]) for row in FactDataset(trained / "facts").rows("qa_id")}
    rows = list(FactDataset(trained / name).rows("qa_ood"))
    known = sum((row["name"], row["text"]) in asked for row in rows)
    assert 0 < known < len(rows)
    checkpoint, dataset = trained / "checkpoints" / model, FactDataset(trained / name)
    for split in ("qa_ood", "qa_ood_unseen"):
        several = len(list(dataset.rows(split))) // len(rows)
        sentence = (
            f"{known * several} of {len(rows) * several} questions of {split} in {dataset.folder} ask people whose "
            f"questions {checkpoint} was trained on: take its own dataset, {trained / 'facts'}, or leave out {split}"
        )
        with pytest.raises(CircuitsError, match=re.escape(sentence)):
            check_held_out(checkpoint, dataset, [split])
    strangers = {row["person"] for row in rows if (row["name"], row["text"]) not in asked}
    check_held_out(checkpoint, dataset, people=strangers)


@pytest.mark.filterwarnings("error")
def test_people_that_are_held_out_pass(trained):
    checkpoints, other = trained / "checkpoints", FactDataset(trained / "split")
    for dataset in (FactDataset(trained / "facts"), FactDataset(trained / "people")):
        check_held_out(checkpoints / "mixed", dataset)
    # as biographies or trained questions they are nothing but themselves, and before its questions no model knows any
    check_held_out(checkpoints / "mixed", other, ["bio", "qa_id", "qa_id_unseen"])
    for untaught in ("pre", "stage_1"):
        check_held_out(checkpoints / untaught, other)


def test_without_its_own_dataset_a_checkpoint_says_that_nothing_can_be_checked(trained, tmp_path):
    shutil.copytree(trained / "checkpoints" / "mixed", tmp_path / "far" / "away" / "mixed")
    moved = tmp_path / "far" / "away" / "mixed"
    with pytest.warns(CircuitsWarning, match=r"whether qa_ood of .*split ask people it was trained on cannot be"):
        check_held_out(moved, FactDataset(trained / "split"), ["bio", "qa_ood"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_held_out(moved, FactDataset(trained / "facts"))


def test_a_folder_that_is_no_checkpoint_is_not_asked_for_its_dataset(trained):
    with pytest.raises(CircuitsError, match="facts is no checkpoint: it has no config.json"):
        dataset_of(trained / "facts")


def test_an_adapter_has_the_dataset_of_its_base_unless_it_names_its_own(trained, tmp_path, monkeypatch):
    adapter, split = tmp_path / "deep" / "adapter", FactDataset(trained / "split")
    adapter.mkdir(parents=True)

    def name(base):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))

    monkeypatch.chdir(trained)
    for base in (str(trained / "checkpoints" / "mixed"), "checkpoints/mixed"):
        name(base)
        assert dataset_of(adapter).folder == trained / "facts"
        with pytest.raises(CircuitsError, match=r"questions of qa_ood in .*split ask people whose questions .*adapter"):
            check_held_out(adapter, split, ["qa_ood"])
    facts = {"data": str(split.folder), "dataset": split.fingerprint}
    (adapter / "circuits.json").write_text(json.dumps(facts))
    assert dataset_of(adapter).folder == split.folder
    (adapter / "circuits.json").unlink()
    name("nowhere/base")
    with pytest.raises(CircuitsError, match=r"names its base as nowhere/base, and there is no folder .*adapter/.* or"):
        dataset_of(adapter)
