"""What this machine can do at best, measured: the yardstick for memory-bound operators."""

import statistics
import time

import torch

COPY_BYTES = 256 << 20  # far beyond any last-level cache
QUICK_COPY_BYTES = 1 << 20


def copy_bandwidth(size: int = COPY_BYTES, repeat: int = 9) -> float:
    """Bytes a second of `destination.copy_(source)`, read plus written, into memory that is already mapped:
    the median."""
    source = torch.ones(size // 4)
    destination = torch.zeros(size // 4)
    destination.copy_(source)
    seconds = []
    for _ in range(repeat):
        before = time.perf_counter()
        destination.copy_(source)
        seconds.append(time.perf_counter() - before)
    return 2 * size / statistics.median(seconds)
