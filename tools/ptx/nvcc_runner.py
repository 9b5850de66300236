"""Run the CUDA C++ operators on CPU tensors: host code natively, and nvcc's PTX of the kernels in the interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.cuda_sim.simulator import load_simulator
from tools.ptx.machine import run
from tools.ptx.memory import Memory
from tools.ptx.parser import parse

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "csrc" / "cuda"
_CACHE = _ROOT / "build" / "ptx"
#: C type of the simulator's launch observer, ``fused_res::cuda::sim::Observer``.
LAUNCH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_bool,
)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
_parse = functools.lru_cache(maxsize=64)(parse)


@dataclass(frozen=True)
class Launch:
    """A kernel launch."""

    kernel: str  # mangled name
    grid: tuple[int, ...]
    threads: int
    shared: int
    cooperative: bool


@contextlib.contextmanager
def intercept_launches(handle: Callable[[Launch, bytes], None]) -> Iterator[list[Launch]]:
    """Call ``handle`` instead of every kernel that ``torch.ops.fused_res_sim`` launches in the block.

    Args:
        handle: called with the launch and the bytes of the kernel's argument. Its first exception is raised at the end
            of the block; later launches are recorded without calling it.

    Yields:
        The list of launches so far.
    """
    launches: list[Launch] = []
    errors: list[Exception] = []
    observe = load_simulator().library.fused_res_sim_observe

    def observer(name: bytes, grid, threads: int, shared: int, argument: int, size: int, cooperative: bool) -> bool:
        launches.append(launch := Launch(name.decode(), tuple(grid[:3]), threads, shared, cooperative))
        if not errors:
            try:
                handle(launch, ctypes.string_at(argument, size))
            except Exception as error:  # ctypes would only print it
                errors.append(error)
        return True

    callback = LAUNCH_CALLBACK(observer)  # a reference, because the C++ side holds none
    observe(callback)
    try:
        yield launches
    finally:
        observe(None)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def interpret_cuda_launches(
    schedule: int = 0,
    *,
    ctas: Callable[[tuple[int, ...]], Sequence[int]] | None = None,
    edit: Callable[[str], str] = str,
    multiprocessors: int = 2,
) -> Iterator[list[Launch]]:
    """Run every kernel launched in the block in the PTX interpreter.

    Kernels can access only tensors that are allocated in the block.

    Args:
        schedule: see :func:`tools.ptx.machine.run`.
        ctas: function from the grid to the CTAs to run; default all.
        edit: function applied to a kernel's PTX before it runs.
        multiprocessors: number of simulated multiprocessors, which limits the blocks of a cooperative launch.

    Yields:
        The list of launches so far.

    Raises:
        FileNotFoundError: nvcc is not installed.
    """
    if NVCC is None:
        raise FileNotFoundError("nvcc is not installed")
    simulator = load_simulator()

    def interpret(launch: Launch, argument: bytes) -> None:
        text = edit(kernel_ptx(launch.kernel))
        limit = re.search(r"\.maxntid\s+(\d+)", text)
        if limit is not None and launch.threads > int(limit[1]):
            raise ValueError(f"{launch.kernel}: launched with {launch.threads} threads, expected at most {limit[1]}")
        run(
            _parse(text)[launch.kernel],
            launch.grid,
            [argument],
            _map_live_allocations(simulator.library),
            threads=(launch.threads,),
            shared=launch.shared,
            ctas=ctas and ctas(launch.grid),
            cooperative=launch.cooperative,
            schedule=schedule,
        )

    with (
        simulator.guard_allocations(),
        simulator.multiprocessors(multiprocessors),
        intercept_launches(interpret) as launches,
    ):
        yield launches


def _map_live_allocations(library: ctypes.CDLL) -> Memory:
    """Return a memory with every live guarded tensor mapped at its own address."""
    library.fused_res_sim_allocations.restype = ctypes.c_size_t
    count = library.fused_res_sim_allocations(None, None, ctypes.c_size_t(0))
    pointers, sizes = (ctypes.c_void_p * count)(), (ctypes.c_size_t * count)()
    library.fused_res_sim_allocations(pointers, sizes, ctypes.c_size_t(count))
    memory = Memory()
    for pointer, size in zip(pointers, sizes, strict=True):
        memory.map_buffer(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)), address=pointer)
    return memory


def kernel_ptx(kernel: str) -> str:
    """Return the PTX of one kernel, with the directives and variables at the head of its module."""
    return kernels_by_name()[kernel]


@functools.cache
def kernels_by_name() -> dict[str, str]:
    """Return the PTX of every kernel in csrc/cuda by mangled name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(pool.map(_compile_to_ptx, sorted(_SOURCES.glob("*.cu"))))
    found = {}
    for module in modules:
        head, *entries = re.split(r"(?=^\.visible \.entry )", module, flags=re.MULTILINE)
        found |= {one.split(None, 2)[2].partition("(")[0]: head + one for one in entries}
    return found


def _compile_to_ptx(source: Path) -> str:
    """Compile a source to PTX with nvcc, or return the cached PTX if no source or option has changed."""
    options = ["-arch=compute_80", "-std=c++20", "-O3", "-fmad=false", f"-I{_SOURCES.parent}"]
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + " ".join(options).encode() + source.read_bytes())
    for header in sorted([*_SOURCES.glob("*.*h"), *_SOURCES.with_name("common").glob("*.h")]):
        digest.update(header.read_bytes())
    compiled = _CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.ptx"
    if not compiled.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        for old in _CACHE.glob(f"{source.stem}-*.ptx"):
            old.unlink(missing_ok=True)
        unfinished = compiled.with_suffix(f".{os.getpid()}")
        subprocess.run([str(NVCC), "-ptx", *options, source, "-o", unfinished], check=True)
        unfinished.replace(compiled)
    return compiled.read_text()
