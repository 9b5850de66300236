"""The CPU's convolutions and weight gradients under sanitizers, without torch: cpu_sanitize.cpp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from fused_res import _extension

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}

# What this machine runs. Races are the same in all, as all share the tasks: for them one is enough.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(CAPABILITY, [])
CASES = [("address", isa) for isa in ISAS] + [("thread", isa) for isa in ISAS[:1]]

if not _extension.loaded:
    pytest.skip(_extension.reason, allow_module_level=True)
if not CASES:
    pytest.skip("the convolutions need AVX2", allow_module_level=True)


def build(sanitizer: str, isa: str, folder: Path) -> Path:
    program = folder / "cpu_sanitize"
    flags = [*FLAGS, *_extension.build_info["isas"][isa].split(), *SANITIZERS[sanitizer]]
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        there = subprocess.run([COMPILER, *flags, folder / "empty.cpp", "-o", program], capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"{COMPILER} is not there")
    if there.returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    source = ROOT / "tests" / "cpu_sanitize.cpp"
    built = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", source, "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize(("sanitizer", "isa"), CASES)
def test_convolutions(sanitizer: str, isa: str, tmp_path: Path) -> None:
    program = build(sanitizer, isa, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("gradients are right\n") and not done.stderr
    for kernels in ("convolution", "gradient", "winograd_gradient"):
        broken = subprocess.run([program, kernels], capture_output=True, text=True, timeout=120)
        assert broken.returncode != 0 and REPORTS[sanitizer] in broken.stderr, broken.stdout + broken.stderr
