"""`memory`: the bytes that a training step saves and needs, against modules counted by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import footprint
from benchmarks.memory import Checkpointed
from tests.support.benchmark_cli import RUN, assert_files, run


def test_memory(tmp_path: Path) -> None:
    document = run("memory", *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, "memory")
    (case,) = document["runs"][0]["cases"]
    ways = case["providers"]
    assert list(ways) == ["ours none", "ours norm", "ours conv", "eager", "eager-channels-last", "checkpoint"]
    saved = {way: values["saved_bytes"] for way, values in ways.items()}
    assert saved["ours conv"] <= saved["ours norm"] < saved["ours none"] <= saved["eager"]
    assert saved["checkpoint"] < saved["eager"] == saved["eager-channels-last"]
    for values in ways.values():
        assert values["hidden_bytes"] == 0
        assert values["saved_bytes"] <= values["held_bytes"] < values["peak_tensor_bytes"]
        assert values["resident_before_bytes"] < values["resident_peak_bytes"]


class Hiding(torch.autograd.Function):
    """Doubles; keeps a tensor where saved_tensors_hooks does not look."""

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

    # The convolution saves its input (not counted) and weight (not counted). The norm saves that output, and
    # mean and inverse deviation of 4 channels. The ReLU in place saves its result; the mean over space saves
    # nothing.
    conv_bn_relu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    activation = 2 * 4 * 6 * 6
    saved = footprint.saved_for_backward(lambda: conv_bn_relu(x).mean(), conv_bn_relu, [x])
    assert saved == footprint.Saved(floats * (2 * activation + 2 * 4), 0)
    # The input counts if it is not named as one, and only once although two layers save it.
    twice = nn.Conv2d(3, 4, 3)
    both = footprint.saved_for_backward(lambda: (twice(x) + twice(x)).sum(), twice, [])
    assert both.total == floats * x.numel()

    # A saved slice keeps its whole storage.
    leaf = torch.randn(10, requires_grad=True)
    whole = torch.randn(100)
    assert footprint.saved_for_backward(lambda: (leaf * whole[:10]).sum(), nn.Identity(), [leaf]).total == 400

    # What was saved and dropped again before the end of the forward does not count.
    def forward() -> Tensor:
        (leaf * torch.randn(10)).sum()
        return (leaf * torch.randn(10)).sum()

    assert footprint.saved_for_backward(forward, nn.Identity(), [leaf]).total == 40

    hidden = footprint.saved_for_backward(lambda: Hiding.apply(leaf).sum(), nn.Identity(), [leaf])
    assert hidden == footprint.Saved(0, 100)


def test_saved_bytes_of_a_checkpointed_module_is_its_input() -> None:
    x = torch.randn(2, 4, 8, 8)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = Checkpointed(block)
    before = nn.Conv2d(4, 4, 1)
    saved = footprint.saved_for_backward(lambda: model(before(x)).sum(), nn.Sequential(before, model), [x])
    assert saved.total == 4 * x.numel()


def test_tensor_memory_sees_what_is_held_and_the_peak() -> None:
    def call() -> Tensor:
        kept, dropped = torch.empty(1000), torch.empty(5000)
        del dropped
        return kept

    assert footprint.tensor_memory(call) == footprint.TensorMemory(held=4000, peak=24000)


def _big_step(size: int):
    return lambda: torch.ones(size).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_resident_sees_a_fresh_process() -> None:
    resident = footprint.peak_resident(_big_step, 50_000_000)
    assert 195e6 < resident.peak - resident.before < 400e6
