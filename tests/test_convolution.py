"""Convolutions that make few pixels, as products with the weight as it lies in memory."""

import pytest
import torch

from fused_res import UnitSpec, convolution
from fused_res.testing import assert_as_exact_as

GEOMETRIES = [  # images, channels, height, width, outputs, kernel, stride, padding, dilation
    ((4, 64, 2, 2), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 64, 5, 4), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 96, 6, 7), 80, (3, 2), (1, 2), (2, 0), (2, 1)),
    ((3, 256, 3, 3), 160, (1, 1), (2, 2), (0, 0), (1, 1)),
    ((5, 192, 4, 5), 256, (1, 1), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_few_pixels(geometry, bias, dtype, monkeypatch):
    shape, outputs, kernel, stride, padding, dilation = geometry
    spec = UnitSpec(stride, padding, dilation)
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, shape[1], *kernel, dtype=torch.float64).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    b = torch.randn(outputs, dtype=dtype) if bias else None
    assert convolution._few(x, weight, spec) is not None

    def compute(x, weight, b, grad=None):
        z = convolution.forward(x, weight, b, spec)
        grad = torch.linspace(-1, 1, z.numel()).to(x.dtype).view_as(z) if grad is None else grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        return z, *convolution.backward(grad, x, weight, b, spec, [True, True, bias]), grad

    ours = compute(x, weight, b)
    *_, grad = ours
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        for flag, some, every in zip(
            wanted, convolution.backward(grad, x, weight, b, spec, list(wanted)), ours[1:4], strict=True
        ):
            assert (some is not None) == flag and (some is None or every is None or torch.equal(some, every))
    monkeypatch.setattr(convolution, "_few", lambda *_: None)
    stock = compute(x, weight, b, grad)
    wide = [None if t is None else t.double() for t in (x, weight, b)]
    exact = compute(*wide, grad.double())
    for name, mine, its, true in zip(("z", "dx", "dweight", "dbias"), ours, stock, exact, strict=False):
        assert (mine is None) == (its is None)
        if mine is None:
            continue
        assert mine.dim() < 4 or mine.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float64:
            torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)
        else:
            assert_as_exact_as(name, mine, its, true)


def test_many_pixels_or_a_small_weight_are_left_to_aten():
    def few(images, channels, size, taps=3):
        x = torch.randn(images, channels, size, size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, taps, taps).contiguous(memory_format=torch.channels_last)
        return convolution._few(x, weight, UnitSpec(padding=(taps // 2,) * 2))

    assert few(8, 64, 2) == (2, 2)
    assert few(9, 64, 2) is None and few(0, 64, 2) is None and few(8, 64, 1) is None and few(4, 16, 2) is None
    assert few(31, 256, 2, 1) == (2, 2) and few(32, 256, 2, 1) is None
