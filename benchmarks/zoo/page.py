"""The zoo's section of docs/models.md, generated from the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.zoo import measure
from benchmarks.zoo.compare import excesses
from benchmarks.zoo.models import PACKAGES, ZOO

Row = dict[str, Any]

HEADER = (
    "model",
    "input",
    "norms",
    "fused: training",
    "evaluation",
    "equal",
    "speed: training",
    "evaluation",
    "frozen",
)
NOTE = (
    "*Fused*: share of the norms of one forward that run fused, counted from outside: those for which neither PyTorch's"
    " batch norm nor the forward of a frozen norm is called. *Equal*: outputs, gradients, buffers and frozen outputs in"
    " float64, relative to stock PyTorch. *Speed* of a training step (forward, backward, SGD) and of evaluation of"
    " `fuse(model)`, and of `freeze(model)`: the time of stock PyTorch over that of fused_res, medians of interleaved"
    " runs in one process, float32, channels_last, random weights."
)


def share(fused: int, total: int) -> str:
    """Return a share as text; only a complete one is 100 %."""
    return "-" if not total else f"{int(100 * fused / total)} %"


def name_of(row: Row) -> str:
    return row["name"].partition(":")[2]


def norms_fused(row: Row) -> str:
    training, evaluation = row["norms"]["training"], row["norms"]["evaluation"]
    if training == evaluation:
        return f"{training[0]} of {training[1]} norms"
    return f"{training[0]} of {training[1]} norms in training, {evaluation[0]} of {evaluation[1]} in evaluation"


def cells(row: Row) -> list[str]:
    """Return the cells of one model."""
    name, shape = name_of(row), "x".join(map(str, row["shape"]))
    if "failure" in row:
        return [name, shape, "", "", "", f"not measured: {row['failure']}".replace("|", "\\|"), "", "", ""]
    speeds = measure.speedups(row)
    (_, total) = row["norms"]["training"]
    return [
        name,
        shape,
        str(total),
        share(*row["norms"]["training"]),
        share(*row["norms"]["evaluation"]),
        "; ".join(excesses(row["errors"])) or "yes",
        *(report.ratio(speeds[mode]) if mode in speeds else "" for mode in measure.BASELINES),
    ]


def counted(rows: Sequence[Row], mode: str) -> tuple[int, int]:
    """Return the number of fused norms and of all norms of several models in one mode."""
    pairs = [row["norms"][mode] for row in rows]
    return sum(fused for fused, _ in pairs), sum(total for _, total in pairs)


def summary_table(rows: Sequence[Row]) -> str:
    """Return a table with one row per package, and one for all."""
    return report.table(SUMMARY_HEADER, summary_rows(rows))


SUMMARY_HEADER = ("package", "models", "norms", "fused: training", "evaluation", "equal", *HEADER[-3:])


def summary_rows(rows: Sequence[Row]) -> list[list[str]]:
    measured = [row for row in rows if "failure" not in row]
    groups = {package: [row for row in measured if row["package"] == package] for package in PACKAGES}
    table = [summary_row(name, group) for name, group in groups.items() if group]
    popular = {model.title for model in ZOO if model.popular}
    if chosen := [row for row in measured if row["name"] in popular]:
        table.append(summary_row("most used", chosen))
    return [*table, summary_row("all", measured)] if measured else table


def summary_row(name: str, rows: Sequence[Row]) -> list[str]:
    equal = sum(not list(excesses(row["errors"])) for row in rows)
    speeds = [measure.speedups(row) for row in rows]
    means = []
    for mode in measure.BASELINES:
        values = [one[mode] for one in speeds if mode in one]
        means.append(f"{report.ratio(report.geometric_mean(values))} ({min(values):.2f}x)" if values else "")
    training, evaluation = counted(rows, "training"), counted(rows, "evaluation")
    return [name, str(len(rows)), str(training[1]), share(*training), share(*evaluation), f"{equal}", *means]


def section(document: dict[str, Any]) -> str:
    """Return the section about one results document, in Markdown."""
    (run,) = document["runs"]
    rows = run["cases"]
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({(row["commit"] or "no commit")[:12] for row in rows})
    versions = {row["package"]: row["version"] for row in rows if row.get("version")}
    packages = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    parts = [
        f"`{document['command']}` · {report.machine(run['environment'])} · {packages} · {when} · commit"
        f" {', '.join(commits)}",
        NOTE,
        "Speeds in this table are geometric means; in brackets, the slowest model.",
        report.markdown(SUMMARY_HEADER, summary_rows(rows)),
    ]
    for package in PACKAGES:
        chosen = [row for row in rows if row["package"] == package]
        if chosen:
            parts += [f"**{package}**", report.markdown(HEADER, [cells(row) for row in chosen])]
            left = [f"- {name_of(row)}: {'; '.join(row['reasons'])}" for row in chosen if row.get("reasons")]
            if left:
                parts.append("Norms that run stock:\n\n" + "\n".join(left))
    present = {row["name"] for row in rows}
    absent = [model.title for model in ZOO if model.title not in present]
    if absent:
        parts.append(f"Not measured: {', '.join(absent)}.")
    return "\n\n".join(parts)
