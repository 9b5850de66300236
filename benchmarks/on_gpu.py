"""Tests and benchmarks on a machine with an NVIDIA GPU (`make gpu`), with the Python that has its PyTorch.

    python3 benchmarks/on_gpu.py [test] [bench] [compile] [--out DIR]

Nothing is downloaded. Each stage ends within nine minutes, even if a command fails or hangs, and writes its results as
soon as it has them:

test      compile the C++ and CUDA extensions in place, run the GPU tests, then some under compute-sanitizer
bench     benchmark operators, blocks, networks, memory, convolutions and inference against stock PyTorch and cuDNN
compile   benchmark against torch.compile, whose compilation takes long
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Time limit of a stage.
STAGE_SECONDS = 530.0
#: Part of that limit which the tests reserve for compute-sanitizer.
SANITIZER_SECONDS = 150.0
#: `pytest -k` expression: small, quick tests that run every kernel once.
SANITIZER_TESTS = "(convolution or conv1x1 or statistics_and_backward or apply or max_pool) and (bfloat16 or float32)"
TOOLS = ("memcheck", "racecheck")


class Stage:
    """Runs commands one after the other until the time limit of the stage, and records their output."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.deadline = time.monotonic() + STAGE_SECONDS
        self.failed: list[str] = []

    def run(self, title: str, command: list[str], reserve: float = 0.0, **environment: str) -> bool:
        """Run `command`, copy its output to `<title>.log`, and return whether it succeeded."""
        limit = self.deadline - time.monotonic() - reserve
        print(f"\n== {title}: {' '.join(command)}", flush=True)
        with (self.out / f"{title}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )  # fmt: skip
            timer = threading.Timer(max(limit, 1), lambda: os.killpg(process.pid, 9))
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            code = process.wait()
            in_time = timer.is_alive()
            timer.cancel()
        if code:
            self.failed.append(f"{title}: {f'exit code {code}' if in_time else f'stopped after {limit:.0f} s'}")
        return code == 0


def test(stage: Stage) -> None:
    python = sys.executable
    extension = {"FUSED_RES_CPP": "1", "FUSED_RES_CUDA": "1"}
    if not stage.run("build", [python, "setup.py", "build_ext", "--inplace"], **extension):
        return
    stage.run("info", [python, "-m", "fused_res", "info"])
    pytest = [python, "-m", "pytest", "--durations=5"]
    device = "tests/gpu/test_gpu_device.py"  # allocates tens of GB at once
    # These run on the simulator, too.
    others = ["tests/backends/cuda/test_cuda_conv.py", "tests/backends/cuda/test_cuda_norm.py"]
    others += [name for path in ROOT.glob("tests/gpu/test_gpu_*.py") if (name := str(path.relative_to(ROOT))) != device]
    stage.run(
        "tests-device", [*pytest, device, f"--junitxml={stage.out / 'tests-device.xml'}"], reserve=SANITIZER_SECONDS
    )
    # Most of the time is Triton compilation, which runs in parallel.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    stage.run(
        "tests",
        [*pytest, *workers, *sorted(others), f"--junitxml={stage.out / 'tests.xml'}"],
        reserve=SANITIZER_SECONDS,
    )
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("\n== sanitizer: skipped, compute-sanitizer is not on PATH")
        return
    sanitizer_tests = [
        python,
        "-m",
        "pytest",
        "-x",
        "-q",
        "tests/gpu/test_gpu_kernels.py",
        "-k",
        f"cuda and {SANITIZER_TESTS}",
    ]
    for index, tool in enumerate(TOOLS):
        reserve = (len(TOOLS) - 1 - index) * SANITIZER_SECONDS / len(TOOLS)
        # PyTorch's caching allocator splits large blocks; without it every tensor is an allocation with its own bounds.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *sanitizer_tests]
        stage.run(f"sanitizer-{tool}", command, reserve=reserve, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(name: str) -> Callable[[Stage], None]:
    def run(stage: Stage) -> None:
        arguments = ["-m", "benchmarks", "all", "--device", "cuda", "--stage", name, "--out", str(stage.out)]
        stage.run(name, [sys.executable, *arguments])

    return run


STAGES: dict[str, Callable[[Stage], None]] = {
    "test": test,
    "bench": benchmark("bench"),
    "compile": benchmark("compile"),
}


def device_name() -> str:
    """Return the name of the GPU in the form of a folder name."""
    code = "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{sys.executable}: found no NVIDIA GPU: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help="default: all of them")
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results/<the GPU's name>)")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    name = device_name()
    out = (options.out or ROOT / "benchmarks" / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for title in options.stages or STAGES:
        stage = Stage(out)
        STAGES[title](stage)
        failed += stage.failed
    print("\n== " + (f"failed: {'; '.join(failed)}" if failed else f"all done; results in {out}"))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
