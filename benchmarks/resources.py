"""Registers, shared memory and threads of our kernels on sm_90, from their compilers; no GPU is needed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.events import Event
from benchmarks.gpu_model import Gpu

_REGISTERS, _THREADS, _BLOCKS = 65536, 2048, 32
_SHARED, _RESERVED_SHARED = 228 << 10, 1 << 10


@dataclass(frozen=True)
class Kernel:
    """Resource usage of one compiled kernel.

    Args:
        name: the kernel's name in its source.
        registers: per thread.
        shared: bytes per block, static and dynamic.
        threads: per block.
        instruction: tensor core instruction: ``"wgmma"``, ``"mma.sync"`` or ``""``.
    """

    name: str
    registers: int
    shared: int
    threads: int
    instruction: str = ""

    def resident_blocks(self, gpu: Gpu) -> int:
        """Return the number of blocks that fit on one SM; every GPU here is taken to have Hopper's limits."""
        registers = math.ceil(max(self.registers, 1) / 8) * 8 * 32  # of a warp, allocated in units of 256
        warps = math.ceil(self.threads / 32)
        by_registers = 4 * (_REGISTERS // 4 // registers) // warps
        by_shared = _SHARED // (math.ceil(self.shared / 128) * 128 + _RESERVED_SHARED)
        return max(1, min(_THREADS // (32 * warps), _BLOCKS, by_registers, by_shared))

    def matrix_share(self, gpu: Gpu) -> float:
        """Return the share of the GPU's tensor rate that the kernel's instruction reaches.

        On Hopper, mma.sync reaches 0.62 of wgmma's rate ("Dissecting the NVIDIA Hopper Architecture through
        Microbenchmarking and Multiple Level Analysis", arXiv:2501.12084, and its predecessor arXiv:2402.13499).
        """
        return 0.62 if gpu.hopper and self.instruction == "mma.sync" else 1.0


class Resources:
    """Resource usage by variant of kernel.

    Args:
        known: variants measured before.
    """

    def __init__(self, known: dict[str, dict[str, Any]] | None = None) -> None:
        self.known = {variant: Kernel(**fields) for variant, fields in (known or {}).items()}

    def of(self, event: Event) -> Kernel:
        """Return the resource usage of an event's kernel.

        Raises:
            KeyError: the variant was not measured.
        """
        return self.known[_key(event)]

    def missing(self, events: Iterable[Event]) -> list[Event]:
        """Return one event of each variant that was not measured."""
        return list({_key(e): e for e in events if e.backend != "aten" and _key(e) not in self.known}.values())

    def measure(self, events: Iterable[Event]) -> None:
        """Compile the kernels of all variants that are missing, for sm_90."""
        for event in self.missing(events):
            kind, *handle = event.handle
            self.known[_key(event)] = (
                _measure_triton(event, *handle) if kind == "triton" else _measure_cuda(event, *handle)
            )

    def as_json(self, events: Iterable[Event]) -> dict[str, dict[str, Any]]:
        """Return the resource usage of the kernels of these events, as plain data."""
        used = sorted({_key(event) for event in events if event.backend != "aten"})
        return {variant: asdict(self.known[variant]) for variant in used}


def _key(event: Event) -> str:
    return f"{event.variant} {event.threads} {event.shared}" if event.backend == "cuda" else event.variant


def _measure_triton(event: Event, kernel: Any, grid: Any, arguments: Any, options: Any) -> Kernel:
    from fused_res.backends.triton import aot

    report = aot.analyze_kernel(aot.compile_launch(kernel, grid, arguments, options, 90))
    families = report.tensor_core_instructions
    instruction = "wgmma" if "wgmma" in families else families[0] if families else ""
    return Kernel(report.name, report.registers, report.shared, 32 * report.warps, instruction)


def _measure_cuda(event: Event, mangled: str) -> Kernel:
    """Compile one kernel's PTX (compute capability 8.0) for sm_90."""
    from tools import ptxas_report
    from tools.ptx import nvcc_runner

    name = re.sub(r"<.*", "", ptxas_report.demangle([mangled])[0])
    ptx = nvcc_runner.kernel_ptx(mangled)
    ptxas = shutil.which("ptxas") or str(Path(str(nvcc_runner.NVCC)).with_name("ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        log = subprocess.run(
            [ptxas, "-arch=sm_90", "-v", str(source), "-o", str(Path(folder) / "kernel.cubin")],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    usage = ptxas_report.parse(log)[0]
    instruction = "mma.sync" if "mma.sync" in ptx else ""
    return Kernel(name, usage.registers, event.shared + usage.static_shared_bytes, event.threads, instruction)
