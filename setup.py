"""Runs CMake (CMakeLists.txt lists sources and flags) and packages what it made.

The switches are FUSED_RES_CPP and FUSED_RES_CUDA: see fused_res/env.py.
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

# Here too, for `python setup.py`: exits where setuptools is missing or too old.
INSTALL = runpy.run_path(str(ROOT / "cmake" / "build_backend.py"))["INSTALL"]

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

variables = runpy.run_path(str(ROOT / "fused_res" / "env.py"))
CPP, CUDA = variables["CPP"].read(), variables["CUDA"].read()
if (CPP, CUDA) == ("0", "1"):
    raise SystemExit("FUSED_RES_CPP=0 leaves out everything compiled, and FUSED_RES_CUDA=1 insists on a part of it")


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "fused_res is compiled against the torch that it will run with, and this Python has none. Type:\n"
            f"    {INSTALL} torch\n    pip install --no-build-isolation ."
        ) from None


def tool(name: str) -> str:
    """The program from this environment, which need not be activated, or else from PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise CompileError(f"{name} was not found: pip install cmake ninja")
    return found


def configure(directory: Path) -> None:
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
    """Build in a directory that outlives the command, so that ninja finds what it compiled the last time.

    Beside the module lies the library of CUDA kernels, _cuda. Each of the two has a build record, <name>.json: the
    output of CMake, or why there is no such library.
    """

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        cuda = cuda_library(module)
        module.parent.mkdir(parents=True, exist_ok=True)
        if CPP == "0":
            skip(module, cuda, reason="FUSED_RES_CPP=0")
            return
        # One directory for each combination that cannot share objects.
        key = f"{torch_version()}|{sys.prefix}|{os.environ.get('CXX')}|{ROOT}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        directory = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch_version()}-{digest}"
        try:
            configure(directory)
        except CompileError as error:  # the machine lacks something: an `optional` extension is left out
            skip(module, cuda, reason=str(error))
            raise
        # From here on an error is one of our code, and nothing to go on without.
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


def skip(*libraries: Path, reason: str) -> None:
    for library in libraries:
        library.with_suffix(".json").write_text(json.dumps({"skipped": reason}))


def copy_with_record(source: Path, target: Path) -> None:
    record = source.with_suffix(".json")
    shutil.copy2(record, target.with_suffix(".json"))
    if "skipped" not in json.loads(record.read_text()):
        shutil.copy2(source, target)


class Build(build):
    """Start from an empty build/lib: a module that was deleted since would otherwise be in the wheel."""

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
            sources=[],  # CMakeLists.txt has them; `depends` puts them into a source distribution
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
