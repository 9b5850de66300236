"""Memory for packed weights that many calls read (csrc/cpu/weight_memory.cpp)."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_res import _extension

if not _extension.loaded:
    pytest.skip("the compiled extension is not loaded", allow_module_level=True)
from fused_res.backends.cpu import operators

if _extension._module.cpu_isa() == "baseline":
    pytest.skip("the baseline has no kernels that pack a weight", allow_module_level=True)

LINE = 64  # bytes


def pack(weight: Tensor, winograd: int = 0, resident: bool = True) -> Tensor:
    return operators.pack_conv_weight(weight, winograd, False, False, resident)


def test_weights_of_any_size_do_not_overlap() -> None:
    # From a few bytes to a slab of its own, packed by several threads at once.
    shapes = [(1, 1, 1, 1), (33, 5, 3, 3), (64, 64, 1, 1), (200, 300, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3)] * 6
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    variants = [int(weight.shape[2] == 3) for weight in weights]
    with ThreadPoolExecutor(4) as threads:
        packed = list(threads.map(pack, weights, variants))
    for weight, winograd, resident in zip(weights, variants, packed, strict=True):
        assert resident.data_ptr() % LINE == 0
        assert torch.equal(resident, pack(weight, winograd, resident=False))


def test_a_weight_outlives_its_neighbors() -> None:
    weight = torch.randn(64, 64, 3, 3)
    neighbors = [pack(torch.randn(64, 64, 3, 3)) for _ in range(3)]
    packed = pack(weight)
    del neighbors
    gc.collect()
    later = [pack(torch.randn(64, 64, 3, 3)) for _ in range(300)]  # 44 MB: more than one slab
    assert torch.equal(packed, pack(weight, resident=False))
    del later


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_memory_of_replaced_weights_is_returned() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    weight = torch.randn(128, 128, 3, 3)
    kept = pack(torch.randn(64, 64, 1, 1))  # in a slab that others leave
    packed = [pack(weight) for _ in range(20)]
    before = resident_bytes()
    for _ in range(40):  # 470 MB in all
        packed = [pack(weight) for _ in range(20)]
    assert resident_bytes() - before < 96 << 20
    assert torch.equal(packed[-1], pack(weight, resident=False)) and kept.numel()
