"""Build and test against the oldest supported torch, in its CUDA build, on a machine without a GPU (`make gpu-env`).

Steps, of which the first that fails ends the command:

copy      the source tree to build/gpu-env/source, so that no other environment sees what is built
build     C++ and CUDA extensions in the copy, for sm_90
check     import them, and find every operator's CUDA kernel in the dispatcher
compile   every Triton kernel of the AOT manifest, for sm_90
test      pytest; arguments after `--` select tests
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "gpu-env" / "source"
BUILD_SETTINGS = {"FUSED_RES_CPP": "1", "FUSED_RES_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}

CHECK = """
import torch
from fused_res import _extension, ops

library, reason = _extension.cuda_library()
assert library is not None, reason
ops.define("fused_res_cuda")
torch.ops.load_library(str(library))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in ops.SCHEMAS if not has_kernel(f"fused_res_cuda::{name}", "CUDA")]
assert not missing, f"without a CUDA kernel: {', '.join(missing)}"
size = library.stat().st_size / 1e6
print(f"torch {torch.__version__}: {len(ops.SCHEMAS)} operators have a CUDA kernel, {library.name} has {size:.1f} MB")
"""

COMPILE = """
import triton
from fused_res.backends.triton import aot_manifest

reports = aot_manifest.compile_all(90)
print(f"Triton {triton.__version__}: {len(reports)} kernels compiled for sm_90")
for report in reports:
    if report.stack or report.local_accesses:
        print(f"  {report.stack} bytes of stack, {report.registers} registers: {report.name} {report.variant}")
"""


def copy_sources(target: Path) -> None:
    """Copy the files that git tracks or would track; unchanged files keep their time, so that Ninja skips them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    for path in [path for path in target.rglob("*.py") if "build" not in path.relative_to(target).parts]:
        if str(path.relative_to(target)) not in names:
            path.unlink()
    for name in names:
        copied = target / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copied)


def run(title: str, *command: str, **environment: str) -> None:
    """Run a command of the environment in the copy; exit if it fails."""
    print(f"== {title}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=SOURCE, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{title}: exit code {done.returncode}")
    print(f"== {title}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="build,check,compile,test", help="comma-separated; default: all")
    parser.add_argument("tests", nargs="*", help="arguments of pytest; default: all tests")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - {"build", "check", "compile", "test"}:
        parser.error(f"--steps: expected build, check, compile or test, got {', '.join(sorted(unknown))}")
    copy_sources(SOURCE)
    if "build" in steps:
        run("build", sys.executable, "setup.py", "build_ext", "--inplace", **BUILD_SETTINGS)
    if "check" in steps:
        run("check", sys.executable, "-c", CHECK)
    if "compile" in steps:
        run("compile", sys.executable, "-c", COMPILE, TRITON_INTERPRET="0")
    if "test" in steps:
        pytest = [sys.executable, "-m", "pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile"]
        run("test", *pytest, "--no-loadscope-reorder", *options.tests, OMP_WAIT_POLICY="passive")


if __name__ == "__main__":
    main()
