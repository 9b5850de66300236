"""Runs the CUDA C++ operators on CPU tensors: their real host code, and the PTX that nvcc makes of their kernels."""

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

from tools.cuda_sim.simulator import run_time
from tools.ptx.machine import run
from tools.ptx.memory import Memory
from tools.ptx.parser import parse

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "csrc" / "cuda"
_CACHE = _ROOT / "build" / "ptx"
_OBSERVER = ctypes.CFUNCTYPE(
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
    kernel: str  # mangled
    grid: tuple[int, ...]
    threads: int
    shared: int
    cooperative: bool


@contextlib.contextmanager
def observed(handle: Callable[[Launch, bytes], None]) -> Iterator[list[Launch]]:
    """Inside, ``handle`` is what becomes of every kernel that ``torch.ops.fused_res_sim`` launches.

    It gets the launch and the kernel's argument. What it raises is raised at the end: until then there are no more
    calls. What comes out is the list of launches, as it grows.
    """
    launches: list[Launch] = []
    errors: list[Exception] = []
    observe = run_time().library.fused_res_sim_observe

    def observer(name: bytes, grid, threads: int, shared: int, argument: int, size: int, cooperative: bool) -> bool:
        launches.append(launch := Launch(name.decode(), tuple(grid[:3]), threads, shared, cooperative))
        if not errors:
            try:
                handle(launch, ctypes.string_at(argument, size))
            except Exception as error:  # of which ctypes would only print
                errors.append(error)
        return True

    callback = _OBSERVER(observer)  # which ctypes does not keep alive
    observe(callback)
    try:
        yield launches
    finally:
        observe(None)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def interpreted_nvcc(
    schedule: int = 0,
    *,
    ctas: Callable[[tuple[int, ...]], Sequence[int]] | None = None,
    edit: Callable[[str], str] = str,
    multiprocessors: int = 2,
) -> Iterator[list[Launch]]:
    """:func:`observed` with the interpreter.

    A kernel may touch only tensors that were made inside. ``schedule`` is that of :func:`ptx.machine.run`, ``ctas``
    gets the grid and says which to run, ``edit`` changes a kernel's PTX before it runs, and ``multiprocessors`` limits
    the blocks of a cooperative launch.
    """
    if NVCC is None:
        raise FileNotFoundError("there is no nvcc here")
    simulator = run_time()

    def interpret(launch: Launch, argument: bytes) -> None:
        text = edit(entry(launch.kernel))
        most = re.search(r"\.maxntid\s+(\d+)", text)
        if most is not None and launch.threads > int(most[1]):
            raise ValueError(f"{launch.kernel} is launched with {launch.threads} threads, and takes {most[1]} at most")
        run(
            _parse(text)[launch.kernel],
            launch.grid,
            [argument],
            _live_memory(simulator.library),
            threads=(launch.threads,),
            shared=launch.shared,
            ctas=ctas and ctas(launch.grid),
            cooperative=launch.cooperative,
            schedule=schedule,
        )

    with simulator.guarded(), simulator.multiprocessors(multiprocessors), observed(interpret) as launches:
        yield launches


def _live_memory(library: ctypes.CDLL) -> Memory:
    """Every guarded tensor that lives, at its own address."""
    library.fused_res_sim_blocks.restype = ctypes.c_size_t
    count = library.fused_res_sim_blocks(None, None, ctypes.c_size_t(0))
    pointers, sizes = (ctypes.c_void_p * count)(), (ctypes.c_size_t * count)()
    library.fused_res_sim_blocks(pointers, sizes, ctypes.c_size_t(count))
    memory = Memory()
    for pointer, size in zip(pointers, sizes, strict=True):
        memory.place(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)), at=pointer)
    return memory


def entry(kernel: str) -> str:
    """The PTX of one kernel, with what stands before all kernels of its module."""
    return _entries()[kernel]


@functools.cache
def _entries() -> dict[str, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(pool.map(_ptx, sorted(_SOURCES.glob("*.cu"))))
    found = {}
    for module in modules:
        head, *entries = re.split(r"(?=^\.visible \.entry )", module, flags=re.MULTILINE)
        found |= {one.split(None, 2)[2].partition("(")[0]: head + one for one in entries}
    return found


def _ptx(source: Path) -> str:
    """What nvcc makes of a source, from the last time if nothing has changed."""
    options = ["-arch=compute_80", "-std=c++20", "-O3", "-fmad=false", f"-I{_SOURCES.parent}"]
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + " ".join(options).encode() + source.read_bytes())
    for header in sorted([*_SOURCES.glob("*.*h"), *_SOURCES.with_name("common").glob("*.h")]):
        digest.update(header.read_bytes())
    made = _CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.ptx"
    if not made.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        for old in _CACHE.glob(f"{source.stem}-*.ptx"):
            old.unlink(missing_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        subprocess.run([str(NVCC), "-ptx", *options, source, "-o", unfinished], check=True)
        unfinished.replace(made)
    return made.read_text()
