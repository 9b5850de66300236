"""Loader of the compiled extension `fused_res._C`; if it does not load, provides the reason and the build command.

The same folder may contain `_cuda`, the library of CUDA kernels, which the `cuda` backend opens on demand. The build
writes a record next to each of the two (`<library>.json`, from CMakeLists.txt). The record is read before the library:
a library that was built for another torch must not be opened, because that may crash the interpreter.
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
_MODULE, CUDA_LIBRARY = (f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_cuda"))


def build_command(variable: env.Variable = env.CPP, package: Path = _PACKAGE) -> str:
    """Return the command that builds the library controlled by ``variable``, for this kind of installation."""
    install = f"{variable.name}=1 pip install --no-build-isolation --no-deps --force-reinstall"
    sources = package.parent
    if (sources / "CMakeLists.txt").exists():
        return f"{install} --editable {sources}"
    return f"{install} FOLDER_OF_THE_FUSED_RES_SOURCES"


def read_build_record(package: Path = _PACKAGE, library: str = _MODULE) -> tuple[dict[str, Any], str]:
    """Read the build record of a library.

    Args:
        package: folder of the package.
        library: file name of the library.

    Returns:
        The record, and the reason why the library must not be loaded, "" if it may be loaded.
    """
    path = package / library
    record = path.with_suffix(".json")
    if not record.exists():
        others = sorted(one.name for one in package.glob(f"{library.partition('.')[0]}.*.so") if one != path)
        note = f" (found {', '.join(others)}, for another Python)" if others else ""
        if (installed := _shadowed_package(package, record.name)) is not None:
            note = f", but the package installed in {installed} has one: start Python outside {package.parent}"
        return {}, f"{package} has no {record.name}{note}"
    try:
        build_info = json.loads(record.read_text())
    except ValueError as error:
        return {}, f"its build record {record} cannot be read ({error})"
    if "skipped" in build_info:
        return build_info, f"it was omitted when fused_res was installed ({build_info['skipped']})"
    if not path.exists():
        return build_info, f"{package} has no {path.name}"
    if _public_version(build_info["torch"]) != _public_version(torch.__version__):
        return (build_info, f"it was built for torch {build_info['torch']}, but this is torch {torch.__version__}")
    if "cuda" in build_info and _major_version(build_info["cuda"]) != _major_version(torch.version.cuda):
        this = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return build_info, f"it was built for CUDA {build_info['cuda']}, but this torch was built {this}"
    return build_info, ""


def _shadowed_package(package: Path, file: str) -> Path | None:
    """Return an installed package that contains ``file`` and that ``package`` shadows, or None.

    A package in the folder where Python was started shadows the one in site-packages.
    """
    others = (Path(folder).resolve() / package.name for folder in sys.path)
    return next((other for other in others if other != package and (other / file).exists()), None)


def _public_version(version: str) -> str:
    """Return a version without its local part (PEP 440).

    2.13.0+cpu and 2.13.0+cu130 have the same C++ ABI for the CPU.
    """
    return version.partition("+")[0]


def _major_version(version: str | None) -> str | None:
    """Return the major version of CUDA, within which libraries are compatible; None for None."""
    return version and version.partition(".")[0]


def _load() -> tuple[Any, dict[str, Any], str]:
    build_info, reason = read_build_record()
    if reason:
        return None, build_info, reason
    try:
        return importlib.import_module("fused_res._C"), build_info, ""
    except ImportError as error:
        return None, build_info, f"it could not be opened ({error})"


_module, build_info, _reason = _load()
loaded = _module is not None
unavailable_reason = "" if loaded else f"the C++ extension is not loaded: {_reason}. To build it: {build_command()}"

if loaded:
    try:
        _module.set_cpu_isa(env.CPU_ISA.read())
    except ValueError as error:  # the instruction set was requested by name: no fallback to another one
        raise ValueError(f"{env.CPU_ISA.name}: {error}") from None

    if (_sizes := env.CPU_CACHES.read()) != "auto":
        _module.set_cpu_caches(env.parse_sizes(_sizes))

#: The C++ module, None if it is not loaded; csrc/library.cpp documents the properties of the kernels that it exposes.
cpp = _module


def _require_module() -> Any:
    """Return the C++ module; raise RuntimeError if it is not loaded."""
    if not loaded:
        raise RuntimeError(unavailable_reason)
    return _module


def set_output_cache(megabytes: int) -> None:
    """Set the capacity of the C++ kernels' cache of freed output buffers; free the buffers beyond it.

    Args:
        megabytes: capacity in MiB (2**20 bytes), an integer from 0 to 2**30; 0 disables the cache.

    Raises:
        ValueError: ``megabytes`` is not an integer from 0 to 2**30.
        RuntimeError: the C++ extension is not loaded.
    """
    module = _require_module()
    if not isinstance(megabytes, int) or not 0 <= megabytes <= 1 << 30:
        raise ValueError(f"megabytes must be an integer from 0 to 2**30, got {megabytes!r}")
    module.set_output_cache(megabytes << 20)


if loaded:
    set_output_cache(int(env.CPU_CACHE.read()))


def output_cache_bytes() -> int:
    """Return the size in bytes of the C++ kernels' cache of freed output buffers.

    Raises:
        RuntimeError: the C++ extension is not loaded.
    """
    return int(_require_module().output_cache_bytes())


def cpu_isa() -> str:
    """Return the instruction set that the C++ kernels use."""
    return str(_require_module().cpu_isa())


def cpu_caches() -> tuple[int, ...]:
    """Return the bytes of a core's L1 data cache, of its L2, and of the L3 that it uses, shared with other cores."""
    return tuple(_require_module().cpu_caches()[0])


def cpu_cache_sources() -> tuple[str, ...]:
    """Return where each size of :func:`cpu_caches` comes from.

    ``"cpuid"``, ``"sysconf"``, ``"default"`` (the machine does not report the level), or the variable
    ``FUSED_RES_CPU_CACHES``.
    """
    sources = _require_module().cpu_caches()[1]
    return tuple(env.CPU_CACHES.name if source == "set" else source for source in sources)


def fma_peak(threads: int) -> float:
    """Measure the peak FLOP/s of float32 fused multiply-adds on registers.

    Args:
        threads: number of threads.
    """
    return float(_require_module().fma_peak(threads))


@functools.cache
def cuda_library() -> tuple[Path | None, str]:
    """Return the path of the library of CUDA kernels, for ``torch.ops.load_library``.

    Returns:
        The path, or None; and the reason why there is no usable library, or "".
    """
    _, reason = read_build_record(library=CUDA_LIBRARY)
    if reason:
        return None, _cuda_library_unavailable(reason)
    return _PACKAGE / CUDA_LIBRARY, ""


def cuda_code_missing(capability: tuple[int, int]) -> str:
    """Return the reason why the library of CUDA kernels has no code for a GPU, "" if it has.

    Machine code (``sm_80``) runs on GPUs of the same major compute capability and an equal or higher minor one; PTX
    (``compute_80``) on all of an equal or higher compute capability.

    Args:
        capability: compute capability of the GPU.
    """
    architectures = read_build_record(library=CUDA_LIBRARY)[0]["architectures"]
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        major, minor = divmod(int(number), 10)
        if (kind == "compute" or major == capability[0]) and (major, minor) <= capability:
            return ""
    major, minor = capability
    return _cuda_library_unavailable(f"it contains code for {', '.join(architectures)}, this GPU is sm_{major}{minor}")


def _cuda_library_unavailable(reason: str) -> str:
    return f"the library of CUDA kernels is unavailable: {reason}. To build it: {build_command(env.CUDA)}"
