"""Runs CMake (CMakeLists.txt lists sources and flags) and packages what it made.

The one switch is FUSED_RES_CPP: see fused_res/env.py.
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

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

CPP = runpy.run_path(str(ROOT / "fused_res" / "env.py"))["CPP"].read()


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "fused_res is compiled against the torch that it will run with, and this Python has none. Type:\n"
            "    pip install torch\n    pip install --no-build-isolation ."
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
    settings = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = [cmake, "-G", "Ninja", "-S", ROOT, "-B", directory, *settings]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        first = re.split(r"CMake Error.*\n|Call Stack", done.stderr)[1:2] or [done.stderr]
        raise CompileError(" ".join(first[0].split()))


class CMakeBuild(build_ext):
    """Build in a directory that outlives the command, so that ninja finds what it compiled the last time.

    Beside the module lies its build record, <module>.json: the output of CMake, or why there is no module.
    """

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        record = module.with_suffix(".json")
        if CPP == "0":
            record.write_text(json.dumps({"skipped": "FUSED_RES_CPP=0"}))
            return
        # One directory for each combination that cannot share objects.
        key = f"{torch_version()}|{sys.prefix}|{os.environ.get('CXX')}|{ROOT}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        directory = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch_version()}-{digest}"
        try:
            configure(directory)
        except CompileError as error:  # the machine lacks something: an `optional` extension is left out
            record.write_text(json.dumps({"skipped": str(error)}))
            raise
        # From here on an error is one of our code, and nothing to go on without.
        subprocess.run([tool("cmake"), "--build", directory], check=True)
        shutil.copy2(directory / module.name, module)
        shutil.copy2(directory / record.name, record)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib, self.get_ext_filename("fused_res._C"))
        shutil.copy2(built.with_suffix(".json"), ROOT / "fused_res")


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
            depends=["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*")))],
            optional=CPP != "1",
        )
    ],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
