"""Measured ceilings of this machine: copy bandwidth for memory-bound operators, peak throughput for the others."""

import statistics

import torch

from benchmarks.timing import clock_of
from fused_res import _extension

COPY_BYTES = 256 << 20  # far larger than any last-level cache
GPU_COPY_BYTES = 1 << 30
QUICK_COPY_BYTES = 1 << 20
#: Instruction sets of the C++ kernels with products of bfloat16.
BF16_ISAS = ("avx512_bf16", "amx", "amx_emulated")


def copy_size(device: str, quick: bool) -> int:
    return QUICK_COPY_BYTES if quick else GPU_COPY_BYTES if device == "cuda" else COPY_BYTES


def copy_bandwidth(size: int = COPY_BYTES, repeat: int = 9, device: str = "cpu") -> float:
    """Return the median bandwidth of `destination.copy_(source)` into mapped memory, in bytes/s, read plus write."""
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
    """Return the FLOP/s of float32 FMAs on registers in all of PyTorch's threads; None without the C++ extension."""
    return _extension.fma_peak(torch.get_num_threads()) if _extension.loaded else None


def bf16_unavailable() -> str | None:
    """Return why the C++ kernels have no products of bfloat16 here, or None if they have."""
    if not _extension.loaded:
        return "the C++ extension is not loaded"
    isa = _extension.cpu_isa()
    return None if isa in BF16_ISAS else f"products of bfloat16 require amx or avx512_bf16, this machine runs {isa}"


def bf16_peak() -> float | None:
    """Return the FLOP/s of bfloat16 products on registers in all threads; None without avx512_bf16 or amx."""
    return float(_extension.cpp.bf16_peak(torch.get_num_threads())) if bf16_unavailable() is None else None


def measure(device: str, quick: bool) -> dict[str, float]:
    ceilings = {"copy_bytes_per_s": copy_bandwidth(copy_size(device, quick), device=device)}
    peaks = {"fma_flops_per_s": fma_peak(), "bf16_flops_per_s": bf16_peak()} if device == "cpu" else {}
    return ceilings | {name: peak for name, peak in peaks.items() if peak is not None}


def elementwise_max(*measured: dict[str, float]) -> dict[str, float]:
    """Return the maximum of each ceiling: a noisy neighbor may have lowered one of the measurements."""
    return {name: max(one[name] for one in measured) for name in measured[0]}
