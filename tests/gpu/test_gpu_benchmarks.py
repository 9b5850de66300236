"""Every benchmark on a GPU, quickly: does it run."""

from pathlib import Path

import pytest
import torch

from tests.support.benchmark_cli import RUN, run

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


@pytest.mark.parametrize("name", ["op", "block", "model", "memory", "conv", "infer"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    document = run(name, "--device", "cuda", *RUN, "both", out=tmp_path)
    (one,) = document["runs"]
    assert one["environment"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert all(p["median_s"] > 0 for case in one["cases"] for p in case["providers"].values())


def test_gpu_graph_replays_are_the_inference(tmp_path: Path) -> None:
    arguments = ("--mode", "eval", "--providers", "ours+graph,eager-channels-last+graph", "--device", "cuda")
    (one,) = run("model", *arguments, *RUN, "as-shipped", out=tmp_path)["runs"]
    assert list(one["cases"][0]["providers"]) == ["ours+graph", "eager-channels-last+graph"]
