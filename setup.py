"""Builds the C++ extension and the CUDA library with CMake (CMakeLists.txt lists sources and flags) and packages them.

The environment variables FUSED_RES_CPP and FUSED_RES_CUDA select what is built: see fused_res/env.py.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# For `python setup.py`, which does not use the build backend: exits if setuptools is missing or too old.
INSTALL = runpy.run_path(str(ROOT / "cmake" / "build_backend.py"))["INSTALL"]

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

variables = runpy.run_path(str(ROOT / "fused_res" / "env.py"))
CPP, CUDA = variables["CPP"].read(), variables["CUDA"].read()
if (CPP, CUDA) == ("0", "1"):
    raise SystemExit("FUSED_RES_CUDA: expected 0 or auto with FUSED_RES_CPP=0, which disables all compiled code, got 1")


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "torch: not installed, but fused_res is compiled against the torch that it runs with. Run:\n"
            f"    {INSTALL} torch\n    pip install --no-build-isolation ."
        ) from None


def tool(name: str) -> str:
    """Return the path of a program in this environment, which need not be activated, or else on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise CompileError(f"{name}: not found (pip install cmake ninja)")
    return found


def configure(directory: Path) -> None:
    """Run the configure step of CMake; raise CompileError with the first message of CMake if it fails."""
    cmake, ninja = tool("cmake"), tool("ninja")
    settings = [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFUSED_RES_CUDA={CUDA}",
    ]
    command = [cmake, "-G", "Ninja", "-S", ROOT, "-B", directory, *settings]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        first = re.split(r"CMake Error.*\n|Call Stack", done.stderr)[1:2] or [done.stderr]
        raise CompileError(" ".join(first[0].split()))


class CMakeBuild(build_ext):
    """Build in a persistent directory, so that ninja recompiles only what changed.

    The library of CUDA kernels, _cuda, is placed next to the module, _C. Each of the two has a build record,
    <name>.json: the output of CMake, or the reason why the library was not built.
    """

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        cuda = cuda_library(module)
        module.parent.mkdir(parents=True, exist_ok=True)
        if CPP == "0":
            write_skip_records(module, cuda, reason="FUSED_RES_CPP=0")
            return
        # One directory per combination of settings that cannot share object files.
        key = f"{torch_version()}|{sys.prefix}|{os.environ.get('CXX')}|{ROOT}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        directory = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch_version()}-{digest}"
        try:
            configure(directory)
        except CompileError as error:  # a requirement is missing: setuptools skips an `optional` extension
            write_skip_records(module, cuda, reason=str(error))
            raise
        # From here on an error is a bug in the sources and ends the build.
        subprocess.run([tool("cmake"), "--build", directory], check=True)
        copy_with_record(directory / module.name, module)
        copy_with_record(directory / cuda.name, cuda)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        module = Path(self.build_lib, self.get_ext_filename("fused_res._C"))
        for built in (module, cuda_library(module)):
            copy_with_record(built, ROOT / "fused_res" / built.name)


def cuda_library(module: Path) -> Path:
    return module.with_name(module.name.replace("_C", "_cuda", 1))


def write_skip_records(*libraries: Path, reason: str) -> None:
    """Write a build record with the reason why each library was not built."""
    for library in libraries:
        library.with_suffix(".json").write_text(json.dumps({"skipped": reason}))


def copy_with_record(source: Path, target: Path) -> None:
    """Copy a library with its build record, or only the record if the library was not built."""
    record = source.with_suffix(".json")
    shutil.copy2(record, target.with_suffix(".json"))
    if "skipped" not in json.loads(record.read_text()):
        shutil.copy2(source, target)


class Build(build):
    """Start from an empty build/lib, so that the wheel does not contain modules that have been deleted since."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = CPP == "0"


setup(
    ext_modules=[
        Extension(
            "fused_res._C",
            sources=[],  # listed in CMakeLists.txt; `depends` adds them to a source distribution
            depends=[
                str(path.relative_to(ROOT))
                for pattern in ("CMakeLists.txt", "cmake/*.*", "csrc/**/*.*")
                for path in sorted(ROOT.glob(pattern))
            ],
            optional="1" not in (CPP, CUDA),
        )
    ],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
