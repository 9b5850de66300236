"""Accuracy of the vectorized exponential of SiLU, on every instruction set, over all exponents of the result.

The program is compiled without torch; its C library's ``expl`` is the reference.
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
CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = {"AVX512": ["avx512", "avx2", "baseline"], "AVX2": ["avx2", "baseline"]}.get(CAPABILITY, ["baseline"])

if not _extension.loaded:
    pytest.skip(_extension.unavailable_reason, allow_module_level=True)


@pytest.mark.parametrize("isa", ISAS)
def test_exponential_is_accurate_over_all_exponents(isa: str, tmp_path: Path) -> None:
    program = tmp_path / "exponential"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
    flags += _extension.build_info["isas"][isa].split()
    source = Path(__file__).with_name("exponential.cpp")
    try:
        command = [COMPILER, *flags, f"-I{ROOT / 'csrc'}", source, "-o", program]
        built = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{COMPILER} is not installed")
    assert built.returncode == 0, built.stderr
    lines = subprocess.run([program], capture_output=True, text=True, check=True, timeout=240).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["float", "double"]
    for line in lines:
        dtype, normal, subnormal, special = line.split(maxsplit=3)
        assert special == "ok", dtype
        assert 0.5 <= float(normal) <= 1.1 and 0.5 <= float(subnormal) <= 1.1, line
