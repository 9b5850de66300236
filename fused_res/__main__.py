"""`python -m fused_res info`: what is available here, how it was built, and if something is missing, why.

`python -m fused_res kernels`: the Triton kernels that ship, compiled for any NVIDIA GPU, without one.
"""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import fused_res
from fused_res import _extension, env
from fused_res.backends import cpu, registry, triton


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, the last one as long as it likes."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
    return "\n".join("  " + line for line in lines)


def _versions() -> str:
    return _rows(
        [
            ("fused_res", fused_res.__version__),
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("triton", _version("triton")),
            ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
            ("caches", ", ".join(f"{size >> 10} KiB" for size in cpu.caches()) + " (L1 data, L2, L3; 0: unknown)"),
        ]
    )


def _extension_rows() -> str:
    build = _extension.build_info
    rows = [("status", "loaded" if _extension.loaded else _extension.reason)]
    if "torch" in build:
        rows += [
            ("built for", f"torch {build['torch']}, {build['python']}"),
            ("compiler", build["compiler"]),
            ("flags", build["flags"]),
            *((f"flags, {isa}", flags) for isa, flags in build["isas"].items() if flags),
        ]
    if _extension.loaded:
        rows.insert(1, ("instruction set", f"{_extension.cpu_isa()}, of {', '.join(build['isas'])}"))
    return _rows(rows)


def _cuda_rows() -> str:
    library, reason = _extension.cuda_library()
    build, _ = _extension.inspect(library=_extension.CUDA)
    rows = [("status", str(library or reason))]
    if "torch" in build:
        rows += [
            ("built for", f"torch {build['torch']}, CUDA {build['cuda']}"),
            ("compiler", f"nvcc {build['nvcc']}"),
            ("flags", build["flags"]),
            ("architectures", ", ".join(build["architectures"])),
        ]
    return _rows(rows)


def _backends() -> str:
    """The registry's table; a reason is long and the same for many cells, so it stands below, once."""
    table = registry.table()
    reasons = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if cell != "yes"))
    rows = [("", *next(iter(table.values())))]
    for stem, row in table.items():
        rows.append((stem, *(cell if cell == "yes" else f"no ({reasons.index(cell) + 1})" for cell in row.values())))
    above = {_extension.reason: "see C++ extension", _extension.cuda_library()[1]: "see CUDA kernels"}
    below = (above.get(reason, reason) for reason in reasons)
    return "\n".join([_rows(rows), *(f"  ({number}) {reason}" for number, reason in enumerate(below, 1))])


def _variables() -> str:
    return _rows(
        (
            variable.name,
            (variable.read() or "none") + ("" if os.environ.get(variable.name) else " (default)"),
            variable.doc,
        )
        for variable in env.VARIABLES
    )


def info() -> str:
    return "\n\n".join(
        f"{title}\n{body}"
        for title, body in [
            ("Versions", _versions()),
            ("C++ extension", _extension_rows()),
            ("CUDA kernels", _cuda_rows()),
            ("Backends", _backends()),
            ("Environment variables", _variables()),
        ]
    )


CAPABILITIES = (80, 90, 100, 120)


class CannotCompileError(RuntimeError):
    """Kernels cannot be compiled here; the message says why."""


def kernels(capabilities: Iterable[int], ptx: Path | None) -> Iterator[str]:
    """A table for each compute capability; the code itself goes to the folder ``ptx``, in the table's order."""
    if triton.interpreting():
        raise CannotCompileError("TRITON_INTERPRET is set, with which Triton does not compile: unset it")
    try:
        from fused_res.backends.triton import aot, shipped
    except ImportError as error:
        raise CannotCompileError(f"Triton is missing: pip install triton ({error})") from error
    for capability in capabilities:
        made = shipped.compile_all(capability)
        if ptx is not None:
            ptx.mkdir(parents=True, exist_ok=True)
            for index, one in enumerate(made, 1):
                (ptx / f"sm_{capability}_{index:03}_{one.name}.ptx").write_text(f"// {one.variant}\n{one.ptx}")
        registers, shared = max(one.registers for one in made), max(one.shared for one in made)
        spilling = sum(one.stack > 0 for one in made)
        yield (
            f"sm_{capability}: {len(made)} kernels, at most {registers} registers and {shared / 1024:.1f} KiB of"
            f" shared memory, {spilling or 'none'} with a stack\n{aot.table(made)}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_res", description="What fused_res is, on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    about = "what is available here, how it was built, and if something is missing, why and what to type"
    commands.add_parser("info", help=about, description=f"Prints {about}.")
    about = "compiles the Triton kernels that ship, for NVIDIA GPUs that need not be here"
    compiling = commands.add_parser(
        "kernels",
        help=about,
        description=f"C{about[1:]}. Prints a table for each architecture: every kernel's registers, shared memory,"
        " spills and occupancy. Takes minutes.",
    )
    compiling.add_argument(
        "--sm",
        nargs="+",
        type=int,
        choices=CAPABILITIES,
        default=CAPABILITIES,
        metavar="N",
        help=f"compute capabilities, of {', '.join(map(str, CAPABILITIES))} (default: all)",
    )
    compiling.add_argument(
        "--ptx", type=Path, metavar="DIR", help="also write each kernel's PTX into this folder (default: nowhere)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        print(info())
        return
    try:
        for text in kernels(chosen.sm, chosen.ptx):
            print(text, end="\n\n", flush=True)
    except CannotCompileError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
