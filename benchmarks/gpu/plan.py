"""The stages of a session in order of value: what runs, what it needs, and when it ends at the latest.

The deadlines add up to more than a session has: most stages end well before theirs. Compilation is what could eat one,
so it runs ahead, on all cores, while the smoke tests need little of the GPU: Triton's kernels for `op` and `conv`
(about 2 s each, about 100 of them), and torch.compile's network (about a minute). A stage that finds the caches cold
only takes longer.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.gpu.settings import Settings

#: Seconds of a session, from its start to its last line. The device tool ends a command after 600.
SESSION_SECONDS = 530.0
#: A rehearsal is that much slower: Triton's interpreter runs the kernels.
REHEARSAL_FACTOR = 4.0
#: Seconds reserved for the table and the archive.
RESERVE_SECONDS = 15.0

#: What a stage may need. The first stage reports for each why it is missing, or that it is there.
FEATURES = ("gpu", "fused_res", "triton", "cuda")


@dataclass(frozen=True)
class Stage:
    name: str
    kind: str = ""  # kind of its items, see worker.KINDS
    seconds: float = 60.0  # deadline, from the start of the stage
    item_seconds: float = 30.0  # longest time without a record, including the start of a worker
    settings: Settings = field(default_factory=Settings)
    needs: tuple[str, ...] = ("gpu", "fused_res")
    processes: int = 1  # workers, which share the items
    background: bool = False  # the following stages do not wait for it
    quiet: bool = False  # it is timed: background stages that use the GPU end first
    uses_gpu: bool = True
    prefix: tuple[str, ...] = ()  # a program that runs the worker; "{folder}" is the folder of the session's files
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()  # a command in place of workers


def _train(
    name: str, batch: int, seconds: float, item_seconds: float, *providers: str, model: str = "resnet50"
) -> Stage:
    settings = Settings(batch=batch, only=providers, model=model)
    return Stage(name, "train", seconds, item_seconds, settings, quiet=True)


def _profile(backend: str) -> Stage:
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
    # The clocks stay as they are, because the machine is lent.
    ncu = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details")
    log = ("--force-overwrite", "--log-file", f"{{folder}}/ncu-{backend}.csv")
    prefix = (*ncu, *log, *(word for section in sections for word in ("--section", section)))
    settings = Settings(backend=backend)
    return Stage(
        f"ncu-{backend}", "profile", 45, 40, settings, needs=("gpu", backend), quiet=True, prefix=prefix,
    )  # fmt: skip


def _sanitizer(tool: str, backend: str = "cuda") -> Stage:
    # PyTorch's caching allocator splits large blocks; without it every tensor is an allocation with its own bounds.
    return Stage(
        f"{tool}-{backend}", "smoke", 120, 60, Settings(backend=backend, small=True), needs=("gpu", backend),
        prefix=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


ENVIRONMENT = Stage("environment", "environment", 75, 60, needs=())
#: Checks whether the library of CUDA kernels that was built by this session loads.
LIBRARY = Stage("library", "environment", 40, 40, Settings(only=("cuda",)))

FIRST_HOUR = (
    ENVIRONMENT,
    Stage("warm-op", "op", 100, 60, Settings(warm=True), ("gpu", "triton"), processes=4, background=True),
    Stage("warm-conv", "conv", 100, 60, Settings(warm=True), ("gpu", "triton"), processes=4, background=True),
    Stage(
        "warm-compile", "train", 100, 100,
        Settings(only=("compile-channels-last", "compile-reduce-overhead"), warm=True), processes=2, background=True,
    ),
    Stage("smoke-triton", "smoke", 75, 60, Settings(backend="triton"), ("gpu", "triton"), processes=6),
    Stage("smoke-cuda", "smoke", 25, 20, Settings(backend="cuda"), ("gpu", "cuda"), processes=2),
    Stage(
        "smoke-single-pass", "smoke", 15, 15, Settings(backend="cuda", only=("norm forward", "norm backward")),
        ("gpu", "cuda"), environment={"FUSED_RES_SINGLE_PASS": "1"},
    ),
    Stage("op", "op", 60, 30, quiet=True),
    Stage("conv", "conv", 75, 30, quiet=True),
    _train(
        "train-256", 256, 130, 50, "eager-channels-last", "eager-channels-last+graph", "ours+graph", "ours",
        "ours-norms+graph", "ours-cuda+graph", "ours-triton+graph", "ours-triton",
    ),
    _train("train-256-compile", 256, 90, 90, "compile-channels-last"),
    _train("train-256-reduce-overhead", 256, 70, 70, "compile-reduce-overhead"),
    _train("train-64", 64, 45, 30, "eager-channels-last", "ours", "ours+graph"),
    _profile("cuda"),
    _profile("triton"),
)  # fmt: skip

#: Deadlines that end a stage before its session are for those who choose stages with --only.
_PYTEST = (sys.executable, "-m", "pytest", "--durations=5", "-q")
MORE = (
    ENVIRONMENT,
    # Tens of GB in one tensor: alone.
    Stage("tests-device", seconds=90, command=(*_PYTEST, "tests/gpu/test_gpu_device.py")),
    # Most of the time is Triton's compilation, which runs in parallel. xdist replaces a worker that ends.
    Stage(
        "tests", seconds=240,
        command=(
            *_PYTEST, "-n", "8", "tests/gpu", "tests/backends/cuda/test_cuda_conv.py",
            "tests/backends/cuda/test_cuda_norm.py", "--deselect", "tests/gpu/test_gpu_device.py",
        ),
    ),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    _train("train-256-max-autotune", 256, 200, 200, "compile-max-autotune"),
    _train(
        "train-256-timm", 256, 80, 50, "eager-channels-last", "eager-channels-last+graph", "ours+graph",
        model="timm/resnet50",
    ),
    Stage("suite", seconds=240, quiet=True,
          command=(sys.executable, "-m", "benchmarks", "all", "--device", "cuda", "--out", "{folder}/suite")),
)  # fmt: skip

PLANS = {"first-hour": FIRST_HOUR, "more": MORE}


def build_stage(architecture: str) -> Stage:
    """Return the stage that compiles the library of CUDA kernels in place, for one architecture such as "9.0"."""
    return Stage(
        "build-library", seconds=240, background=True, uses_gpu=False,
        command=(sys.executable, "setup.py", "build_ext", "--inplace"),
        environment={
            "FUSED_RES_CPP": "1", "FUSED_RES_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture,
            "CMAKE_BUILD_PARALLEL_LEVEL": "12",
        },
    )  # fmt: skip
