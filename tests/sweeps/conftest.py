from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def places(tmp_path_factory, dataset, tokenizer):
    """Checkpoints of both families on disk, and another one of the first."""
    from tests.fixtures import FAMILIES, lively

    folder = tmp_path_factory.mktemp("places")
    for name, family, seed in [(family, family, 0) for family in FAMILIES] + [("other", FAMILIES[0], 1)]:
        lively(family, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(folder=folder, dataset=dataset.folder, model=folder / FAMILIES[0], other=folder / "other")


@pytest.fixture
def plan_of(places):
    """Makes small plans."""
    from circuits.sweeps import SweepPlan

    def make(model: str = "llama", **settings):
        return SweepPlan(places.folder / model, **{"dataset": places.dataset, "examples": 6, "job_size": 5} | settings)

    return make


def contents(folder) -> dict[str, bytes]:
    """Every file of a sweep but its notes; locks are empty and stay."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith((".workers", ".lost"))}
