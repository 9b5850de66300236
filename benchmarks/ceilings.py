"""What this machine can do at best, measured: the yardsticks for operators bound by memory or by arithmetic."""

import statistics

import torch

from benchmarks.timing import clock_of
from fused_res import _extension

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


def fma_peak() -> float | None:
    """FLOP/s of float32 multiply-adds in registers, in all of PyTorch's threads; None without our extension."""
    return _extension.fma_peak(torch.get_num_threads()) if _extension.loaded else None


def measure(device: str, quick: bool) -> dict[str, float]:
    ceilings = {"copy_bytes_per_s": copy_bandwidth(copy_size(device, quick), device=device)}
    peak = fma_peak() if device == "cpu" else None
    return ceilings if peak is None else {**ceilings, "fma_flops_per_s": peak}


def best(*measured: dict[str, float]) -> dict[str, float]:
    """A neighbour may have been busy at one moment."""
    return {name: max(one[name] for one in measured) for name in measured[0]}
