"""Items of the stage `environment`: the machine, its ceilings, and which backends run on it."""

import shutil
import subprocess
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.errors import Unavailable
from benchmarks.gpu.journal import Record
from benchmarks.gpu.settings import Settings


def items(settings: Settings) -> list[str]:
    return ["gpu", "fused_res", "triton", "cuda"]


def run(item: str, settings: Settings) -> Iterator[Record]:
    if item == "gpu":
        yield from _gpu(settings)
    elif item == "fused_res":
        from benchmarks import environment  # imports fused_res, and so opens its compiled extension

        yield {"feature": "fused_res", "reason": ""}
        yield {"environment": environment.describe(settings.device)}
    else:
        yield from _backend(item, settings)


def _gpu(settings: Settings) -> Iterator[Record]:
    if not settings.rehearse and not torch.cuda.is_available():
        raise Unavailable("no NVIDIA GPU is available to this torch")
    capability = torch.cuda.get_device_capability()
    yield {"feature": "gpu", "reason": "", "architecture": ".".join(map(str, capability))}
    if smi := shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        command = [smi, f"--query-gpu={query}", "--format=csv,noheader"]
        yield {"nvidia-smi": subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()}
    size = 1 << 20 if settings.rehearse else 4 << 30
    source = torch.empty(size // 4, device=settings.device).normal_()
    copy = _seconds(lambda: source.clone())
    edge = 64 if settings.rehearse else 8192
    a, b = (torch.randn(edge, edge, device=settings.device).bfloat16() for _ in range(2))
    product = _seconds(lambda: a @ b)
    yield {"copy_bytes_per_s": 2 * size / copy, "bf16_flops_per_s": 2 * edge**3 / product}


def _seconds(call) -> float:  # type: ignore[no-untyped-def]
    """Return the mean duration of ten calls after three."""
    for count in (3, 10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def _backend(name: str, settings: Settings) -> Iterator[Record]:
    """Run one small kernel of the backend: a library that loads may have no code for this GPU."""
    from fused_res import backends
    from fused_res.functional import batch_norm_act

    if (reason := backends.unavailable(name)) is not None:
        raise Unavailable(reason)
    x = torch.randn(4, 32, 3, 3, device=settings.device).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32, device=settings.device), torch.zeros(32, device=settings.device)
    y = batch_norm_act(x, None, None, ones, zeros, training=True, backend=name)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True).relu()
    if not (y.double() - expected).abs().max() < 1e-4:
        raise Unavailable("its batch norm is wrong")
    yield {"feature": name, "reason": ""}
