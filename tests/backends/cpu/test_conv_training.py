"""The CPU's own convolutions in training: weight gradients, statistics from the epilogue, and blocks that use them.

The 200 steps that compare Winograd with none: ``python tests/backends/cpu/test_conv_training.py``.
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
from fused_res.testing import assert_as_exact_as

pytestmark = pytest.mark.skipif(
    registry.unavailable("cpu") is not None or _extension.cpu_isa() == "baseline", reason="needs AVX2 and the extension"
)

#: RMS error over the RMS of the result, against float64. The design exempts Winograd from "twice stock's error".
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


def off(found: Tensor, exact: Tensor) -> float:
    """RMS error, relative; 0 where all is zero, as it should be."""
    error, scale = (found.double() - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, winograd: bool) -> Tensor:
    registry.resolve("cpu", torch.device("cpu"))  # defines it
    operator = torch.ops.fused_res_cpu.conv_weight_gradient.default
    return operator(dz, x, weight, (stride,) * 2, (padding,) * 2, (dilation,) * 2, winograd)


def exact_gradients(dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Any:
    return torch.ops.aten.convolution_backward(
        dz.double(), x.double(), weight.double(), None, (stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0),
        1, [True, True, False],
    )  # fmt: skip


def check(
    images_: int, channels: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int], winograd: bool,
    stride: int = 1, padding: int = 1, dilation: int = 1, last: bool = True,
) -> None:  # fmt: skip
    x = images(images_, channels, *size)
    weight = torch.randn(outputs, channels, *kernel)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    sizes = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    if min(sizes) < 1:
        return
    dz = images(images_, outputs, *sizes, mean=0.0)
    found = gradient(dz, x, weight, stride, padding, dilation, winograd)
    assert found.stride() == weight.stride()
    error = off(found, exact_gradients(dz, x, weight, stride, padding, dilation)[1])
    assert error <= LIMITS[winograd], (x.shape, weight.shape, stride, padding, dilation, error)


def test_weight_gradient_by_winograd(isa: str) -> None:
    torch.manual_seed(0)
    heights, widths = (1, 2, 3, 4, 5, 6, 7, 13), (2, 5, 8, 11)
    for n, channels, outputs in ((1, 17, 33), (3, 64, 3), (2, 1, 40)):
        for height, width, padding, last in itertools.product(heights, widths, (0, 1, 2), (True, False)):
            for stride in (1, 2):
                check(n, channels, outputs, (height, width), (3, 3), True, stride, padding, last=last)
    check(4, 130, 100, (14, 14), (3, 3), True)  # sums that all share
    check(8, 64, 64, (28, 28), (3, 3), True)  # and of its own for each part
    check(4, 130, 100, (28, 27), (3, 3), True, stride=2)
    check(8, 64, 64, (56, 56), (3, 3), True, stride=2)


def test_weight_gradient_by_one_product(isa: str) -> None:
    torch.manual_seed(0)
    for n, channels, outputs in ((1, 17, 33), (3, 64, 3), (2, 3, 64)):
        for size, kernel, stride, padding, dilation in itertools.product(
            ((1, 2), (7, 6), (10, 13)), ((1, 1), (3, 3), (5, 3)), (1, 2, 3), (0, 1), (1, 2)
        ):
            check(n, channels, outputs, size, kernel, False, stride, padding, dilation)
    check(2, 3, 64, (64, 64), (7, 7), False, stride=2, padding=3)
    check(2, 1024, 48, (7, 7), (1, 1), False, padding=0)  # rows a power of two apart are copied
    check(2, 48, 1024, (7, 7), (1, 1), False, padding=0, last=False)
    check(2, 160, 200, (15, 15), (3, 3), False, stride=2)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    for channels, outputs, size in ((32, 40, 24), (200, 160, 9)):
        x, dz = images(3, channels, size, size), images(3, outputs, size, size)
        weight = images(outputs, channels, 3, 3)
        for winograd in (True, False):
            found = []
            for count in (1, 2, 3):
                with threads(count):
                    found.append(gradient(dz, x, weight, 1, 1, 1, winograd))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_other_memory_is_copied() -> None:
    x, dz, weight = torch.randn(2, 20, 9, 9)[:, ::2], torch.randn(2, 8, 9, 9), torch.randn(8, 10, 3, 3)
    exact = exact_gradients(dz, x, weight, 1, 1, 1)[1]
    for winograd in (True, False):
        assert off(gradient(dz, x, weight, 1, 1, 1, winograd), exact) <= LIMITS[winograd]


@pytest.mark.parametrize("winograd", [True, False])
def test_bad_arguments(winograd: bool) -> None:
    x, dz, weight = images(2, 8, 6, 6), images(2, 4, 6, 6), images(4, 8, 3, 3)
    for arguments, error in (
        ((dz[:1], x, weight, 1, 1, 1), "grad_output: expected the gradient"),
        ((dz, x, weight, 1, 0, 1), "grad_output: expected the gradient"),
        ((dz, x, weight, 0, 1, 1), "stride: expected two numbers of at least 1"),
        ((dz, x[:, :4], weight, 1, 1, 1), "grad_output: expected the gradient"),
        ((dz[0], x, weight, 1, 1, 1), r"expected \(N, C, H, W\)"),
        ((dz.double(), x, weight, 1, 1, 1), "grad_output: expected float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            gradient(*arguments, winograd)
    with pytest.raises(ValueError, match="Winograd is for 3x3"):
        gradient(images(2, 4, 6, 6), x, images(4, 8, 1, 1), 1, 0, 1, True)


def test_statistics_from_the_epilogue() -> None:
    """As near to float64 as the pass over the output that they replace, also where the mean is large."""
    torch.manual_seed(0)
    kernels = registry.resolve("cpu", torch.device("cpu"))
    x, weight = images(4, 32, 20, 20), images(48, 32, 3, 3, mean=0.0)
    scale, shift = torch.randn(48), torch.randn(48)
    for mean in (0.0, 300.0):  # the deviation is about 17
        z, partials = kernels.conv_bn_stats(x, weight, torch.full((48,), mean), None, False, *SAME.geometry, True)
        found = kernels.merge_stats(partials, scale, shift, 1e-5, False)
        passed = kernels.batch_norm_stats(z, scale, shift, None, None, True, 1e-5)
        exact = kernels.batch_norm_stats(z.double(), scale.double(), shift.double(), None, None, True, 1e-5)
        for row in range(5):
            assert_as_exact_as(f"row {row} for {mean}", found[row], passed[row], exact[row])
    reference = registry.resolve("reference", torch.device("cpu"))
    empty = torch.zeros(1, 3, 48, dtype=torch.float64)
    parts = torch.cat([partials, empty, reference.batch_norm_partials(x[:, :1].expand(-1, 48, -1, -1))])
    for double in (True, False):
        mine = kernels.merge_stats(parts, scale, shift, 1e-5, double)
        torch.testing.assert_close(mine, reference.merge_stats(parts, scale, shift, 1e-5, double))


# --- blocks ---


def block(size: int = 12, channels: int = 32, stride: int = 1) -> tuple[BlockSpec, Tensor, list[Tensor | None]]:
    """Without a ReLU in between: a clamped element that is off in its sign is off by all of its gradient."""
    torch.manual_seed(1)
    first, second = (UnitSpec((by, by), (1, 1), activation="identity") for by in (stride, 1))
    spec = BlockSpec((first, second), UnitSpec((stride, stride), activation="identity"))
    tensors: list[Tensor | None] = []
    for taps in (3, 3, 1):
        weight = images(channels, channels, taps, taps, mean=0.0) * 0.1
        norm = [torch.rand(channels) + 0.5, torch.randn(channels), torch.zeros(channels), torch.ones(channels)]
        tensors += [weight, None, *norm]
    return spec, images(4, channels, size, size), tensors


def stock(x: Tensor, spec: BlockSpec, tensors: list[Any], training: bool = True) -> Tensor:
    def unit(index: int, x: Tensor) -> Tensor:
        u, (weight, bias, *norm, mean, var) = spec.convolutions[index], tensors[6 * index : 6 * index + 6]
        return F.batch_norm(F.conv2d(x, weight, bias, u.stride, u.padding), mean, var, *norm, training, 0.1, u.eps)

    return unit(1, unit(0, x)) + unit(2, x)


def gradients(function: Any, x: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    flat = [None if t is None else t.clone().requires_grad_(i % 6 < 4) for i, t in enumerate(tensors)]
    y = function(x, flat)
    grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    wanted = [t for t in (x, *flat) if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from fused_res.backends.cpu import convolution as module

    calls: list[str] = []
    for name in ("convolve", "conv_weight_gradient"):
        original = getattr(module, name)

        def call(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, call)
    yield calls
    monkeypatch.undo()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("winograd", [True, False])
def test_block_precision(winograd: bool, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Winograd to the contract, twice stock's error. With it, a few times the 3e-6 of one convolution, as four
    follow each other; and where stock loses more (a norm's bias before another norm: a sum that cancels), so do we."""
    spec, x, tensors = block(12 * stride + 1, stride=stride)
    exact = gradients(lambda x, t: stock(x, spec, t), x.double(), [None if t is None else t.double() for t in tensors])
    theirs = gradients(lambda x, t: stock(x, spec, t), x, tensors)
    with fused_res.backends.use("auto", winograd=winograd), counted(monkeypatch) as calls:
        ours = gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    if winograd:
        assert calls.count("convolve") >= 4 and calls.count("conv_weight_gradient") >= 2
    for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if winograd:
            assert off(a, c) <= 1e-5 + 2 * off(b, c), index
        else:
            assert_as_exact_as(f"{index}", a, b, c)


def test_input_gradient_of_a_strided_1x1() -> None:
    """As a block's projection and as the first convolution of a chain: the pixels that were not read get zeros."""
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
                ours = gradients(lambda x, t, spec=spec: residual_block(x, spec, t, training=False), x, flat)
            with fused_res.backends.use("reference"):
                exact = gradients(lambda x, t, spec=spec: residual_block(x, spec, t, training=False), x.double(), wide)
            for a, b in zip(ours, exact, strict=True):
                assert off(a, b) <= 2e-6


def test_everything_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x, tensors = block()
    with fused_res.backends.use("auto", convolution="aten"), counted(monkeypatch) as calls:
        gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    assert calls == []


def test_what_is_not_float32_images_is_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x, tensors = block()

    def run(x: Tensor, tensors: list[Tensor | None]) -> None:
        gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)

    with counted(monkeypatch) as calls:
        run(
            x.contiguous(memory_format=torch.contiguous_format).double(),
            [t if t is None else t.double() for t in tensors],
        )
        run(x.contiguous(), tensors)
        with torch.autocast("cpu", torch.bfloat16):
            run(x, tensors)
    assert calls == []


def test_recomputed_and_partly_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits at every level, and no gradient that nobody wants."""
    spec, x, tensors = block()
    expected = gradients(lambda x, t: residual_block(x, spec, t, training=True), x, tensors)
    for level in ("norm", "conv"):
        found = gradients(
            lambda x, t, level=level: residual_block(x, spec, t, training=True, recompute=level), x, tensors
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    frozen = [None if t is None else t.clone() for t in tensors]
    weight = frozen[0]
    assert weight is not None
    weight.requires_grad_()
    with counted(monkeypatch) as calls:
        y = residual_block(x, spec, frozen, training=True)
        made = len(calls)
        (found_weight,) = torch.autograd.grad(y, weight, torch.ones_like(y).cumsum(3).cos())
    assert calls[made:] == ["convolve", "conv_weight_gradient"] and found_weight.shape == weight.shape


def test_compiled() -> None:
    spec, x, tensors = block()
    torch._dynamo.reset()

    def run(x: Tensor, tensors: list[Tensor | None]) -> Tensor:
        return residual_block(x, spec, tensors, training=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x, tensors), gradients(run, x, tensors), strict=True):
        assert torch.equal(a, b)


def test_running_statistics_and_eval() -> None:
    spec, x, tensors = block()
    mine, theirs = ([None if t is None else t.clone() for t in tensors] for _ in range(2))
    with torch.no_grad():
        for training in (True, False):
            ours = residual_block(x, spec, mine, training=training)
            torch.testing.assert_close(ours, stock(x, spec, theirs, training), rtol=1e-4, atol=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        assert a is None or (b is not None and torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def test_the_plan_says_so() -> None:
    spec, x, tensors = block()
    made = plan(BlockConfig(spec, (True,) * 3, "cpu"), x, tensors)
    assert [unit.algorithms.forward.name for unit in made.all_units] == ["winograd_f4x4", "winograd_f4x4", "direct"]
    assert "convolution(x, 0.weight) -> z0, partials0: winograd_f4x4" in str(made)


# --- a network ---


def losses(steps: int, seed: int, winograd: bool, size: int = 64, batch: int = 16) -> list[float]:
    """Of ResNet-18 on images that can just be told apart by their colour and its place.

    At 0.02 and without warm-up every curve, whoever computes it, has peaks of 5 to 19: chaos, which any rounding moves.
    """
    torch.manual_seed(seed)
    model = models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    found = []
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
            found.append(loss.item())
    return found


def assert_no_more_apart_than_seeds(steps: int) -> str:
    """By the mean distance of the curves."""
    with_it, without, other = losses(steps, 0, True), losses(steps, 0, False), losses(steps, 1, False)

    def apart(a: list[float], b: list[float]) -> float:
        return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / steps

    said = f"with and without {apart(with_it, without):.4f}, two seeds {apart(without, other):.4f}"
    assert with_it != without, "Winograd was not used"
    assert apart(with_it, without) <= apart(without, other), said
    return said


def test_training_with_and_without() -> None:
    assert_no_more_apart_than_seeds(6)


if __name__ == "__main__":
    print(assert_no_more_apart_than_seeds(200))
