"""Calculated quantities: `roofline`, its levels of fusion, and the memory traffic of a batch norm."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cases, levels, network, roofline, traffic
from benchmarks.devices import DEVICES
from tests.support.benchmark_cli import assert_report_files, run_benchmark


def test_op_cases_match_resnet50() -> None:
    """Shapes and counts match the batch norms of the network itself, at two sizes (one with odd halves)."""
    from benchmarks.stock import stock_model

    with torch.device("meta"):
        network = stock_model("resnet50")
    norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for size in (224, 100):
        counted: dict[tuple[int, ...], int] = {}
        for shape in cases.input_shapes(network, list(norms), 4, size).values():
            counted[shape] = counted.get(shape, 0) + 1
        expected: dict[tuple[int, ...], int] = {}
        op_cases = cases.resnet50_op_cases(4, size)
        for case in op_cases:
            expected[case.shape] = expected.get(case.shape, 0) + case.count
        assert counted == expected
        assert len(op_cases) == 16
        assert sum(case.count for case in op_cases) == len(norms) == 53
        assert sum(case.count for case in op_cases if case.residual) == 16
        assert sum(case.count for case in op_cases if case.activation == "identity") == 4


def test_traffic_of_a_hand_counted_case() -> None:
    n = 1000
    assert traffic.compulsory(n, residual=False) == traffic.Traffic(2 * n, 3 * n)  # x y | dy x dx
    assert traffic.compulsory(n, residual=True) == traffic.Traffic(3 * n, 4 * n)  # x r y | dy x dx dr
    assert traffic.fused(n, False, "train") == traffic.Traffic(3 * n, 5 * n)  # x x y | dy x dy x dx
    mask = n / 32
    assert traffic.fused(n, True, "train") == traffic.Traffic(4 * n + mask, 6 * n + 2 * mask)
    assert traffic.fused(n, True, "eval") == traffic.Traffic(3 * n, 0)
    # mean variance normalize(2) add(3) relu(2) | relu(3) norm(5)
    assert traffic.eager(n, True, "train") == traffic.Traffic(9 * n, 8 * n)
    assert traffic.eager(n, False, "train", relu=False) == traffic.Traffic(4 * n, 5 * n)


def test_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark(
        "roofline", "--model", "resnet18", "--batch", "2", "--size", "64", "--layers", out=tmp_path
    )
    assert_report_files(tmp_path, "roofline")
    printed = capsys.readouterr().out
    assert "roofline: H200 SXM: 4.80 TB/s, 989 TFLOP/s dense, 50 MB L2 (calculated)" in printed
    assert "fewest ms" in printed
    (one,) = document["runs"]
    for case in one["cases"]:
        times = [level["floor_s"] for level in case["levels"].values()]
        assert max(times) == times[0] and min(times) == times[-1] > 0
        for level in case["levels"].values():
            assert max(level["memory_s"], level["math_s"]) <= level["floor_s"] <= level["memory_s"] + level["math_s"]
            for key in ("bytes", "flops", "floor_s"):
                assert sum(stage[key] for stage in level["stages"].values()) == pytest.approx(level[key])


def test_roofline_of_a_hand_counted_bottleneck() -> None:
    """The unit is one activation of 64 channels; the block's input and output have four units each."""
    net = network.build_network("resnet50", 2, 64)
    a, weights = 2 * (2 * 64 * 16 * 16), 2 * (256 * 64 + 64 * 64 * 9 + 64 * 256)
    mask = 4 / 16  # of the block's output, one bit for each element of 16 bits

    def count(level: str, mode: cases.Mode) -> float:
        kernels = levels.kernels(net, levels.LEVELS[level], mode, torch.bfloat16)
        traffic_bytes = sum(kernel.bytes for kernel in kernels if kernel.layer.startswith("layer1.1."))
        return (traffic_bytes - (3 if mode == "train" else 1) * weights) / a

    convolutions = (4 + 1) + (1 + 1) + (1 + 4)
    # mean and variance, normalize, ReLU | addition | ReLU, reductions, dx | the shortcut's gradient
    eager = convolutions + 2 * (1 + 2 + 2) + (4 + 8 + 12 + 8) + (12 + 8 + 12) + 2 * (3 + 2 + 3) + 2 * convolutions + 12
    assert count("eager", "train") == eager == 138
    compiled = convolutions + 2 * (1 + 2) + (4 + 12) + (20 + 12) + 2 * (3 + 4) + 2 * convolutions
    assert count("compile", "train") == compiled == 104
    norm = convolutions + 2 * (1 + 2) + (4 + 12) + (8 + 12) + 2 * (2 + 3) + 2 * convolutions + 12 + 4 * mask
    assert count("norm", "train") == norm == 101
    # Forward: statistics of the 3x3 only, normalization of its input, end of the block. Backward from the end:
    # reductions and both gradients of the last 1x1; dz and both gradients of the 3x3; reductions and both gradients of
    # the first 1x1, which adds the shortcut's gradient.
    fused = convolutions + 1 + 2 + 12 + 8 + (10 + 9) + (3 + 2 + 2) + (2 + (6 + 4) + 6) + 5 * mask
    assert count("fused", "train") == fused == 80.25
    assert count("fewest", "train") == convolutions + 12 + 10 + 4 + 14 == 52
    assert count("eager", "eval") == convolutions + 2 * (2 + 2) + (8 + 12 + 8) == 48
    assert count("norm", "eval") == count("compile", "eval") == convolutions + 2 * 2 + 12
    assert count("fused", "eval") == count("fewest", "eval") == convolutions + 4


def test_roofline_of_a_hand_counted_convolution() -> None:
    """The projection of ResNet-50's second stage reads a quarter of its input, but writes the whole input gradient."""
    net = network.build_network("resnet50", 8, 224)
    kernels = levels.kernels(net, levels.LEVELS["eager"], "train", torch.float32)
    steps = {kernel.step: kernel for kernel in kernels if kernel.layer == "layer2.0.projection"}
    x, z, w = 4 * 8 * 256 * 56 * 56, 4 * 8 * 512 * 28 * 28, 4 * 256 * 512
    flops = 2 * 8 * 512 * 28 * 28 * 256
    assert steps["conv"][-2:] == steps["wgrad"][-2:] == (x / 4 + z + w, flops)
    assert steps["dgrad"][-2:] == (z + w + x, flops)
    total = roofline.totals([steps["conv"]], DEVICES["a100"], "tf32")
    assert total["memory_s"] == pytest.approx((x / 4 + z + w) / 2.039e12)
    assert total["floor_s"] == max(total["memory_s"], total["math_s"]) and total["math_s"] == flops / 156e12


def test_roofline_fuses_every_1x1_convolution() -> None:
    net = network.build_network("resnet50", 2, 64)
    steps = [kernel.step for kernel in levels.kernels(net, levels.LEVELS["fused"], "train", torch.bfloat16)]
    assert steps.count("fused wgrad") == 2 * 16 + 4


def test_roofline_counts_the_flops_of_a_training_step() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.stock import stock_model

    with torch.device("meta"):
        model = stock_model("resnet50")
        images = torch.empty(4, 3, 224, 224)
    net = network.build_network("resnet50", 4, 224)
    for mode in roofline.MODES:
        model.train(mode == "train")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode == "train"):
            output = model(images)
            if mode == "train":
                output.sum().backward()
        for level in levels.LEVELS.values():
            kernels = levels.kernels(net, level, mode, torch.bfloat16)
            assert sum(kernel.flops for kernel in kernels) == counter.get_total_flops()
