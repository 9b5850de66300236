"""The CPU convolution operators pack_conv_weight and convolve of torch.ops.fused_res_cpu, compared with float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

import fused_res.backends.cpu.operators  # noqa: F401  (registers the operators)
from fused_res import _extension
from tests.support.guard_pages import GuardedTensor

if not _extension.loaded:
    pytest.skip(_extension.unavailable_reason, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
_C = _extension._module


def _is_supported(isa: str) -> bool:
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        return False
    _C.set_cpu_isa(before)
    return True


ISAS = [isa for isa in ("avx2", "avx512") if _is_supported(isa)]
#: Instruction sets with dot products of bfloat16.
BF16_ISAS = [isa for isa in ("avx512_bf16", "amx", "amx_emulated") if _is_supported(isa)]
if not ISAS:
    pytest.skip("the convolutions need AVX2", allow_module_level=True)

CONVOLVE, PACK = torch.ops.fused_res_cpu.convolve, torch.ops.fused_res_cpu.pack_conv_weight
DIRECT = 0
#: Values of the argument `tile`: m of the Winograd algorithm F(m x m, 3x3), or 0 for the direct algorithm.
TILES = (DIRECT, 2, 3, 4)
CHANNELS = (1, 3, 17, 33, 64, 100)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


Pair = tuple[int, int]


@pytest.fixture(autouse=True)
def _restore_isa_and_threads() -> Iterator[None]:
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    images: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    bias: bool = True
    residual: bool = True
    relu: bool = True

    def output_size(self) -> Pair:
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return height, width

    def is_valid(self) -> bool:
        sizes = zip((self.height, self.width), self.kernel, self.padding, self.dilation, strict=True)
        return all(size + 2 * p > d * (k - 1) for size, k, p, d in sizes)


@dataclass
class Operands:
    """Operands of a case, with a mean away from zero, scaled so that the outputs are about 1. The bias is float32."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None

    @staticmethod
    def random(case: Case, mean: float = 1.0, dtype: torch.dtype = torch.float32) -> Operands:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        weight = randn(case.outputs, case.channels, *case.kernel)
        return Operands(
            case,
            to_channels_last(randn(case.images, case.channels, case.height, case.width) + mean).to(dtype),
            (weight / weight[0].numel() ** 0.5).to(dtype),
            randn(case.outputs) + mean if case.bias else None,
            to_channels_last(randn(case.images, case.outputs, *case.output_size()) - mean).to(dtype)
            if case.residual
            else None,
        )

    def packed(self, tile: int, bf16_products: bool = False) -> Tensor:
        winograd_stride = 0 if tile == DIRECT else self.case.stride[0]
        return PACK(self.weight, winograd_stride, False, bf16_products)

    def run(
        self, tile: int, partials: bool = False, packed: Tensor | None = None, bf16_products: bool = False
    ) -> tuple[Tensor, Tensor]:
        case = self.case
        if packed is None:
            packed = self.packed(tile, bf16_products)
        geometry = case.outputs, case.kernel, case.stride, case.padding, case.dilation
        return CONVOLVE(self.x, packed, self.bias, self.residual, *geometry, tile, case.relu, partials, bf16_products)

    def reference(self) -> Tensor:
        case = self.case
        bias = None if self.bias is None else self.bias.double()
        y = F.conv2d(self.x.double(), self.weight.double(), bias, case.stride, case.padding, case.dilation)
        y = y if self.residual is None else y + self.residual
        return y.relu() if case.relu else y


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def limit(tile: int) -> float:
    return 1e-6 if tile == DIRECT else 3e-6


def check_output(operands: Operands, tile: int, output: Tensor, reference: Tensor) -> None:
    """Check the relative RMS error.

    The error is relative to the larger of the reference's RMS and its expected RMS, because a few outputs may all be
    small by chance.
    """
    case = operands.case
    dtype = operands.x.dtype
    assert output.shape == reference.shape and output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    expected = rms(operands.x) * rms(operands.weight) * operands.weight[0].numel() ** 0.5
    # The result is rounded once: a 16-bit output has the error of the rounded reference, and no more.
    rounding = 0.0 if dtype == torch.float32 else rms(reference.to(dtype) - reference)
    error = (rms(output - reference) - rounding) / max(rms(reference), expected)
    assert error <= limit(tile), f"{case}, tile {tile}, {_C.cpu_isa()}: {error:.2g}"


def check_all(case: Case, dtype: torch.dtype = torch.float32) -> None:
    operands = Operands.random(case, dtype=dtype)
    reference = operands.reference()
    winograd = case.kernel == (3, 3) and case.stride in ((1, 1), (2, 2)) and case.dilation == (1, 1)
    packed = {tile: operands.packed(tile) for tile in (TILES if winograd else (DIRECT,))}
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        for tile, weight in packed.items():
            check_output(operands, tile, operands.run(tile, packed=weight)[0], reference)


def epilogue_options(index: int) -> dict[str, Any]:
    """Return one of the eight combinations of bias, residual and ReLU; `index` is taken modulo 8."""
    return {name: bool(index >> bit & 1) for bit, name in enumerate(("bias", "residual", "relu"))}


class TestAgainstFloat64:
    @pytest.mark.parametrize("height", range(1, 13))
    def test_small_sizes(self, height: int) -> None:
        for width, padding in itertools.product(range(1, 13), range(3)):
            n = height * 41 + width * 7 + padding * 3  # varies the channels, the batch size and the epilogue
            case = Case(
                1 + n % 3,
                CHANNELS[n % 6],
                height,
                width,
                CHANNELS[n // 6 % 6],
                padding=(padding, padding),
                **epilogue_options(n),
            )
            if case.is_valid():
                check_all(case)
                check_all(replace(case, stride=(2, 2)))

    @pytest.mark.parametrize("channels", CHANNELS)
    def test_channel_counts(self, channels: int) -> None:
        for outputs, images in itertools.product(CHANNELS, (1, 2, 3)):
            case = Case(images, channels, 7, 9, outputs, **epilogue_options(outputs + images))
            check_all(case)
            check_all(replace(case, height=14, width=13, stride=(2, 2)))

    @pytest.mark.parametrize(
        "number", range(8), ids=lambda n: " ".join(k for k, on in epilogue_options(n).items() if on) or "-"
    )
    def test_epilogue_combinations(self, number: int) -> None:
        for size in ((14, 14), (13, 18)):
            check_all(Case(2, 20, *size, 40, **epilogue_options(number)))

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (7, 7)])
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 2)])
    def test_strides_paddings_and_dilations(self, kernel: Pair, stride: Pair) -> None:
        count = 0
        for padding, dilation in itertools.product(((0, 0), (1, 1), (2, 2), (0, 1)), ((1, 1), (2, 2), (2, 1))):
            for size in ((1, 2), (3, 5), (9, 7), (14, 15)):
                case = Case(2, 5, *size, 35, kernel, stride, padding, dilation, **epilogue_options(count))
                if case.is_valid():
                    check_all(case)
                    count += 1
        assert count > 8

    # 1024 channels: a row stride of a multiple of 4 KB, for which the input is copied (im2col).
    @pytest.mark.parametrize("channels", [1000, 1024])
    def test_pointwise_with_many_channels(self, channels: int) -> None:
        check_all(Case(2, channels, 5, 7, 65, (1, 1), padding=(0, 0)))

    @pytest.mark.parametrize(
        "case",
        [
            Case(2, 33, 56, 57, 70),
            Case(1, 512, 7, 7, 512),  # few tiles
            Case(
                8, 300, 31, 32, 300, residual=False
            ),  # a weight larger than the caches, and several cache blocks per thread
        ],
        ids=str,
    )
    def test_large_cases(self, case: Case) -> None:
        """The error is at most the limit, relative to the RMS of the reference outputs only."""
        operands = Operands.random(case)
        reference = operands.reference()
        for isa, tile in itertools.product(ISAS, TILES):
            _C.set_cpu_isa(isa)
            assert rms(operands.run(tile)[0] - reference) <= limit(tile) * rms(reference), (isa, tile)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_streaming_stores(self, stride: int) -> None:
        """Outputs larger than 8 MB whose rows are whole cache lines are written with non-temporal stores."""
        case = Case(5, 9, 82 * stride, 82 * stride, 64, stride=(stride, stride))
        operands = Operands.random(case)
        reference = operands.reference()
        assert reference.numel() > 2 << 20
        for isa, tile, partials in itertools.product(ISAS, TILES, (False, True)):
            _C.set_cpu_isa(isa)
            check_output(operands, tile, operands.run(tile, partials)[0], reference)

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(st.data())
    def test_random_cases(self, data: st.DataObject) -> None:
        def pair(low: int, high: int) -> Pair:
            return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

        images, channels, outputs = (data.draw(st.integers(1, high)) for high in (4, 70, 70))
        kernel, stride, padding, dilation = (3, 3), (1, 1), pair(0, 3), (1, 1)
        if data.draw(st.booleans()):
            kernel, stride, dilation = pair(1, 7), pair(1, 4), pair(1, 3)
        min_sizes = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
        height, width = (data.draw(st.integers(smallest, smallest + 20)) for smallest in min_sizes)
        options = {name: data.draw(st.booleans()) for name in ("bias", "residual", "relu")}
        check_all(Case(images, channels, height, width, outputs, kernel, stride, padding, dilation, **options))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
class TestSixteenBits:
    """bfloat16 and float16 in memory, fp32 arithmetic."""

    @pytest.mark.parametrize("height", [1, 2, 5, 8])
    def test_small_sizes(self, dtype: torch.dtype, height: int) -> None:
        for width, padding in itertools.product((1, 3, 6, 9), range(3)):
            n = height * 41 + width * 7 + padding * 3
            case = Case(1 + n % 3, CHANNELS[n % 6], height, width, CHANNELS[n // 6 % 6], padding=(padding, padding))
            case = replace(case, **epilogue_options(n))
            if case.is_valid():
                check_all(case, dtype)
                check_all(replace(case, stride=(2, 2)), dtype)

    @pytest.mark.parametrize("channels", CHANNELS)
    def test_channel_counts(self, dtype: torch.dtype, channels: int) -> None:
        for index, outputs in enumerate(CHANNELS):
            check_all(Case(1 + index % 2, channels, 7, 9, outputs, **epilogue_options(outputs + index)), dtype)

    @pytest.mark.parametrize("number", range(8))
    def test_epilogue_combinations(self, dtype: torch.dtype, number: int) -> None:
        for kernel, padding in (((3, 3), (1, 1)), ((1, 1), (0, 0))):
            check_all(Case(2, 20, 13, 18, 96, kernel, padding=padding, **epilogue_options(number)), dtype)

    @pytest.mark.parametrize("kernel", [(1, 1), (5, 3), (7, 7)])
    def test_strides_paddings_and_dilations(self, dtype: torch.dtype, kernel: Pair) -> None:
        for count, (stride, padding, dilation) in enumerate(
            itertools.product(((1, 1), (2, 2), (1, 3)), ((0, 0), (2, 1)), ((1, 1), (2, 1)))
        ):
            case = Case(2, 5, 14, 15, 35, kernel, stride, padding, dilation, **epilogue_options(count))
            check_all(case, dtype)

    @pytest.mark.parametrize("channels", [1000, 1024])
    def test_pointwise_with_many_channels(self, dtype: torch.dtype, channels: int) -> None:
        check_all(Case(2, channels, 5, 7, 65, (1, 1), padding=(0, 0)), dtype)

    @pytest.mark.parametrize("case", [Case(1, 512, 7, 7, 512), Case(4, 40, 57, 56, 70)], ids=str)
    def test_large_cases(self, dtype: torch.dtype, case: Case) -> None:
        check_all(case, dtype)

    def test_dtype_of_bias_and_weight(self, dtype: torch.dtype) -> None:
        """A 16-bit bias and a float32 weight of the same values give the same bits."""
        operands = Operands.random(Case(2, 9, 8, 7, 35), dtype=dtype)
        assert operands.bias is not None
        bias = operands.bias.to(dtype)
        for tile in TILES:
            expected = replace(operands, bias=bias.float(), weight=operands.weight.float()).run(tile)[0]
            assert torch.equal(replace(operands, bias=bias).run(tile)[0], expected)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 1), (0, 0))], ids=["3x3", "1x1"])
    def test_non_finite_matches_float64(self, dtype: torch.dtype, isa: str, kernel: Pair, padding: Pair) -> None:
        _C.set_cpu_isa(isa)
        operands = TestNonFinite.operands(Case(2, 19, 15, 13, 35, kernel, padding=padding), dtype)
        output, reference = operands.run(DIRECT)[0], operands.reference()
        assert torch.equal(output.isnan(), reference.isnan()) and reference.isnan().any()
        assert torch.equal(output.isposinf(), reference.isposinf()) and reference.isinf().any()
        for tile in TILES[1:] if kernel == (3, 3) else ():
            output = operands.run(tile)[0]
            assert output[reference.isnan()].isnan().all()
            assert not output[reference.isposinf()].isfinite().any()

    def test_overflow_rounds_to_infinity(self, dtype: torch.dtype) -> None:
        """An output beyond the dtype's range is infinite; one that fits after the addition of the residual is not."""
        largest = torch.finfo(dtype).max
        case = Case(1, 1, 3, 3, 1, (1, 1), padding=(0, 0), bias=False)
        x = to_channels_last(torch.full((1, 1, 3, 3), largest)).to(dtype)
        weight = torch.full((1, 1, 1, 1), 1.5).to(dtype)
        for isa, (residual, expected) in itertools.product(ISAS, ((0.0, float("inf")), (-largest, largest / 2))):
            _C.set_cpu_isa(isa)
            operands = Operands(case, x, weight, None, torch.full_like(x, residual))
            if dtype == torch.float16 or residual == 0:  # 1.5 times the largest bfloat16 is infinite in float32 as well
                assert (operands.run(DIRECT)[0] == torch.tensor(expected, dtype=dtype)).all()

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("case", [Case(2, 17, 33, 30, 65), Case(2, 320, 14, 15, 320)], ids=str)
    def test_results_are_bitwise_equal_for_any_thread_count(self, dtype: torch.dtype, isa: str, case: Case) -> None:
        _C.set_cpu_isa(isa)
        operands = Operands.random(case, dtype=dtype)
        for tile in (DIRECT, 4):
            torch.set_num_threads(1)
            output = operands.run(tile)[0]
            torch.set_num_threads(2)
            assert torch.equal(operands.run(tile)[0], output)

    def test_error_is_at_most_that_of_aten(self, dtype: torch.dtype) -> None:
        """Relative RMS error of F(4x4) and `direct` with activations after a ReLU, as in a network."""
        for channels, size in ((64, 28), (256, 14)):
            case = Case(2, channels, size, size, channels)
            operands = Operands.random(case, mean=0, dtype=dtype)
            operands.x.relu_()
            assert operands.bias is not None and operands.residual is not None
            stock = F.conv2d(operands.x, operands.weight, operands.bias.to(dtype), padding=1)
            stock = (stock + operands.residual).relu()
            reference = operands.reference()
            for tile in (DIRECT, 4):
                assert rms(operands.run(tile)[0] - reference) <= rms(stock - reference)


@pytest.mark.parametrize("isa", BF16_ISAS)
class TestBf16Products:
    """Direct convolutions of bfloat16 by dot products, accumulated in float32."""

    @staticmethod
    def check(case: Case) -> None:
        operands = Operands.random(case, dtype=torch.bfloat16)
        check_output(operands, DIRECT, operands.run(DIRECT, bf16_products=True)[0], operands.reference())

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (7, 7)])
    def test_strides_paddings_and_dilations(self, isa: str, kernel: Pair) -> None:
        _C.set_cpu_isa(isa)
        for count, (stride, padding, dilation, channels) in enumerate(
            itertools.product(((1, 1), (2, 2), (1, 3)), ((0, 0), (2, 1)), ((1, 1), (2, 2)), (5, 32))
        ):
            self.check(Case(2, channels, 14, 15, 35, kernel, stride, padding, dilation, **epilogue_options(count)))

    @pytest.mark.parametrize("width", [1, 7, 13, 31, 32, 56, 63])
    def test_widths(self, isa: str, width: int) -> None:
        """Bands of an image and tiles of 16 or 32 pixels, which end within a line or an image."""
        _C.set_cpu_isa(isa)
        for height, outputs, images in ((1, 64, 3), (5, 32, 2), (9, 33, 1)):
            self.check(Case(images, 32, height, width, outputs))
            self.check(Case(images, 64, height, width, outputs, (1, 1), padding=(0, 0)))

    @pytest.mark.parametrize("channels", [1, 3, 4, 32])
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3), (4, 2)], ids=str)
    def test_strides(self, isa: str, channels: int, stride: Pair) -> None:
        """Bands of every phase of a stride; with up to 4 channels, bands of whole rows of the filter."""
        _C.set_cpu_isa(isa)
        windows = ((7, 7), (3, 3)), ((3, 3), (1, 1)), ((2, 8), (0, 5)), ((1, 1), (0, 0)), ((3, 1), (4, 2))
        for kernel, padding in windows:
            for height, width in ((30, 29), (9, 64)):
                self.check(Case(3, channels, height, width, 40, kernel, stride, padding, **epilogue_options(channels)))
            if channels > 4:
                self.check(Case(2, channels, 40, 33, 40, kernel, stride, padding, dilation=(2, 3)))

    def test_channel_counts(self, isa: str) -> None:
        _C.set_cpu_isa(isa)
        for channels, outputs in itertools.product((*CHANNELS, 2, 31, 32, 2048), CHANNELS):
            self.check(Case(2, channels, 7, 9, outputs, (1, 1), padding=(0, 0), **epilogue_options(outputs)))
        for channels in CHANNELS:
            self.check(Case(1, channels, 7, 9, 40, **epilogue_options(channels)))

    def test_error_is_at_most_that_of_aten(self, isa: str) -> None:
        _C.set_cpu_isa(isa)
        for channels, size in ((64, 28), (256, 14)):
            operands = Operands.random(Case(2, channels, size, size, channels), mean=0, dtype=torch.bfloat16)
            assert operands.bias is not None and operands.residual is not None
            stock = F.conv2d(operands.x, operands.weight, operands.bias.bfloat16(), padding=1)
            stock = (stock + operands.residual).relu()
            reference = operands.reference()
            assert rms(operands.run(DIRECT, bf16_products=True)[0] - reference) <= rms(stock - reference)

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_packed_weight(self, isa: str, kernel: Pair, dtype: torch.dtype) -> None:
        """[panel][block of 32 rows of K][half of the outputs][pair of rows][16 outputs][2], padded with zeros."""
        _C.set_cpu_isa(isa)
        for channels, outputs in ((5, 35), (32, 64), (33, 7), (70, 16), (3, 35), (1, 8)):
            weight = torch.randn(outputs, channels, *kernel, dtype=dtype)
            k = weight.bfloat16().permute(0, 2, 3, 1)
            if channels <= 4 and isa.startswith("amx"):  # blocks of one row of the filter, pixels of four channels
                k = F.pad(F.pad(k, (0, 4 - channels)).flatten(2), (0, 32 - 4 * kernel[1]))
            k = k.flatten(1)
            k = F.pad(k, (0, -k.shape[1] % 32, 0, -outputs % 32))
            expected = k.view(-(-outputs // 32), 2, 16, -1, 16, 2).permute(0, 3, 1, 4, 2, 5).flatten()
            dgrad_weight = weight.transpose(0, 1).flip(2, 3)  # whose dgrad weight is `weight`
            for stored in (weight, to_channels_last(weight)):
                assert torch.equal(PACK(stored, 0, False, True), expected)
            assert torch.equal(PACK(dgrad_weight, 0, True, True), expected)

    @pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 1), (0, 0))], ids=["3x3", "1x1"])
    @pytest.mark.parametrize("channels", [4, 19, 32])
    def test_non_finite_matches_float64(self, isa: str, kernel: Pair, padding: Pair, channels: int) -> None:
        _C.set_cpu_isa(isa)
        operands = TestNonFinite.operands(Case(2, channels, 15, 13, 35, kernel, padding=padding), torch.bfloat16)
        output, reference = operands.run(DIRECT, bf16_products=True)[0], operands.reference()
        assert torch.equal(output.isnan(), reference.isnan()) and reference.isnan().any()
        assert torch.equal(output.isposinf(), reference.isposinf()) and reference.isinf().any()

    def test_denormals_are_flushed(self, isa: str) -> None:
        """The dot products treat denormal operands as zero; fp32 arithmetic does not."""
        _C.set_cpu_isa(isa)
        case = Case(1, 2, 4, 4, 1, bias=False, residual=False, relu=False)
        x = to_channels_last(torch.full((1, 2, 4, 4), 1e-39)).bfloat16()
        operands = Operands(case, x, torch.full((1, 2, 3, 3), 64.0).bfloat16(), None, None)
        assert (operands.run(DIRECT, bf16_products=True)[0] == 0).all()
        assert (operands.run(DIRECT)[0] > 0).all()

    def test_results_are_bitwise_equal_for_any_thread_count(self, isa: str) -> None:
        _C.set_cpu_isa(isa)
        for case in (Case(2, 64, 33, 30, 65), Case(1, 512, 14, 14, 96), Case(3, 64, 30, 30, 96, (1, 1))):
            operands = Operands.random(case, dtype=torch.bfloat16)
            torch.set_num_threads(1)
            output = operands.run(DIRECT, bf16_products=True)[0]
            torch.set_num_threads(2)
            assert torch.equal(operands.run(DIRECT, bf16_products=True)[0], output)

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"tile": 2}, "bf16_products: expected a direct convolution of bfloat16"),
            ({"input": torch.ones(2, 5, 6, 5)}, "bf16_products: expected a direct convolution of bfloat16"),
            ({"weight": torch.ones(32 * 64)}, "weight: expected bfloat16"),
            ({"weight": torch.ones(7).bfloat16()}, "weight: expected the weight packed"),
            ({"bf16_products": False}, "weight: expected"),
            ({"residual": torch.ones(2, 8, 6, 5)}, "residual: expected the dtype of input, BFloat16"),
            ({"bias": torch.ones(8).half()}, "bias: expected float32 or the dtype of the input"),
            ({"bf16_products": False, "partials": True}, "partials: expected a float32 input"),
            ({"input_stats": torch.ones(5, 4)}, r"input_stats: expected \(5, 5\)"),
            (
                {"input": torch.ones(2, 3, 9, 9).bfloat16(), "dilation": (2, 2)},
                "dilation: .* of images of up to 4 channels",
            ),
        ],
        ids=str,
    )
    def test_invalid_arguments_raise(self, isa: str, changed: dict[str, Any], match: str) -> None:
        _C.set_cpu_isa(isa)
        operands = Operands.random(Case(2, 5, 6, 5, 8), dtype=torch.bfloat16)
        arguments: dict[str, Any] = {
            "input": operands.x, "weight": operands.packed(DIRECT, bf16_products=True), "bias": None, "residual": None,
            "outputs": 8, "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
            "tile": DIRECT, "relu": True, "partials": False, "bf16_products": True,
        }  # fmt: skip
        CONVOLVE(**arguments)
        with pytest.raises((ValueError, TypeError), match=match):
            CONVOLVE(**(arguments | changed))
        with pytest.raises(ValueError, match="bf16_products: expected a direct convolution"):
            PACK(operands.weight, 1, False, True)


def test_bf16_products_need_an_instruction_set() -> None:
    _C.set_cpu_isa(ISAS[0])
    operands = Operands.random(Case(1, 4, 6, 5, 8), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"bf16_products: .*, got {ISAS[0]}"):
        operands.packed(DIRECT, bf16_products=True)


class TestInputGradient:
    @pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 5), (9, 12), (14, 15)])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
    def test_transposed_weight_computes_input_gradient(self, size: Pair, kernel: Pair) -> None:
        """With stride 1, the convolution with a weight packed as `transposed` is the input gradient."""
        for padding, (channels, outputs) in itertools.product((0, 1, 2), ((3, 17), (33, 64), (100, 1))):
            if not all(padding < k and s + 2 * padding >= k for k, s in zip(kernel, size, strict=True)):
                continue
            forward = Case(2, channels, *size, outputs, kernel, padding=(padding, padding))
            operands = Operands.random(forward)
            grad = to_channels_last(torch.randn(2, outputs, *forward.output_size()) + 1)
            reference = conv2d_input((2, channels, *size), operands.weight.double(), grad.double(), padding=padding)
            weight = operands.weight.transpose(0, 1)
            backward = replace(
                forward, channels=outputs, outputs=channels, height=grad.shape[2], width=grad.shape[3],
                padding=(kernel[0] - 1 - padding, kernel[1] - 1 - padding), bias=False, residual=False, relu=False,
            )  # fmt: skip
            for isa, tile in itertools.product(ISAS, TILES if kernel == (3, 3) else (DIRECT,)):
                _C.set_cpu_isa(isa)
                winograd_stride = 0 if tile == DIRECT else 1
                packed = PACK(operands.weight, winograd_stride, True)
                ours = Operands(backward, grad, weight, None, None)
                check_output(ours, tile, ours.run(tile, packed=packed)[0], reference)


class TestUnpackedWeight:
    """A weight (K, C, kh, kw) is packed within the call, by the tasks that read it where a Winograd weight is large."""

    CASES = (
        Case(2, 17, 9, 12, 33),
        Case(3, 64, 14, 15, 48, stride=(2, 2)),
        Case(1, 300, 6, 7, 330),  # staged: large weights
        Case(1, 300, 12, 7, 330, stride=(2, 2)),
        Case(4, 300, 44, 43, 330, residual=False),  # staged, in more than one stage
    )

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_packed_weight(self, case: Case, isa: str) -> None:
        _C.set_cpu_isa(isa)
        operands = Operands.random(case)
        weights = operands.weight, to_channels_last(operands.weight), operands.weight.bfloat16()
        for tile, weight, threads in itertools.product((DIRECT, 2, 4), weights, (1, 2)):
            torch.set_num_threads(threads)
            expected = Operands(case, operands.x, weight, operands.bias, operands.residual).run(tile, partials=True)
            for a, b in zip(operands.run(tile, partials=True, packed=weight), expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("tile", [DIRECT, 4])
    def test_invalid_weight_raises(self, tile: int) -> None:
        operands = Operands.random(Case(1, 300, 6, 7, 330))
        weight = operands.weight
        for invalid in (weight.double(), weight[1:], weight[:, 1:], weight[..., 1:], weight.transpose(0, 1)):
            with pytest.raises((ValueError, TypeError), match="weight: expected"):
                operands.run(tile, packed=invalid)


class TestStatistics:
    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("relu", [False, True])
    def test_partial_statistics_with_large_mean(self, tile: int, isa: str, relu: bool) -> None:
        """Partial statistics of outputs with mean 100 and standard deviation 1.

        Sums of squares about zero would lose all of M2 in float32.
        """
        _C.set_cpu_isa(isa)
        shapes = ((1, 5, 1, 1, 3), (1, 9, 2, 1, 17), (3, 33, 7, 7, 33), (2, 17, 13, 30, 65), (1, 300, 6, 7, 300))
        for images, channels, height, width, outputs in shapes:
            operands = Operands.random(Case(images, channels, height, width, outputs, relu=relu), mean=0)
            assert operands.bias is not None
            operands.bias += 100
            output, partials = operands.run(tile, partials=True)
            assert torch.equal(output, operands.run(tile)[0])
            reference = output.double()
            assert partials.shape == (1, 3, outputs) and partials.dtype == torch.float64
            count, mean, m2 = partials[0]
            dims = (0, 2, 3)
            assert (count == reference[:, 0].numel()).all()
            torch.testing.assert_close(mean, reference.mean(dims), rtol=1e-6, atol=0)
            m2_reference = (reference - reference.mean(dims, keepdim=True)).square().sum(dims)
            torch.testing.assert_close(m2, m2_reference, rtol=1e-4, atol=1e-9)

    def test_no_statistics_without_partials(self) -> None:
        assert Operands.random(Case(1, 3, 5, 5, 7)).run(DIRECT)[1].shape == (0,)


class TestNonFinite:
    @staticmethod
    def operands(case: Case, dtype: torch.dtype = torch.float32) -> Operands:
        """Return operands with NaN, inf and -inf, spaced so that some windows contain none and some contain two."""
        operands = Operands.random(case, dtype=dtype)
        x, residual = operands.x, operands.residual
        x[0, 1, 2, 3], x[0, 2, 9, 9], x[1, 0, 5, 0] = float("nan"), float("inf"), -float("inf")
        x[1, 3, 6, 2] = float("inf")
        assert residual is not None and operands.bias is not None
        residual[1, 2, -1, -1], residual[1, 3, -1, -1] = float("nan"), float("inf")
        operands.bias[4] = -float("inf")
        return operands

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize(
        ("kernel", "stride"), [((3, 3), (1, 1)), ((1, 1), (1, 1)), ((5, 3), (2, 1))], ids=["3x3", "1x1", "5x3"]
    )
    def test_direct_matches_float64(self, isa: str, relu: bool, kernel: Pair, stride: Pair) -> None:
        _C.set_cpu_isa(isa)
        operands = self.operands(Case(2, 19, 15, 13, 35, kernel, stride, relu=relu))
        output, reference = operands.run(DIRECT)[0], operands.reference()
        assert reference.isnan().any() and reference.isinf().any() and reference.isfinite().float().mean() > 0.5
        assert torch.equal(output.isnan(), reference.isnan())
        assert torch.equal(output.isposinf(), reference.isposinf()) and torch.equal(
            output.isneginf(), reference.isneginf()
        )
        finite = reference.isfinite()
        torch.testing.assert_close(output[finite], reference[finite].float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("tile", TILES[1:])
    def test_winograd_is_non_finite_where_float64_is(self, isa: str, relu: bool, tile: int) -> None:
        """Winograd may output NaN in place of infinity, and non-finite values elsewhere in the same tile."""
        _C.set_cpu_isa(isa)
        operands = self.operands(Case(2, 19, 15, 13, 35, relu=relu))
        output, reference = operands.run(tile)[0], operands.reference()
        assert output[reference.isnan()].isnan().all()
        pre = replace(operands.case, relu=False)  # ReLU maps -inf to 0 and preserves NaN
        infinite = ~replace(operands, case=pre).reference().isfinite() & reference.isposinf()
        assert not output[infinite].isfinite().any()
        affected = F.max_pool2d((~operands.x.isfinite()).any(1, keepdim=True).float(), 2 * tile + 1, 1, tile) > 0
        clean = reference.isfinite() & ~affected
        assert clean.float().mean() > 0.3
        torch.testing.assert_close(output[clean], reference[clean].float(), rtol=1e-4, atol=1e-4)


class TestThreads:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize(
        "case",
        [
            Case(2, 17, 33, 30, 65),
            Case(1, 24, 14, 14, 200),  # few tiles: the work is partitioned by panels
            Case(2, 320, 14, 15, 320),  # a weight larger than the caches
        ],
        ids=str,
    )
    def test_results_are_bitwise_equal_for_any_thread_count(self, isa: str, case: Case) -> None:
        _C.set_cpu_isa(isa)
        operands = Operands.random(case)
        for tile in TILES:
            torch.set_num_threads(1)
            output, partials = operands.run(tile, partials=True)
            assert output.numel() >= 1 << 15, "too small for threads"
            for threads in (2, 3):
                torch.set_num_threads(threads)
                packed = operands.packed(tile)
                for a, b in zip(operands.run(tile, partials=True, packed=packed), (output, partials), strict=True):
                    assert torch.equal(a, b), (tile, threads)
            check_output(operands, tile, output, operands.reference())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "every other channel": lambda t: to_channels_last(t.repeat_interleave(2, 1))[:, ::2],
    "every other row": lambda t: to_channels_last(t.repeat_interleave(2, 2))[:, :, ::2],
    "cropped rows": lambda t: to_channels_last(F.pad(t, (1, 2)))[..., 1:-2],
    "transposed": lambda t: to_channels_last(t.transpose(2, 3)).transpose(2, 3),
    "every other batch element": lambda t: to_channels_last(t.repeat_interleave(2, 0))[::2],
}


class TestLayout:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("tile", TILES)
    def test_non_dense_layouts(self, view: str, tile: int) -> None:
        operands = Operands.random(Case(3, 6, 9, 7, 35))
        assert operands.residual is not None
        output, _ = operands.run(tile)
        viewed = VIEWS[view]
        other = replace(
            operands, x=viewed(operands.x), weight=viewed(operands.weight), residual=viewed(operands.residual)
        )
        before = [t.clone() for t in (other.x, other.weight, other.residual, operands.bias) if t is not None]
        assert torch.equal(other.run(tile)[0], output)
        after = [t for t in (other.x, other.weight, other.residual, operands.bias) if t is not None]
        assert all(map(torch.equal, before, after))
        assert torch.equal(operands.run(tile)[0], output)

    def test_expanded_input(self) -> None:
        operands = Operands.random(Case(1, 6, 9, 7, 35, residual=False))
        output, _ = operands.run(4)
        expanded = replace(operands, x=operands.x.expand(3, -1, -1, -1))
        assert torch.equal(expanded.run(4)[0], output.expand(3, -1, -1, -1))


def run_with_guard_pages() -> None:
    """Run the operators in a child process with every operand next to a guard page, after or before it."""
    for isa, at_end, channels, outputs in itertools.product(ISAS, (True, False), (1, 3, 17, 64), (1, 33, 96)):
        _C.set_cpu_isa(isa)
        for kernel, stride, padding, size in (
            ((3, 3), 1, 1, (5, 7)),
            ((3, 3), 1, 0, (4, 6)),
            ((3, 3), 1, 2, (1, 3)),
            ((3, 3), 2, 1, (6, 5)),
            ((1, 1), 1, 0, (3, 5)),
            ((7, 7), 2, 3, (9, 8)),
        ):
            case = Case(2, channels, *size, outputs, kernel, (stride, stride), (padding, padding))
            winograd = kernel == (3, 3) and stride == 1
            for tile in TILES if winograd else (DIRECT,):
                check_with_guard_pages(Operands.random(case), at_end, tile)
            dtype = SIXTEEN_BITS[channels % 2]
            for tile in (DIRECT, 2, 4) if winograd else (DIRECT,):
                check_with_guard_pages(Operands.random(case, dtype=dtype), at_end, tile)
            for bf16_isa in BF16_ISAS:
                _C.set_cpu_isa(bf16_isa)
                check_with_guard_pages(Operands.random(case, dtype=torch.bfloat16), at_end, DIRECT, bf16_products=True)
                _C.set_cpu_isa(isa)


def check_with_guard_pages(operands: Operands, at_end: bool, tile: int, bf16_products: bool = False) -> None:
    partials = operands.x.dtype == torch.float32
    plain = operands.run(tile, partials, bf16_products=bf16_products)
    tensors = (operands.x, operands.weight, operands.bias, operands.residual, operands.packed(tile, bf16_products))
    guards = [GuardedTensor(tensor, at_end) for tensor in tensors if tensor is not None]
    *copies, packed = (guard.copy for guard in guards)
    guarded = Operands(operands.case, *copies)
    assert torch.equal(guarded.packed(tile, bf16_products), packed)
    for a, b in zip(guarded.run(tile, partials, packed, bf16_products), plain, strict=True):
        assert torch.equal(a, b)
    del copies, packed, guarded
    for guard in guards:
        guard.close()


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages with mprotect")
def test_no_access_outside_operands() -> None:
    command = [sys.executable, "-c", f"import {__name__} as tests; tests.run_with_guard_pages()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"


class TestInvalidArguments:
    VALID = Case(2, 4, 6, 5, 8)

    def check_raises(self, match: str, valid_tile: int = DIRECT, **changed: Any) -> None:
        operands = Operands.random(self.VALID)
        arguments: dict[str, Any] = {
            "input": operands.x, "weight": operands.packed(valid_tile), "bias": operands.bias,
            "residual": operands.residual, "outputs": 8, "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1),
            "dilation": (1, 1), "tile": valid_tile, "relu": True, "partials": False,
        }  # fmt: skip
        CONVOLVE(**arguments)
        for partials in (False, True):
            with pytest.raises((ValueError, TypeError), match=match):
                CONVOLVE(**(arguments | {"residual": None, "partials": partials} | changed))

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"input": torch.ones(4, 6, 5)}, "input: expected"),
            ({"input": torch.ones(2, 4, 6, 5, dtype=torch.float64)}, "input: expected float32, bfloat16 or float16"),
            ({"input": torch.ones(2, 4, 6, 5).int()}, "input: expected float32, bfloat16 or float16"),
            ({"input": torch.ones(2, 5, 6, 5)}, "weight: expected"),
            ({"input": torch.ones(2, 0, 6, 5)}, "input: expected"),
            ({"input": torch.ones(2, 4, 0, 5), "padding": (0, 0)}, "input: expected"),
            ({"input": torch.ones(2, 4, 2, 5), "padding": (0, 0)}, "input: expected"),
            ({"input": torch.ones(2, 4, 2, 5), "padding": (0, 0), "stride": (2, 2)}, "input: expected"),
            ({"weight": torch.ones(7)}, "weight: expected"),
            ({"weight": torch.ones(1152, dtype=torch.float64)}, "weight: expected float32"),
            ({"weight": torch.ones(2304)[::2]}, "weight: expected"),
            ({"weight": torch.ones(1).expand(1152)}, "weight: expected"),
            ({"bias": torch.ones(7)}, "bias: expected 8"),
            ({"bias": torch.ones(16)[::2]}, "bias: expected 8"),
            ({"bias": torch.ones(8, dtype=torch.float64)}, "bias: expected float32"),
            ({"residual": torch.ones(2, 8, 6, 4)}, "residual: expected the shape"),
            ({"residual": torch.ones(8)}, "residual: expected the shape"),
            ({"residual": torch.ones(2, 8, 6, 5, dtype=torch.float64)}, "residual: expected the dtype of input, Float"),
            ({"residual": torch.ones(2, 8, 6, 5).bfloat16()}, "residual: expected the dtype of input, Float"),
            ({"bias": torch.ones(8).bfloat16()}, "bias: expected float32"),
            ({"weight": torch.ones(1152).bfloat16()}, "weight: expected float32"),
            ({"outputs": 0}, "expected"),
            ({"outputs": -8}, "expected"),
            ({"outputs": 40}, "weight: expected"),
            ({"kernel_size": (0, 3)}, "kernel"),
            ({"kernel_size": (3, -3)}, "kernel"),
            ({"kernel_size": (-3, -3)}, "kernel"),
            ({"stride": (0, 1)}, "stride"),
            ({"stride": (1, -1)}, "stride"),
            ({"padding": (-1, 0)}, "padding"),
            ({"dilation": (1, 0)}, "dilation"),
            ({"dilation": (-1, 1)}, "dilation"),
        ],
        ids=str,
    )  # fmt: skip
    def test_convolve_raises(self, changed: dict[str, Any], match: str) -> None:
        self.check_raises(match, **changed)

    @pytest.mark.parametrize(
        "changed",
        [
            {"tile": 1}, {"tile": 5}, {"tile": -1}, {"stride": (2, 1)}, {"dilation": (1, 2)},
            {"kernel_size": (1, 9), "padding": (0, 4)},
            {"kernel_size": (9, 1), "padding": (4, 0)},
        ],
        ids=str,
    )  # fmt: skip
    def test_winograd_raises(self, changed: dict[str, Any]) -> None:
        message = "tile: Winograd supports 3x3 kernels with stride 1 or 2, and tiles of 2 to 4"
        self.check_raises(message, valid_tile=4, **changed)

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    def test_16_bit_input_raises(self, dtype: torch.dtype) -> None:
        operands = Operands.random(self.VALID, dtype=dtype)
        packed = operands.packed(DIRECT)
        with pytest.raises(TypeError, match="partials: expected a float32 input"):
            operands.run(DIRECT, partials=True, packed=packed)
        assert operands.residual is not None and operands.bias is not None
        for other in [o for o in (torch.float32, torch.float64, *SIXTEEN_BITS) if o != dtype]:
            with pytest.raises(TypeError, match="residual: expected the dtype of input"):
                replace(operands, residual=operands.residual.to(other)).run(DIRECT, packed=packed)
            if other != torch.float32:
                with pytest.raises(TypeError, match="bias: expected float32"):
                    replace(operands, bias=operands.bias.to(other)).run(DIRECT, packed=packed)

    def test_wrong_number_of_dimensions_raises(self) -> None:
        for name in ("kernel_size", "stride", "padding", "dilation"):
            for invalid in ((1,), (1, 1, 1)):
                changed: dict[str, Any] = {name: invalid}
                self.check_raises(f"{name}: expected two integers", **changed)

    @pytest.mark.parametrize(
        ("weight", "winograd_stride", "match"),
        [
            (torch.ones(8, 4, 3), 0, "weight: expected"),
            (torch.ones(8, 4, 3, 3, dtype=torch.float64), 0, "weight: expected float32"),
            (torch.ones(8, 4, 5, 5), 1, "Winograd supports 3x3"),
            (torch.ones(8, 4, 1, 9), 1, "Winograd supports 3x3"),
        ],
    )
    def test_pack_conv_weight_raises(self, weight: Tensor, winograd_stride: int, match: str) -> None:
        for transposed in (False, True):
            with pytest.raises((ValueError, TypeError), match=match):
                PACK(weight, winograd_stride, transposed)

    @pytest.mark.parametrize("tile", TILES)
    def test_empty_batch_is_valid(self, tile: int) -> None:
        """An empty batch yields an empty output and partial statistics with a count of zero."""
        operands = Operands.random(replace(self.VALID, images=0))
        output, partials = operands.run(tile, partials=True)
        assert output.shape == (0, 8, 6, 5)
        assert (partials == 0).all() and partials.shape == (1, 3, 8)

    def test_baseline_isa_raises(self) -> None:
        operands = Operands.random(self.VALID)
        packed = operands.packed(DIRECT)
        _C.set_cpu_isa("baseline")
        with pytest.raises(RuntimeError, match="baseline, has no convolution kernels"):
            operands.run(DIRECT, packed=packed)
