"""Charts, drawn from the data that is written as JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt

from benchmarks import report

OURS_COLORS = ("#0b6e4f", "#53a987")
STOCK_COLORS = ("#8d99ae", "#4a5572", "#d9a05b", "#b5651d")
#: One color per provider in every chart: fused_res green, eager PyTorch grey, compiled PyTorch brown.
COLORS = {
    OURS_COLORS[0]: ("ours",),
    OURS_COLORS[1]: ("ours+compile", "ours+graph", "ours-packed", "ours-direct"),
    "#8fc7ae": ("ours-triton", "ours-norms", "ours-folded", "ours+stats"),
    "#2f7f93": ("ours-cuda",),
    STOCK_COLORS[0]: ("eager", "aten"),
    STOCK_COLORS[1]: ("eager-channels-last", "aten-unfused"),
    STOCK_COLORS[2]: ("compile", "eager-channels-last+graph", "aten+stats", "eager-empty"),
    STOCK_COLORS[3]: ("compile-channels-last",),
    "#e3c567": ("compile-freezing",),
    "#7a4a12": ("compile-max-autotune",),
    "#7d5ba6": ("openvino", "onednn-fused"),
    "#c27ba0": ("onnxruntime",),
    "#76b7d8": ("cudnn", "cudnn-fused"),
}
COLOR_OF = {name: color for color, names in COLORS.items() for name in names}


def save(figure: Any, document: dict[str, Any], path: Path, title: str) -> None:
    """Write the figure to the PNG file `path`, with a title, the machine and the versions."""
    env = document["runs"][0]["environment"]
    machine = gpu["name"] if (gpu := env.get("gpu")) else f"{env['cpu']}, {env['threads']} threads"
    versions = f"torch {env['torch']}, fused_res {env['fused_res']}, {env['date'][:10]}"
    figure.suptitle(f"{title}\n{machine}, {versions}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def grouped_bars(axis: Any, labels: Sequence[str], series: dict[str, Sequence[float]], text: str = "{:.0f}") -> None:
    """Draw horizontal bars: the first label on top, one bar per provider."""
    height = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        positions = [row + (index - (len(series) - 1) / 2) * height for row in range(len(labels))]
        bars = axis.barh(positions, values, height * 0.92, label=name, color=COLOR_OF[name])
        axis.bar_label(bars, [text.format(value) for value in values], fontsize=6, padding=2, color="#333333")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.45, -0.55)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.08)


def panels(document: dict[str, Any], height: float) -> Any:
    """Return a figure with one panel per run (allocator setting) side by side, and pairs of axis and run."""
    runs = document["runs"]
    figure, axes = plt.subplots(
        1, len(runs), figsize=(1.5 + 5.5 * len(runs), height), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, run in zip(axes[0], runs, strict=True):
        axis.set_title(report.allocator_title(run), fontsize=10)
    return figure, list(zip(axes[0], runs, strict=True))


def legend_below(figure: Any, *axes: Any) -> None:
    """Draw one legend for all axes, without repeated entries."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(),
        map(report.provider_title, entries),
        fontsize=8,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )


def bandwidth(document: dict[str, Any], path: Path) -> None:
    """Draw GB/s of compulsory traffic for each case, compared with the copy bandwidth."""
    cases = document["runs"][0]["cases"]
    providers = list(cases[0]["providers"])
    figure, pairs = panels(document, 1.6 + len(cases) * (0.12 + 0.11 * len(providers)))
    for axis, run in pairs:
        series = {
            name: [case["fewest_bytes"] / case["providers"][name]["median_s"] / 1e9 for case in run["cases"]]
            for name in providers
        }
        grouped_bars(axis, [case["name"] for case in cases], series, "{:.1f}")
        copy = run["ceilings"]["copy_bytes_per_s"] / 1e9
        axis.axvline(copy, color="#b00020", linewidth=1, linestyle="--", label="measured copy bandwidth")
        axis.set_xlabel(f"GB/s of compulsory traffic (higher is better; copy bandwidth: {copy:.1f})")
    legend_below(figure, pairs[0][0])
    mode = document["options"]["mode"]
    passes = "forward and backward" if mode == "train" else "inference"
    save(figure, document, path, f"batch norm (+ add) + ReLU, {passes}")


def speedups(document: dict[str, Any], path: Path, title: str) -> None:
    """Draw the speed of each provider relative to eager channels_last, or to the last provider without that one.

    Providers of some cases only, and those without a color, are left out: the candidate algorithms of `conv`.
    """
    cases = document["runs"][0]["cases"]
    providers = [name for name in report.common_providers(cases) if name in COLOR_OF]
    figure, pairs = panels(document, 1.6 + len(cases) * (0.15 + 0.13 * len(providers)))
    base = "eager-channels-last" if "eager-channels-last" in providers else providers[-1]
    for axis, run in pairs:
        series = {name: report.ratios(run["cases"], base, name) for name in providers}
        grouped_bars(axis, [case["name"] for case in cases], series, "{:.2f}")
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.set_xlabel(f"speed relative to {report.provider_title(base)} (higher is better)")
    legend_below(figure, pairs[0][0])
    save(figure, document, path, title)


def overview(documents: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the README's figure: full networks relative to stock PyTorch, inference left, training right."""
    base = "eager-channels-last"
    sides = {"inference": ("infer",), "training step": ("model-resnet18", "model")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2), layout="constrained")
    for axis, (title, names) in zip(axes, sides.items(), strict=True):
        cases = [case for name in names if name in documents for case in documents[name]["runs"][0]["cases"]]
        shown = [case for case in cases if case["model"] in ("resnet18", "resnet50") and case["batch"] != 4]
        series = {name: report.ratios(shown, base, name) for name in report.common_providers(shown)}
        labels = [f"{case['model'].replace('resnet', 'ResNet-')}\nbatch {case['batch']}" for case in shown]
        grouped_bars(axis, labels, series, "{:.2f}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"speed relative to {report.provider_title(base)} (higher is better)", fontsize=8)
    legend_below(figure, *axes)
    case = documents["infer"]["runs"][0]["cases"][0]
    save(figure, documents["infer"], path, f"ResNets in {case['dtype']}, {case['size']}x{case['size']} pixels")


def roofline_times(document: dict[str, Any], path: Path) -> None:
    """Draw the roofline time of each level of fusion, stacked by stage, in one panel per case."""
    (run,) = document["runs"]
    cases = run["cases"]
    figure, axes = plt.subplots(1, len(cases), figsize=(1.5 + 4.5 * len(cases), 3), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], cases, strict=True):
        levels = list(case["levels"])
        left = [0.0] * len(levels)
        for stage in case["levels"][levels[0]]["stages"]:
            widths = [case["levels"][level]["stages"][stage]["floor_s"] * 1e3 for level in levels]
            axis.barh(levels, widths, left=left, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(case["name"], fontsize=9)
        axis.set_xlabel("roofline ms")
        axis.spines[["top", "right"]].set_visible(False)
    legend_below(figure, axes[0][0])
    figure.suptitle(f"calculated for {run['device']['name']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def predicted_times(document: dict[str, Any], path: Path) -> None:
    """Draw the predicted GPU time of each provider, in one panel per case."""
    (run,) = document["runs"]
    figure, axes = plt.subplots(1, len(run["cases"]), figsize=(6, 3), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], run["cases"], strict=True):
        names = list(case["providers"])
        axis.barh(names, [case["providers"][name]["gpu_s"] * 1e3 for name in names])
        axis.invert_yaxis()
        axis.set_title(case["name"], fontsize=9)
        axis.set_xlabel("predicted ms of GPU time")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"predicted for {run['device']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def time_against_memory(document: dict[str, Any], path: Path) -> None:
    """Draw each training configuration as a point: bytes saved for backward, and time of a step."""
    figure, pairs = panels(document, 5)
    for axis, run in pairs:
        case = run["cases"][0]
        for prefix, color, marker, below in (("ours", OURS_COLORS[0], "o", True), ("", STOCK_COLORS[1], "s", False)):
            points = {
                name: (provider["saved_bytes"] / case["batch"] / 1e6, provider["median_s"])
                for name, provider in case["providers"].items()
                if name.startswith("ours") == bool(prefix)
            }
            axis.scatter(*zip(*points.values(), strict=True), s=60, color=color, marker=marker)
            for name, point in points.items():
                offset = (
                    0,
                    -14 if below else 8,
                )  # labels of fused_res below their points and of stock PyTorch above, as points are close
                axis.annotate(name, point, offset, textcoords="offset points", ha="center", fontsize=7)
        axis.margins(0.22)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("saved for backward, MB/image")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    pairs[0][0].set_ylabel("seconds for a training step")
    case = document["runs"][0]["cases"][0]
    shape = f"batch {case['batch']}, {case['size']}x{case['size']}"
    save(figure, document, path, f"{case['model']}, {shape}: time against memory")


def waterfall(
    document: dict[str, Any], path: Path, levels: Sequence[str], stock: str, floor: Callable[..., tuple[float, float]]
) -> None:
    """Draw the time of each level of fusion of each block: what a level saves starts where the level before ends.

    Args:
        levels: names of the levels, the least fused first.
        stock: name of stock PyTorch's provider.
        floor: function of a run, a case and a level that returns the seconds of its bytes and of its products.
    """
    run = document["runs"][-1]
    cases = run["cases"]
    figure, axes = plt.subplots(
        (len(cases) + 1) // 2,
        2,
        figsize=(11, 1.0 + 1.55 * ((len(cases) + 1) // 2)),
        squeeze=False,
        layout="constrained",
    )
    rows = [report.provider_title(stock), *levels]
    for axis, case in zip(axes.flat, cases, strict=False):
        times = [case["providers"][name]["median_s"] * 1e3 for name in (stock, *levels)]
        axis.barh(rows, times, color=[COLOR_OF[stock], *[COLOR_OF["ours"]] * len(levels)])
        for row, (before, time) in enumerate(itertools.pairwise(times[1:]), start=2):
            saved, lost = max(before - time, 0), max(time - before, 0)
            axis.barh(row, saved, left=time, color="#dddddd")
            axis.barh(row, lost, left=before, color="#d98c8c")
        for row, level in enumerate(levels, start=1):
            memory, products = (seconds * 1e3 for seconds in floor(run, case, level))
            axis.plot([memory] * 2, [row - 0.4, row + 0.4], color="#b00020", linewidth=1.2)
            axis.plot([products] * 2, [row - 0.4, row + 0.4], color="#333333", linewidth=1.2, linestyle=":")
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(case["name"], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        for row, time in enumerate(times):
            axis.text(time, row, f" {time:.2f}", va="center", fontsize=6)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "ms, forward and backward. Gray: saved by the level; pink: lost; red line: bytes at copy bandwidth; dotted:"
        " products at peak",
        fontsize=8,
    )
    save(figure, document, path, f"fusions of residual blocks, {run.get('dtype', 'bfloat16')} training")
