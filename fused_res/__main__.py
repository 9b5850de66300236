"""`python -m fused_res info`: what is available here, how it was built, and if something is missing, why."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence

import torch

import fused_res
from fused_res import _extension, env
from fused_res.backends import registry


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
            ("CUDA", build["cuda"] or "not built"),
        ]
    if _extension.loaded:
        rows.insert(1, ("instruction set", f"{_extension.cpu_isa()}, of {', '.join(build['isas'])}"))
    return _rows(rows)


def _backends() -> str:
    """The registry's table; a reason is long and the same for many cells, so it stands below, once."""
    table = registry.table()
    reasons = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if cell != "yes"))
    rows = [("", *next(iter(table.values())))]
    for stem, row in table.items():
        rows.append((stem, *(cell if cell == "yes" else f"no ({reasons.index(cell) + 1})" for cell in row.values())))
    below = ("see C++ extension" if reason == _extension.reason else reason for reason in reasons)
    return "\n".join([_rows(rows), *(f"  ({number}) {reason}" for number, reason in enumerate(below, 1))])


def _variables() -> str:
    return _rows(
        (
            variable.name,
            variable.read() + ("" if os.environ.get(variable.name) else " (default)"),
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
            ("Backends", _backends()),
            ("Environment variables", _variables()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_res", description=__doc__)
    parser.add_subparsers(dest="command", required=True).add_parser("info", help="print it")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
