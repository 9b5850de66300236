"""Configuration of the test session.

Without a GPU, Triton kernels run in Triton's interpreter, and CUDA C++ kernels in the simulator of tools/cuda_sim.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def _patch_language_once_per_launch() -> None:
    """Make Triton's interpreter patch triton.language once per launch and module instead of at every function call.

    It patches all of triton.language whenever a device function calls another, which takes most of the interpreter's
    time.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def launch_with_reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_with_reset
    interpreter.InterpretedFunction.__call__ = call


# The suite runs the same few examples every time; --hypothesis-profile=search generates new ones.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=50)
    settings.register_profile("search", deadline=None, max_examples=3000)
    settings.load_profile("suite")

#: Test files with the longest run times. They run first, so that no worker is left with one at the end; see PYTEST in
#: the Makefile.
LONGEST_FILES = (
    "test_batch_norm_act",
    "test_cuda_build",
    "test_cuda_simulator",
    "test_kernel_codegen",
    "test_sanitizers",
    "test_sync_batch_norm",
    "test_train",
    "test_triton_bf16",
)


@pytest.fixture
def forced_kernels() -> Iterator[None]:
    """Run a GPU backend's convolution kernels wherever they are supported, also where cuDNN would be selected."""
    from fused_res import backends

    with backends.use("auto", convolution="fused"):
        yield


@pytest.fixture
def process_group() -> Iterator[None]:
    """Make this process the only one of a gloo process group.

    A group's destructor waits for its threads, which wait for the interpreter's lock when they free a tensor.
    ``destroy_process_group`` releases the lock meanwhile; a DDP module that is freed later and has the last reference
    does not, and the process hangs. The test's own references are gone when it has returned.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST_FILES)


def pytest_collection_finish(session: pytest.Session) -> None:
    with contextlib.suppress(ImportError):  # without Triton its tests are skipped
        from tools.ptx.compiled_session import record_selected_tests

        record_selected_tests(session.items)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End this process if the test has left a CUDA error, which would fail every later test.

    An error of a kernel is asynchronous and sticky. pytest-xdist replaces the process, reports this test as the one
    that ended it, and goes on with the next.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{item.nodeid} left a CUDA error, this process ends: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)


if torch.cuda.is_available():
    torch.backends.cudnn.deterministic = True  # some tests compare bits
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    with contextlib.suppress(ImportError):  # without Triton its tests are skipped, with the reason
        _patch_language_once_per_launch()
    from tools.cuda_sim.simulator import build

    if isinstance(library := build(), Path):  # else tests/tools/test_cuda_simulator.py fails with the reason
        os.environ.setdefault("FUSED_RES_SIMULATOR", str(library))
