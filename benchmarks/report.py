"""Text and Markdown tables of result data."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks import allocator

ALLOCATOR_TITLES = {allocator.DEFAULT: "default allocator", allocator.WARM: "warm allocator", None: "calculated"}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of text columns; the first is flush left, the others flush right."""
    cells = [list(map(str, header)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the same table in Markdown."""
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


#: Display names of the providers.
PROVIDER_TITLES = {
    "ours": "fused_res",
    "ours-direct": "without Winograd",
    "ours-norms": "fused norms, ATen convolutions",
    "ours-folded": "folded norms, ATen convolutions",
    "eager": "PyTorch",
    "eager-channels-last": "PyTorch in channels_last",
    "compile": "torch.compile",
    "compile-channels-last": "torch.compile in channels_last",
    "compile-freezing": "torch.compile with freezing",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "checkpoint": "PyTorch with checkpointed blocks",
    "ours none": "fused_res",
    "ours norm": 'fused_res, recompute="norm"',
    "ours conv": 'fused_res, recompute="conv"',
}


def provider_title(provider: str) -> str:
    return PROVIDER_TITLES.get(provider, provider)


def milliseconds(seconds: float) -> str:
    """Return a time in ms as text, with three significant digits or more."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}"


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def spread(provider: dict[str, Any]) -> str:
    """Return the distance from the 10th to the 90th percentile, relative to the median, as text."""
    return f"{(provider['p90_s'] - provider['p10_s']) / provider['median_s']:.0%}"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(cases: Sequence[dict[str, Any]], name: str, other: str) -> list[float]:
    """Return the time of provider `name` divided by the time of `other`, for each case."""
    return [case["providers"][name]["median_s"] / case["providers"][other]["median_s"] for case in cases]


def minimum(case: dict[str, Any], name: str) -> float:
    """Return the shortest time of provider `name` in seconds."""
    return float(min(case["providers"][name]["samples_s"]))


def common_providers(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Return the providers of all cases: some do not support every shape."""
    return [name for name in cases[0]["providers"] if all(name in case["providers"] for case in cases)]


def product_peak(run: dict[str, Any], dtype: str) -> float | None:
    """Return the measured FLOP/s of products of `dtype`: those of bfloat16, where the CPU has them, or of FMAs."""
    measured = run["ceilings"]
    names = ("bf16_flops_per_s",) * (dtype == "bfloat16") + ("fma_flops_per_s",)
    return next((float(measured[name]) for name in names if name in measured), None)


def allocator_title(run: dict[str, Any]) -> str:
    """Return what identifies a run within its document: the allocator setting, or on a GPU the name of the GPU."""
    gpu = run["environment"].get("gpu")
    return gpu["name"] if gpu else ALLOCATOR_TITLES[run["allocator"]]


def wide_times(cases: Sequence[dict[str, Any]]) -> str:
    """Return a table with a row per case and a column per provider: median, spread, time relative to the first one."""
    names = list(cases[0]["providers"])
    rows = []
    for case in cases:
        first = case["providers"][names[0]]
        row = [case["name"]]
        for name in names:
            provider = case["providers"][name]
            cell = f"{milliseconds(provider['median_s'])} ±{spread(provider)}"
            row.append(cell if provider is first else f"{cell} {ratio(provider['median_s'] / first['median_s'])}")
        rows.append(row)
    note = f"median ms, ±spread (10th to 90th percentile), time relative to {names[0]}"
    return note + "\n" + table(["case", *names], rows)


def long_times(cases: Sequence[dict[str, Any]]) -> str:
    """Return a table per case with a row per provider, with the phases of the step."""
    parts = []
    for case in cases:
        names = list(case["providers"])
        first = case["providers"][names[0]]
        phases = list(first["phases_s"])
        rows = [
            [
                name,
                milliseconds(provider["median_s"]),
                spread(provider),
                ratio(provider["median_s"] / first["median_s"]),
                *(milliseconds(provider["phases_s"][p]) if p in provider["phases_s"] else "-" for p in phases),
                provider["rounds"],
            ]
            for name, provider in case["providers"].items()
        ]
        header = [case["name"], "median ms", "p10-p90", f"time / {names[0]}", *(f"{p} ms" for p in phases), "rounds"]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def subcommand_of(document: dict[str, Any]) -> str:
    """Return the subcommand of a document; its name may differ, as a suite has several documents of one subcommand."""
    return document["command"].split()[3]  # python -m benchmarks SUBCOMMAND ...


def environment(document: dict[str, Any]) -> str:
    """Return one line on the machine, its versions and its measured ceilings."""
    run = document["runs"][0]
    env = run["environment"]
    commit = f"commit {env['commit'][:12]}" if env["commit"] else "no commit"
    where = machine(env) if "backend" in env else f"calculated · {versions(env)}"
    return " · ".join([where, *ceilings(run), commit, env["date"]])


def machine(env: dict[str, Any]) -> str:
    """Return one line on the hardware, the backend and the versions."""
    if gpu := env.get("gpu"):
        where, kernels = f"{gpu['name']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}", ""
    else:
        where = f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads"
        kernels = f" ({env['isa'] or 'no C++ kernels'})"
    return f"{where} · backend {env['backend']}{kernels} · {versions(env)}"


def versions(env: dict[str, Any]) -> str:
    return f"torch {env['torch']} · fused_res {env['fused_res']}"


def ceilings(run: dict[str, Any]) -> list[str]:
    """Return the measured ceilings as text; older results and results of a GPU have no FMA peak."""
    measured = run.get("ceilings", {})
    texts = {
        "copy_bytes_per_s": "copy bandwidth {:.1f} GB/s (read + write)",
        "fma_flops_per_s": "FMA peak {:.0f} GFLOP/s",
        "bf16_flops_per_s": "peak of bfloat16 products {:.0f} GFLOP/s",
    }
    return [text.format(measured[name] / 1e9) for name, text in texts.items() if name in measured]
