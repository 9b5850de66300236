"""What `make gpu` runs on a machine with an NVIDIA GPU, with the Python that has its PyTorch; nothing is downloaded.

    python3 benchmarks/on_gpu.py [test] [bench] [compile] [--out DIR]

Each stage ends within nine minutes, whatever fails or hangs, and writes what it has found at once:

test      compiles the C++ and CUDA extensions in place; the tests for GPUs, then some under compute-sanitizer
bench     operators, blocks, networks, memory, convolutions and inference beside stock PyTorch and cuDNN
compile   the same beside torch.compile, which takes long to compile
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
#: Seconds of a stage.
LIMIT = 530.0
#: Of which, for the tests to leave time for compute-sanitizer.
SANITIZER = 150.0
#: Small and quick: every kernel once.
SANITIZED = "(convolution or pointwise or halves or apply or max_pool) and (bfloat16 or float32)"
TOOLS = ("memcheck", "racecheck")


class Stage:
    """Runs commands one after the other, each until the stage's time is up; keeps what they print."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.end = time.monotonic() + LIMIT
        self.failed: list[str] = []

    def run(self, title: str, command: list[str], reserve: float = 0.0, **environment: str) -> bool:
        """Whether it succeeded; prints what it prints, which `<title>.log` keeps."""
        limit = self.end - time.monotonic() - reserve
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
    alone = "tests/gpu/test_gpu_device.py"  # takes tens of GB at a time
    others = ["tests/backends/cuda/test_cuda_conv.py", "tests/backends/cuda/test_cuda_norm.py"]  # also the simulator's
    others += [name for path in ROOT.glob("tests/gpu/test_gpu_*.py") if (name := str(path.relative_to(ROOT))) != alone]
    stage.run("tests-device", [*pytest, alone, f"--junitxml={stage.out / 'tests-device.xml'}"], reserve=SANITIZER)
    # Triton compiles for most of the time.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    stage.run("tests", [*pytest, *workers, *sorted(others), f"--junitxml={stage.out / 'tests.xml'}"], reserve=SANITIZER)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("\n== sanitizer: skipped, there is no compute-sanitizer on PATH")
        return
    some = [python, "-m", "pytest", "-x", "-q", "tests/gpu/test_gpu_kernels.py", "-k", f"cuda and {SANITIZED}"]
    for index, tool in enumerate(TOOLS):
        rest = (len(TOOLS) - 1 - index) * SANITIZER / len(TOOLS)
        # PyTorch's allocator hands out pieces of large blocks: without it every tensor has bounds of its own.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *some]
        stage.run(f"sanitizer-{tool}", command, reserve=rest, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(name: str) -> Callable[[Stage], None]:
    def run(stage: Stage) -> None:
        selection = ["-m", "benchmarks", "all", "--device", "cuda", "--stage", name, "--out", str(stage.out)]
        stage.run(name, [sys.executable, *selection])

    return run


STAGES: dict[str, Callable[[Stage], None]] = {
    "test": test,
    "bench": benchmark("bench"),
    "compile": benchmark("compile"),
}


def device_name() -> str:
    """Of the GPU, as a folder."""
    code = "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        raise SystemExit(f"{sys.executable} sees no NVIDIA GPU: {asked.stderr.strip().splitlines()[-1]}")
    return asked.stdout.strip()


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
