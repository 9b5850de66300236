"""`memory`: bytes that a training step saves and allocates, compared with hand-counted modules."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import footprint
from benchmarks.memory import CheckpointedBlock
from tests.support.benchmark_cli import QUICK_OPTIONS, assert_report_files, run_benchmark


def test_memory(tmp_path: Path) -> None:
    document = run_benchmark("memory", *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, "memory")
    (case,) = document["runs"][0]["cases"]
    configurations = case["providers"]
    assert list(configurations) == ["ours none", "ours norm", "ours conv", "eager", "eager-channels-last", "checkpoint"]
    saved = {name: values["saved_bytes"] for name, values in configurations.items()}
    assert saved["ours conv"] <= saved["ours norm"] < saved["ours none"] <= saved["eager"]
    assert saved["checkpoint"] < saved["eager"] == saved["eager-channels-last"]
    for values in configurations.values():
        assert values["hidden_bytes"] == 0
        assert values["saved_bytes"] <= values["held_bytes"] < values["peak_tensor_bytes"]
        assert values["resident_before_bytes"] < values["resident_peak_bytes"]


class HiddenTensorFunction(torch.autograd.Function):
    """Doubles its input and stores a tensor that saved_tensors_hooks does not intercept."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.stash = {"spare": [torch.zeros(25)]}
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_saved_bytes_of_hand_counted_modules() -> None:
    x = torch.randn(2, 3, 8, 8)
    floats = 4

    # The convolution saves its input and weight (neither is counted). The norm saves the convolution's output and mean
    # and inverse standard deviation of 4 channels. The in-place ReLU saves its output; the mean saves nothing.
    conv_bn_relu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    activation = 2 * 4 * 6 * 6
    saved = footprint.saved_for_backward(lambda: conv_bn_relu(x).mean(), conv_bn_relu, [x])
    assert saved == footprint.SavedBytes(floats * (2 * activation + 2 * 4), 0)
    # An input that is not excluded counts, and only once although two layers save it.
    twice = nn.Conv2d(3, 4, 3)
    both = footprint.saved_for_backward(lambda: (twice(x) + twice(x)).sum(), twice, [])
    assert both.total == floats * x.numel()

    # A saved slice retains its whole storage.
    leaf = torch.randn(10, requires_grad=True)
    whole = torch.randn(100)
    assert footprint.saved_for_backward(lambda: (leaf * whole[:10]).sum(), nn.Identity(), [leaf]).total == 400

    # Tensors that are saved and freed before the end of the forward do not count.
    def forward() -> Tensor:
        (leaf * torch.randn(10)).sum()
        return (leaf * torch.randn(10)).sum()

    assert footprint.saved_for_backward(forward, nn.Identity(), [leaf]).total == 40

    hidden = footprint.saved_for_backward(lambda: HiddenTensorFunction.apply(leaf).sum(), nn.Identity(), [leaf])
    assert hidden == footprint.SavedBytes(0, 100)


def test_checkpointed_module_saves_only_its_input() -> None:
    x = torch.randn(2, 4, 8, 8)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = CheckpointedBlock(block)
    before = nn.Conv2d(4, 4, 1)
    saved = footprint.saved_for_backward(lambda: model(before(x)).sum(), nn.Sequential(before, model), [x])
    assert saved.total == 4 * x.numel()


def test_tensor_memory_counts_live_bytes_and_the_peak() -> None:
    def call() -> Tensor:
        retained, freed = torch.empty(1000), torch.empty(5000)
        del freed
        return retained

    assert footprint.tensor_memory(call) == footprint.TensorMemory(live=4000, peak=24000)


def _big_step(size: int):
    return lambda: torch.ones(size).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_resident_measures_a_fresh_process() -> None:
    resident = footprint.peak_resident(_big_step, 50_000_000)
    assert 195e6 < resident.peak - resident.before < 400e6
