"""Ahead-of-time compilation of kernel launches, without a GPU, and reports on the compiled machine code."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from fused_res.backends.triton.launch import Grid, intercept_launches

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Argument(NamedTuple):
    """A kernel argument after specialization: its Triton type, and whether its value is divisible by 16."""

    name: str
    type: str
    divisible: bool


class _SmLimits(NamedTuple):
    """Resident warps, thread blocks and bytes of shared memory of a multiprocessor."""

    warps: int
    blocks: int
    shared: int


#: Registers of a multiprocessor; bytes of shared memory that the driver reserves in each thread block.
_REGISTERS, _RESERVED_SHARED = 65536, 1024
_SM_LIMITS = {
    80: _SmLimits(64, 32, 164 << 10),
    90: _SmLimits(64, 32, 228 << 10),
    100: _SmLimits(64, 32, 228 << 10),
    120: _SmLimits(48, 24, 100 << 10),
}


@dataclass(frozen=True)
class KernelReport:
    """Resource usage and PTX of one kernel, compiled for one architecture."""

    name: str
    constants: Mapping[str, Any]  # constexprs, and arguments that are specialized to a constant (1, None)
    arguments: tuple[Argument, ...]  # arguments that the launch passes, in order
    capability: int
    warps: int
    stages: int
    registers: int
    stack: int  # bytes per thread
    local_accesses: int  # LDL and STL instructions in the SASS: register spills and dynamically indexed arrays
    shared: int  # bytes per block, static and dynamic
    ptx: str

    @property
    def variant(self) -> str:
        """Short description of the specialization, unique among the compilations of a kernel.

        Constants that are False are omitted, and those that are None are printed with a minus sign.
        """
        words = [
            name if value is True else f"-{name}" if value is None else f"{name}={value}"
            for name, value in self.constants.items()
            if value is not False
        ]
        pointers = dict.fromkeys(argument.type[1:] for argument in self.arguments if argument.type[0] == "*")
        numbers = [argument for argument in self.arguments if argument.type[0] != "*"]
        hints = {
            "unaligned": [name for name, type_, divisible in self.arguments if type_[0] == "*" and not divisible],
            "i64": [name for name, type_, _ in numbers if type_ == "i64"],
            "16": [name for name, _, divisible in numbers if divisible],
        }
        hint_words = [f"{hint}:{','.join(names)}" for hint, names in hints.items() if names]
        return " ".join([*words, ",".join(pointers), *hint_words])

    @property
    def occupancy(self) -> float:
        """Warps resident on a multiprocessor as a fraction of its maximum."""
        limits = _SM_LIMITS[self.capability]
        # Each of the four schedulers allocates a quarter of the registers, in units of 256 per warp.
        by_registers = 4 * (_REGISTERS // 4 // (-(-max(self.registers, 1) // 8) * 256)) // self.warps
        by_shared = limits.shared // (-(-self.shared // 128) * 128 + _RESERVED_SHARED)
        return min(limits.warps // self.warps, limits.blocks, by_registers, by_shared) * self.warps / limits.warps

    @property
    def tensor_core_instructions(self) -> tuple[str, ...]:
        """Families of tensor core instructions in the PTX: ``mma.sync``, ``wgmma``, ``tcgen05``."""
        families = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
        return tuple(name for name, pattern in families.items() if re.search(pattern, self.ptx))

    @property
    def global_accesses(self) -> Mapping[tuple[str, int], int]:
        """Number of global memory accesses in the PTX, by instruction (ld, st, cp.async, tma) and bytes per thread.

        A bulk copy has no size per thread and counts as 16 bytes.
        """
        found: Counter[tuple[str, int]] = Counter()
        pattern = r"\b(ld|st)\.(?:relaxed\.|volatile\.)?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s"
        for kind, vector, bits in re.findall(pattern, self.ptx):
            found[kind, int(vector or 1) * int(bits) // 8] += 1
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(\w+)", self.ptx):
            found["cp.async", int(size, 0)] += 1
        if bulk := len(re.findall(r"\bcp\.(?:reduce\.)?async\.bulk\.tensor", self.ptx)):
            found["tma", 16] += bulk
        return found


class _AotDriver:
    """The part of a Triton driver that compilation uses; its device index is the compute capability.

    Triton caches kernels by device index, so every capability has a separate cache, distinct from those of GPUs.
    """

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextlib.contextmanager
def _use_driver_for(capability: int) -> Iterator[None]:
    driver = triton.runtime.driver
    previous = driver._active  # `driver.active` raises where there is no GPU
    driver.set_active(_AotDriver(capability))
    try:
        yield
    finally:
        driver.set_active(previous)


def compile_launch(
    kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any], capability: int
) -> Any:
    """Compile one intercepted launch for ``capability``, with the specialization that the launch would have.

    Returns:
        Triton's ``CompiledKernel``.

    Raises:
        RuntimeError: the kernel was defined under Triton's interpreter.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "ahead-of-time compilation requires that TRITON_INTERPRET is unset before the kernels are imported"
        )
    with _use_driver_for(capability):
        return kernel.warmup(*arguments, grid=grid, **options)


def compile_launches(call: Callable[[], None], capability: int) -> list[KernelReport]:
    """Compile every distinct launch that ``call`` makes.

    Args:
        call: function that launches kernels, on tensors of any device, the meta device included.
        capability: compute capability: 80, 90, 100 or 120.

    Returns:
        A report on each compiled kernel, without duplicates.

    Raises:
        ValueError: an unsupported ``capability``.
    """
    if capability not in _SM_LIMITS:
        raise ValueError(f"capability must be one of {', '.join(map(str, _SM_LIMITS))}, got {capability}")
    kernels: list[Any] = []

    def interceptor(kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernels.append(compile_launch(kernel, grid, arguments, options, capability))

    with ThreadPoolExecutor(2) as pool:
        with triton.AsyncCompileMode(pool), intercept_launches(interceptor):
            call()
        # The mode returns kernels that were compiled before, and futures, which hide their kernel before Triton 3.7.
        compiled = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]
        return list(pool.map(analyze_kernel, {kernel.hash: kernel for kernel in compiled}.values()))


def analyze_kernel(kernel: Any) -> KernelReport:
    """Return the report on a ``CompiledKernel``, from its metadata, PTX and disassembled cubin."""
    source, metadata = kernel.src, kernel.metadata
    names: list[str] = source.fn.arg_names
    divisible = {path[0] for path, hints in source.attrs.items() if ["tt.divisibility", 16] in hints}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = dict(
            re.findall(r"(\w+):(\d+)", _run_tool("cuobjdump", "-res-usage", cubin.name).partition("Function ")[2])
        )
        sass = _run_tool("nvdisasm", cubin.name) if int(usage["STACK"]) else ""
    # From sm_90 on, the reported static shared memory includes the bytes that the driver reserves.
    static = int(usage["SHARED"]) - (_RESERVED_SHARED if metadata.target.arch >= 90 else 0)
    return KernelReport(
        name=metadata.name,
        constants={names[path[0]]: value for path, value in source.constants.items()},
        arguments=tuple(
            Argument(name, type_, position in divisible)
            for position, (name, type_) in enumerate(source.signature.items())
            if type_ != "constexpr"
        ),
        capability=metadata.target.arch,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=metadata.shared + max(static, 0),
        ptx=kernel.asm["ptx"],
    )


def _run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def table(reports: Sequence[KernelReport]) -> str:
    """Return a human-readable table with one line for each report."""
    head = ("kernel", "variant", "sm", "warps", "registers", "shared KiB", "stack", "local accesses", "occupancy")
    rows = [(*head, "MMA", "16-byte accesses / all"), *map(_row, reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(report: KernelReport) -> tuple[str, ...]:
    accesses = report.global_accesses
    wide_shares = [
        f"{kind} {sum(n for (k, size), n in accesses.items() if k == kind and size >= 16)}"
        f"/{sum(n for (k, _), n in accesses.items() if k == kind)}"
        for kind in dict.fromkeys(kind for kind, _ in accesses)
    ]
    numbers = (
        report.capability,
        report.warps,
        report.registers,
        f"{report.shared / 1024:.1f}",
        report.stack,
        report.local_accesses,
    )
    occupancy, matrix = f"{report.occupancy:.0%}", ", ".join(report.tensor_core_instructions) or "-"
    return report.name, report.variant, *map(str, numbers), occupancy, matrix, ", ".join(wide_shares)
