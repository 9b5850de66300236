"""Command line: `python -m fused_res` with `info`, `kernels`, `summarize` or `check`.

`info` prints versions, the compiled libraries, the backends and the environment variables, with a reason for everything
that is unavailable. `kernels` compiles the Triton kernels of the AOT manifest for NVIDIA GPUs, without needing one.
`summarize` and `check` apply the functions of these names to a model, see _cli.py.
"""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import fused_res
from fused_res import _cli, _extension, env
from fused_res.backends import registry, triton
from fused_res.nn import chain


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _format_rows(rows: Iterable[Sequence[str]]) -> str:
    """Format rows as left-aligned columns; the last column is not padded."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
    return "\n".join("  " + line for line in lines)


def _versions() -> str:
    threads = torch.get_num_threads()
    return _format_rows(
        [
            ("fused_res", fused_res.__version__),
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("triton", _version("triton")),
            ("machine", f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"),
            ("caches", _caches()),
        ]
    )


def _caches() -> str:
    if not _extension.loaded:
        return "unknown without the C++ extension"
    sizes, sources = _extension.cpu_caches(), _extension.cpu_cache_sources()
    levels = zip(("L1 data", "L2", "L3"), sizes, sources, strict=True)
    return ", ".join(f"{level} {_format_size(size)} ({source})" for level, size, source in levels)


def _format_size(size: int) -> str:
    exponent = next((e for e in (3, 2, 1) if size % 1024**e == 0), 0)
    return f"{size >> 10 * exponent} {('bytes', 'KiB', 'MiB', 'GiB')[exponent]}"


def _extension_rows() -> str:
    build = _extension.build_info
    rows = [("status", "loaded" if _extension.loaded else _extension.unavailable_reason)]
    if "torch" in build:
        rows += [
            ("built for", f"torch {build['torch']}, {build['python']}"),
            ("compiler", build["compiler"]),
            ("flags", build["flags"]),
            *((f"flags, {isa}", flags) for isa, flags in build["isas"].items() if flags),
        ]
    if _extension.loaded:
        rows.insert(1, ("instruction set", f"{_extension.cpu_isa()} (built: {', '.join(build['isas'])})"))
    return _format_rows(rows)


def _cuda_rows() -> str:
    library, reason = _extension.cuda_library()
    build, _ = _extension.read_build_record(library=_extension.CUDA_LIBRARY)
    rows = [("status", str(library or reason))]
    if "torch" in build:
        rows += [
            ("built for", f"torch {build['torch']}, CUDA {build['cuda']}"),
            ("compiler", f"nvcc {build['nvcc']}"),
            ("flags", build["flags"]),
            ("architectures", ", ".join(build["architectures"])),
        ]
    return _format_rows(rows)


def _backends() -> str:
    """Format the registry's table; each distinct reason is printed once, as a footnote."""
    table = registry.table()
    reasons = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if cell != "yes"))
    rows = [("", *next(iter(table.values())))]
    for op_family, row in table.items():
        rows.append(
            (op_family, *(cell if cell == "yes" else f"no ({reasons.index(cell) + 1})" for cell in row.values()))
        )
    sections = {_extension.unavailable_reason: "see C++ extension", _extension.cuda_library()[1]: "see CUDA kernels"}
    footnotes = (sections.get(reason, reason) for reason in reasons)
    lines = [_format_rows(rows), *(f"  ({number}) {reason}" for number, reason in enumerate(footnotes, 1))]
    if not chain.enabled:
        lines.append("  FUSED_RES=0 is set: fused, frozen and fused_res.nn modules run stock PyTorch operators")
    return "\n".join(lines)


def _variables() -> str:
    return _format_rows(
        (
            variable.name,
            (variable.read() or "none") + ("" if os.environ.get(variable.name) else " (default)"),
            variable.doc,
        )
        for variable in env.VARIABLES
    )


def info() -> str:
    """Return the text that the command `info` prints."""
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


def kernels(capabilities: Iterable[int], ptx: Path | None) -> Iterator[str]:
    """Compile the kernels of the AOT manifest.

    Args:
        capabilities: compute capabilities, such as 90.
        ptx: folder for the kernels' PTX files, which are numbered in the table's order; None: they are not written.

    Yields:
        A table of the kernels' resources for each compute capability.

    Raises:
        CommandError: Triton cannot compile kernels in this environment.
    """
    if triton.is_interpreted():
        raise _cli.CommandError("TRITON_INTERPRET is set, so Triton does not compile: unset it")
    try:
        from fused_res.backends.triton import aot, aot_manifest
    except ImportError as error:
        raise _cli.CommandError(f"Triton is not installed: pip install triton ({error})") from error
    for capability in capabilities:
        compiled = aot_manifest.compile_all(capability)
        if ptx is not None:
            ptx.mkdir(parents=True, exist_ok=True)
            for index, kernel in enumerate(compiled, 1):
                (ptx / f"sm_{capability}_{index:03}_{kernel.name}.ptx").write_text(f"// {kernel.variant}\n{kernel.ptx}")
        registers, shared = max(kernel.registers for kernel in compiled), max(kernel.shared for kernel in compiled)
        with_stack_frame = sum(kernel.stack > 0 for kernel in compiled)
        yield (
            f"sm_{capability}: {len(compiled)} kernels, at most {registers} registers and {shared / 1024:.1f} KiB of"
            f" shared memory, {with_stack_frame or 'none'} with a stack frame\n{aot.table(compiled)}"
        )


def _run_info(options: argparse.Namespace) -> None:
    print(info())


def _run_kernels(options: argparse.Namespace) -> None:
    for text in kernels(options.sm, options.ptx):
        print(text, end="\n\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_res", description="The state of fused_res on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    about = (
        "what is available on this machine, how it was built, and, for each missing part, the reason and the command"
        " that builds it"
    )
    info_parser = commands.add_parser("info", help=about, description=f"Prints {about}.")
    info_parser.set_defaults(run=_run_info)
    about = "compiles the Triton kernels ahead of time for NVIDIA GPUs, without needing one"
    kernels_parser = commands.add_parser(
        "kernels",
        help=about,
        description=f"C{about[1:]}. Prints a table for each architecture: every kernel's registers, shared memory,"
        " local memory accesses (register spills) and occupancy. Takes minutes.",
    )
    kernels_parser.set_defaults(run=_run_kernels)
    kernels_parser.add_argument(
        "--sm",
        nargs="+",
        type=int,
        choices=CAPABILITIES,
        default=CAPABILITIES,
        metavar="N",
        help=f"compute capabilities, any of {', '.join(map(str, CAPABILITIES))} (default: all)",
    )
    kernels_parser.add_argument(
        "--ptx", type=Path, metavar="DIR", help="also write each kernel's PTX to this folder (default: no PTX)"
    )
    _cli.add_commands(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except _cli.CommandError as error:
        parser.exit(error.status, f"{error}\n")


if __name__ == "__main__":
    main()
