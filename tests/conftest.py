"""Without a GPU to run them on, Triton's kernels run in its interpreter here, and those in CUDA C++ are simulated."""

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def _hasten_interpreter() -> None:
    """Every call of a device function by another patches all of triton.language anew, which takes most of the time:
    once in a launch, for the functions of a module, is enough."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[str] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in done:
            done.add(self.fn.__module__)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


# The same few examples in every run of the suite; --hypothesis-profile=search looks for others.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=50)
    settings.register_profile("search", deadline=None, max_examples=3000)
    settings.load_profile("suite")

#: Files that would keep one process waiting for another if they came last; see PYTEST in the Makefile.
LONGEST = (
    "test_batch_norm_act",
    "test_cuda_build",
    "test_cuda_simulator",
    "test_kernel_codegen",
    "test_sanitizers",
    "test_sync_batch_norm",
    "test_train",
    "test_triton_bf16",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    with contextlib.suppress(ImportError):  # no Triton: its tests are skipped
        from tools.ptx.compiled_session import select

        select(session.items)


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    with contextlib.suppress(ImportError):  # no Triton: its tests say so
        _hasten_interpreter()
    from tools.cuda_sim.simulator import build

    if isinstance(library := build(), Path):  # else tests/tools/test_cuda_simulator.py says why
        os.environ.setdefault("FUSED_RES_SIMULATOR", str(library))
