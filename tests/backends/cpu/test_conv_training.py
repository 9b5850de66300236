"""The CPU backend's convolutions in training: weight gradients, statistics from the epilogue, and residual blocks.

``python -m tests.backends.cpu.test_conv_training`` compares 200 training steps with and without Winograd.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, UnitSpec, _extension, models
from fused_res.backends import registry
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.functional import residual_block
from fused_res.testing import assert_within_stock_error

pytestmark = pytest.mark.skipif(
    registry.unavailable("cpu") is not None or _extension.cpu_isa() == "baseline", reason="needs AVX2 and the extension"
)

#: RMS error relative to the RMS of the float64 reference, with and without Winograd. Winograd is exempt from the
#: accuracy criterion "at most twice stock PyTorch's error".
LIMITS = {True: 3e-6, False: 1e-6}
SAME = UnitSpec(padding=(1, 1))


@pytest.fixture(params=["avx512", "avx2"])
def isa(request: Any) -> Iterator[str]:
    previous = _extension.cpu_isa()
    try:
        _extension._module.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _extension._module.set_cpu_isa(previous)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def images(*shape: int, mean: float = 0.5) -> Tensor:
    return (torch.randn(shape) + mean).contiguous(memory_format=torch.channels_last)


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Return the relative RMS error; the absolute one if the reference is zero."""
    error, scale = (actual.double() - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def weight_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, winograd: bool
) -> Tensor:
    registry.resolve("cpu", torch.device("cpu"))  # loads the backend, which registers the operator
    no_norms = None, None, None, False, None, 0, weight, x, None, False, None, None
    geometry = (stride,) * 2, (padding,) * 2, (dilation,) * 2
    return torch.ops.fused_res_cpu.conv_backward(dz, *no_norms, *geometry, (False, True), 4 * winograd)[2]


def float64_gradients(dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Any:
    return torch.ops.aten.convolution_backward(
        dz.double(), x.double(), weight.double(), None, (stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0),
        1, [True, True, False],
    )  # fmt: skip


def check_weight_gradient(
    batch: int, channels: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int], winograd: bool,
    stride: int = 1, padding: int = 1, dilation: int = 1, channels_last: bool = True,
) -> None:  # fmt: skip
    x = images(batch, channels, *size)
    weight = torch.randn(outputs, channels, *kernel)
    weight = weight.contiguous(memory_format=torch.channels_last) if channels_last else weight
    sizes = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    if min(sizes) < 1:
        return
    dz = images(batch, outputs, *sizes, mean=0.0)
    actual = weight_gradient(dz, x, weight, stride, padding, dilation, winograd)
    assert actual.stride() == weight.stride()
    error = relative_error(actual, float64_gradients(dz, x, weight, stride, padding, dilation)[1])
    assert error <= LIMITS[winograd], (x.shape, weight.shape, stride, padding, dilation, error)


def test_winograd_weight_gradient(isa: str) -> None:
    torch.manual_seed(0)
    heights, widths = (1, 2, 3, 4, 5, 6, 7, 13), (2, 5, 8, 11)
    for n, channels, outputs in ((1, 17, 33), (3, 64, 3), (2, 1, 40)):
        for height, width, padding, channels_last in itertools.product(heights, widths, (0, 1, 2), (True, False)):
            for stride in (1, 2):
                check_weight_gradient(
                    n, channels, outputs, (height, width), (3, 3), True, stride, padding, channels_last=channels_last
                )
    check_weight_gradient(4, 130, 100, (14, 14), (3, 3), True)  # one set of accumulators, shared by all tasks
    check_weight_gradient(8, 64, 64, (28, 28), (3, 3), True)  # separate accumulators for each part of K
    check_weight_gradient(4, 130, 100, (28, 27), (3, 3), True, stride=2)
    check_weight_gradient(8, 64, 64, (56, 56), (3, 3), True, stride=2)


def test_direct_weight_gradient(isa: str) -> None:
    torch.manual_seed(0)
    for n, channels, outputs in ((1, 17, 33), (3, 64, 3), (2, 3, 64)):
        for size, kernel, stride, padding, dilation in itertools.product(
            ((1, 2), (7, 6), (10, 13)), ((1, 1), (3, 3), (5, 3)), (1, 2, 3), (0, 1), (1, 2)
        ):
            check_weight_gradient(n, channels, outputs, size, kernel, False, stride, padding, dilation)
    check_weight_gradient(2, 3, 64, (64, 64), (7, 7), False, stride=2, padding=3)
    # A row stride of a multiple of 4 KB is copied.
    check_weight_gradient(2, 1024, 48, (7, 7), (1, 1), False, padding=0)
    check_weight_gradient(2, 48, 1024, (7, 7), (1, 1), False, padding=0, channels_last=False)
    check_weight_gradient(2, 160, 200, (15, 15), (3, 3), False, stride=2)


def test_results_are_bitwise_equal_for_any_thread_count() -> None:
    torch.manual_seed(0)
    for channels, outputs, size in ((32, 40, 24), (200, 160, 9)):
        x, dz = images(3, channels, size, size), images(3, outputs, size, size)
        weight = images(outputs, channels, 3, 3)
        for winograd in (True, False):
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    results.append(weight_gradient(dz, x, weight, 1, 1, 1, winograd))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_non_dense_layouts() -> None:
    x, dz, weight = torch.randn(2, 20, 9, 9)[:, ::2], torch.randn(2, 8, 9, 9), torch.randn(8, 10, 3, 3)
    reference = float64_gradients(dz, x, weight, 1, 1, 1)[1]
    for winograd in (True, False):
        assert relative_error(weight_gradient(dz, x, weight, 1, 1, 1, winograd), reference) <= LIMITS[winograd]


@pytest.mark.parametrize("winograd", [True, False])
def test_invalid_arguments_raise(winograd: bool) -> None:
    x, dz, weight = images(2, 8, 6, 6), images(2, 4, 6, 6), images(4, 8, 3, 3)
    for arguments, error in (
        ((dz[:1], x, weight, 1, 1, 1), "grad_output: expected the gradient"),
        ((dz, x, weight, 1, 0, 1), "grad_output: expected the gradient"),
        ((dz, x, weight, 0, 1, 1), "stride: expected two integers of at least 1"),
        ((dz, x[:, :4], weight, 1, 1, 1), "grad_output: expected the gradient"),
        ((dz[0], x, weight, 1, 1, 1), r"expected \(N, C, H, W\)"),
        ((dz.double(), x, weight, 1, 1, 1), "grad_output: expected the dtype of input"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            weight_gradient(*arguments, winograd)
    with pytest.raises(ValueError, match="Winograd supports"):
        weight_gradient(images(2, 4, 6, 6), x, images(4, 8, 1, 1), 1, 0, 1, True)


def test_epilogue_statistics_match_separate_pass() -> None:
    """Statistics from the epilogue are as accurate as a separate pass over the output, also with a large mean."""
    torch.manual_seed(0)
    kernels = registry.resolve("cpu", torch.device("cpu"))
    x, weight = images(4, 32, 20, 20), images(48, 32, 3, 3, mean=0.0)
    scale, shift = torch.randn(48), torch.randn(48)
    for mean in (0.0, 300.0):  # the standard deviation is about 17
        z, partials = kernels.conv_bn_stats(x, weight, torch.full((48,), mean), None, False, *SAME.geometry, True)
        fused = kernels.merge_stats(partials, scale, shift, 1e-5, False)
        separate = kernels.batch_norm_stats(z, scale, shift, None, None, True, 1e-5)
        exact = kernels.batch_norm_stats(z.double(), scale.double(), shift.double(), None, None, True, 1e-5)
        for row in range(5):
            assert_within_stock_error(f"row {row} for {mean}", fused[row], separate[row], exact[row])
    reference = registry.resolve("reference", torch.device("cpu"))
    empty = torch.zeros(1, 3, 48, dtype=torch.float64)
    parts = torch.cat([partials, empty, reference.batch_norm_partials(x[:, :1].expand(-1, 48, -1, -1))])
    for double in (True, False):
        merged = kernels.merge_stats(parts, scale, shift, 1e-5, double)
        torch.testing.assert_close(merged, reference.merge_stats(parts, scale, shift, 1e-5, double))


# --- blocks ---


def make_block(size: int = 12, channels: int = 32, stride: int = 1) -> tuple[BlockSpec, Tensor, list[Tensor | None]]:
    """Return a block without inner ReLUs, where rounding errors near zero would change an element's whole gradient."""
    torch.manual_seed(1)
    first, second = (UnitSpec((by, by), (1, 1), activation="identity") for by in (stride, 1))
    spec = BlockSpec((first, second), UnitSpec((stride, stride), activation="identity"))
    tensors: list[Tensor | None] = []
    for kernel in (3, 3, 1):
        weight = images(channels, channels, kernel, kernel, mean=0.0) * 0.1
        norm = [torch.rand(channels) + 0.5, torch.randn(channels), torch.zeros(channels), torch.ones(channels)]
        tensors += [weight, None, *norm]
    return spec, images(4, channels, size, size), tensors


def stock_block(x: Tensor, spec: BlockSpec, tensors: list[Any], training: bool = True) -> Tensor:
    def unit(index: int, x: Tensor) -> Tensor:
        u, (weight, bias, *norm, mean, var) = spec.convolutions[index], tensors[6 * index : 6 * index + 6]
        return F.batch_norm(F.conv2d(x, weight, bias, u.stride, u.padding), mean, var, *norm, training, 0.1, u.eps)

    return unit(1, unit(0, x)) + unit(2, x)


def output_and_gradients(function: Any, x: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    flat = [None if t is None else t.clone().requires_grad_(i % 6 < 4) for i, t in enumerate(tensors)]
    y = function(x, flat)
    grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    inputs = [t for t in (x, *flat) if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@contextlib.contextmanager
def record_cpu_conv_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from fused_res.backends.cpu import convolution as module

    calls: list[str] = []
    for name in ("convolve", "conv_backward"):
        original = getattr(module, name)

        def call(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, call)
    yield calls
    monkeypatch.undo()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("winograd", [True, False])
def test_block_accuracy_vs_stock(winograd: bool, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error against float64 of a block's output and gradients.

    Without Winograd the accuracy criterion holds, twice stock PyTorch's error. With it, the limit is a few times the
    3e-6 of one convolution, because four are consecutive, plus twice stock's error, which is larger for the gradient of
    a norm's bias before another norm: a sum with cancellation.
    """
    spec, x, tensors = make_block(12 * stride + 1, stride=stride)
    exact = output_and_gradients(
        lambda x, t: stock_block(x, spec, t), x.double(), [None if t is None else t.double() for t in tensors]
    )
    theirs = output_and_gradients(lambda x, t: stock_block(x, spec, t), x, tensors)
    with fused_res.backends.use("auto", winograd=winograd), record_cpu_conv_calls(monkeypatch) as calls:
        ours = output_and_gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    if winograd:
        assert calls.count("convolve") >= 3 and calls.count("conv_backward") >= 2
    for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if winograd:
            assert relative_error(a, c) <= 1e-5 + 2 * relative_error(b, c), index
        else:
            assert_within_stock_error(f"{index}", a, b, c)


def test_input_gradient_of_strided_1x1() -> None:
    """The gradient is zero at the input positions that the stride skips; as a projection and as a first convolution."""
    first, projection = UnitSpec((2, 3), activation="identity"), UnitSpec((2, 3), activation="identity")
    for size in ((17, 16), (15, 31), (16, 18)):
        torch.manual_seed(0)
        x = images(4, 24, *size)
        norm = [torch.ones(40), torch.zeros(40), torch.zeros(40), torch.ones(40)]
        tensors = [images(40, 24, 1, 1, mean=0.0), None, *norm]
        for spec in (BlockSpec((first,)), BlockSpec((first,), projection)):
            flat: list[Any] = tensors * len(spec.convolutions)
            wide = [t if t is None else t.double() for t in flat]
            with fused_res.backends.use("cpu"):
                ours = output_and_gradients(lambda x, t, spec=spec: residual_block(x, spec, t, training=False), x, flat)
            with fused_res.backends.use("reference"):
                exact = output_and_gradients(
                    lambda x, t, spec=spec: residual_block(x, spec, t, training=False), x.double(), wide
                )
            for a, b in zip(ours, exact, strict=True):
                assert relative_error(a, b) <= 2e-6


def test_convolution_aten_runs_no_fused_res_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x, tensors = make_block()
    with fused_res.backends.use("auto", convolution="aten"), record_cpu_conv_calls(monkeypatch) as calls:
        output_and_gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    assert calls == []


def test_unsupported_dtypes_and_layouts_dispatch_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x, tensors = make_block()

    def run(x: Tensor, tensors: list[Tensor | None]) -> None:
        output_and_gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)

    with record_cpu_conv_calls(monkeypatch) as calls:
        run(
            x.contiguous(memory_format=torch.contiguous_format).double(),
            [t if t is None else t.double() for t in tensors],
        )
        run(x.contiguous(), tensors)
        with torch.autocast("cpu", torch.float16):
            run(x, tensors)
    assert calls == []


def test_recomputation_is_bitwise_equal_and_unneeded_gradients_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recompute level yields bitwise equal gradients, and only requested gradients are computed."""
    spec, x, tensors = make_block()
    expected = output_and_gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    for level in ("norm", "conv"):
        found = output_and_gradients(
            lambda x, t, level=level: residual_block(x, spec, t, training=True, recompute=level), x, tensors
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    frozen = [None if t is None else t.clone() for t in tensors]
    weight = frozen[0]
    assert weight is not None
    weight.requires_grad_()
    with record_cpu_conv_calls(monkeypatch) as calls:
        y = residual_block(x, spec, frozen, training=True)
        forward_calls = len(calls)
        (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y).cumsum(3).cos())
    assert calls[forward_calls:] == ["conv_backward"] * 2 and dweight.shape == weight.shape


def test_compiled_block_is_bitwise_equal() -> None:
    spec, x, tensors = make_block()
    torch._dynamo.reset()

    def run(x: Tensor, tensors: list[Tensor | None]) -> Tensor:
        return residual_block(x, spec, tensors, training=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(output_and_gradients(compiled, x, tensors), output_and_gradients(run, x, tensors), strict=True):
        assert torch.equal(a, b)


def test_running_statistics_and_eval_match_stock() -> None:
    spec, x, tensors = make_block()
    updated, expected = ([None if t is None else t.clone() for t in tensors] for _ in range(2))
    with torch.no_grad():
        for training in (True, False):
            ours = residual_block(x, spec, updated, training=training)
            torch.testing.assert_close(ours, stock_block(x, spec, expected, training), rtol=1e-4, atol=1e-4)
    for a, b in zip(updated, expected, strict=True):
        assert a is None or (b is not None and torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def test_plan_reports_selected_algorithms() -> None:
    spec, x, tensors = make_block()
    block_plan = plan(BlockConfig(spec, (True,) * 3, "cpu"), x, tensors)
    assert [unit.algorithms.forward.name for unit in block_plan.all_units] == [
        "winograd_f4x4",
        "winograd_f4x4",
        "fused_fp32",
    ]
    assert "convolution(x, 0.weight) -> z0, partials0: winograd_f4x4" in str(block_plan)


# --- a network ---


def training_losses(steps: int, seed: int, winograd: bool, size: int = 64, batch: int = 16) -> list[float]:
    """Return the losses of ResNet-18 on noise images whose class is a weak offset of one channel in one half.

    The learning rate is 0.003, because at 0.02 without warm-up every implementation's loss curve has peaks of 5 to 19:
    training is then chaotic, and any rounding changes the curve.
    """
    torch.manual_seed(seed)
    model = models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    losses = []
    with fused_res.backends.use("auto", winograd=winograd):
        for _ in range(steps):
            labels = torch.randint(0, 4, (batch,), generator=generator)
            x = torch.randn(batch, 3, size, size, generator=generator)
            x[:, 0, : size // 2] += 0.1 * (labels % 2)[:, None, None]
            x[:, 1, :, : size // 2] += 0.1 * (labels // 2)[:, None, None]
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def compare_training_losses(steps: int) -> str:
    """Check that Winograd changes the loss curve, on average, by no more than another seed does."""
    winograd, direct, seed_1 = (
        training_losses(steps, 0, True),
        training_losses(steps, 0, False),
        training_losses(steps, 1, False),
    )

    def difference(a: list[float], b: list[float]) -> float:
        return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / steps

    report = (
        f"mean loss difference: Winograd vs direct {difference(winograd, direct):.4f},"
        f" seed 0 vs seed 1 {difference(direct, seed_1):.4f}"
    )
    assert winograd != direct, "Winograd was not used"
    assert difference(winograd, direct) <= difference(direct, seed_1), report
    return report


def test_training_losses_with_and_without_winograd() -> None:
    compare_training_losses(6)


if __name__ == "__main__":
    print(compare_training_losses(200))
