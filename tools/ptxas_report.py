"""Parse the output of ``ptxas -v``, which CMakeLists.txt stores next to the object files: registers, spills, memory.

``python tools/ptxas_report.py build/cuda`` prints the table of a build folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"


@dataclass(frozen=True)
class KernelResources:
    """Resource usage of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # spill stores and loads

    @property
    def has_spills(self) -> bool:
        return bool(self.stack_bytes or self.spill_bytes)


_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n"
    r".*Function properties for (?P=name)\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def parse(log: str) -> list[KernelResources]:
    """Parse one log of ``ptxas -v``.

    Raises:
        ValueError: the log is not in the expected format.
    """
    found = list(_KERNEL.finditer(log))
    if len(found) != log.count("Compiling entry function"):
        raise ValueError("the log of ptxas has an unknown format")
    names = demangle([one["name"] for one in found])
    return [
        KernelResources(
            name,
            one["architecture"],
            int(one["registers"]),
            sum(map(int, re.findall(r"(\d+) bytes smem", one["rest"]))),
            int(one["stack"]),
            int(one["stores"]) + int(one["loads"]),
        )
        for name, one in zip(names, found, strict=True)
    ]


def demangle(names: list[str]) -> list[str]:
    """Return demangled kernel names without namespace and argument list."""
    if not names:
        return []
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\([\w:]+\)$|^void |fused_res::cuda::", "", one) for one in lines.splitlines()]


def parse_build(folder: Path) -> dict[str, list[KernelResources]]:
    """Return every kernel of a build folder, by its source file."""
    sources = sorted(path.name for path in SOURCES.glob("*.cu"))
    return {name: parse((folder / f"csrc/cuda/{name}.o.log").read_text()) for name in sources}


def table(
    sources: Mapping[str, Iterable[KernelResources]], launches: Mapping[str, tuple[int, int]] | None = None
) -> str:
    """Return a Markdown table of registers per thread by kernel and architecture.

    Args:
        sources: kernels by source file.
        launches: threads per block and bytes of shared memory by kernel name.
    """
    kernels = {source: list(some) for source, some in sources.items()}
    architectures = list(dict.fromkeys(one.architecture for some in kernels.values() for one in some))
    architectures.sort(key=lambda name: int(re.sub(r"\D", "", name)))
    columns = ["threads", "shared memory", *architectures]
    lines = ["| kernel | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for source, some in kernels.items():
        lines.append(f"| **{source}** |" + " |" * len(columns))
        registers = {(one.name, one.architecture): one.registers for one in some}
        for name in sorted({one.name for one in some}):
            cells = [str(registers.get((name, architecture), "")) for architecture in architectures]
            threads, shared = (launches or {}).get(name, ("", ""))
            lines.append(f"| `{name}` | " + " | ".join([str(threads), str(shared), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(parse_build(Path(sys.argv[1]))))
