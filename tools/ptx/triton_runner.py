"""Runs Triton kernels on CPU tensors through the PTX that Triton makes for sm_80."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fused_res.backends.triton import aot
from fused_res.backends.triton.launch import observed
from tools.ptx.machine import run
from tools.ptx.memory import Memory
from tools.ptx.parser import parse

Result = TypeVar("Result")
_parse = functools.lru_cache(maxsize=64)(parse)


def interpreted(
    call: Callable[[], Result],
    schedule: int = 0,
    *,
    ctas: Callable[[tuple[int, ...]], Sequence[int]] | None = None,
    edit: Callable[[str], str] = str,
) -> Result:
    """What ``call`` returns, with every kernel that it launches on CPU tensors run by the interpreter.

    Each tensor argument lies at an address of its own with nothing around it. ``schedule`` is that of
    :func:`ptx.machine.run`, ``ctas`` gets the grid and says which to run, ``edit`` changes the PTX before it runs.
    """

    def observer(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = aot.compile_launch(kernel, grid, arguments, options, 80)
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            raise NotImplementedError("scratch memory")
        bound = kernel.signature.bind(*arguments, **{k: v for k, v in options.items() if k in kernel.arg_names})
        bound.apply_defaults()
        memory = Memory()
        values = [
            memory.place(bound.arguments[name]) if type_[0] == "*" else bound.arguments[name]
            for name, type_ in compiled.src.signature.items()
            if type_ != "constexpr"
        ]
        ptx = _parse(edit(compiled.asm["ptx"]))[compiled.metadata.name]
        values += [0] * (len(ptx.parameters) - len(values))  # the scratch memory that is not there
        run(ptx, grid, values, memory, shared=compiled.metadata.shared, ctas=ctas and ctas(grid), schedule=schedule)

    with observed(observer):
        return call()
