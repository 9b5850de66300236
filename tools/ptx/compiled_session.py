"""Run tests that need compiled Triton kernels from a pytest session that uses Triton's interpreter."""

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

#: Names of the decorated tests that this session selected, by file; filled in by conftest.py.
selected_tests: dict[Path, list[str]] = {}


def record_selected_tests(items: list[pytest.Item]) -> None:
    """Record the selected tests that are decorated with :func:`needs_compiled_triton`."""
    for item in items:
        if hasattr(getattr(item, "function", None), "runs_in_second_session"):
            selected_tests.setdefault(item.path, []).append(item.name)


def needs_compiled_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with compiled Triton kernels: here if ``triton.jit`` compiles, else in a second session.

    Triton chooses between compiler and interpreter when it is imported, so one process cannot use both. There is one
    second session per file, which runs all decorated tests of the file.
    """

    @functools.wraps(test)
    def run_in_second_session(*args: Any, **kwargs: Any) -> None:
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].rpartition(" ")[0]
        outcomes, log = _session(inspect.getfile(test))
        if name not in outcomes:
            pytest.fail(f"the second session did not run {name}:\n{log}", pytrace=False)
        if (problem := outcomes[name]) is not None:
            (pytest.skip if problem.tag == "skipped" else functools.partial(pytest.fail, pytrace=False))(
                problem.text or problem.get("message", "")
            )

    run_in_second_session.runs_in_second_session = True  # type: ignore[attr-defined]
    return run_in_second_session if triton.knobs.runtime.interpret else test


@functools.cache
def _session(file: str) -> tuple[dict[str, ElementTree.Element | None], str]:
    """Run the selected tests of a file; return their outcomes, None for success, and the end of pytest's output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-m", ""]
        command += [f"{file}::{name}" for name in selected_tests[Path(file)]]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        return {case.get("name", ""): next(iter(case), None) for case in cases}, (done.stdout + done.stderr)[-4000:]
