"""What this machine can do at best, measured: the yardstick for memory-bound operators."""

import statistics

import torch

from benchmarks.timing import clock_of

COPY_BYTES = 256 << 20  # far beyond any last-level cache
GPU_COPY_BYTES = 1 << 30
QUICK_COPY_BYTES = 1 << 20


def copy_size(device: str, quick: bool) -> int:
    return QUICK_COPY_BYTES if quick else GPU_COPY_BYTES if device == "cuda" else COPY_BYTES


def copy_bandwidth(size: int = COPY_BYTES, repeat: int = 9, device: str = "cpu") -> float:
    """Bytes a second of `destination.copy_(source)`, read plus written, into memory that is already mapped:
    the median."""
    clock = clock_of(device)
    source = torch.ones(size // 4, device=device)
    destination = torch.zeros(size // 4, device=device)
    destination.copy_(source)
    seconds = []
    for _ in range(repeat):
        before = clock.now()
        destination.copy_(source)
        seconds.append(clock.seconds(before, clock.now()))
    return 2 * size / statistics.median(seconds)
