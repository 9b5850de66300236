"""Running a subcommand of the benchmarks, at its quickest."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command_line

RUN = ("--quick", "--threads", "1", "--allocator")


def run(*arguments: str, out: Path) -> dict:
    command_line.main([*arguments, "--out", str(out)])
    return json.loads((out / f"{arguments[0]}.json").read_text())


def assert_files(out: Path, name: str) -> None:
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.txt").stat().st_size > 200
