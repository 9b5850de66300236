"""Tests that need compiled kernels, in a session whose kernels are Triton's interpreter's."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import triton

#: Names of the tests that this session selected, by file; conftest.py fills it in.
selected: dict[Path, list[str]] = {}


def select(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(getattr(item, "function", None), "compiled_elsewhere"):
            selected.setdefault(item.path, []).append(item.name)


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where ``triton.jit`` compiles: here if it does, or else in a second session, one for each file.

    Which of the two it is, is decided when Triton is imported, so that one process cannot do both.
    """

    @functools.wraps(test)
    def elsewhere(*args: Any, **kwargs: Any) -> None:
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].rpartition(" ")[0]
        outcomes, log = _session(inspect.getfile(test))
        if name not in outcomes:
            pytest.fail(f"the second session did not run {name}:\n{log}", pytrace=False)
        if (problem := outcomes[name]) is not None:
            (pytest.skip if problem.tag == "skipped" else functools.partial(pytest.fail, pytrace=False))(
                problem.text or problem.get("message", "")
            )

    elsewhere.compiled_elsewhere = True  # type: ignore[attr-defined]
    return elsewhere if triton.knobs.runtime.interpret else test


@functools.cache
def _session(file: str) -> tuple[dict[str, ElementTree.Element | None], str]:
    """The outcome of each selected test of a file, None for success, and the end of pytest's output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-m", ""]
        command += [f"{file}::{name}" for name in selected[Path(file)]]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        return {case.get("name", ""): next(iter(case), None) for case in cases}, (done.stdout + done.stderr)[-4000:]
