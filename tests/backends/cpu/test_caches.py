"""Cache sizes: detection, ``FUSED_RES_CPU_CACHES``, and the decisions that depend on them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_res import _extension, env

if not _extension.loaded:
    pytest.skip(_extension.unavailable_reason, allow_module_level=True)

ZEN4, XEON = (32 << 10, 1 << 20, 32 << 20), (48 << 10, 2 << 20, 300 << 20)


@pytest.fixture
def set_caches() -> Iterator[object]:
    """Function that sets the cache sizes; the sizes in force before are restored."""
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


def test_detected_sizes_are_those_of_linux(set_caches) -> None:
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


def test_set_sizes_must_be_positive(set_caches) -> None:
    with pytest.raises(ValueError, match="sizes: expected positive integers, got 0"):
        set_caches((32 << 10, 0, 32 << 20))
    set_caches(XEON)
    assert _extension.cpu_caches() == XEON
    assert _extension.cpu_cache_sources() == ("FUSED_RES_CPU_CACHES",) * 3
