"""The figures, drawn from the contents of results.json. Plain networks are orange, residual networks blue."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullFormatter

from benchmarks.plots import OURS_COLORS as GREEN
from benchmarks.plots import STOCK_COLORS as GREY

COLORS = {"plain": "#c8591c", "residual": "#1d5f9e"}
#: Color ranges from the shallowest network to the deepest.
SHADES = {"plain": ("#f4c19c", "#7c2d06"), "residual": ("#a9cdea", "#0b2f57")}
STATES = {
    "initial": "at initialization",
    "trained": "after training",
    "initial, no norm": "at initialization,\nwithout batch norm",
}
DPI = 115


def draw(document: dict[str, Any], folder: Path) -> None:
    """Draw the figures of all sections of `document` into `folder`."""
    for section, measured in document["sections"].items():
        for name, figure in FIGURES.get(section, {}).items():
            drawn = figure(measured)
            drawn.savefig(folder / f"{name}.png", dpi=DPI)
            plt.close(drawn)


def errors_by_depth(measured: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, which in zip(axes, ("train", "test"), strict=True):
        for kind, color in COLORS.items():
            entries = [entry for entry in measured["by_depth"] if entry["kind"] == kind]
            depths = sorted({entry["depth"] for entry in entries})
            errors = [[e[f"{which}_error"] for e in entries if e["depth"] == depth] for depth in depths]
            axis.plot(depths, [statistics.fmean(values) for values in errors], "o-", color=color, label=kind)
            axis.fill_between(
                depths, [min(values) for values in errors], [max(values) for values in errors], color=color, alpha=0.2
            )
        axis.set_xticks(depths)
        axis.set_xlabel("layers")
        axis.set_title("training error" if which == "train" else "test error", fontsize=10)
        _tidy(axis)
    axes[0].set_ylabel("error, %")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="upper left")
    seeds = len({entry["seed"] for entry in measured["by_depth"]})
    note = f"mean of {seeds} seeds, shading: minimum to maximum" if seeds > 1 else "one seed"
    figure.suptitle(f"Final error by depth ({note})", fontsize=11)
    return figure


def training_curves(measured: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, COLORS, strict=True):
        depths = sorted({entry["depth"] for entry in measured["by_depth"]})
        for color, depth in zip(_shades(kind, len(depths)), depths, strict=True):
            curves = [e["curve_error"] for e in measured["by_depth"] if (e["kind"], e["depth"]) == (kind, depth)]
            epochs = range(1, len(curves[0]) + 1)
            by_epoch = list(zip(*curves, strict=True))
            axis.plot(epochs, [statistics.fmean(v) for v in by_epoch], color=color, label=str(depth))
            axis.fill_between(
                epochs, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=color, alpha=0.15, linewidth=0
            )
        axis.set_xlabel("epoch")
        axis.set_title(f"{kind} networks", fontsize=10, color=COLORS[kind])
        axis.legend(
            title="layers",
            frameon=False,
            fontsize=7.5,
            title_fontsize=7.5,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=5,
            handlelength=1,
        )
        _tidy(axis)
    axes[0].set_ylabel("training error, %")
    axes[0].set_ylim(0, 100)
    figure.suptitle("Training error by epoch (with augmentation)", fontsize=11)
    return figure


def gradient_norms(measured: dict[str, Any]) -> Any:
    depths = sorted({curve["depth"] for curve in measured["curves"]})
    figure, axes = plt.subplots(
        len(STATES), len(depths), figsize=(8, 7), sharey="row", squeeze=False, layout="constrained"
    )
    for row, (state, title) in zip(axes, STATES.items(), strict=True):
        for axis, depth in zip(row, depths, strict=True):
            for curve in measured["curves"]:
                if (curve["state"], curve["depth"]) != (state, depth):
                    continue
                by_layer = list(zip(*curve["norms"], strict=True))
                layers = range(1, len(by_layer) + 1)
                color = COLORS[curve["kind"]]
                middle = [statistics.median(values) for values in by_layer]
                axis.plot(layers, middle, color=color, label=curve["kind"], linewidth=1.4)
                axis.fill_between(
                    layers, [min(v) for v in by_layer], [max(v) for v in by_layer], color=color, alpha=0.2, linewidth=0
                )
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            _tidy(axis)
        row[0].set_ylabel(title, fontsize=9)
        _at_least_a_decade(row[0])
    for depth, top, bottom in zip(depths, axes[0], axes[-1], strict=True):
        top.set_title(f"{depth} layers", fontsize=10)
        bottom.set_xlabel("layer (1 = first)", fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle("Norm of the loss gradient with respect to each layer's weight", fontsize=11)
    return figure


def costs(measured: dict[str, Any]) -> Any:
    networks = measured["networks"]
    labels = [str(network["layers"]) for network in networks]
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    (size, train), (memory, infer) = axes
    bars = size.bar(labels, [n["parameters"] / 1e6 for n in networks], 0.5, color="#b9c6d3")
    size.bar_label(bars, [f"{n['flops_per_image'] / 1e9:.2f}" for n in networks], fontsize=8, padding=2)
    size.set_title("parameters, millions (labels: forward GFLOP per image)", fontsize=9, loc="left")
    _bars(train, networks, "train", "median_s", 1e3)
    train.set_title("training step, ms", fontsize=9, loc="left")
    _bars(memory, networks, "train", "saved_bytes", 1e-6)
    memory.set_title("saved for backward, MB", fontsize=9, loc="left")
    _bars(infer, networks, "infer", "median_s", 1e3)
    infer.set_title("inference, ms", fontsize=9, loc="left")
    for axis in axes.flat:
        axis.set_xlabel("layers of the ResNet", fontsize=9)
        axis.margins(y=0.12)
        _tidy(axis)
    handles, names = train.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    shape = f"{measured['batch']} images of {measured['side']}x{measured['side']}, {measured['threads']} threads"
    figure.suptitle(f"Time and memory by depth, fused_res and stock PyTorch ({shape})", fontsize=11)
    return figure


def _bars(axis: Any, networks: Sequence[dict[str, Any]], mode: str, quantity: str, scale: float) -> None:
    """Draw one group of bars per network, with one bar per provider."""
    colors = {"ours": GREEN[0], "eager": GREY[0], "eager-channels-last": GREY[1]}
    names = {"ours": "fused_res", "eager": "stock PyTorch", "eager-channels-last": "stock PyTorch, channels_last"}
    width = 0.8 / len(colors)
    for index, (provider, color) in enumerate(colors.items()):
        positions = [at + (index - (len(colors) - 1) / 2) * width for at in range(len(networks))]
        heights = [network[mode][provider][quantity] * scale for network in networks]
        axis.bar(positions, heights, 0.92 * width, color=color, label=names[provider])
    axis.set_xticks(range(len(networks)), [str(network["layers"]) for network in networks])


def _shades(kind: str, count: int) -> list[Any]:
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(kind, SHADES[kind])
    return [shades(index / (count - 1)) for index in range(count)]


def _at_least_a_decade(axis: Any) -> None:
    """Make a logarithmic axis span at least a decade, so that nearly equal values look nearly equal."""
    low, high = axis.get_ylim()
    if high < 10 * low:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


#: Drawing functions by section and by the figure's file name.
FIGURES: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "degradation": {"errors-by-depth": errors_by_depth, "training-curves": training_curves},
    "gradients": {"gradient-norms": gradient_norms},
    "spectrum": {"costs": costs},
}
