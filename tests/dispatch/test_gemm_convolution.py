"""im2col_gemm and tap_gemm: convolutions with small outputs, as GEMMs on the unpacked weight."""

import pytest
import torch

from fused_res import UnitSpec
from fused_res.dispatch import Problem, convolution, select
from fused_res.testing import assert_within_stock_error

GEOMETRIES = [  # (N, C, H, W), output channels, kernel, stride, padding, dilation
    ((4, 64, 2, 2), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 64, 5, 4), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 96, 6, 7), 80, (3, 2), (1, 2), (2, 0), (2, 1)),
    ((3, 256, 3, 3), 160, (1, 1), (2, 2), (0, 0), (1, 1)),
    ((5, 192, 4, 5), 256, (1, 1), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_im2col_gemm_is_as_accurate_as_aten(geometry, bias, dtype):
    shape, out_channels, kernel, stride, padding, dilation = geometry
    spec = UnitSpec(stride, padding, dilation)
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, shape[1], *kernel, dtype=torch.float64).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    b = torch.randn(out_channels, dtype=dtype) if bias else None

    def compute(algorithm, x, weight, b, grad=None):
        forward, backward = algorithm.implementations["forward"], algorithm.implementations["weight_gradient"]
        z, _ = forward(x, weight, b, spec.geometry, False)
        grad = torch.linspace(-1, 1, z.numel()).to(x.dtype).view_as(z) if grad is None else grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        return z, *backward(grad, x, weight, b, spec.geometry, [True, True, bias]), grad

    gemm = convolution.IM2COL_GEMM
    ours = compute(gemm, x, weight, b)
    *_, grad = ours
    for output_mask in ((True, False, False), (False, True, False), (False, False, True)):
        for requested, grad_found, grad_expected in zip(
            output_mask,
            gemm.implementations["weight_gradient"](grad, x, weight, b, spec.geometry, list(output_mask)),
            ours[1:4],
            strict=True,
        ):
            assert (grad_found is not None) == requested and (
                grad_found is None or grad_expected is None or torch.equal(grad_found, grad_expected)
            )
    stock = compute(convolution.ATEN, x, weight, b, grad)
    wide = [None if t is None else t.double() for t in (x, weight, b)]
    exact = compute(convolution.ATEN, *wide, grad.double())
    for name, actual, aten, reference in zip(("z", "dx", "dweight", "dbias"), ours, stock, exact, strict=False):
        assert (actual is None) == (aten is None)
        if actual is None:
            continue
        assert actual.dim() < 4 or actual.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float64:
            torch.testing.assert_close(actual, aten, rtol=1e-11, atol=1e-11)
        else:
            assert_within_stock_error(name, actual, aten, reference)


def test_large_outputs_and_small_weights_select_aten():
    def name(images, channels, size, kernel_size=3):
        spec = UnitSpec(padding=(kernel_size // 2,) * 2)
        problem = Problem(
            "forward", (images, channels, size, size), (channels, channels, kernel_size, kernel_size), *spec.geometry,
            torch.float32, "cpu", True, weight_channels_last=True,
        )  # fmt: skip
        return select(convolution.ALGORITHMS, problem, "planned").name

    assert name(8, 64, 2) == "im2col_gemm"
    assert name(9, 64, 2) == name(0, 64, 2) == name(4, 16, 2) == "aten"
    assert name(8, 64, 1) == "tap_gemm"
    assert name(31, 256, 2, 1) == "im2col_gemm" and name(32, 256, 2, 1) == "aten"
