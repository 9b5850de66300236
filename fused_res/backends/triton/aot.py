"""Ahead-of-time compilation of launches, with no GPU: what a launch would run, and what ptxas made of it."""

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

from fused_res.backends.triton.launch import Grid, observed

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Argument(NamedTuple):
    """A kernel argument as compiled: ``type`` is Triton's name for it, ``divisible`` whether by 16."""

    name: str
    type: str
    divisible: bool


class _Multiprocessor(NamedTuple):
    warps: int
    blocks: int
    shared: int


_REGISTERS, _RESERVED_SHARED = 65536, 1024  # a multiprocessor's registers; shared memory the driver takes from a block
_MULTIPROCESSORS = {
    80: _Multiprocessor(64, 32, 164 << 10),
    90: _Multiprocessor(64, 32, 228 << 10),
    100: _Multiprocessor(64, 32, 228 << 10),
    120: _Multiprocessor(48, 24, 100 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture."""

    name: str
    constants: Mapping[str, Any]  # constexprs, and arguments specialised to a constant (1, None)
    arguments: tuple[Argument, ...]  # what remains for the launch to pass, in order
    capability: int
    warps: int
    stages: int
    registers: int
    stack: int  # bytes a thread
    spills: int  # local loads and stores in the machine code; they also serve arrays that are indexed at run time
    shared: int  # bytes a block, static and dynamic
    ptx: str

    @property
    def variant(self) -> str:
        """What tells this compilation from others of the same kernel, in short: constants that are false are left out,
        those that are None have a minus sign."""
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
        told = [f"{hint}:{','.join(names)}" for hint, names in hints.items() if names]
        return " ".join([*words, ",".join(pointers), *told])

    @property
    def occupancy(self) -> float:
        """Warps resident on a multiprocessor, over as many as it can hold."""
        most = _MULTIPROCESSORS[self.capability]
        # Each of the four schedulers hands out a quarter of the registers, in units of 256 a warp.
        by_registers = 4 * (_REGISTERS // 4 // (-(-max(self.registers, 1) // 8) * 256)) // self.warps
        by_shared = most.shared // (-(-self.shared // 128) * 128 + _RESERVED_SHARED)
        return min(most.warps // self.warps, most.blocks, by_registers, by_shared) * self.warps / most.warps

    @property
    def matrix_instructions(self) -> tuple[str, ...]:
        """Families of matrix instructions in use, of ``mma.sync``, ``wgmma`` and ``tcgen05``."""
        families = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
        return tuple(name for name, pattern in families.items() if re.search(pattern, self.ptx))

    @property
    def accesses(self) -> Mapping[tuple[str, int], int]:
        """How often the code accesses global memory, by instruction (ld, st, cp.async, tma) and bytes a thread.

        A bulk copy has no size a thread: it counts as 16 bytes.
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


class _Target:
    """As much of a Triton driver as compiling takes; its device index is the compute capability.

    Triton caches kernels by device index, so that every capability gets a cache of its own, apart from real devices'.
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
def _target(capability: int) -> Iterator[None]:
    driver = triton.runtime.driver
    previous = driver._active  # `driver.active` raises where there is no GPU
    driver.set_active(_Target(capability))
    try:
        yield
    finally:
        driver.set_active(previous)


def compile_launch(
    kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any], capability: int
) -> Any:
    """Triton's own ``CompiledKernel`` of one observed launch, specialised just as the launch would have been."""
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET unset before the kernels are imported")
    with _target(capability):
        return kernel.warmup(*arguments, grid=grid, **options)


def compile_launches(call: Callable[[], None], capability: int) -> list[Compiled]:
    """Compiles every launch made by ``call``, which may pass tensors on the meta device; equal ones once."""
    if capability not in _MULTIPROCESSORS:
        raise ValueError(f"capability has to be one of {', '.join(map(str, _MULTIPROCESSORS))}, not {capability}")
    kernels: list[Any] = []

    def observer(kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernels.append(compile_launch(kernel, grid, arguments, options, capability))

    with ThreadPoolExecutor(2) as pool:
        with triton.AsyncCompileMode(pool), observed(observer):
            call()
        return list(pool.map(describe, {kernel.hash: kernel for kernel in kernels}.values()))


def describe(kernel: Any) -> Compiled:
    """Reads what there is to know from a ``CompiledKernel``."""
    source, metadata = kernel.src, kernel.metadata
    names: list[str] = source.fn.arg_names
    divisible = {path[0] for path, hints in source.attrs.items() if ["tt.divisibility", 16] in hints}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = dict(re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", cubin.name).partition("Function ")[2]))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", _tool("nvdisasm", cubin.name))) if int(usage["STACK"]) else 0
    # From sm_90 on, static shared memory is reported with what the driver reserves.
    static = int(usage["SHARED"]) - (_RESERVED_SHARED if metadata.target.arch >= 90 else 0)
    return Compiled(
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
        spills=spills,
        shared=metadata.shared + max(static, 0),
        ptx=kernel.asm["ptx"],
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def table(compiled: Sequence[Compiled]) -> str:
    """One line a compilation, for people to read."""
    head = ("kernel", "variant", "sm", "warps", "registers", "shared KiB", "stack", "spills", "occupancy", "matrix")
    rows = [(*head, "16 bytes"), *map(_row, compiled)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(one: Compiled) -> tuple[str, ...]:
    accesses = one.accesses
    wide = [
        f"{kind} {sum(n for (k, size), n in accesses.items() if k == kind and size >= 16)}"
        f"/{sum(n for (k, _), n in accesses.items() if k == kind)}"
        for kind in dict.fromkeys(kind for kind, _ in accesses)
    ]
    numbers = one.capability, one.warps, one.registers, f"{one.shared / 1024:.1f}", one.stack, one.spills
    occupancy, matrix = f"{one.occupancy:.0%}", ", ".join(one.matrix_instructions) or "-"
    return one.name, one.variant, *map(str, numbers), occupancy, matrix, ", ".join(wide)
