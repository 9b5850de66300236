"""Runs kernels: the threads of several CTAs in lock step, one array element a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ptx.instructions import REGROUP, decode
from ptx.memory import Copies, Fault, Memory, Shared, argument_bytes
from ptx.numerics import Array
from ptx.operands import Operands
from ptx.parser import Kernel

_THREADS_AT_ONCE = 4096


def run(
    kernel: Kernel,
    grid: Sequence[int],
    arguments: Sequence[Any],
    memory: Memory,
    *,
    threads: Sequence[int] | None = None,
    shared: int = 0,
    ctas: Sequence[int] | None = None,
    schedule: int = 0,
) -> None:
    """Runs ``kernel`` on ``memory``.

    ``arguments``: numbers, addresses, or bytes for structs. ``shared``: bytes of dynamic shared memory. ``ctas``:
    linear ids (x fastest) of those to run, all by default. ``schedule``: 0 runs all warps in lock step; 1 runs each
    warp up to the next barrier before the following one starts; 2 goes from the last warp, and the last CTA, to the
    first.
    """
    block = tuple(threads or kernel.threads or ())
    if not block:
        raise ValueError(f"{kernel.name} does not say how many threads it takes")
    size = int(np.prod(block))
    chosen = np.arange(int(np.prod(grid))) if ctas is None else np.asarray(ctas)
    chosen = chosen[::-1] if schedule == 2 else chosen
    at_once = max(1, _THREADS_AT_ONCE // size)
    with np.errstate(all="ignore"):
        for start in range(0, len(chosen), at_once):
            part = chosen[start : start + at_once]
            Machine(kernel, tuple(grid), block, part, arguments, memory, shared, schedule).run()


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        ctas: Array,
        arguments: Sequence[Any],
        memory: Memory,
        shared: int,
        schedule: int,
    ) -> None:
        self.kernel, self.memory, self.schedule = kernel, memory, schedule
        self.block, self.ctas, self.numbers = int(np.prod(block)), len(ctas), ctas
        self.warps = -(-self.block // 32)
        # Whole warps, so that warp-wide instructions are reshapes; lanes beyond the block never run.
        self.lanes = self.ctas * self.warps * 32
        self.thread = np.tile(np.arange(self.warps * 32), self.ctas)
        self.cta = np.repeat(np.arange(self.ctas), self.warps * 32)
        self.warp = self.thread // 32
        self.alive = self.thread < self.block
        self.waiting = np.zeros(self.lanes, bool)
        self.counters = np.zeros(self.lanes, "i8")
        self.active = self.alive
        self.everyone = bool(self.alive.all())  # whether all lanes are active
        self.special = self._special(grid, block, ctas, shared)
        self.shared = Shared(self.ctas, kernel.static_shared + shared, self.cta, self.warp)
        self.copies = Copies(self.lanes, self.shared)
        self.parameters = self._parameters(arguments)
        self.carry = np.zeros(self.lanes, "u8")
        operands = Operands(self)
        self.steps = [decode(operands, one) for one in kernel.instructions]

    def _special(self, grid: tuple[int, ...], block: tuple[int, ...], ctas: Array, shared: int) -> dict[str, Array]:
        (bx, by, bz), (gx, gy, gz) = ((*size, 1, 1)[:3] for size in (block, grid))
        id_ = ctas[self.cta]
        values = {
            **{"tid.x": self.thread % bx, "tid.y": self.thread // bx % by, "tid.z": self.thread // (bx * by)},
            **{"ctaid.x": id_ % gx, "ctaid.y": id_ // gx % gy, "ctaid.z": id_ // (gx * gy)},
            **{"ntid.x": bx, "ntid.y": by, "ntid.z": bz, "nctaid.x": gx, "nctaid.y": gy, "nctaid.z": gz},
            **{"laneid": self.thread % 32, "warpid": self.warp, "dynamic_smem_size": shared},
        }
        return {f"%{name}": np.broadcast_to(value, self.lanes).astype("u4") for name, value in values.items()}

    def _parameters(self, arguments: Sequence[Any]) -> dict[str, bytes]:
        wanted = self.kernel.parameters
        if len(arguments) != len(wanted):
            raise ValueError(f"{self.kernel.name} takes {len(wanted)} arguments, not {len(arguments)}")
        return {p.name: argument_bytes(a, p.type, p.size) for p, a in zip(wanted, arguments, strict=True)}

    def run(self, limit: int = 2_000_000) -> None:
        steps, end = self.steps, len(self.steps)
        while (group := self._next_group()) is not None:
            counter, stop = group
            while counter < stop:
                limit -= 1
                if counter >= end or limit < 0:
                    raise Fault(f"{self.kernel.name} ran off its end, or does not come to one")
                try:
                    target = steps[counter]()
                except Fault as fault:
                    raise Fault(self._located(fault, counter)) from None
                if target is None:
                    counter += 1
                elif target == REGROUP:
                    break
                else:
                    counter = target
            else:
                self.counters[self.active] = counter

    def _located(self, fault: Fault, counter: int) -> str:
        instruction, lane = self.kernel.instructions[counter], fault.lane
        thread = "" if lane is None else f", CTA {self.numbers[self.cta[lane]]}, thread {self.thread[lane]}"
        return f"{self.kernel.name}, {instruction.where}{thread}: {fault}: {instruction.text}"

    def _next_group(self) -> tuple[int, int] | None:
        """Activates the runnable threads with the smallest program counter; says how far they may go."""
        runnable = self.alive & ~self.waiting
        if not runnable.any():
            if not self.waiting.any():
                return None
            self._release()
            runnable = self.alive
        if self.schedule:
            present = np.unique(self.warp[runnable])
            runnable = runnable & (self.warp == present[0 if self.schedule == 1 else -1])
        counters = self.counters[runnable]
        smallest = int(counters.min())
        later = counters[counters > smallest]
        self.activate(runnable & (self.counters == smallest))
        return smallest, int(later.min()) if later.size else len(self.steps) + 1

    def activate(self, active: Array) -> None:
        self.active, self.everyone = active, bool(active.all())

    def _release(self) -> None:
        """Everyone runnable has come to a barrier: legal where all threads of a CTA are at the same one."""
        for cta in range(self.ctas):
            of_cta = (self.cta == cta) & (self.thread < self.block)
            waiting = of_cta & self.waiting
            if not waiting.any():
                continue
            places = np.unique(self.counters[waiting])
            if len(places) > 1 or (waiting != of_cta).any():
                where = [self.kernel.instructions[place - 1].where for place in places]
                gone = int((of_cta & ~waiting).sum())
                raise Fault(f"{self.kernel.name}: divergent barrier: threads wait at {where}, {gone} have returned")
        self.shared.barrier(np.unique(self.cta[self.waiting]))
        self.waiting[:] = False
