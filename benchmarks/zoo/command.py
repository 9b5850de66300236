"""`zoo`: models of public packages, as their packages ship them: norms that run fused, equality with stock, speed.

Every model is compared with stock PyTorch in float64, its norms are counted from outside, and its training step, its
evaluation and its frozen evaluation are timed in float32 in channels_last, interleaved with stock PyTorch. The results
file has one row per model and is written after each of them; a model that is measured again replaces only its own row.
Models run in a process of their own: one that raises, crashes or exceeds its time limit gets a row that says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks import options as common
from benchmarks.zoo import measure
from benchmarks.zoo.compare import excesses
from benchmarks.zoo.models import ZOO, ZooModel, missing_packages
from benchmarks.zoo.page import norms_fused, summary_table
from fused_res import backends

HELP = "models of public packages: norms that run fused, equality with stock, speed"

Document = dict[str, Any]
Work = Callable[[Connection, list[str], measure.Settings], None]
#: Parts of the environment that are equal for all rows of a results file.
MACHINE = ("cpu", "cores", "threads", "isa", "torch")
QUICK = ("torchvision:shufflenet_v2_x1_0", "timm:resnet50")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="models whose name contains PATTERN or matches it as a shell pattern, such as 'timm:*', in upper or lower "
        "case; the other rows of the results file stay (default: all)",
    )
    parser.add_argument("--resume", action="store_true", help="skip models that the results file has a row for")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only compare and count; write nothing, and exit with status 1 if a model differs from stock or has fewer "
        "fused norms than the catalog states",
    )
    parser.add_argument("--list", action="store_true", help="list the models and exit")
    parser.add_argument(
        "--limit",
        type=common.seconds,
        default=180.0,
        metavar="SECONDS",
        help="time limit of each model (default: %(default)s)",
    )
    parser.add_argument("--threads", type=common.positive_int, help="number of PyTorch threads (default: by PyTorch)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two models and two rounds: a smoke test")
    common.add_timing(parser)
    parser.set_defaults(repeat=5)


def select(options: argparse.Namespace) -> list[ZooModel]:
    """Return the models that `--only` and `--quick` select, without those of missing packages, which are printed."""
    names = QUICK if options.quick else [model.title for model in ZOO]
    if options.only:
        pattern = options.only.lower()
        names = [name for name in names if pattern in name.lower() or fnmatch.fnmatchcase(name.lower(), pattern)]
    if not names:
        raise SystemExit(f"--only {options.only!r} matches no model; --list prints them")
    chosen = [model for model in ZOO if model.title in names]
    for package in missing_packages():
        count = sum(model.package == package for model in chosen)
        if count:
            print(f"{package} is not installed: {count} of its models are not measured", flush=True)
    return [model for model in chosen if model.package not in missing_packages()]


def rows_of(
    models: Sequence[ZooModel], settings: measure.Settings, limit: float, work: Work = measure.work
) -> Iterator[measure.Row]:
    """Yield the row of each model, measured in a worker process.

    The worker is replaced after a model that crashes it or exceeds the time limit. The row of a model that fails has
    the key `failure`.

    Args:
        models: the models, in order.
        settings: settings of the measurement.
        limit: time limit of each model, in seconds; that of a worker's first model includes its start.
        work: function that the worker runs.
    """
    context = multiprocessing.get_context("spawn")
    pending = list(models)
    while pending:
        receiver, sender = context.Pipe(duplex=False)
        titles = [model.title for model in pending]
        worker = context.Process(target=work, args=(sender, titles, settings), daemon=True)
        worker.start()
        sender.close()  # the worker has its own: its end is noticed as the end of the pipe
        failure = None
        while pending and failure is None:
            try:
                received: measure.Row | str
                if receiver.poll(limit):
                    received = receiver.recv()
                else:
                    received = failure = f"exceeded its time limit of {limit:.0f} s"
            except EOFError:
                worker.join()
                received = failure = f"ended its process with exit code {worker.exitcode}"
            model = pending.pop(0)
            yield received if isinstance(received, dict) else failed_row(model, received)
        if failure is not None:
            worker.kill()
        worker.join()


def failed_row(model: ZooModel, reason: str) -> measure.Row:
    return {
        "name": model.title,
        "package": model.package,
        "shape": list(model.shape),
        "failure": reason,
        "providers": {},
        **measure.provenance(),
    }


def load(path: Path) -> Document:
    """Return the document at `path`, or one without rows.

    Raises:
        SystemExit: its rows are of another machine or another torch.
    """
    current = environment.describe() | {"backend": backends.resolve("auto", torch.device("cpu")).name}
    if not path.exists():
        return {"benchmark": "zoo", "runs": [{"allocator": "as-shipped", "environment": current, "cases": []}]}
    document: Document = json.loads(path.read_text())
    stored = document["runs"][0]["environment"]
    differing = [f"{name}: {stored[name]}, now {current[name]}" for name in MACHINE if stored[name] != current[name]]
    if differing:
        raise SystemExit(f"--out: {path} was measured elsewhere ({'; '.join(differing)}); choose another folder")
    document["runs"][0]["environment"] = current
    return document


def store(path: Path, document: Document, row: measure.Row) -> None:
    """Add the row to the document, or replace the model's, in the catalog's order, and write the file."""
    (run,) = document["runs"]
    rows = {one["name"]: one for one in run["cases"]} | {row["name"]: row}
    run["cases"] = [rows[model.title] for model in ZOO if model.title in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)  # an interruption leaves the old file or the new one


def progress(row: measure.Row, position: str, seconds: float) -> str:
    """Return one line about a measured model."""
    text = row.get("failure")
    if text is None:
        differences = list(excesses(row["errors"]))
        speeds = [f"{name.removeprefix('ours ')} {speed:.2f}x" for name, speed in measure.speedups(row).items()]
        text = ", ".join([norms_fused(row), *(differences or ["equal"]), *speeds])
    return f"[{position}] {row['name']}: {text} ({seconds:.0f} s)"


def defects(row: measure.Row, model: ZooModel) -> list[str]:
    """Return how a row falls short of the catalog."""
    if "failure" in row:
        return [row["failure"]]
    found = list(excesses(row["errors"]))
    for mode, (fused, total) in row["norms"].items():
        if fused < model.fused * total:
            found.append(f"{mode}: {fused} of {total} norms run fused, expected at least {model.fused:.0%}")
    return found


def run(options: argparse.Namespace) -> int:
    """Measure the selected models; return the exit status."""
    if options.list:
        print("\n".join(model.title for model in ZOO))
        return 0
    models = select(options)
    if options.threads:
        torch.set_num_threads(options.threads)  # the environment's description states it
    path: Path = options.out / "zoo.json"
    document = load(path) if not options.check else {}
    if options.resume and not options.check:
        present = {row["name"] for row in document["runs"][0]["cases"] if "failure" not in row}
        models = [model for model in models if model.title not in present]
    settings = measure.Settings(options.seed, options.threads, **timing(options))
    found: dict[str, list[str]] = {}
    started = last = time.monotonic()
    for index, row in enumerate(rows_of(models, settings, options.limit)):
        now = time.monotonic()
        print(progress(row, f"{index + 1}/{len(models)}", now - last), flush=True)
        last = now
        found[row["name"]] = defects(row, models[index])
        if not options.check:
            document["command"] = "python -m benchmarks zoo"
            document["options"] = {"seed": options.seed, "threads": options.threads, **timing(options)}
            store(path, document, row)
    if not options.check:
        print(f"\n{summary_table(document['runs'][0]['cases'])}\n\nwrote {path}")
    wrong = [f"{name}: {defect}" for name, several in found.items() for defect in several]
    print("\n".join([f"{(time.monotonic() - started) / 60:.1f} minutes", *wrong]))
    return int(bool(wrong)) if options.check else 0


def timing(options: argparse.Namespace) -> dict[str, Any]:
    return {**common.timing(options), **({"min_time": None} if options.check else {})}
