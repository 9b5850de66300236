"""Runs one subcommand: one child process per allocator setting measures, the parent writes, prints and draws."""

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

#: Types of the options that are written to a results file.
JSON_TYPES = (NoneType, bool, int, float, str, list, tuple)


class Benchmark(Protocol):
    """Interface of a subcommand's module."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """Measure, in the child process, and return `{"cases": [...]}` as plain data."""

    def tables(self, run: dict[str, Any]) -> str:
        """Return all tables of one run (allocator setting)."""

    def summary(self, run: dict[str, Any]) -> str:
        """Return the few lines of one run that `all` repeats at its end."""

    def plot(self, document: dict[str, Any], path: Path) -> None:
        """Draw the chart of all runs into the PNG file `path`."""


def measure_to_file(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """Measure in the child process and write the data to the file `--into`."""
    device = options.device
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: no NVIDIA GPU is available to this torch")
        torch.backends.cudnn.benchmark = True  # for all providers, as shapes do not change
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
        "ceilings": ceilings.elementwise_max(before, after),
        **measured,
    }
    options.into.write_text(json.dumps(run))


def calculate(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run of a subcommand that calculates instead of measuring."""
    return {"allocator": None, "environment": environment.describe(), **benchmark.measure(options)}


class BenchmarkFailedError(Exception):
    """The child process failed, with a message of its own, or exceeded its time limit."""

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
            raise BenchmarkFailedError(1, f"exceeded its time limit of {limit:.0f} s") from None
        if child.returncode:
            raise BenchmarkFailedError(child.returncode, f"exit code {child.returncode}")
        result: dict[str, Any] = json.loads(into.read_text())
    return result


def run(
    name: str, benchmark: Benchmark, options: argparse.Namespace, arguments: list[str], limit: float | None = None
) -> dict[str, Any]:
    """Measure under each allocator setting, then write `<name>.json`, print the tables and draw the charts.

    Args:
        name: name of the result files.
        benchmark: module of the subcommand.
        options: parsed options.
        arguments: command line of the subcommand.
        limit: seconds for each allocator setting; default: no limit.

    Raises:
        BenchmarkFailedError: a child process failed or exceeded `limit`.
    """
    if "allocator" in options:
        settings = allocator.settings_for(options.allocator, options.device)
        instruction_set = getattr(options, "isa", None)
        isa.check(instruction_set, options.device)
        runs = [measure_in_child(arguments, setting, instruction_set, limit) for setting in settings]
    else:
        runs = [calculate(benchmark, options)]
    document = {
        "benchmark": name,
        # Results are committed, so they do not contain absolute paths of a machine.
        "command": shlex.join(
            ["python", "-m", "benchmarks"]
            + [os.path.relpath(word) if word == str(options.out) else word for word in arguments]
        ),
        "options": {name: value for name, value in vars(options).items() if isinstance(value, JSON_TYPES)},
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
