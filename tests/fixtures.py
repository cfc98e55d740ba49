"""Fixtures: a small dataset, and for both families a model with weights large enough to make every part matter."""

import copy
import multiprocessing
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module

# Python does not find the compiled files of what a module under the import hook imports first
for large in ("beartype.door", "datasets", "pandas", "peft", "pyarrow.parquet", "scipy.stats"):
    import_module(large)

import jaxtyping
import pytest
import torch

from circuits import processes
from circuits.executors import end_with, local
from circuits.facts import DatasetSettings, FactDataset, make_dataset, word_tokenizer
from circuits.tasks import Task
from circuits.training import configurations, new_model

FAMILIES = ("llama", "pythia")
#: Of which the one ties its embeddings, and the other does not.
START = {"llama": "tiny-llama", "pythia": "tiny-pythia-untied"}

# small models are fastest on one thread, and a busy machine makes two far slower
torch.set_num_threads(1)
torch.set_flush_denormal(True)


def narrow(configuration: str, seed: int = 0):
    """A new model with half the width of the one that is trained from scratch, and a fifth of its parameters."""
    usual = new_model(configuration, word_tokenizer())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes = {name: size for name, size in sizes.items() if hasattr(usual.config, name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(usual)(type(usual.config)(**usual.config.to_dict() | sizes)).eval()


@contextmanager
def of_size(**sizes: int):
    """Models that are trained from scratch have these sizes, for what does not depend on them."""
    config = configurations._config

    def made(*of):
        usual = config(*of)
        return type(usual)(**usual.to_dict() | {name: size for name, size in sizes.items() if hasattr(usual, name)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurations, "_config", made)
        yield


@pytest.fixture
def smaller():
    """Half the layers and half the width."""
    with of_size(num_hidden_layers=2, hidden_size=64, intermediate_size=96):
        yield


def lively(family: str, seed: int = 0):
    """A Hugging Face model whose attention is far from uniform and whose biases are not zero."""
    model = narrow(START[family], seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.02 if "norm" in name else 0.5 if "embed" in name else 0.17
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def gradients_of(model):
    """A function from a loss, computed with a hookable model, to its gradient at each parameter of the checkpoint."""
    rows, named = model.checkpoint.rows, dict(model.named_parameters())
    own_name = getattr(model, "own_name", None)

    def gradients(loss):
        found = {}
        if own_name is None:
            at = torch.autograd.grad(loss, list(model.checkpoint.tensors.values()))
            by_tensor = dict(zip(model.checkpoint.tensors, at, strict=True))
            found = {row.name: row.stored(by_tensor[row.tensor]) for row in rows}
            return {name: value for name, value in found.items() if not (tied and name == "unembed.W_U")}
        at = torch.autograd.grad(loss, [named[own_name(row.name)] for row in rows])
        found = {row.name: value.clone() for row, value in zip(rows, at, strict=True)}
        if tied:
            found["embed.W_E"] += found.pop("unembed.W_U").T
        return found

    tied = model.checkpoint.tied
    return gradients


@torch.no_grad()
def said_by(model, task):
    """The task with what a model answers for the truth, so that it gets everything right."""
    tokens = task.tokens.clone()
    for answer in task.answers.itertuples():
        for place in range(answer.start, answer.end):
            tokens[answer.example, place] = model(tokens[answer.example, :place][None])[0, -1].argmax()
    return replace(task, tokens=tokens)


@pytest.fixture
def unchecked():
    """Without checks of shapes and types: wrong ones reach our refusals, and small calls are ten times faster."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def all_unchecked():
    """The same for a whole module: one that puts together what other modules check piece by piece."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def without_pages():
    """Analyses draw nothing and write no page, for tests of their tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("circuits.analysis.analysis.figures_of", lambda _: {})
        patch.setattr("circuits.analysis.analysis.write_page", lambda *_: None)
        yield


@contextmanager
def few_points():
    """Curves over more than four units are measured at few numbers of them, and integrals at few points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("circuits.rankings.curves._ALL_COUNTS", 4)
        patch.setattr("circuits.rankings.curves._SEGMENTS", 3)
        patch.setattr("circuits.analysis.consistency.PATH", 4)
        yield


@pytest.fixture
def pageless():
    with without_pages():
        yield


@pytest.fixture
def coarse_search(monkeypatch):
    """The search for a graft tries few sizes, for tests that only need some graft."""
    monkeypatch.setattr("circuits.masks.graft_search._SIZES", 9)
    monkeypatch.setattr("circuits.masks.graft_search._TOLERANCE", 0.05)


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers are forked and wait for no imports; tests of little work start some that begin anew."""
    context, ends = multiprocessing.get_context("fork"), []
    pipe = context.Pipe

    def kept(duplex=True):
        reader, end = pipe(duplex)
        ends.append(end)
        return reader, end

    def end_with_parent(alive) -> None:
        # a fork has inherited the end whose closing would tell it that its parent is gone
        for end in ends:
            end.close()
        end_with(alive)

    monkeypatch.setattr(context, "Pipe", kept)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    for module in (processes, local):
        monkeypatch.setattr(module, "end_with", end_with_parent)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> FactDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "facts", DatasetSettings(people=12))


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def huggingface(family):
    return lively(family)


@cache
def _loaded(family: str, seed: int):
    from circuits.models import load_model

    return load_model(lively(family, seed), tokenizer=word_tokenizer())


def loaded(family: str, seed: int = 0):
    """A model of a test's own: a copy takes an eighth of the time of loading one."""
    return copy.deepcopy(_loaded(family, seed))


@pytest.fixture(scope="session")
def untouched(family):
    """The model that others are copies of: for tests that change nothing of it."""
    return _loaded(family, 0)


@pytest.fixture
def model(family):
    return loaded(family)


@pytest.fixture
def pre(family):
    """What the model was before fine-tuning."""
    return loaded(family, seed=1)


@pytest.fixture(scope="session")
def tasks(dataset, tokenizer) -> dict[str, Task]:
    return {split: dataset.task(split, tokenizer) for split in ("bio", "qa_id", "qa_ood")}


@pytest.fixture
def bio(tasks) -> Task:
    """Ten examples of unequal length."""
    task = tasks["bio"].select(range(10))
    assert len(set(task.attention_mask.sum(1).tolist())) > 1
    return task


@pytest.fixture
def recalled(model, tasks) -> Task:
    """Questions whose answers are one token: the one that the model predicts."""
    task = tasks["qa_ood"]
    task = task.select(task.answers.loc[task.answers["end"] - task.answers["start"] == 1, "example"].tolist()[:8])
    tokens = task.tokens.clone()
    starts = torch.tensor(task.answers["start"].tolist())
    examples = torch.arange(len(task))
    with torch.no_grad():
        tokens[examples, starts] = model(tokens)[examples, starts - 1].argmax(-1)
    return replace(task, name="recalled", tokens=tokens)
