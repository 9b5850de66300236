"""Python interface of the CUDA simulator: build it, load it, and control its runtime."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build" / "sim"


@functools.cache
def build(target: str = "fused_res_sim") -> Path | str:
    """Build a target of cmake/simulator.cmake and return its path.

    Returns:
        The library or program, or the reason why it cannot be built here: CMake or the CUDA headers are missing.

    Raises:
        RuntimeError: a source does not compile.
    """
    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "lock", "w") as lock:  # only one pytest session builds at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (reason := _configure()) is not None:
            return reason
        built = _cmake("--build", str(_BUILD), "--target", target, "-j", str(os.cpu_count()))
        if built.returncode:
            raise RuntimeError(f"{target} does not build:\n{built.stdout[-8000:]}")
    library = _BUILD / f"lib{target}.so"
    return library if library.exists() else _BUILD / target


def _configure() -> str | None:
    """Configure the build folder with CMake; return a message if that fails.

    A folder that is already configured for this Python environment is left to Ninja, which reruns CMake if necessary.
    """
    cache = _BUILD / "CMakeCache.txt"
    variables = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE)) if cache.exists() else {}
    same_python = Path(variables.get("Python_EXECUTABLE", "")).parent == Path(sys.executable).parent
    if same_python and variables.get("FUSED_RES_SIMULATOR") == "ON" and (_BUILD / "build.ninja").exists():
        return None
    # One translation unit for all host sources: most of their compile time is torch's headers.
    unity = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")
    settings = ("-DFUSED_RES_SIMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}", *unity)
    try:
        done = _cmake("-G", "Ninja", "-S", str(_ROOT), "-B", str(_BUILD), *settings)
    except FileNotFoundError:
        return "the simulator needs CMake, which is not installed"
    return f"CMake cannot configure the simulator: {done.stdout[-2000:]}" if done.returncode else None


def _cmake(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run CMake, preferring CMake and Ninja of this Python environment, activated or not, to those on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("cmake")
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        [cmake, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class SimulatorLibrary:
    """A loaded library with the simulator's runtime: ``fused_res_sim`` or ``fused_res_sim_unit_kernels``."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fused_res_sim_bank_conflicts.restype = ctypes.c_size_t

    @contextlib.contextmanager
    def schedule(self, number: int) -> Iterator[None]:
        """Set the order in which threads and blocks run.

        Args:
            number: 0 first in, first out, blocks ascending; 1 last in, first out, blocks descending; otherwise the seed
                of a pseudo-random order.
        """
        previous = self.library.fused_res_sim_schedule(number)
        try:
            yield
        finally:
            self.library.fused_res_sim_schedule(previous)

    @contextlib.contextmanager
    def multiprocessors(self, count: int) -> Iterator[None]:
        """Set the number of simulated multiprocessors, which limits the blocks of a cooperative launch."""
        previous = self.library.fused_res_sim_multiprocessors(count)
        try:
            yield
        finally:
            self.library.fused_res_sim_multiprocessors(previous)

    @contextlib.contextmanager
    def skip_kernels(self) -> Iterator[None]:
        """Return from every launch without running its kernel, which leaves its outputs uninitialized."""
        self.library.fused_res_sim_skip_kernels(True)
        try:
            yield
        finally:
            self.library.fused_res_sim_skip_kernels(False)

    def bank_conflicts(self) -> int:
        """Return the number of shared-memory bank conflicts of ``ldmatrix`` since the last call."""
        return int(self.library.fused_res_sim_bank_conflicts())

    @contextlib.contextmanager
    def guard_allocations(self) -> Iterator[None]:
        """Within the ``with`` statement, allocate CPU tensors with guard pages and NaN contents.

        Alternately, a tensor ends directly before a guard page or begins directly after one.
        """
        self.library.fused_res_sim_guard_allocations(True)
        try:
            yield
        finally:
            self.library.fused_res_sim_guard_allocations(False)


@functools.cache
def load_simulator() -> SimulatorLibrary:
    """Build and load the simulator with all operators of csrc/cuda.

    Raises:
        RuntimeError: it cannot be built here.
    """
    path = build()
    if isinstance(path, str):
        raise RuntimeError(path)
    return SimulatorLibrary(path)
