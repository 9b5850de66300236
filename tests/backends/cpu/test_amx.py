"""The AMX kernels' machine code, compiled as for the extension, runs convolutions.

A machine without AMX emulates the instructions in a signal handler (amx_emulator.h). The emulator itself is tested
first: decoding and execution of every instruction, and its exceptions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fused_res import _extension

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
POSITION_INDEPENDENT = ["-fPIC", "-fvisibility=hidden"]

# The instruction that must end the process, the signal, and the reason in the message.
EXCEPTIONS = [
    ("palette", signal.SIGSEGV, "ldtilecfg: #GP: palette 2"),
    ("reserved byte 2", signal.SIGSEGV, "ldtilecfg: #GP: reserved byte 2 is 1"),
    ("reserved byte 15", signal.SIGSEGV, "ldtilecfg: #GP: reserved byte 15 is 1"),
    ("reserved byte 32", signal.SIGSEGV, "ldtilecfg: #GP: reserved byte 32 is 1"),
    ("reserved byte 47", signal.SIGSEGV, "ldtilecfg: #GP: reserved byte 47 is 1"),
    ("reserved byte 63", signal.SIGSEGV, "ldtilecfg: #GP: reserved byte 63 is 1"),
    ("17 rows", signal.SIGSEGV, "ldtilecfg: #GP: tile 7 has 17 rows of 64 bytes"),
    ("65 bytes", signal.SIGSEGV, "ldtilecfg: #GP: tile 7 has 16 rows of 65 bytes"),
    ("rows of no bytes", signal.SIGSEGV, "ldtilecfg: #GP: tile 4 has 16 rows of 0 bytes"),
    ("no rows", signal.SIGSEGV, "ldtilecfg: #GP: tile 4 has 0 rows of 64 bytes"),
    ("not configured", signal.SIGILL, "tilezero: #UD: tiles are not configured"),
    ("after tilerelease", signal.SIGILL, "tileloadd: #UD: tiles are not configured"),
    ("unused tile", signal.SIGILL, "tileloadd: #UD: tile 3 is not configured"),
    ("unused operand", signal.SIGILL, "tdpbf16ps: #UD: tile 3 is not configured"),
    ("row of 6 bytes", signal.SIGILL, "tilestored: #UD: tile 2 has rows of 6 bytes, not a multiple of 4"),
    ("start row", signal.SIGILL, "tileloadd: #UD: start_row is 5, but tile 2 has 5 rows"),
    ("equal operands", signal.SIGILL, "tdpbf16ps: #UD: operands tmm0, tmm1, tmm1 are not distinct"),
    ("rows of C and A", signal.SIGILL, "tmm0 8 x 64, tmm1 16 x 64, tmm2 16 x 64"),
    ("columns of C and B", signal.SIGILL, "tmm0 16 x 32, tmm1 16 x 64, tmm2 16 x 64"),
    ("columns of A and rows of B", signal.SIGILL, "tmm0 16 x 64, tmm1 16 x 32, tmm2 16 x 64"),
    ("tdpbssd", signal.SIGILL, "not an emulated instruction: c4 e2 6b 5e c1"),
    ("ud2", signal.SIGILL, "not an emulated instruction: 0f 0b"),
    ("raise", signal.SIGILL, ""),
    ("W1", signal.SIGILL, "not an emulated instruction: c4 e2 f8 49 c0"),
    ("256 bits", signal.SIGILL, "not an emulated instruction: c4 e2 7c 49 c0"),
    ("vvvv", signal.SIGILL, "not an emulated instruction: c4 e2 70 49 c0"),
    ("tile 8", signal.SIGILL, "not an emulated instruction: c4 62 7b 49 c0"),
    ("operand tile 8", signal.SIGILL, "not an emulated instruction: c4 e2 2a 5c c1"),
]

# Another handler of SIGILL, as pytest installs it; the permission for tile data; then the instructions.
PRELOADED = """
import ctypes, faulthandler, os, sys
faulthandler.enable()
libc = ctypes.CDLL(None)
arch_prctl = lambda code, value: libc.syscall(158, ctypes.c_long(code), ctypes.c_long(value))
assert arch_prctl(0x1023, 18) == 0  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
assert arch_prctl(0x1023, 63) == -1
assert libc.syscall(39) == os.getpid()
library = ctypes.CDLL(sys.argv[1])
library.run_all() if len(sys.argv) == 2 else library.run_one(sys.argv[2].encode())
"""


CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split() if CPUINFO.exists() else ())
if not {"avx2", "fma"} <= CPU_FLAGS:
    pytest.skip("AMX kernels and the emulator require an x86-64 CPU with AVX2 and FMA", allow_module_level=True)
HAS_AMX = "amx_tile" in CPU_FLAGS
emulated = pytest.mark.skipif(HAS_AMX, reason="this machine executes AMX instructions: there is nothing to emulate")


def build(target: Path, *arguments: str | Path) -> Path:
    try:
        built = subprocess.run([COMPILER, *FLAGS, *arguments, "-o", target], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{COMPILER} is not installed")
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the test program of the emulator, and of both as shared libraries."""
    folder = tmp_path_factory.mktemp("amx")
    instructions, emulator, preload = (
        build(folder / f"{name}.o", *POSITION_INDEPENDENT, "-c", HERE / f"{name}.cpp")
        for name in ("amx_instructions", "amx_emulator", "amx_emulator_preload")
    )
    build(folder / "instructions", instructions, emulator)
    build(folder / "instructions.so", "-shared", instructions)
    build(folder / "preload.so", "-shared", preload, emulator)
    return folder


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)


@emulated
def test_emulator_executes_every_instruction(folder: Path) -> None:
    done = run(folder / "instructions")
    assert (done.returncode, done.stdout, done.stderr) == (0, "all instructions are correct\n", "")


@emulated
@pytest.mark.parametrize(("name", "number", "reason"), EXCEPTIONS, ids=[name for name, _, _ in EXCEPTIONS])
def test_emulator_raises_exceptions(folder: Path, name: str, number: int, reason: str) -> None:
    done = run(folder / "instructions", name)
    assert (done.returncode, done.stdout) == (-number, "")
    assert reason in done.stderr and bool(done.stderr) == bool(reason)


@emulated
def test_preloaded_emulator_serves_a_python_process(folder: Path) -> None:
    command = [sys.executable, "-c", PRELOADED, folder / "instructions.so"]
    done = run(*command, LD_PRELOAD=str(folder / "preload.so"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "all instructions are correct\n", "")
    # Other illegal instructions go to the other handler.
    done = run(*command, "ud2", LD_PRELOAD=str(folder / "preload.so"))
    assert done.returncode == -signal.SIGILL
    assert "not an emulated instruction: 0f 0b" in done.stderr
    assert "Fatal Python error: Illegal instruction" in done.stderr


def build_kernels(isa: str, folder: Path) -> Path:
    """Compile the kernel table of `isa` with the flags that CMakeLists.txt has for it."""
    flags = [*_extension.build_info["flags"].split(), *_extension.build_info["isas"][isa].split()]
    flags += ["-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", f"-DFUSED_RES_ISA={isa}"]
    return build(folder / f"{isa}.o", *flags, f"-I{SOURCES}", "-c", SOURCES / "cpu/isa/bf16_kernels.cpp")


@pytest.mark.skipif(not _extension.loaded, reason=str(_extension.unavailable_reason))
@pytest.mark.skipif("avx512dq" not in CPU_FLAGS, reason="the AMX kernels require AVX-512, which this machine lacks")
@pytest.mark.parametrize("isa", ["amx", pytest.param("avx512_bf16", marks=pytest.mark.full)])
def test_bf16_convolutions(folder: Path, isa: str) -> None:
    if isa not in ("amx", *CPU_FLAGS):
        pytest.skip(f"this machine has no {isa}")
    macros = [f"-DFUSED_RES_TEST_{isa.upper()}"]
    if isa == "amx" and not HAS_AMX:
        macros.append("-DFUSED_RES_EMULATE_AMX")
    program = build(
        folder / "bf16_convolution",
        f"-I{SOURCES}",
        *macros,
        HERE / "bf16_convolution.cpp",
        SOURCES / "cpu/caches.cpp",
        folder / "amx_emulator.o",
        *(build_kernels(name, folder) for name in ("amx_emulated", isa)),
    )
    done = run(program)
    assert done.returncode == 0 and done.stdout.endswith(" convolutions are correct\n"), done.stdout + done.stderr
    # Accesses outside of the operands end at a guard page.
    for name in ("input", "scratch", "output"):
        assert run(program, name).returncode == -signal.SIGSEGV
