"""CPU kernels under address, undefined-behaviour and thread sanitizers, without torch.

sanitize_convolution.cpp runs the convolutions and their weight gradients, sanitize_batch_norm.cpp the batch norms and
max pooling. Every kernel runs under each sanitizer for one instruction set; `make test-full` adds the others.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from fused_res import _extension

ROOT = Path(__file__).resolve().parents[3]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}

# What this machine runs. Races are the same in all, as all share the tasks: for them one is enough.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = {"AVX512": ["avx512", "avx2", "baseline"], "AVX2": ["avx2", "baseline"]}.get(CAPABILITY, ["baseline"])
CONVOLUTIONS = [("address", isa) for isa in ISAS[:1] if isa != "baseline"]
CONVOLUTIONS += [("thread", isa) for isa in ISAS[:1] if isa != "baseline"]
CONVOLUTIONS += [pytest.param("address", isa, marks=pytest.mark.full) for isa in ISAS[1:-1]]
# AddressSanitizer does not look into masked loads and stores, and the baseline has none.
NORMS = [("address", "baseline"), ("thread", ISAS[0])]

if not _extension.loaded:
    pytest.skip(_extension.reason, allow_module_level=True)


def build(source: str, sanitizer: str, isa: str, folder: Path, *more: str) -> Path:
    program = folder / "cpu_sanitize"
    flags = [*FLAGS, *more, *_extension.build_info["isas"][isa].split(), *SANITIZERS[sanitizer]]
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        there = subprocess.run([COMPILER, *flags, folder / "empty.cpp", "-o", program], capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"{COMPILER} is not there")
    if there.returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    built = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", Path(__file__).with_name(source), "-o", program],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return program


def check(program: Path, sanitizer: str, ends: str, broken: list[str]) -> None:
    """Nothing is reported, and something is in each of the programs that were broken on purpose."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(ends) and not done.stderr
    # ThreadSanitizer would report thousands of races, each with its stack: the first one is enough.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    for name in broken:
        found = subprocess.run([program, name], capture_output=True, text=True, timeout=120, env=environment)
        assert found.returncode != 0 and REPORTS[sanitizer] in found.stderr, found.stdout + found.stderr


@pytest.mark.parametrize(("sanitizer", "isa"), CONVOLUTIONS)
def test_convolutions(sanitizer: str, isa: str, tmp_path: Path) -> None:
    program = build("sanitize_convolution.cpp", sanitizer, isa, tmp_path)
    check(program, sanitizer, "gradients are right\n", ["convolution", "gradient", "winograd_gradient"])


@pytest.mark.parametrize(("sanitizer", "isa"), NORMS)
def test_norms_and_pools(sanitizer: str, isa: str, tmp_path: Path) -> None:
    # Not optimised: its many instances take four times as long to compile, and a second to run.
    program = build("sanitize_batch_norm.cpp", sanitizer, isa, tmp_path, "-O0")
    check(program, sanitizer, "norms and pools are right\n", ["nhwc", "nchw", "max_pool"])
