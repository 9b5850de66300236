"""Loads the compiled extension `fused_res._C`, or says why it could not and what to type.

Beside it may lie `_cuda`, the library of CUDA kernels, which whoever wants them opens. The build leaves a record beside
each of the two (`<library>.json`, written by CMakeLists.txt). It is read first: what was built for another torch must
not even be opened, because that may crash the interpreter.
"""

import functools
import importlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from fused_res import env

_PACKAGE = Path(__file__).resolve().parent
_MODULE, CUDA = (f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_cuda"))


def how_to_build(variable: env.Variable = env.CPP, package: Path = _PACKAGE) -> str:
    """The command that builds what ``variable`` is about, for this kind of installation."""
    install = f"{variable.name}=1 pip install --no-build-isolation --no-deps --force-reinstall"
    sources = package.parent
    if (sources / "CMakeLists.txt").exists():
        return f"{install} --editable {sources}"
    return f"{install} FOLDER_OF_THE_FUSED_RES_SOURCES"


def inspect(package: Path = _PACKAGE, library: str = _MODULE) -> tuple[dict[str, Any], str]:
    """The build record in a package's folder, and why its library must not be loaded ("" if it may be)."""
    path = package / library
    record = path.with_suffix(".json")
    if not record.exists():
        others = sorted(one.name for one in package.glob(f"{library.partition('.')[0]}.*.so") if one != path)
        note = f" (there is {', '.join(others)}, for another Python)" if others else ""
        if (installed := _hidden(package, record.name)) is not None:
            note = f", but the installed {installed} has: start Python in another folder than {package.parent}"
        return {}, f"{package} has no {record.name}{note}"
    try:
        build_info = json.loads(record.read_text())
    except ValueError as error:
        return {}, f"the record of its build, {record}, cannot be read ({error})"
    if "skipped" in build_info:
        return build_info, f"it was left out when fused_res was installed ({build_info['skipped']})"
    if not path.exists():
        return build_info, f"{package} has no {path.name}"
    if _public(build_info["torch"]) != _public(torch.__version__):
        return (build_info, f"it was built for torch {build_info['torch']}, and this is torch {torch.__version__}")
    if (cuda := build_info.get("cuda", torch.version.cuda)) != torch.version.cuda:
        return build_info, f"it was built for CUDA {cuda}, and this torch has CUDA {torch.version.cuda}"
    return build_info, ""


def _hidden(package: Path, file: str) -> Path | None:
    """The package that Python would have imported, with such a file, had it not been started beside ``package``."""
    others = (Path(folder).resolve() / package.name for folder in sys.path)
    return next((other for other in others if other != package and (other / file).exists()), None)


def _public(version: str) -> str:
    """Without the local part: 2.13.0+cpu and 2.13.0+cu130 offer the same C++ interface for the CPU."""
    return version.partition("+")[0]


def _load() -> tuple[Any, dict[str, Any], str]:
    build_info, why_not = inspect()
    if why_not:
        return None, build_info, why_not
    try:
        return importlib.import_module("fused_res._C"), build_info, ""
    except ImportError as error:
        return None, build_info, f"it could not be opened ({error})"


_module, build_info, _why_not = _load()
loaded = _module is not None
reason = "" if loaded else f"the C++ extension is not loaded: {_why_not}. To build it: {how_to_build()}"

if loaded:
    try:
        _module.set_cpu_isa(env.CPU_ISA.read())
    except ValueError as error:  # asked for by name: not a reason to take another one
        raise ValueError(f"{env.CPU_ISA.name}: {error}") from None

#: The C++ module, None if it is not loaded; csrc/library.cpp documents the facts of the kernels that it exposes.
cpp = _module


def _required() -> Any:
    if not loaded:
        raise RuntimeError(reason)
    return _module


def set_output_cache(megabytes: int) -> None:
    """How many MB of freed outputs the C++ kernels keep for their next ones; what is kept beyond that is freed now.

    Raises:
        ValueError: ``megabytes`` is no whole number, or below 0.
        RuntimeError: the C++ extension is not loaded.
    """
    module = _required()
    if not isinstance(megabytes, int) or not 0 <= megabytes <= 1 << 30:
        raise ValueError(f"megabytes must be a whole number, 0 or more, got {megabytes!r}")
    module.set_output_cache(megabytes << 20)


if loaded:
    set_output_cache(int(env.CPU_CACHE.read()))


def output_cache_bytes() -> int:
    """Bytes of freed outputs kept at this moment. Raises RuntimeError where the C++ extension is not loaded."""
    return int(_required().output_cache_bytes())


def cpu_isa() -> str:
    """The instruction set that the C++ kernels use."""
    return str(_required().cpu_isa())


def fma_peak(threads: int) -> float:
    """FLOP/s of float32 multiply-adds in registers, measured in so many threads."""
    return float(_required().fma_peak(threads))


@functools.cache
def cuda_library() -> tuple[Path | None, str]:
    """The library of CUDA kernels, for ``torch.ops.load_library``, or why there is none to load."""
    _, why_not = inspect(library=CUDA)
    if why_not:
        return None, f"the library of CUDA kernels is not there: {why_not}. To build it: {how_to_build(env.CUDA)}"
    return _PACKAGE / CUDA, ""
