"""Runs subcommands of the benchmarks in process, with their quickest options."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command_line

QUICK_OPTIONS = ("--quick", "--threads", "1", "--allocator")


def run_benchmark(*arguments: str, out: Path) -> dict:
    """Run a subcommand with results folder `out` and return its document."""
    command_line.main([*arguments, "--out", str(out)])
    return json.loads((out / f"{arguments[0]}.json").read_text())


def assert_report_files(out: Path, name: str) -> None:
    """Check that chart and tables of document `name` exist."""
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.txt").stat().st_size > 200
