"""Run Triton kernels on CPU tensors: compiled to PTX for sm_80, and executed by the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fused_res.backends.triton import aot
from fused_res.backends.triton.launch import intercept_launches
from tools.ptx.machine import run
from tools.ptx.memory import Memory
from tools.ptx.parser import parse

Result = TypeVar("Result")
_parse = functools.lru_cache(maxsize=64)(parse)


def run_interpreted(
    call: Callable[[], Result],
    schedule: int = 0,
    *,
    ctas: Callable[[tuple[int, ...]], Sequence[int]] | None = None,
    edit: Callable[[str], str] = str,
) -> Result:
    """Call ``call`` with every Triton kernel that it launches on CPU tensors run by the interpreter.

    Each tensor argument is a buffer of its own, surrounded by unmapped addresses.

    Args:
        call: the function to call.
        schedule: see :func:`tools.ptx.machine.run`.
        ctas: function from the grid to the CTAs to run; default all.
        edit: function applied to the PTX before it runs.

    Returns:
        The result of ``call``.
    """

    def observer(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = aot.compile_launch(kernel, grid, arguments, options, 80)
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            raise NotImplementedError("kernels with scratch memory")
        bound = kernel.signature.bind(*arguments, **{k: v for k, v in options.items() if k in kernel.arg_names})
        bound.apply_defaults()
        memory = Memory()
        values = [
            memory.map_buffer(bound.arguments[name]) if type_[0] == "*" else bound.arguments[name]
            for name, type_ in compiled.src.signature.items()
            if type_ != "constexpr"
        ]
        ptx = _parse(edit(compiled.asm["ptx"]))[compiled.metadata.name]
        values += [0] * (len(ptx.parameters) - len(values))  # null pointers to scratch memory
        run(ptx, grid, values, memory, shared=compiled.metadata.shared, ctas=ctas and ctas(grid), schedule=schedule)

    with intercept_launches(observer):
        return call()
