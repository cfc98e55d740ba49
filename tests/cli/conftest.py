import pytest


@pytest.fixture(scope="module")
def without_workers():
    """What is done side by side is done here, one after the other, without waiting for processes."""
    from circuits import processes
    from circuits.study import along, analyses, rates
    from circuits.training import parallel

    def here(calls, workers=2, say=None):
        assert workers == 2
        processes.side_by_side(calls, 1, say)

    with pytest.MonkeyPatch.context() as patch:
        for module in (parallel, analyses, rates):
            patch.setattr(module, "side_by_side", here)
        # what is measured while they learn
        patch.setattr(along, "_EXAMPLES", 8)
        patch.setattr(along, "_FACTS", 8)
        yield
