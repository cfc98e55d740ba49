"""The benchmark that needs a GPU, as far as it runs without one."""

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.command([]) == 2
    said = capsys.readouterr()
    assert said.err == "benchmarks.gpu: there is no CUDA device here: run it where there is one, or with --tiny\n"
    assert said.out == ""


# with the checks that take a machine of their own: beside other work torch has failed in one of its backward passes
@pytest.mark.real
def test_it_runs_to_the_end_with_tiny_models(unchecked):
    found = gpu.main(tiny=True)
    for name in ("llama-3.2-3b", "pythia-2.8b"):
        exact, half = (found[f"{name} {dtype}"] for dtype in ("float32", "bfloat16"))
        assert exact["heads"] == 12
        assert exact["heads_max_difference"] < 1e-3
        assert exact["deviations"]["log_prob"] < 1e-4
        assert exact["deviations"]["trace_over_largest_entry"] < 1e-4
        # interventions compute in float32 with bfloat16 weights where the processor has no products of these
        products = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
        assert half["deviations"]["log_prob"] < (2e-2 if products else 1e-4)
        assert 1e-4 < half["deviations"]["trace_over_largest_entry"] < 0.1
        assert min(exact["share_of_peak"], exact["heads_ratio"], exact["trace_ratio"]) > 0
