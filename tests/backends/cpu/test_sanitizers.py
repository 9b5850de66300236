"""CPU kernels under address, undefined-behavior and thread sanitizers, in programs without torch.

sanitize_convolution.cpp runs the convolutions and their weight gradients, bf16_convolution.cpp the convolutions with
bfloat16 products on tiles in plain C++, sanitize_batch_norm.cpp the batch norms and max pooling. Every kernel runs
under each sanitizer for one instruction set; `make test-full` adds the other sets.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from fused_res import _extension

ROOT = Path(__file__).resolve().parents[3]
CACHES = ROOT / "csrc/cpu/caches.cpp"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}

# The instruction sets of this machine. The thread sanitizer runs for one only: all share the work partition, and so the
# same races.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = {"AVX512": ["avx512", "avx2", "baseline"], "AVX2": ["avx2", "baseline"]}.get(CAPABILITY, ["baseline"])
CONVOLUTIONS = [("address", isa) for isa in ISAS[:1] if isa != "baseline"]
CONVOLUTIONS += [("thread", isa) for isa in ISAS[:1] if isa != "baseline"]
CONVOLUTIONS += [pytest.param("address", isa, marks=pytest.mark.full) for isa in ISAS[1:-1]]
# AddressSanitizer does not check masked loads and stores; the baseline instruction set has none.
NORMS = [("address", "baseline"), ("thread", ISAS[0])]

if not _extension.loaded:
    pytest.skip(_extension.unavailable_reason, allow_module_level=True)


def build(source: str, sanitizer: str, isa: str, folder: Path, *more: str, kernels: str | None = None) -> Path:
    """Compile the program `source`, and with `kernels` a file of csrc/cpu/isa."""
    program = folder / "cpu_sanitize"
    flags = [*FLAGS, *more, *_extension.build_info["isas"][isa].split(), *SANITIZERS[sanitizer]]
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        probe = subprocess.run([COMPILER, *flags, folder / "empty.cpp", "-o", program], capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"{COMPILER} is not installed")
    if probe.returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    sources = [Path(__file__).with_name(source), *([ROOT / "csrc/cpu/isa" / kernels] if kernels else [])]
    built = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", *sources, CACHES, "-o", program],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return program


def check_program(program: Path, sanitizer: str, ends: str, faults: list[str]) -> None:
    """Check that the sanitizer reports nothing, and that it reports each of the seeded faults."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(ends) and not done.stderr
    # halt_on_error: ThreadSanitizer would otherwise report thousands of races, each with its stack.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    for name in faults:
        found = subprocess.run([program, name], capture_output=True, text=True, timeout=120, env=environment)
        assert found.returncode != 0 and REPORTS[sanitizer] in found.stderr, found.stdout + found.stderr


@pytest.mark.parametrize(("sanitizer", "isa"), CONVOLUTIONS)
def test_convolutions_have_no_sanitizer_reports(sanitizer: str, isa: str, tmp_path: Path) -> None:
    program = build("sanitize_convolution.cpp", sanitizer, isa, tmp_path)
    check_program(
        program, sanitizer, "weight gradients are correct\n", ["convolution", "direct_wgrad", "winograd_wgrad"]
    )


@pytest.mark.skipif(ISAS[0] != "avx512", reason="the kernels with bfloat16 products require AVX-512")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_bf16_convolutions_have_no_sanitizer_reports(sanitizer: str, tmp_path: Path) -> None:
    isa, faults = "amx_emulated", ["scratch", "input"] if sanitizer == "address" else ["scratch"]
    macro = f"-DFUSED_RES_ISA={isa}"
    program = build("bf16_convolution.cpp", sanitizer, isa, tmp_path, macro, kernels="bf16_kernels.cpp")
    check_program(program, sanitizer, "convolutions are correct\n", faults)


@pytest.mark.parametrize(("sanitizer", "isa"), NORMS)
def test_norms_and_pools_have_no_sanitizer_reports(sanitizer: str, isa: str, tmp_path: Path) -> None:
    # -O0: with optimization its many template instances take four times as long to compile, and it runs for one second.
    program = build("sanitize_batch_norm.cpp", sanitizer, isa, tmp_path, "-O0")
    check_program(program, sanitizer, "batch norms and poolings are correct\n", ["nhwc", "nchw", "max_pool"])
