"""Cache sizes: detection, ``FUSED_RES_CPU_CACHES``, and the decisions that depend on them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_res import _extension, env
from fused_res.backends import cpu

if not _extension.loaded:
    pytest.skip(_extension.unavailable_reason, allow_module_level=True)

ZEN4, XEON = (32 << 10, 1 << 20, 32 << 20), (48 << 10, 2 << 20, 300 << 20)


@pytest.fixture
def set_caches() -> Iterator[Callable[..., None]]:
    """Function that sets the cache sizes; the sizes in force before are restored."""
    cpu.load()  # registers the operators
    sizes, sources = _extension.cpp.cpu_caches()
    yield _extension.cpp.set_cpu_caches
    _extension.cpp.set_cpu_caches(tuple(sizes) if "set" in sources else None)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("48K,2M,300M", XEON),
        (" 32768 , 1m,\t1G ", (32768, 1 << 20, 1 << 30)),
        ("1", (1,)),
        ("", ()),
        ("48K,,300M", ()),
        ("48K,2M,0", ()),
        ("48K,-2M,300M", ()),
        ("48KB,2M,300M", ()),
        ("4.5M,2M,300M", ()),
        ("²,2M,300M", ()),
        ("9999999999,2M,300M", ()),
    ],
)
def test_sizes_are_parsed(text: str, sizes: tuple[int, ...]) -> None:
    assert env.parse_sizes(text) == sizes


@pytest.mark.parametrize("value", ["48K,2M", "48K,2M,300M,1G", "48K 2M 300M", "auto,2M,300M"])
def test_invalid_sizes_are_named(value: str) -> None:
    with pytest.raises(ValueError, match=f"FUSED_RES_CPU_CACHES='{value.lower()}' .* auto, or 3 sizes such as 48K"):
        env.CPU_CACHES.read({"FUSED_RES_CPU_CACHES": value})


def test_variable_sets_the_sizes_and_info_prints_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fused_res", "info"],
        env=os.environ | {"FUSED_RES_CPU_CACHES": "48k,2M,307200K"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.split()[0:1] == ["caches"])
    source = "(FUSED_RES_CPU_CACHES)"
    assert line.split(None, 1)[1] == f"L1 data 48 KiB {source}, L2 2 MiB {source}, L3 300 MiB {source}"


def test_detected_sizes_are_those_of_linux(set_caches: Callable[..., None]) -> None:
    """cpuid and Linux's sysfs, which derives its sizes from it, agree."""
    set_caches(None)
    levels = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = (index.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            levels[int(level)] = int(size[:-1]) << 10
    assert len(_extension.cpu_caches()) == len(_extension.cpu_cache_sources()) == 3
    for level, (size, source) in enumerate(
        zip(_extension.cpu_caches(), _extension.cpu_cache_sources(), strict=True), 1
    ):
        assert source in ("cpuid", "sysconf", "default")
        if source == "cpuid" and level in levels:
            assert size == levels[level]
        if source == "default":
            assert size == ZEN4[level - 1]


def test_set_sizes_must_be_positive(set_caches: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="sizes: expected positive integers, got 0"):
        set_caches((32 << 10, 0, 32 << 20))
    set_caches(XEON)
    assert _extension.cpu_caches() == XEON
    assert _extension.cpu_cache_sources() == ("FUSED_RES_CPU_CACHES",) * 3


#: Caches that keep next to nothing, and any tensor.
TINY, HUGE = (1 << 10, 4 << 10, 16 << 10), (1 << 20, 64 << 20, 1 << 40)


@pytest.mark.parametrize(
    ("caches", "norm", "largest_cached"),
    [
        # The thresholds that were measured on Zen 4: 8 MB, and 1 MB for norms.
        (ZEN4, False, 8 << 20),
        (ZEN4, True, (1 << 20) - 1),
        # ResNet-50 at batch 16 has outputs of 51 MB.
        (XEON, False, 75 << 20),
        (XEON, True, 75 << 20),
    ],
)
def test_outputs_that_the_l3_keeps_are_not_streamed(
    set_caches: Callable[..., None], caches: tuple[int, ...], norm: bool, largest_cached: int
) -> None:
    set_caches(caches)
    assert not _extension.cpp.streams_output(largest_cached, norm)
    assert _extension.cpp.streams_output(largest_cached + 1, norm)


def assert_independent_of_caches(set_caches: Callable[..., None], results: Callable[[], Sequence[Tensor]]) -> None:
    set_caches(ZEN4)
    expected = results()
    for sizes in (TINY, XEON, HUGE):
        set_caches(sizes)
        for one, other in zip(expected, results(), strict=True):
            assert one.numel() and torch.equal(one, other)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_bits_do_not_depend_on_the_caches(
    set_caches: Callable[..., None], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """The caches decide groups of channels and streaming stores, not the order of summation."""
    torch.manual_seed(0)
    x, residual, grad = (
        torch.randn(2, 32, 144, 144).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    weight, bias = torch.randn(2, 32)
    ops = torch.ops.fused_res_cpu

    def results() -> Sequence[Tensor]:
        forward = ops.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, "relu", save_mask=True
        )
        return *forward, *ops.batch_norm_act_backward(grad, x, weight, *forward[1:], True, "relu", [True] * 4)

    assert_independent_of_caches(set_caches, results)


@pytest.mark.skipif(not _extension.loaded or _extension.cpu_isa() == "baseline", reason="baseline: no convolutions")
@pytest.mark.parametrize("tile", [0, 2, 4])
def test_convolution_bits_do_not_depend_on_the_caches(set_caches: Callable[..., None], tile: int) -> None:
    """Neither the output, streamed or not, nor the partial statistics, nor the weight gradient."""
    torch.manual_seed(0)
    x, dz = (torch.randn(2, c, 64, 64).contiguous(memory_format=torch.channels_last) for c in (48, 64))
    weight = torch.randn(64, 48, 3, 3)
    ops, pair = torch.ops.fused_res_cpu, [1, 1]

    def results() -> Sequence[Tensor]:
        packed = ops.pack_conv_weight(weight, int(tile > 0), False)
        output = ops.convolve(x, packed, None, None, 64, [3, 3], pair, pair, pair, tile, True, True)
        no_norms = None, None, None, False, None, 0, weight, x, None, False, None, None
        return packed, *output, *ops.conv_backward(dz, *no_norms, pair, pair, pair, (True, True), tile)[::2]

    assert_independent_of_caches(set_caches, results)
