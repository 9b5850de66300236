"""The CUDA kernels' build, with no GPU and no torch that knows CUDA: which torch, nvcc and architectures it takes, what
the compiler says of every kernel, and whether the linked library brings every operator. The kernels have no code that
depends on the architecture: one is compiled by default, all of them by `make test-full`."""

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
from tools import ptxas_report as ptxas

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build"  # its folders are kept, so that the next session compiles nothing twice
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TORCH = Path(torch.__file__).parent
LIBRARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
#: By the name of the build's folder: what TORCH_CUDA_ARCH_LIST says, and what is compiled then.
ARCHITECTURES = {"cuda": ("8.0", ["sm_80"]), "cuda-all": ("", ["sm_80", "sm_90", "sm_100", "sm_120"])}

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")


def run(*command: str | Path, fails: bool = False, timeout: int = 60, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RES_", "PYTHON", "CUDA"))}
    clean.pop("TORCH_CUDA_ARCH_LIST", None)
    done = subprocess.run(
        command, env=clean | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def tool(name: str) -> str:
    """Of this environment, which need not be activated."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which(name, path=scripts)
    assert found is not None
    return found


def pretended(folder: Path, cuda: str | None) -> Path:
    """A folder for PYTHONPATH with this torch's headers and libraries, said to be built with that CUDA.

    Its libc10_cuda is empty.
    """
    version = f"{torch.__version__.partition('+')[0]}+cu{cuda}"
    package, metadata = folder / "torch", folder / f"torch-{version}.dist-info"
    (package / "lib").mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"cuda = {cuda!r}\n")
    for name in ("include", "lib/libc10.so", "lib/libtorch_cpu.so"):
        (package / name).unlink(missing_ok=True)
        (package / name).symlink_to(TORCH / name)
    stub(package, "")
    return folder


def stub(package: Path, code: str) -> None:
    """A libc10_cuda in place of the real one."""
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", package / "lib" / "libc10_cuda.so"]
    subprocess.run([*command, "-Wl,-soname,libc10_cuda.so"], input=code, text=True, check=True)


def configure(folder: Path, mode: str = "auto", *options: str, **arguments: object) -> str:
    options += (f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    options += (f"-DFUSED_RES_CUDA={mode}",)
    return run(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *options, **arguments)


def record(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("_cuda.*.json")
    return json.loads(path.read_text())


# --- what the build finds -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CMake configures, again and again."""
    return tmp_path_factory.mktemp("configured")


@pytest.fixture
def another_nvcc(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """A CUDA_HOME with an nvcc that does ``unlike`` in place of something, and else what the real one does."""

    def make(unlike: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f'#!/bin/sh\ncase "$*" in\n{unlike};;\n*) exec {NVCC} "$@";;\nesac\n')
        nvcc.chmod(0o755)
        return {"CUDA_HOME": str(tmp_path)}

    return make


def cuda_version() -> str:
    found = re.search(r"release ([\d.]+)", run(NVCC, "--version"))
    assert found is not None
    return found[1]


def with_torch(tmp_path: Path, cuda: str | None) -> dict[str, str]:
    return {"PYTHONPATH": str(pretended(tmp_path / "torch", cuda))}


def refused(folder: Path, why: str, **variables: str) -> None:
    """``auto`` goes without the kernels and records why; ``1`` stops with it."""
    configure(folder, **variables)
    assert re.search(why, str(record(folder)["skipped"]))
    printed = " ".join(configure(folder, "1", fails=True, **variables).split())
    assert "CMake Error" in printed and re.search(f"FUSED_RES_CUDA=1, but .*{why}", printed)


def test_torch_without_cuda(folder, tmp_path):
    refused(folder, "this torch, .*, was built without CUDA", **with_torch(tmp_path, None))


def test_switched_off(folder, tmp_path):
    configure(folder, "0", **with_torch(tmp_path, cuda_version()))
    assert record(folder) == {"skipped": "FUSED_RES_CUDA=0"}


def test_cuda_of_another_major_version(folder, tmp_path):
    why = rf"nvcc is CUDA {re.escape(cuda_version())} and this torch was built with CUDA 99\.1: the major version"
    refused(folder, why, **with_torch(tmp_path, "99.1"))


def test_cuda_of_another_minor_version(folder, tmp_path):
    cuda = cuda_version().partition(".")[0] + ".99"
    printed = " ".join(configure(folder, "1", **with_torch(tmp_path, cuda)).split())
    assert "CMake Warning" in printed and "which should do" in printed
    assert record(folder)["cuda"] == cuda


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc that runs"),
        ({"CUDACXX": "/bin/false"}, "CUDACXX=/bin/false is no nvcc that runs"),
        ({"TORCH_CUDA_ARCH_LIST": "Ampere"}, "'Ampere' is no compute capability; write numbers"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9"}, "'9' is no compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "6.0 7.5"}, "the CUDA kernels need 8.0 or newer"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;99.0"}, r"nvcc [\d.]+ does not know 99\.0"),
    ],
)
def test_what_is_not_there(variables, why, folder, tmp_path):
    refused(folder, why, **variables, **with_torch(tmp_path, cuda_version()))


def test_a_toolkit_that_does_not_compile(folder, tmp_path, another_nvcc):
    nvcc = another_nvcc('*" -c "*launch.h*) echo "error: unsupported GNU version"; exit 1')
    refused(
        folder, "cannot compile with .*: error: unsupported GNU version", **nvcc, **with_torch(tmp_path, cuda_version())
    )


def test_architectures_that_nvcc_does_not_know_are_no_default(folder, tmp_path, another_nvcc):
    nvcc = another_nvcc("--list-gpu-arch) printf 'compute_70\\ncompute_80\\ncompute_90\\n'")
    configure(folder, "1", **nvcc, **with_torch(tmp_path, cuda_version()))
    assert record(folder)["architectures"] == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("7.5 8.6, 12.0 8.6", ["sm_86", "sm_120"]),
    ],
)
def test_architectures_that_are_asked_for(wanted, made, folder, tmp_path):
    configure(folder, "1", TORCH_CUDA_ARCH_LIST=wanted, **with_torch(tmp_path, cuda_version()))
    assert record(folder)["architectures"] == made
    commands = run(tool("ninja"), "-C", folder, "-t", "commands", "cuda_objects")
    generated = set(re.findall(r",code=(\w+)", commands))
    assert generated == set(made)


# --- what it makes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cuda", pytest.param("cuda-all", marks=pytest.mark.full)])
def built(request: pytest.FixtureRequest) -> Path:
    """The build folder with the library linked, for one or all architectures."""
    folder = BUILD / request.param
    torch_folder = pretended(folder / "torch", cuda_version())
    # One translation unit for all host sources: torch's headers are most of what each one compiles.
    unity = "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"
    configure(folder, "1", *unity, PYTHONPATH=str(torch_folder), TORCH_CUDA_ARCH_LIST=ARCHITECTURES[request.param][0])
    run(tool("cmake"), "--build", folder, "--target", "cuda_objects", "--parallel", "2", timeout=1500)
    objects = list((folder / "CMakeFiles" / "cuda_host.dir").rglob("*.o"))
    missing = set(re.findall(r"\b(_ZNK?3c104cuda\w+)", run("nm", "--undefined-only", *objects)))
    stub(torch_folder / "torch", "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(missing)))
    run(tool("cmake"), "--build", folder, "--target", "_cuda", timeout=120)
    return folder


@pytest.fixture(scope="module")
def kernels(built: Path) -> dict[str, list[ptxas.Kernel]]:
    return ptxas.of_build(built)


def test_no_kernel_spills(kernels):
    wrong = [str(one) for some in kernels.values() for one in some if one.spills]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_compiled_for_every_architecture(built, kernels):
    for source, some in kernels.items():
        made = {name: [one.architecture for one in some if one.name == name] for name in {one.name for one in some}}
        assert made, source
        for name, architectures in made.items():
            assert sorted(architectures) == sorted(ARCHITECTURES[built.name][1]), f"{source}: {name}"


def test_the_compiler_warns_of_nothing(built, kernels):
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


def test_a_kernel_that_spills_is_seen(tmp_path):
    (tmp_path / "spilling.cu").write_text(SPILLING)
    log = run(NVCC, "-arch=sm_90", "-Xptxas=-v", "-c", tmp_path / "spilling.cu", "-o", tmp_path / "spilling.o")
    spilling, tiny = sorted(ptxas.parse(log), key=lambda one: one.name)
    assert (spilling.name, tiny.name) == ("spilling", "tiny")
    assert spilling.spills and spilling.registers <= 64
    assert not tiny.spills and tiny.shared == 16
    made = ptxas.table({"spilling.cu": [spilling, tiny]}, {"tiny": (64, 1024)})
    assert f"| `tiny` | 64 | 1024 | {tiny.registers} |" in made


#: What a block may have on every architecture: sm_120 has the least.
SHARED = 99 << 10
SHAPES = [  # of a bottleneck's convolutions: images, channels, size, outputs
    (32, 64, 56, 256),
    (64, 256, 28, 512),
    (2, 256, 16, 128),
    (2, 2048, 7, 512),
    (3, 35, 9, 20),  # nothing is aligned
]


def launched() -> Iterator[tuple[str, int, int, bool]]:
    """Kernel, threads, shared memory and whether it is cooperative, of every operator at real sizes; none is run."""
    from tools.ptx.nvcc_runner import observed

    ours = registry.resolve("cuda", torch.device("cpu"))
    with observed(lambda launch, argument: None) as launches:
        for (images, channels, size, outputs), dtype, format, tf32 in itertools.product(
            SHAPES,
            (torch.float32, torch.bfloat16, torch.float16, torch.float64),
            (torch.channels_last, torch.contiguous_format),
            (True, False),
        ):
            torch.backends.cudnn.allow_tf32 = tf32
            x, y = (torch.empty(images, c, size, size, dtype=dtype, memory_format=format) for c in (channels, outputs))
            wide = ops.stats_dtype(dtype)
            vector, stats, y_stats = (
                torch.empty(size, dtype=wide) for size in ((outputs,), (5, channels), (5, outputs))
            )
            mask = torch.empty(memory_format.packed_shape(y), dtype=torch.uint8)
            ours.batch_norm_act_forward(y, y, None, vector, vector, None, None, True, 1e-5, True, True)
            ours.batch_norm_act_forward(y, None, None, vector, vector, vector, vector, False, 1e-5, True, True)
            ours.batch_norm_act_backward(y, y, vector, y_stats, mask, True, True, [True] * 4)
            ours.add_masked_(y, y, mask)
            ours.update_running_stats([vector], [vector], [y_stats], [0.1])
            pooled, indices = ours.max_pool_forward(x, stats, True, [3, 3], [2, 2], [1, 1])
            ours.max_pool_backward(pooled, indices, x, [3, 3], [2, 2], [1, 1])
            if format == torch.contiguous_format or dtype == torch.float64:
                continue
            weight, geometry = torch.empty(outputs, channels, 1, 1, dtype=dtype), ([1, 1], [0, 0], [1, 1], 1)
            ours.conv_bias_act(x, weight, vector.to(dtype), y, *geometry, True)
            ours.conv_bn_stats(x, weight, None, stats, True, *geometry, True)
            gradient = y, y, y_stats, mask, False, y_stats[:2], y[:, 0].numel(), weight
            ours.conv_dgrad(*gradient, x, stats, True)
            ours.conv_wgrad(*gradient, x, stats, True, [1, 1])
    names = ptxas.demangled([one.kernel for one in launches])
    for name, one in zip(names, launches, strict=True):
        yield name, one.threads, one.shared, one.cooperative


@pytest.mark.skipif(not cuda.simulating(), reason="the CUDA kernels are not simulated here")
def test_table_of_registers_and_shared_memory(built, kernels, monkeypatch):
    """It is left in build/cuda. A cooperative launch asks what a block may have; all others have to fit everywhere."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    most: dict[str, tuple[int, int]] = {}
    for name, threads, shared, cooperative in launched():
        assert shared <= SHARED or cooperative, name
        most[name] = threads, max(shared, most.get(name, (0, 0))[1])
    assert set(most) <= {one.name for some in kernels.values() for one in some}
    assert all(any(one.name in most for one in some) for some in kernels.values())
    (built / "kernels.md").write_text(ptxas.table(kernels, most) + "\n")


def test_the_library_says_what_it_needs_but_not_where(built):
    library = built / LIBRARY
    dynamic = run("readelf", "-d", library)
    major = cuda_version().partition(".")[0]
    for needed in ("libc10_cuda.so", f"libcudart.so.{major}", "libtorch_cpu.so", "libc10.so"):
        assert f"[{needed}]" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "python" not in dynamic
    for path in (ROOT, TORCH):
        assert os.fsencode(path) not in library.read_bytes(), "a path of this machine is in the library"


OPERATORS = """
import sys

import torch
from fused_res import ops

ops.define("fused_res_cuda")
torch.ops.load_library(sys.argv[1])
registered = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in ops.SCHEMAS if not registered(f"fused_res_cuda::{name}", "CUDA")))
"""


def test_the_library_brings_every_operator(built):
    """It opens with torch's schemas and CUDA's real run-time library; what it calls of libc10_cuda is a stub."""
    cudart = re.search(r"\S+libcudart\.so\S*", (built / "build.ninja").read_text())
    assert cudart is not None
    folders = f"{built / 'torch/torch/lib'}:{Path(cudart[0]).parent}"
    library = built / LIBRARY
    printed = run(sys.executable, "-c", OPERATORS, library, LD_LIBRARY_PATH=folders, PYTHONPATH=str(ROOT))
    assert printed.split() == []
