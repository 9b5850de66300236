"""Description of the hardware and the software that a result was measured on, stored with the result."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fused_res
from benchmarks import allocator, isa, peers
from fused_res import _extension


def describe(device: str = "cpu") -> dict[str, Any]:
    return {
        "gpu": gpu() if device == "cuda" else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": physical_cores(usable_cpus()),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "transparent_huge_pages": transparent_huge_pages(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        **{name: version_of(name) for name in peers.NAMES},
        "fused_res": fused_res.__version__,
        "commit": commit(),
        "isa": _extension.cpu_isa() if _extension.loaded else None,
        "extension": _extension.build_info if _extension.loaded else f"not loaded: {_extension.unavailable_reason}",
        "allocator_variables": {name: os.environ[name] for name in allocator.VARIABLES if name in os.environ},
        "isa_variables": {name: os.environ[name] for name in isa.VARIABLES if name in os.environ},
    }


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version_of("triton"),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> Iterable[int]:
    """Return the logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def physical_cores(cpus: Iterable[int], sysfs: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of physical cores of the logical processors `cpus`: hardware threads of a core count once."""

    def core(cpu: int) -> str:
        siblings = sysfs / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        return siblings.read_text().strip() if siblings.exists() else str(cpu)

    return len({core(cpu) for cpu in cpus})


def transparent_huge_pages() -> str | None:
    """Return the kernel's setting (`always`, `madvise` or `never`), or None if it has none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return None
    return setting.read_text().partition("[")[2].partition("]")[0]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the source tree, with the suffix `+changes` if files differ; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
