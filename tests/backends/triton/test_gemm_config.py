"""Grids, and the work partition of the weight gradient: wave efficiency, resource usage, split-K against float64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_res.backends.triton import aot, conv_wgrad, is_interpreted
from fused_res.backends.triton.conv_bias_act import conv_bias_act
from fused_res.backends.triton.conv_bn_stats import conv_bn_stats
from fused_res.backends.triton.gemm_config import SMS, WGRAD_TILES, GemmConfig, wgrad_config
from fused_res.backends.triton.launch import intercept_launches
from tools.ptx.compiled_session import needs_compiled_triton
from tools.ptx.triton_runner import run_interpreted

#: The 1x1 convolutions of ResNet-50: input channels, output channels, and size of the output.
RESNET50 = [
    (64, 64, 56), (64, 256, 56), (256, 64, 56), (256, 128, 56), (128, 512, 28), (256, 512, 28), (512, 128, 28),
    (512, 256, 28), (256, 1024, 14), (512, 1024, 14), (1024, 256, 14), (1024, 512, 14), (512, 2048, 7),
    (1024, 2048, 7), (2048, 512, 7),
]  # fmt: skip


def resident_programs(config: GemmConfig, dtype: torch.dtype) -> int:
    return next(tile.resident for tile in WGRAD_TILES[dtype.itemsize] if tile[:2] == config.block_shape[:2])


@pytest.mark.parametrize("batch", [32, 256])
def test_wgrad_fills_the_multiprocessors(batch: int) -> None:
    """At least 85 % of the K blocks that all resident programs could process are processed; prints the partitions.

    The partial accumulators, written and read, are no more bytes than the operands.
    """
    header = "batch     C     K size  tile        tiles splits waves iterations efficiency  partials, MB"
    print(f"\n{header}")
    for channels, out_channels, size in RESNET50:
        pixels = batch * size * size
        config = wgrad_config(out_channels, channels, pixels, torch.bfloat16)
        tiles, k_blocks = config.tiles_m * config.tiles_n, -(-pixels // config.block_k)
        slots = SMS * resident_programs(config, torch.bfloat16)
        waves = -(-tiles * config.splits // slots)
        efficiency = tiles * k_blocks / (waves * slots * config.k_blocks_per_split)
        operands = pixels * (2 * out_channels + channels) * 2 / 1e6
        partials = 2 * config.splits * channels * out_channels * 4 / 1e6 if config.splits > 1 else 0.0
        tile = "x".join(map(str, config.block_shape))
        print(
            f"{batch:5} {channels:5} {out_channels:5} {size:4}  {tile:<10}  {tiles:5} "
            f"{config.splits:6} {waves:5} {config.k_blocks_per_split:10} {efficiency:10.0%} "
            f"{partials:8.1f} of {operands:.1f}"
        )
        assert efficiency >= 0.85
        assert partials <= operands


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wgrad_partition_covers_every_pixel_once(dtype: torch.dtype) -> None:
    for m in (1, 24, 64, 100, 2048):
        for n in (3, 64, 129, 1024):
            for pixels in (1, 49, 1000, 802_816):
                config = wgrad_config(m, n, pixels, dtype)
                k_blocks = -(-pixels // config.block_k)
                assert (config.splits - 1) * config.k_blocks_per_split < k_blocks
                assert k_blocks <= config.splits * config.k_blocks_per_split and config.splits <= 512
                assert (config.tiles_m - 1) * config.block_m < m <= config.tiles_m * config.block_m
                assert (config.tiles_n - 1) * config.block_n < n <= config.tiles_n * config.block_n


def test_more_groups_than_a_grid_can_have_are_not_launched() -> None:
    x, weight = torch.randn(1, 65_536, 1, 1), torch.randn(65_536, 1, 1, 1)
    geometry = [1, 1], [0, 0], [1, 1], 65_536
    with intercept_launches(lambda *launched: pytest.fail(f"launched {launched[:2]}")):
        y = conv_bias_act(x, weight, None, None, *geometry, False)
        z, _ = conv_bn_stats(x, weight, None, None, False, *geometry, True)
    torch.testing.assert_close(y, x * weight.view_as(x))
    torch.testing.assert_close(z, x * weight.view_as(x))


def wgrad_args(
    channels: int, outputs: int, size: int, dtype: torch.dtype, device: str, masked: bool, norm: bool
) -> tuple[Any, ...]:
    """Return the arguments of ``conv_wgrad`` for one image: with a mask or recomputed ReLU, and an input's norm."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def image(count: int) -> torch.Tensor:
        return randn(1, count, size, size).to(dtype).contiguous(memory_format=torch.channels_last)

    z, dy, x, weight = image(outputs), image(outputs), image(channels), randn(outputs, channels, 1, 1).to(dtype)
    mask = torch.full((size * size, -(-outputs // 8)), 0xAA, dtype=torch.uint8, device=device) if masked else None
    stats, x_stats = randn(5, outputs), randn(5, channels) if norm else None
    return dy, z, stats, mask, not masked, stats[:2] * size, size * size, weight, x, x_stats, norm, [1, 1]


def assert_matches_float64(grad: torch.Tensor, arguments: tuple[Any, ...], rounding: float) -> None:
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    expected = conv_wgrad.reference.conv_wgrad(*wide)
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=rounding * expected.abs().max().item())


@pytest.mark.skipif(not is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("size", "splits"), [(48, 72), (6, 1)])
def test_split_k_of_wgrad_matches_float64(size: int, splits: int) -> None:
    """With split-K, the merge adds more partial accumulators than it has rows in a tile."""
    arguments = wgrad_args(16, 24, size, torch.float32, "cpu", True, True)
    assert wgrad_config(24, 16, size * size, torch.float32).splits == splits
    grad = conv_wgrad.conv_wgrad(*arguments)
    assert grad.is_contiguous() and grad.shape == (24, 16, 1, 1)
    assert_matches_float64(grad, arguments, 2e-6)


@needs_compiled_triton
def test_split_k_of_wgrad_stores_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split with fewer pixels than the others, and a merge whose tile has more rows than splits."""
    config = GemmConfig(16, 16, 16, 4, 2, 1, 1, 3, 2)
    monkeypatch.setattr(conv_wgrad, "wgrad_config", lambda *_: config)
    arguments = wgrad_args(16, 16, 9, torch.bfloat16, "cpu", True, False)
    grad = run_interpreted(lambda: conv_wgrad.conv_wgrad(*arguments))
    assert grad.dtype == torch.bfloat16
    assert_matches_float64(grad, arguments, 2**-8)


@needs_compiled_triton
@pytest.mark.parametrize(
    "capability",
    [
        90,
        pytest.param(80, marks=pytest.mark.full),
        pytest.param(
            100,
            marks=[
                pytest.mark.full,
                pytest.mark.xfail(strict=True, reason="128x64 with a mask spills 8 bytes a thread"),
            ],
        ),
        pytest.param(120, marks=pytest.mark.full),
    ],
)
def test_wgrad_tiles_fit_registers_and_shared_memory(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile with every prologue compiles without spills, and an SM of sm_90 holds as many programs as declared."""
    for itemsize, tiles in WGRAD_TILES.items():
        for tile in tiles:
            config = GemmConfig(*tile[:3], 8, tile.num_stages, 2, 2, 4, 4)
            monkeypatch.setattr(conv_wgrad, "wgrad_config", lambda *_, config=config: config)
            dtype = torch.bfloat16 if itemsize == 2 else torch.float32

            def call(dtype: torch.dtype = dtype) -> None:
                for masked in (False, True):
                    for norm in (False, True):
                        conv_wgrad.conv_wgrad(*wgrad_args(256, 256, 16, dtype, "meta", masked, norm))

            reports = [report for report in aot.compile_launches(call, capability) if report.name == "wgrad_kernel"]
            assert len(reports) == 4
            for report in reports:
                assert not report.stack and not report.local_accesses, f"{tile} {report.variant}"
                assert report.shared <= 99 << 10 or capability in (90, 100)
                assert capability != 90 or report.occupancy * 64 / report.warps >= tile.resident, report.registers
