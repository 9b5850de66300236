"""Direct launches, without a GPU: Triton compiles and launches the kernels for a stand-in driver that records them.

They need compiled kernels, and the other tests interpreted ones, so they run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_WORKER = Path(__file__).with_name("launch_worker.py")
_CASES = (
    "block",
    "norms",
    "alignment_and_dtypes",
    "device_and_stream",
    "hooks_and_settings",
    "batch_sizes",
    "threads",
)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Run all cases in one process; return case -> "ok" or its traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = _WORKER.parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.triton.launch_worker", *_CASES],
        env=environment | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    outcomes = dict.fromkeys(_CASES, f"did not run:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    for part in done.stdout.split("\x1e")[1:]:
        name, _, outcome = part.partition("\x1f")
        outcomes[name] = outcome.strip()
    return outcomes


@pytest.mark.parametrize("case", _CASES)
def test_direct_launches(results: dict[str, str], case: str):
    assert results[case] == "ok", results[case]
