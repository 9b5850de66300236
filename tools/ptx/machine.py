"""Runs kernels: the threads of several CTAs in lock step, one array element a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.ptx.instructions import REGROUP, decode
from tools.ptx.memory import Copies, Fault, Memory, Shared, argument_bytes
from tools.ptx.numerics import Array
from tools.ptx.operands import Operands, Step
from tools.ptx.parser import Kernel

_THREADS_AT_ONCE = 4096
_PARAMETER_WINDOW = 1 << 16
_MOST_SPINS = 1000  # in a row, in which nobody else runs


def run(
    kernel: Kernel,
    grid: Sequence[int],
    arguments: Sequence[Any],
    memory: Memory,
    *,
    threads: Sequence[int] | None = None,
    shared: int = 0,
    ctas: Sequence[int] | None = None,
    cooperative: bool = False,
    schedule: int = 0,
) -> None:
    """Runs ``kernel`` on ``memory``.

    ``arguments``: numbers, addresses, or bytes for structs. ``shared``: bytes of dynamic shared memory. ``ctas``:
    linear ids (x fastest) of those to run, all by default. ``cooperative``: they run all at once, so that they can wait
    for each other. ``schedule``: 0 runs all warps in lock step; 1 runs each warp up to the next barrier before the
    following one starts, or if cooperative, each CTA as far as it comes on its own; 2 goes from the last warp, and the
    last CTA, to the first.
    """
    block = tuple(threads or kernel.threads or ())
    if not block:
        raise ValueError(f"{kernel.name} does not say how many threads it takes")
    size = int(np.prod(block))
    chosen = np.arange(int(np.prod(grid))) if ctas is None else np.asarray(ctas)
    chosen = chosen[::-1] if schedule == 2 else chosen
    at_once = len(chosen) if cooperative else max(1, _THREADS_AT_ONCE // size)
    with np.errstate(all="ignore"):
        for start in range(0, len(chosen), at_once):
            part = chosen[start : start + at_once]
            Machine(kernel, tuple(grid), block, part, arguments, memory, shared, schedule, cooperative).run()


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
        cooperative: bool = False,
    ) -> None:
        self.kernel, self.memory, self.schedule = kernel, memory, schedule
        self.in_turn = cooperative and schedule > 0
        self.block, self.ctas, self.numbers = int(np.prod(block)), len(ctas), ctas
        self.warps = -(-self.block // 32)
        # Whole warps, so that warp-wide instructions are reshapes; lanes beyond the block never run.
        self.lanes = self.ctas * self.warps * 32
        self.thread = np.tile(np.arange(self.warps * 32), self.ctas)
        self.cta = np.repeat(np.arange(self.ctas), self.warps * 32)
        self.warp = self.thread // 32
        self.alive = self.thread < self.block
        self.waiting = np.zeros(self.lanes, bool)  # at a barrier
        self.spinning = np.zeros(self.lanes, bool)  # until a place in memory changes: they let the others run
        self._spins = 0
        self.counters = np.zeros(self.lanes, "i8")
        self.active = self.alive
        self.everyone = bool(self.alive.all())  # whether all lanes are active
        self.special = self._special(grid, block, ctas, shared)
        self.shared = Shared(self.ctas, kernel.static_shared + shared, self.cta, self.warp)
        self.copies = Copies(self.lanes, self.shared)
        self.parameters = self._parameters(arguments)
        self.parameter_memory = Memory()
        self.parameter_addresses = {
            name: self.parameter_memory.place(np.frombuffer(value, "u1"), at=_PARAMETER_WINDOW * i, readonly=True)
            for i, (name, value) in enumerate(self.parameters.items(), 1)
        }
        self.carry = np.zeros(self.lanes, "u8")
        self.operands = Operands(self)
        self.steps: list[Step | None] = [None] * len(kernel.instructions)  # decoded when they are first met

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
                step = steps[counter]
                if step is None:
                    step = steps[counter] = decode(self.operands, self.kernel.instructions[counter])
                try:
                    target = step()
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
        if self.in_turn:
            self._open(self._complete())
        runnable = self.alive & ~self.waiting & ~self.spinning
        if not runnable.any():
            if not self.alive.any():
                return None
            self._release()
            runnable = self.alive & ~self.waiting
        if self.schedule:
            unit = self.cta if self.in_turn else self.warp
            present = np.unique(unit[runnable])
            runnable = runnable & (unit == present[0 if self.schedule == 1 else -1])
        counters = self.counters[runnable]
        smallest = int(counters.min())
        later = counters[counters > smallest]
        self.activate(runnable & (self.counters == smallest))
        return smallest, int(later.min()) if later.size else len(self.steps) + 1

    def activate(self, active: Array) -> None:
        self.active, self.everyone = active, bool(active.all())

    def _complete(self) -> Array:
        """The CTAs all of whose threads wait at the same barrier."""
        waiting, counters = (one.reshape(self.ctas, -1)[:, : self.block] for one in (self.waiting, self.counters))
        return waiting.all(1) & (counters == counters[:, :1]).all(1)

    def _open(self, complete: Array) -> None:
        self.shared.barrier(np.flatnonzero(complete))
        self.waiting &= ~complete[self.cta]

    def _release(self) -> None:
        """Nobody can run: barriers open where all threads of a CTA are at the same one, and who spins looks again."""
        complete = self._complete()
        for cta in np.unique(self.cta[self.waiting & ~complete[self.cta]]):
            of_cta = (self.cta == cta) & (self.thread < self.block)
            if not (of_cta & self.spinning).any():
                places = np.unique(self.counters[of_cta & self.waiting])
                where = [self.kernel.instructions[place - 1].where for place in places]
                gone = int((of_cta & ~self.waiting).sum())
                raise Fault(f"{self.kernel.name}: divergent barrier: threads wait at {where}, {gone} have returned")
        self._spins = 0 if complete.any() else self._spins + 1
        if self._spins > _MOST_SPINS:
            lane = int(np.flatnonzero(self.spinning)[0])
            raise Fault(self._located(Fault("waits for what nobody writes", lane), int(self.counters[lane])))
        self._open(complete)
        self.spinning[:] = False
