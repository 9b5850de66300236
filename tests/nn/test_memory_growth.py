"""Memory does not grow over 1250 training steps and 1000 frozen calls with varying shapes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_res
from fused_res import _extension, models

MB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def resident_bytes() -> int:
    """Return the resident set size of this process in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cached_bytes() -> int:
    """Return the bytes in the cache of freed outputs."""
    if not _extension.loaded:
        return 0
    from fused_res.backends.cpu import output_cache_bytes

    return output_cache_bytes()


def test_no_memory_growth_over_1250_training_steps() -> None:
    torch.manual_seed(0)
    model = fused_res.fuse(models.cifar_resnet(8, width=4).train().to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    sizes = []
    for step in range(1250):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step % 250 == 249:
            sizes.append((resident_bytes(), cached_bytes(), len(gc.get_objects())))
    # The allocator still grows in the first steps.
    for (bytes, cached, objects), (later, later_cached, later_objects) in itertools.pairwise(sizes[1:]):
        assert later - bytes < MB and cached == later_cached and later_objects - objects < 100, sizes


def test_no_memory_growth_over_1000_calls_with_varying_shapes() -> None:
    """The caches of inference graphs, plans and packed weights, keyed by shape, are bounded."""
    torch.manual_seed(0)
    frozen = fused_res.freeze(models.cifar_resnet(8, width=4))
    sizes = []
    with torch.inference_mode():
        for call in range(1000):
            frozen(torch.randn(1 + call % 3, 3, 8 + call % 37, 8 + call % 41))
            if call % 250 == 249:
                sizes.append((resident_bytes(), cached_bytes(), len(gc.get_objects())))
    for (bytes, cached, _), (later, later_cached, _) in itertools.pairwise(sizes[1:]):
        assert later - bytes < 8 * MB and later_cached <= max(cached, 256 * MB), sizes
