"""The simulator from Python: building it, and the switches of its run time."""

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
    """A target of CMakeLists.txt, up to date, or why there is none: no CMake, no CUDA headers. A source that does not
    compile raises."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "lock", "w") as lock:  # of pytest's sessions, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (reason := _configure()) is not None:
            return reason
        built = _cmake("--build", str(_BUILD), "--target", target, "-j", str(os.cpu_count()))
        if built.returncode:
            raise RuntimeError(f"{target} does not build:\n{built.stdout[-8000:]}")
    library = _BUILD / f"lib{target}.so"
    return library if library.exists() else _BUILD / target


def _configure() -> str | None:
    """What is configured already, for this Python's packages, Ninja keeps up to date."""
    cache = _BUILD / "CMakeCache.txt"
    known = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE)) if cache.exists() else {}
    same_python = Path(known.get("Python_EXECUTABLE", "")).parent == Path(sys.executable).parent
    if same_python and known.get("FUSED_RES_SIMULATOR") == "ON" and (_BUILD / "build.ninja").exists():
        return None
    # One translation unit for all host sources: torch's headers are most of what each one compiles.
    unity = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")
    settings = ("-DFUSED_RES_SIMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}", *unity)
    try:
        done = _cmake("-G", "Ninja", "-S", str(_ROOT), "-B", str(_BUILD), *settings)
    except FileNotFoundError:
        return "the simulator is built with CMake, which is not installed"
    return f"CMake cannot configure the simulator: {done.stdout[-2000:]}" if done.returncode else None


def _cmake(*arguments: str) -> subprocess.CompletedProcess[str]:
    """CMake and Ninja of this environment, which need not be activated, or else from PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("cmake")
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        [cmake, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class RunTime:
    """The switches of one library: the simulator's, or that of its own tests."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fused_res_sim_bank_conflicts.restype = ctypes.c_size_t

    @contextlib.contextmanager
    def schedule(self, number: int) -> Iterator[None]:
        """In which order threads and blocks run: 0 forward, 1 backward, others pseudo-random from that seed."""
        before = self.library.fused_res_sim_schedule(number)
        try:
            yield
        finally:
            self.library.fused_res_sim_schedule(before)

    @contextlib.contextmanager
    def multiprocessors(self, count: int) -> Iterator[None]:
        """Of the GPU that is simulated: how many blocks a cooperative launch may have is proportional to it."""
        before = self.library.fused_res_sim_multiprocessors(count)
        try:
            yield
        finally:
            self.library.fused_res_sim_multiprocessors(before)

    def bank_conflicts(self) -> int:
        """Of ``ldmatrix``, since the last call."""
        return int(self.library.fused_res_sim_bank_conflicts())

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Tensors on the CPU that are made inside end (every other one: begin) where a page begins that must not be
        touched, and are NaN until written to."""
        self.library.fused_res_sim_guard(True)
        try:
            yield
        finally:
            self.library.fused_res_sim_guard(False)


@functools.cache
def run_time() -> RunTime:
    """The simulator's, which has to be available."""
    path = build()
    if isinstance(path, str):
        raise RuntimeError(path)
    return RunTime(path)
