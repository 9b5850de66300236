"""A test that leaves a CUDA error ends its process, and the tests after it run in another one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

CONFTEST = """
import torch
from tests.conftest import pytest_runtest_teardown

error = []

def synchronize():
    if error:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
"""
TESTS = """
from conftest import error

def test_before(): pass
def test_illegal_access(): error.append(1)
def test_after(): assert not error
"""


def test_sticky_error_ends_only_its_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_three.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, str(tmp_path)], cwd=root, capture_output=True, text=True)
    # Besides the tests before and after it, the call of the failed test itself had passed.
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "crashed while running 'test_three.py::test_illegal_access'" in done.stdout
