"""Runs one subcommand: a child process for each allocator setting measures, this process collects, prints and
draws."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import torch

from benchmarks import allocator, ceilings, environment, isa, report
from fused_res import backends

#: Types of the options that a results file holds.
DATA = (NoneType, bool, int, float, str, list, tuple)


class Benchmark(Protocol):
    """What a subcommand's module defines."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """In the child: `{"cases": [...]}`, plain data."""

    def tables(self, run: dict[str, Any]) -> str:
        """Everything measured under one allocator setting, to read."""

    def summary(self, run: dict[str, Any]) -> str:
        """The few lines that `all` repeats at its end."""

    def plot(self, document: dict[str, Any], path: Path) -> None:
        """Draws the chart of all runs into the PNG `path`."""


def measure_here(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """The child's part: measure, and leave the data in the file `--into`."""
    device = options.device
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: there is no NVIDIA GPU here that this torch can use")
        torch.backends.cudnn.benchmark = True  # for everybody: shapes do not change
    try:
        backend = backends.resolve(options.backend, torch.device(device)).name
    except backends.BackendUnavailableError as error:
        raise SystemExit(f"--backend {options.backend}: {error}") from error
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    before = ceilings.measure(device, options.quick)
    measured = benchmark.measure(options)
    after = ceilings.measure(device, options.quick)
    run = {
        "allocator": options.allocator,
        "environment": {**environment.describe(device), "backend": backend},
        "ceilings": ceilings.best(before, after),
        **measured,
    }
    options.into.write_text(json.dumps(run))


def calculate_here(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    return {"allocator": None, "environment": environment.describe(), **benchmark.measure(options)}


class PartFailedError(Exception):
    """The child did not bring results; it has said why, unless its time was up."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def measure_in_child(
    arguments: list[str], setting: str, instruction_set: str | None = None, limit: float | None = None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks", *arguments, "--allocator", setting, "--into", str(into)]
        try:
            variables = isa.environment_for(instruction_set, allocator.environment_for(setting, os.environ))
            child = subprocess.run(command, env=variables, timeout=limit)
        except subprocess.TimeoutExpired:
            raise PartFailedError(1, f"not done after {limit:.0f} s") from None
        if child.returncode:
            raise PartFailedError(child.returncode, f"ended with exit code {child.returncode}")
        result: dict[str, Any] = json.loads(into.read_text())
    return result


def run(
    name: str, benchmark: Benchmark, options: argparse.Namespace, arguments: list[str], limit: float | None = None
) -> dict[str, Any]:
    """Measures under each allocator setting, each in `limit` seconds, then writes `<name>.json`, prints the tables
    and draws the charts."""
    if "allocator" in options:
        settings = allocator.settings_for(options.allocator, options.device)
        instruction_set = getattr(options, "isa", None)
        isa.check(instruction_set, options.device)
        runs = [measure_in_child(arguments, setting, instruction_set, limit) for setting in settings]
    else:
        runs = [calculate_here(benchmark, options)]
    document = {
        "benchmark": name,
        # Results are committed: no path of a machine's own in them.
        "command": shlex.join(
            ["python", "-m", "benchmarks"]
            + [os.path.relpath(word) if word == str(options.out) else word for word in arguments]
        ),
        "options": {name: value for name, value in vars(options).items() if isinstance(value, DATA)},
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        [report.environment(document)]
        + [f"== {name}, {report.allocator_title(one)} ==\n\n{benchmark.tables(one)}" for one in runs]
    )
    written = [options.out / f"{name}.json", options.out / f"{name}.txt"]
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    written[1].write_text(text + "\n")
    written.append(options.out / f"{name}.png")
    benchmark.plot(document, written[-1])
    print(f"\n{text}\n\nwrote {', '.join(map(str, written))}", flush=True)
    return document
