"""The CPU's convolutions, torch.ops.fused_res_cpu.pack_conv_weight and .convolve, against float64."""

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

import fused_res.backends.cpu.operators  # noqa: F401  (defines them)
from fused_res import _extension
from tests.support.guard_pages import Guarded

if not _extension.loaded:
    pytest.skip(_extension.reason, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
_C = _extension._module


def _runs(isa: str) -> bool:
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        return False
    _C.set_cpu_isa(before)
    return True


ISAS = [isa for isa in ("avx2", "avx512") if _runs(isa)]
if not ISAS:
    pytest.skip("the convolutions need AVX2", allow_module_level=True)

CONVOLVE, PACK = torch.ops.fused_res_cpu.convolve, torch.ops.fused_res_cpu.pack_conv_weight
DIRECT = 0
TILES = (DIRECT, 2, 3, 4)
CHANNELS = (1, 3, 17, 33, 64, 100)

Pair = tuple[int, int]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def rows(tensor: Tensor) -> Tensor:
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

    def out(self) -> Pair:
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return height, width

    def exists(self) -> bool:
        sizes = zip((self.height, self.width), self.kernel, self.padding, self.dilation, strict=True)
        return all(size + 2 * p > d * (k - 1) for size, k, p, d in sizes)


@dataclass
class Operands:
    """What a case is run on, in float32: away from zero, and so that the outputs are about 1."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None

    @staticmethod
    def of(case: Case, mean: float = 1.0) -> Operands:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        weight = randn(case.outputs, case.channels, *case.kernel)
        return Operands(
            case,
            rows(randn(case.images, case.channels, case.height, case.width) + mean),
            weight / weight[0].numel() ** 0.5,
            randn(case.outputs) + mean if case.bias else None,
            rows(randn(case.images, case.outputs, *case.out()) - mean) if case.residual else None,
        )

    def packed(self, tile: int) -> Tensor:
        return PACK(self.weight, self.case.stride[0] if tile != DIRECT else 0, False)

    def run(self, tile: int, partials: bool = False, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        case = self.case
        if packed is None:
            packed = self.packed(tile)
        geometry = case.outputs, case.kernel, case.stride, case.padding, case.dilation
        return CONVOLVE(self.x, packed, self.bias, self.residual, *geometry, tile, case.relu, partials)

    def exact(self) -> Tensor:
        case = self.case
        bias = None if self.bias is None else self.bias.double()
        y = F.conv2d(self.x.double(), self.weight.double(), bias, case.stride, case.padding, case.dilation)
        y = y if self.residual is None else y + self.residual
        return y.relu() if case.relu else y


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def limit(tile: int) -> float:
    return 1e-6 if tile == DIRECT else 3e-6


def check(operands: Operands, tile: int, output: Tensor, exact: Tensor) -> None:
    """A few outputs may all be small by chance: then what they are summed from is the measure."""
    case = operands.case
    assert output.shape == exact.shape and output.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)
    expected = rms(operands.x) * rms(operands.weight) * operands.weight[0].numel() ** 0.5
    error = rms(output - exact) / max(rms(exact), expected)
    assert error <= limit(tile), f"{case}, tile {tile}, {_C.cpu_isa()}: {error:.2g}"


def check_everywhere(case: Case) -> None:
    operands = Operands.of(case)
    exact = operands.exact()
    winograd = case.kernel == (3, 3) and case.stride in ((1, 1), (2, 2)) and case.dilation == (1, 1)
    packed = {tile: operands.packed(tile) for tile in (TILES if winograd else (DIRECT,))}
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        for tile, weight in packed.items():
            check(operands, tile, operands.run(tile, packed=weight)[0], exact)


def epilogue(number: int) -> dict[str, Any]:
    """Each of the eight in turn."""
    return {name: bool(number >> bit & 1) for bit, name in enumerate(("bias", "residual", "relu"))}


class TestAgainstFloat64:
    @pytest.mark.parametrize("height", range(1, 13))
    def test_every_size(self, height: int) -> None:
        for width, padding in itertools.product(range(1, 13), range(3)):
            n = height * 41 + width * 7 + padding * 3  # so that the other sizes change, too
            case = Case(
                1 + n % 3,
                CHANNELS[n % 6],
                height,
                width,
                CHANNELS[n // 6 % 6],
                padding=(padding, padding),
                **epilogue(n),
            )
            if case.exists():
                check_everywhere(case)
                check_everywhere(replace(case, stride=(2, 2)))

    @pytest.mark.parametrize("channels", CHANNELS)
    def test_channels(self, channels: int) -> None:
        for outputs, images in itertools.product(CHANNELS, (1, 2, 3)):
            case = Case(images, channels, 7, 9, outputs, **epilogue(outputs + images))
            check_everywhere(case)
            check_everywhere(replace(case, height=14, width=13, stride=(2, 2)))

    @pytest.mark.parametrize(
        "number", range(8), ids=lambda n: " ".join(k for k, on in epilogue(n).items() if on) or "-"
    )
    def test_epilogue(self, number: int) -> None:
        for size in ((14, 14), (13, 18)):
            check_everywhere(Case(2, 20, *size, 40, **epilogue(number)))

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (7, 7)])
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 2)])
    def test_geometry(self, kernel: Pair, stride: Pair) -> None:
        count = 0
        for padding, dilation in itertools.product(((0, 0), (1, 1), (2, 2), (0, 1)), ((1, 1), (2, 2), (2, 1))):
            for size in ((1, 2), (3, 5), (9, 7), (14, 15)):
                case = Case(2, 5, *size, 35, kernel, stride, padding, dilation, **epilogue(count))
                if case.exists():
                    check_everywhere(case)
                    count += 1
        assert count > 8

    # Rows of a multiple of 4 KB are copied, too: convolution.cpp's `gather`.
    @pytest.mark.parametrize("channels", [1000, 1024])
    def test_pointwise_with_many_channels(self, channels: int) -> None:
        check_everywhere(Case(2, channels, 5, 7, 65, (1, 1), padding=(0, 0)))

    @pytest.mark.parametrize(
        "case",
        [
            Case(2, 33, 56, 57, 70),
            Case(1, 512, 7, 7, 512),  # few tiles
            Case(8, 300, 31, 32, 300, residual=False),  # a weight beyond the caches, and blocks in several rounds
        ],
        ids=str,
    )
    def test_large(self, case: Case) -> None:
        """The issue's limits to the letter: of the outputs' own root mean square."""
        operands = Operands.of(case)
        exact = operands.exact()
        for isa, tile in itertools.product(ISAS, TILES):
            _C.set_cpu_isa(isa)
            assert rms(operands.run(tile)[0] - exact) <= limit(tile) * rms(exact), (isa, tile)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_past_the_caches(self, stride: int) -> None:
        """Outputs of more than 8 MB, whole lines each: written by other instructions, with statistics and without."""
        case = Case(5, 9, 82 * stride, 82 * stride, 64, stride=(stride, stride))
        operands = Operands.of(case)
        exact = operands.exact()
        assert exact.numel() > 2 << 20
        for isa, tile, partials in itertools.product(ISAS, TILES, (False, True)):
            _C.set_cpu_isa(isa)
            check(operands, tile, operands.run(tile, partials)[0], exact)

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(st.data())
    def test_drawn(self, data: st.DataObject) -> None:
        def pair(low: int, high: int) -> Pair:
            return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

        images, channels, outputs = (data.draw(st.integers(1, high)) for high in (4, 70, 70))
        kernel, stride, padding, dilation = (3, 3), (1, 1), pair(0, 3), (1, 1)
        if data.draw(st.booleans()):
            kernel, stride, dilation = pair(1, 7), pair(1, 4), pair(1, 3)
        low = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
        height, width = (data.draw(st.integers(least, least + 20)) for least in low)
        parts = {name: data.draw(st.booleans()) for name in ("bias", "residual", "relu")}
        check_everywhere(Case(images, channels, height, width, outputs, kernel, stride, padding, dilation, **parts))


class TestGradient:
    @pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 5), (9, 12), (14, 15)])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
    def test_transposed(self, size: Pair, kernel: Pair) -> None:
        """A weight packed `transposed` makes of stride 1 the gradient with respect to the input."""
        for padding, (channels, outputs) in itertools.product((0, 1, 2), ((3, 17), (33, 64), (100, 1))):
            if not all(padding < k and s + 2 * padding >= k for k, s in zip(kernel, size, strict=True)):
                continue
            forward = Case(2, channels, *size, outputs, kernel, padding=(padding, padding))
            operands = Operands.of(forward)
            grad = rows(torch.randn(2, outputs, *forward.out()) + 1)
            exact = conv2d_input((2, channels, *size), operands.weight.double(), grad.double(), padding=padding)
            weight = operands.weight.transpose(0, 1)
            backward = replace(
                forward, channels=outputs, outputs=channels, height=grad.shape[2], width=grad.shape[3],
                padding=(kernel[0] - 1 - padding, kernel[1] - 1 - padding), bias=False, residual=False, relu=False,
            )  # fmt: skip
            for isa, tile in itertools.product(ISAS, TILES if kernel == (3, 3) else (DIRECT,)):
                _C.set_cpu_isa(isa)
                packed = PACK(operands.weight, tile != DIRECT, True)
                ours = Operands(backward, grad, weight, None, None)
                check(ours, tile, ours.run(tile, packed=packed)[0], exact)


class TestStatistics:
    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("relu", [False, True])
    def test_mean_100_deviation_1(self, tile: int, isa: str, relu: bool) -> None:
        """Of what was written: in float64, the sums about zero would have lost nothing, in float32 all of M2."""
        _C.set_cpu_isa(isa)
        shapes = ((1, 5, 1, 1, 3), (1, 9, 2, 1, 17), (3, 33, 7, 7, 33), (2, 17, 13, 30, 65), (1, 300, 6, 7, 300))
        for images, channels, height, width, outputs in shapes:
            operands = Operands.of(Case(images, channels, height, width, outputs, relu=relu), mean=0)
            assert operands.bias is not None
            operands.bias += 100
            output, partials = operands.run(tile, partials=True)
            assert torch.equal(output, operands.run(tile)[0])
            exact = output.double()
            assert partials.shape == (1, 3, outputs) and partials.dtype == torch.float64
            count, mean, m2 = partials[0]
            dims = (0, 2, 3)
            assert (count == exact[:, 0].numel()).all()
            torch.testing.assert_close(mean, exact.mean(dims), rtol=1e-6, atol=0)
            m2_exact = (exact - exact.mean(dims, keepdim=True)).square().sum(dims)
            torch.testing.assert_close(m2, m2_exact, rtol=1e-4, atol=1e-9)

    def test_not_asked_for(self) -> None:
        assert Operands.of(Case(1, 3, 5, 5, 7)).run(DIRECT)[1].shape == (0,)


class TestNotNumbers:
    @staticmethod
    def operands(case: Case) -> Operands:
        """NaN, inf and -inf, with room between them for outputs that see none or two of them."""
        operands = Operands.of(case)
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
    def test_direct_has_them_where_float64_has(self, isa: str, relu: bool, kernel: Pair, stride: Pair) -> None:
        _C.set_cpu_isa(isa)
        operands = self.operands(Case(2, 19, 15, 13, 35, kernel, stride, relu=relu))
        output, exact = operands.run(DIRECT)[0], operands.exact()
        assert exact.isnan().any() and exact.isinf().any() and exact.isfinite().float().mean() > 0.5
        assert torch.equal(output.isnan(), exact.isnan())
        assert torch.equal(output.isposinf(), exact.isposinf()) and torch.equal(output.isneginf(), exact.isneginf())
        finite = exact.isfinite()
        torch.testing.assert_close(output[finite], exact[finite].float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("tile", TILES[1:])
    def test_winograd_has_no_numbers_there(self, isa: str, relu: bool, tile: int) -> None:
        """It may have NaN for infinity, and within a tile elsewhere."""
        _C.set_cpu_isa(isa)
        operands = self.operands(Case(2, 19, 15, 13, 35, relu=relu))
        output, exact = operands.run(tile)[0], operands.exact()
        assert output[exact.isnan()].isnan().all()
        pre = replace(operands.case, relu=False)  # a ReLU makes 0 of -inf, and of a NaN none
        wrong = ~replace(operands, case=pre).exact().isfinite() & exact.isposinf()
        assert not output[wrong].isfinite().any()
        seen = F.max_pool2d((~operands.x.isfinite()).any(1, keepdim=True).float(), 2 * tile + 1, 1, tile) > 0
        clean = exact.isfinite() & ~seen
        assert clean.float().mean() > 0.3
        torch.testing.assert_close(output[clean], exact[clean].float(), rtol=1e-4, atol=1e-4)


class TestThreads:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize(
        "case",
        [
            Case(2, 17, 33, 30, 65),
            Case(1, 24, 14, 14, 200),  # few tiles, few pixels: the panels are shared out
            Case(2, 320, 14, 15, 320),  # a weight beyond the caches
        ],
        ids=str,
    )
    def test_same_bits(self, isa: str, case: Case) -> None:
        _C.set_cpu_isa(isa)
        operands = Operands.of(case)
        for tile in TILES:
            torch.set_num_threads(1)
            output, partials = operands.run(tile, partials=True)
            assert output.numel() >= 1 << 15, "too small for threads"
            for threads in (2, 3):
                torch.set_num_threads(threads)
                packed = operands.packed(tile)
                for got, one in zip(operands.run(tile, partials=True, packed=packed), (output, partials), strict=True):
                    assert torch.equal(got, one), (tile, threads)
            check(operands, tile, output, operands.exact())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "every other channel": lambda t: rows(t.repeat_interleave(2, 1))[:, ::2],
    "every other row": lambda t: rows(t.repeat_interleave(2, 2))[:, :, ::2],
    "a part of wider rows": lambda t: rows(F.pad(t, (1, 2)))[..., 1:-2],
    "transposed": lambda t: rows(t.transpose(2, 3)).transpose(2, 3),
    "other images between": lambda t: rows(t.repeat_interleave(2, 0))[::2],
}


class TestLayout:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("tile", TILES)
    def test_any_strides(self, view: str, tile: int) -> None:
        operands = Operands.of(Case(3, 6, 9, 7, 35))
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

    def test_expanded(self) -> None:
        operands = Operands.of(Case(1, 6, 9, 7, 35, residual=False))
        output, _ = operands.run(4)
        expanded = replace(operands, x=operands.x.expand(3, -1, -1, -1))
        assert torch.equal(expanded.run(4)[0], output.expand(3, -1, -1, -1))


def run_on_guarded_memory() -> None:
    """In a child: whatever is read, and where it ends or begins, is against a page that must not be touched."""
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
            operands = Operands.of(case)
            for tile in TILES if kernel == (3, 3) and stride == 1 else (DIRECT,):
                plain, partials = operands.run(tile, partials=True)
                given = (operands.x, operands.weight, operands.bias, operands.residual, operands.packed(tile))
                guards = [Guarded(tensor, at_end) for tensor in given if tensor is not None]
                *copies, packed = (guard.copy for guard in guards)
                again = Operands(case, *copies)
                assert torch.equal(again.packed(tile), packed)
                for got, one in zip(again.run(tile, partials=True, packed=packed), (plain, partials), strict=True):
                    assert torch.equal(got, one)
                del copies, packed, again
                for guard in guards:
                    guard.close()


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages with mprotect")
def test_guarded_memory() -> None:
    command = [sys.executable, "-c", f"import {__name__} as tests; tests.run_on_guarded_memory()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"


class TestBadArguments:
    GOOD = Case(2, 4, 6, 5, 8)

    def fails(self, match: str, good_tile: int = DIRECT, **changed: Any) -> None:
        operands = Operands.of(self.GOOD)
        arguments: dict[str, Any] = {
            "input": operands.x, "packed": operands.packed(good_tile), "bias": operands.bias,
            "residual": operands.residual, "outputs": 8, "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1),
            "dilation": (1, 1), "tile": good_tile, "relu": True, "partials": False,
        }  # fmt: skip
        CONVOLVE(**arguments)
        for partials in (False, True):
            with pytest.raises((ValueError, TypeError), match=match):
                CONVOLVE(**(arguments | {"residual": None, "partials": partials} | changed))

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"input": torch.ones(4, 6, 5)}, "input: expected"),
            ({"input": torch.ones(2, 4, 6, 5, dtype=torch.float64)}, "input: expected float32"),
            ({"input": torch.ones(2, 4, 6, 5, dtype=torch.bfloat16)}, "input: expected float32"),
            ({"input": torch.ones(2, 5, 6, 5)}, "packed: expected"),
            ({"input": torch.ones(2, 0, 6, 5)}, "input: expected"),
            ({"input": torch.ones(2, 4, 0, 5), "padding": (0, 0)}, "input: expected"),
            ({"input": torch.ones(2, 4, 2, 5), "padding": (0, 0)}, "input: expected"),
            ({"input": torch.ones(2, 4, 2, 5), "padding": (0, 0), "stride": (2, 2)}, "input: expected"),
            ({"packed": torch.ones(7)}, "packed: expected"),
            ({"packed": torch.ones(1152, dtype=torch.float64)}, "packed: expected float32"),
            ({"packed": torch.ones(2304)[::2]}, "packed: expected"),
            ({"packed": torch.ones(1).expand(1152)}, "packed: expected"),
            ({"bias": torch.ones(7)}, "bias: expected 8"),
            ({"bias": torch.ones(16)[::2]}, "bias: expected 8"),
            ({"bias": torch.ones(8, dtype=torch.float64)}, "bias: expected float32"),
            ({"residual": torch.ones(2, 8, 6, 4)}, "residual: expected the shape"),
            ({"residual": torch.ones(8)}, "residual: expected the shape"),
            ({"residual": torch.ones(2, 8, 6, 5, dtype=torch.float64)}, "residual: expected float32"),
            ({"outputs": 0}, "expected"),
            ({"outputs": -8}, "expected"),
            ({"outputs": 40}, "packed: expected"),
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
    def test_convolve(self, changed: dict[str, Any], match: str) -> None:
        self.fails(match, **changed)

    @pytest.mark.parametrize(
        "changed",
        [
            {"tile": 1}, {"tile": 5}, {"tile": -1}, {"stride": (2, 1)}, {"dilation": (1, 2)},
            {"kernel_size": (1, 9), "padding": (0, 4)},
            {"kernel_size": (9, 1), "padding": (4, 0)},
        ],
        ids=str,
    )  # fmt: skip
    def test_winograd(self, changed: dict[str, Any]) -> None:
        self.fails("tile: Winograd is for 3x3 kernels with stride 1", good_tile=4, **changed)

    def test_lengths(self) -> None:
        for name in ("kernel_size", "stride", "padding", "dilation"):
            for wrong in ((1,), (1, 1, 1)):
                changed: dict[str, Any] = {name: wrong}
                self.fails(f"{name}: expected two numbers", **changed)

    @pytest.mark.parametrize(
        ("weight", "winograd", "match"),
        [
            (torch.ones(8, 4, 3), False, "weight: expected"),
            (torch.ones(8, 4, 3, 3, dtype=torch.float64), False, "weight: expected float32"),
            (torch.ones(8, 4, 5, 5), True, "Winograd is for 3x3"),
            (torch.ones(8, 4, 1, 9), True, "Winograd is for 3x3"),
        ],
    )
    def test_pack(self, weight: Tensor, winograd: bool, match: str) -> None:
        for transposed in (False, True):
            with pytest.raises((ValueError, TypeError), match=match):
                PACK(weight, winograd, transposed)

    @pytest.mark.parametrize("tile", TILES)
    def test_no_images(self, tile: int) -> None:
        """Not bad: there is nothing to do, and the statistics are of nothing."""
        operands = Operands.of(replace(self.GOOD, images=0))
        output, partials = operands.run(tile, partials=True)
        assert output.shape == (0, 8, 6, 5)
        assert (partials == 0).all() and partials.shape == (1, 3, 8)

    def test_baseline_says_so(self) -> None:
        operands = Operands.of(self.GOOD)
        packed = operands.packed(DIRECT)
        _C.set_cpu_isa("baseline")
        with pytest.raises(RuntimeError, match="baseline, has no convolution kernels"):
            operands.run(DIRECT, packed=packed)
