"""Tensors and Triton launches with guard pages: an out-of-bounds access ends the process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_res.backends.triton import launch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


class GuardedTensor:
    """A copy of a tensor that is adjacent to an inaccessible page.

    Args:
        tensor: tensor to copy; :meth:`close` copies the contents back.
        before_upper_guard: whether the copy ends at the upper guard page; else it begins at the end of the lower one.
    """

    def __init__(self, tensor: Tensor, before_upper_guard: bool) -> None:
        self.original = tensor
        page = mmap.PAGESIZE
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bytes = elements * tensor.element_size() if tensor.numel() else 0
        inside = max(page, -(-bytes // page) * page)
        self.length = inside + 2 * page
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.base = _libc.mmap(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
        assert self.base not in (None, _FAILED)
        for guard in (self.base, self.base + page + inside):
            assert _libc.mprotect(guard, page, 0) == 0
        start = self.base + page + (inside - bytes if before_upper_guard else 0)
        if bytes:
            buffer = (ctypes.c_char * bytes).from_address(start)
            flat = torch.frombuffer(buffer, dtype=tensor.dtype)
            self.copy = flat.as_strided(tensor.shape, tensor.stride())
            self.copy.copy_(tensor)
        else:
            self.copy = tensor

    def close(self) -> None:
        if self.copy is not self.original:
            self.original.copy_(self.copy)
        del self.copy
        _libc.munmap(self.base, self.length)


@contextlib.contextmanager
def launches_with_guard_pages() -> Iterator[None]:
    """Run every launch in this context on guarded copies, alternating between the upper and the lower guard page."""
    count = 0

    def run(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        copies = {
            id(a): GuardedTensor(a, before_upper_guard=bool(count % 2)) for a in arguments if isinstance(a, Tensor)
        }
        kernel[grid](*(copies[id(a)].copy if id(a) in copies else a for a in arguments), **options)
        for copy in copies.values():
            copy.close()

    with launch.intercept_launches(run):
        yield
