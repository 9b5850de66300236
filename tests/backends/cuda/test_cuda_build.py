"""Build of the CUDA kernels with nvcc, on a machine without a GPU and with a PyTorch built without CUDA.

Checks which versions of PyTorch, nvcc and architectures CMake accepts, the compiler's report for every kernel (spills,
registers, warnings), and that the linked library registers every operator. The kernels have no architecture-dependent
code, so one architecture is compiled by default and all of them by ``make test-full``.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fused_res import ops
from fused_res.backends import cuda, registry
from fused_res.ops import memory_format
from tools import ptxas_report

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build"  # persistent, so that the next test session compiles incrementally
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TORCH = Path(torch.__file__).parent
LIBRARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
#: By name of the build folder: the value of TORCH_CUDA_ARCH_LIST, and the architectures that are compiled for it.
ARCHITECTURES = {"cuda": ("8.0", ["sm_80"]), "cuda-all": ("", ["sm_80", "sm_90", "sm_100", "sm_120"])}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc not found")


def run(*command: str | Path, fails: bool = False, timeout: int = 60, **variables: str) -> str:
    """Run a command in a clean environment plus ``variables``, check whether it fails, and return its output."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RES_", "PYTHON", "CUDA"))
    }
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    completed = subprocess.run(
        command,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert (completed.returncode != 0) == fails, completed.stdout
    return completed.stdout


def find_tool(name: str) -> str:
    """Return the path of a program of this Python environment, which need not be activated."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which(name, path=scripts)
    assert found is not None
    return found


def make_fake_torch(folder: Path, cuda: str | None) -> Path:
    """Create a ``torch`` package that claims to be built with CUDA version ``cuda``, and return its PYTHONPATH entry.

    It links to the headers and libraries of the installed PyTorch; its libc10_cuda is empty.
    """
    version = f"{torch.__version__.partition('+')[0]}+cu{cuda}"
    package, metadata = folder / "torch", folder / f"torch-{version}.dist-info"
    (package / "lib").mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"cuda = {cuda!r}\n")
    for name in ("include", "lib/libc10.so", "lib/libtorch_cpu.so", "lib/libtorch_python.so"):
        (package / name).unlink(missing_ok=True)
        (package / name).symlink_to(TORCH / name)
    build_c10_cuda_stub(package, "")
    return folder


def build_c10_cuda_stub(package: Path, code: str) -> None:
    """Compile ``code`` as the libc10_cuda of a fake ``torch`` package."""
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", package / "lib" / "libc10_cuda.so"]
    subprocess.run([*command, "-Wl,-soname,libc10_cuda.so"], input=code, text=True, check=True)


def configure(folder: Path, mode: str = "auto", *options: str, **arguments: object) -> str:
    """Run CMake with ``FUSED_RES_CUDA=mode`` in ``folder`` and return its output."""
    options += (f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}")
    options += (f"-DFUSED_RES_CUDA={mode}",)
    return run(find_tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *options, **arguments)


def build_record(folder: Path) -> dict[str, object]:
    """Return the JSON record that CMake writes: versions and architectures, or why the CUDA backend is skipped."""
    (path,) = folder.glob("_cuda.*.json")
    return json.loads(path.read_text())


# --- configuration ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the tests of the configuration share."""
    return tmp_path_factory.mktemp("configured")


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Return a function that creates a CUDA_HOME whose nvcc differs from the real one.

    Its argument is a branch of a shell ``case`` on nvcc's arguments: the calls that it overrides.
    """

    def make(override: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f'#!/bin/sh\ncase "$*" in\n{override};;\n*) exec {NVCC} "$@";;\nesac\n')
        nvcc.chmod(0o755)
        return {"CUDA_HOME": str(tmp_path)}

    return make


def cuda_version() -> str:
    found = re.search(r"release ([\d.]+)", run(NVCC, "--version"))
    assert found is not None
    return found[1]


def fake_torch_env(tmp_path: Path, cuda: str | None) -> dict[str, str]:
    return {"PYTHONPATH": str(make_fake_torch(tmp_path / "torch", cuda))}


def assert_skipped(folder: Path, why: str, **variables: str) -> None:
    """Check that ``auto`` skips the CUDA backend and records the reason, and that ``1`` fails with the same reason."""
    configure(folder, **variables)
    assert re.search(why, str(build_record(folder)["skipped"]))
    printed = " ".join(configure(folder, "1", fails=True, **variables).split())
    assert "CMake Error" in printed and re.search(f"FUSED_RES_CUDA=1, but .*{why}", printed)


def test_torch_without_cuda_is_skipped(folder, tmp_path):
    assert_skipped(folder, "this torch, .*, was built without CUDA", **fake_torch_env(tmp_path, None))


def test_fused_res_cuda_0_disables_the_backend(folder, tmp_path):
    configure(folder, "0", **fake_torch_env(tmp_path, cuda_version()))
    assert build_record(folder) == {"skipped": "FUSED_RES_CUDA=0"}


def test_different_cuda_major_version_is_skipped(folder, tmp_path):
    why = rf"nvcc is CUDA {re.escape(cuda_version())} and this torch was built with CUDA 99\.1: the major version"
    assert_skipped(folder, why, **fake_torch_env(tmp_path, "99.1"))


def test_different_cuda_minor_version_warns(folder, tmp_path):
    cuda = cuda_version().partition(".")[0] + ".99"
    printed = " ".join(configure(folder, "1", **fake_torch_env(tmp_path, cuda)).split())
    assert "CMake Warning" in printed and "which should be compatible" in printed
    assert build_record(folder)["cuda"] == cuda


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no working bin/nvcc"),
        ({"CUDACXX": "/bin/false"}, "CUDACXX=/bin/false is not a working nvcc"),
        ({"TORCH_CUDA_ARCH_LIST": "Ampere"}, "'Ampere' is not a compute capability; use numbers"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9"}, "'9' is not a compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "6.0 7.5"}, "the CUDA kernels need 8.0 or newer"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;99.0"}, r"nvcc [\d.]+ does not support 99\.0"),
    ],
)
def test_unusable_nvcc_or_architecture_is_skipped(variables, why, folder, tmp_path):
    assert_skipped(folder, why, **variables, **fake_torch_env(tmp_path, cuda_version()))


def test_failing_compiler_probe_is_skipped(folder, tmp_path, fake_nvcc):
    nvcc = fake_nvcc('*" -c "*launch.h*) echo "error: unsupported GNU version"; exit 1')
    assert_skipped(
        folder,
        "cannot compile with .*: error: unsupported GNU version",
        **nvcc,
        **fake_torch_env(tmp_path, cuda_version()),
    )


def test_default_architectures_are_those_that_nvcc_supports(folder, tmp_path, fake_nvcc):
    nvcc = fake_nvcc("--list-gpu-arch) printf 'compute_70\\ncompute_80\\ncompute_90\\n'")
    configure(folder, "1", **nvcc, **fake_torch_env(tmp_path, cuda_version()))
    assert build_record(folder)["architectures"] == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("7.5 8.6, 12.0 8.6", ["sm_86", "sm_120"]),
    ],
)
def test_torch_cuda_arch_list(arch_list, expected, folder, tmp_path):
    configure(folder, "1", TORCH_CUDA_ARCH_LIST=arch_list, **fake_torch_env(tmp_path, cuda_version()))
    assert build_record(folder)["architectures"] == expected
    commands = run(find_tool("ninja"), "-C", folder, "-t", "commands", "cuda_objects")
    generated = set(re.findall(r",code=(\w+)", commands))
    assert generated == set(expected)


# --- kernels and library ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cuda", pytest.param("cuda-all", marks=pytest.mark.full)])
def built(request: pytest.FixtureRequest) -> Path:
    """Build and link the library for one or all architectures, and return the build folder."""
    folder = BUILD / request.param
    torch_folder = make_fake_torch(folder / "torch", cuda_version())
    # One translation unit for all host sources, since torch's headers dominate the compile time of each.
    unity = "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"
    configure(folder, "1", *unity, PYTHONPATH=str(torch_folder), TORCH_CUDA_ARCH_LIST=ARCHITECTURES[request.param][0])
    run(find_tool("cmake"), "--build", folder, "--target", "cuda_objects", "--parallel", "2", timeout=1500)
    objects = list((folder / "CMakeFiles" / "cuda_host.dir").rglob("*.o"))
    missing = set(re.findall(r"\b(_ZNK?3c104cuda\w+)", run("nm", "--undefined-only", *objects)))
    build_c10_cuda_stub(
        torch_folder / "torch", "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(missing))
    )
    run(find_tool("cmake"), "--build", folder, "--target", "_cuda", timeout=120)
    return folder


@pytest.fixture(scope="module")
def kernels(built: Path) -> dict[str, list[ptxas_report.KernelResources]]:
    return ptxas_report.parse_build(built)


def test_no_kernel_spills(kernels):
    spilling = [str(one) for some in kernels.values() for one in some if one.has_spills]
    assert not spilling, "\n".join(spilling)


#: Threads, and resident threadblocks per multiprocessor, of the tiles in bfloat16: resident_wgrad_blocks().
WGRAD_TILES = {"128, 128": (256, 2), "128, 64": (128, 3), "64, 64": (128, 4)}


def test_registers_allow_the_resident_threadblocks_of_the_partition(kernels):
    """csrc/cuda/gemm_partition.h assumes them for the weight gradients; a multiprocessor has 65536 registers."""
    for tile, (threads, blocks) in WGRAD_TILES.items():
        (name,) = {
            one.name
            for one in kernels["conv1x1_backward.cu"]
            if one.name.startswith(f"wgrad_kernel<__nv_bfloat16, false, TileShape<{tile},")
            and one.name.endswith("true>")
        }
        for one in kernels["conv1x1_backward.cu"]:
            if one.name == name:
                assert 65536 // (-(-one.registers // 8) * 8 * threads) == blocks, one


def test_every_kernel_is_compiled_for_every_architecture(built, kernels):
    for source, some in kernels.items():
        compiled = {name: [one.architecture for one in some if one.name == name] for name in {one.name for one in some}}
        assert compiled, source
        for name, architectures in compiled.items():
            assert sorted(architectures) == sorted(ARCHITECTURES[built.name][1]), f"{source}: {name}"


def test_no_compiler_warnings(built, kernels):
    for source in kernels:
        assert "warning" not in (built / f"csrc/cuda/{source}.o.log").read_text()


SPILLING = """
struct Arguments { float* x; };
__global__ void __launch_bounds__(1024) spilling(const __grid_constant__ Arguments a) {
  float v[128];
  for (int i = 0; i < 128; ++i) v[i] = a.x[i];
  for (int j = 0; j < 99; ++j)
    for (int i = 0; i < 128; ++i) v[i] = v[i] * a.x[j] + v[(i + 1) % 128];
  for (int i = 0; i < 128; ++i) a.x[i] = v[i];
}
__global__ void tiny(Arguments a) { __shared__ float y[4]; y[threadIdx.x & 3] = 0; __syncthreads(); *a.x = y[1]; }
"""


def test_spilling_kernel_is_reported(tmp_path):
    (tmp_path / "spilling.cu").write_text(SPILLING)
    log = run(NVCC, "-arch=sm_90", "-Xptxas=-v", "-c", tmp_path / "spilling.cu", "-o", tmp_path / "spilling.o")
    spilling, tiny = sorted(ptxas_report.parse(log), key=lambda one: one.name)
    assert (spilling.name, tiny.name) == ("spilling", "tiny")
    assert spilling.has_spills and spilling.registers <= 64
    assert not tiny.has_spills and tiny.static_shared_bytes == 16
    table = ptxas_report.table({"spilling.cu": [spilling, tiny]}, {"tiny": (64, 1024)})
    assert f"| `tiny` | 64 | 1024 | {tiny.registers} |" in table


#: Shared memory of a threadblock that every architecture supports: sm_120 has the least.
MAX_SHARED = 99 << 10
SHAPES = [  # convolutions of a bottleneck block: images, channels, size, output channels
    (32, 64, 56, 256),
    (64, 256, 28, 512),
    (2, 256, 16, 128),
    (2, 2048, 7, 512),
    (3, 35, 9, 20),  # no operand is aligned
]


def launch_configurations() -> Iterator[tuple[str, int, int, bool]]:
    """Yield kernel name, threads, shared memory and whether it is cooperative of every launch.

    All operators are called at realistic sizes; the launches are intercepted and not run.
    """
    from tools.ptx.nvcc_runner import intercept_launches

    operators = registry.resolve("cuda", torch.device("cpu"))
    with intercept_launches(lambda launch, argument: None) as launches:
        for (images, channels, size, outputs), dtype, format, tf32 in itertools.product(
            SHAPES,
            (torch.float32, torch.bfloat16, torch.float16, torch.float64),
            (torch.channels_last, torch.contiguous_format),
            (True, False),
        ):
            torch.backends.cudnn.allow_tf32 = tf32
            x, y = (torch.empty(images, c, size, size, dtype=dtype, memory_format=format) for c in (channels, outputs))
            stats_dtype = ops.stats_dtype(dtype)
            vector, stats, y_stats = (
                torch.empty(size, dtype=stats_dtype) for size in ((outputs,), (5, channels), (5, outputs))
            )
            mask = torch.empty(memory_format.relu_mask_shape(y), dtype=torch.uint8)
            operators.batch_norm_act_forward(y, y, None, vector, vector, None, None, True, 1e-5, "relu", True)
            operators.batch_norm_act_forward(y, None, None, vector, vector, vector, vector, False, 1e-5, "relu", True)
            operators.batch_norm_act_backward(y, y, vector, y_stats, mask, True, "relu", [True] * 4)
            operators.add_masked_(y, y, mask)
            operators.update_running_stats([vector], [vector], [y_stats], [0.1])
            pooled, indices = operators.max_pool_forward(x, stats, True, [3, 3], [2, 2], [1, 1])
            operators.max_pool_backward(pooled, indices, x, [3, 3], [2, 2], [1, 1])
            if format == torch.contiguous_format or dtype == torch.float64:
                continue
            weight, geometry = torch.empty(outputs, channels, 1, 1, dtype=dtype), ([1, 1], [0, 0], [1, 1], 1)
            operators.conv_bias_act(x, weight, vector.to(dtype), y, *geometry, True)
            operators.conv_bn_stats(x, weight, None, stats, True, *geometry, True)
            gradient = y, y, y_stats, mask, False, y_stats[:2], y[:, 0].numel(), weight
            operators.conv_dgrad(*gradient, x, stats, True)
            operators.conv_wgrad(*gradient, x, stats, True, [1, 1])
    names = ptxas_report.demangle([one.kernel for one in launches])
    for name, one in zip(names, launches, strict=True):
        yield name, one.threads, one.shared, one.cooperative


@pytest.mark.skipif(not cuda.is_simulated(), reason="the CUDA kernels are not simulated here")
def test_table_of_registers_and_shared_memory(built, kernels, monkeypatch):
    """Write the table to build/cuda. Cooperative launches query the device's limit; all others must fit everywhere."""
    from tools.cuda_sim.simulator import load_simulator

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    maxima: dict[str, tuple[int, int]] = {}
    single_pass = load_simulator().library.fused_res_cuda_single_pass
    previous = single_pass(-1)  # auto
    try:
        launches = list(launch_configurations())
    finally:
        single_pass(previous)
    for name, threads, shared, cooperative in launches:
        assert shared <= MAX_SHARED or cooperative, name
        maxima[name] = threads, max(shared, maxima.get(name, (0, 0))[1])
    assert set(maxima) <= {one.name for some in kernels.values() for one in some}
    assert all(any(one.name in maxima for one in some) for some in kernels.values())
    (built / "kernels.md").write_text(ptxas_report.table(kernels, maxima) + "\n")


def test_library_dependencies_have_no_absolute_paths(built):
    library = built / LIBRARY
    dynamic = run("readelf", "-d", library)
    major = cuda_version().partition(".")[0]
    for needed in ("libc10_cuda.so", f"libcudart.so.{major}", "libtorch_cpu.so", "libc10.so"):
        assert f"[{needed}]" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "python" not in dynamic
    for path in (ROOT, TORCH):
        assert os.fsencode(path) not in library.read_bytes(), "the library contains a path of this machine"


OPERATORS = """
import sys

import torch
from fused_res import ops

ops.define("fused_res_cuda")
torch.ops.load_library(sys.argv[1])
registered = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in ops.SCHEMAS if not registered(f"fused_res_cuda::{name}", "CUDA")))
"""


def test_library_registers_every_operator(built):
    """The library is loaded with the real CUDA runtime; its libc10_cuda is a stub."""
    cudart = re.search(r"\S+libcudart\.so\S*", (built / "build.ninja").read_text())
    assert cudart is not None
    folders = f"{TORCH / 'lib'}:{built / 'torch/torch/lib'}:{Path(cudart[0]).parent}"
    library = built / LIBRARY
    printed = run(sys.executable, "-c", OPERATORS, library, LD_LIBRARY_PATH=folders, PYTHONPATH=str(ROOT))
    assert printed.split() == []
