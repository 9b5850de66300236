"""Smoke tests of every benchmark on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.support.benchmark_cli import QUICK_OPTIONS, run_benchmark

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


@pytest.mark.parametrize("name", ["op", "block", "model", "memory", "conv", "infer"])
def test_benchmark_runs_on_gpu(name: str, tmp_path: Path) -> None:
    document = run_benchmark(name, "--device", "cuda", *QUICK_OPTIONS, "both", out=tmp_path)
    (one,) = document["runs"]
    assert one["environment"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert all(p["median_s"] > 0 for case in one["cases"] for p in case["providers"].values())


def test_cuda_graph_replays_match_eager_inference(tmp_path: Path) -> None:
    arguments = ("--mode", "eval", "--providers", "ours+graph,eager-channels-last+graph", "--device", "cuda")
    (one,) = run_benchmark("model", *arguments, *QUICK_OPTIONS, "as-shipped", out=tmp_path)["runs"]
    assert list(one["cases"][0]["providers"]) == ["ours+graph", "eager-channels-last+graph"]
