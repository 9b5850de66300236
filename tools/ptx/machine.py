"""Execute PTX kernels: the threads of several CTAs run in lockstep, with one numpy array element per thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.ptx.instructions import RESCHEDULE, decode
from tools.ptx.memory import AsyncCopies, Fault, Memory, SharedMemory, pack_argument
from tools.ptx.numerics import Array
from tools.ptx.operands import Operands, Step
from tools.ptx.parser import Kernel

_THREADS_AT_ONCE = 4096
_PARAMETER_WINDOW = 1 << 16
_MAX_SPINS = 1000  # consecutive iterations of all spin loops in which no other thread is runnable


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
    """Run ``kernel`` on ``memory``.

    Args:
        kernel: the parsed kernel.
        grid: number of CTAs in each dimension.
        arguments: one per parameter: a number, an address, or bytes for a struct.
        memory: global memory.
        threads: block dimensions; default ``.reqntid``.
        shared: bytes of dynamic shared memory.
        ctas: linear ids (x fastest) of the CTAs to run; default all.
        cooperative: whether all CTAs are resident at once, so that they can wait for each other.
        schedule: 0 runs all warps in lockstep. 1 runs each warp up to its next barrier before the next one starts, or,
            if cooperative, each CTA until it blocks. 2 does the same from the last warp and CTA to the first.

    Raises:
        Fault: the kernel has a memory error, a race, a divergent barrier or a deadlock.
        NotImplementedError: the kernel has an unsupported instruction.
    """
    block = tuple(threads or kernel.threads or ())
    if not block:
        raise ValueError(f"threads: expected the block dimensions, because {kernel.name} has no .reqntid")
    size = int(np.prod(block))
    chosen = np.arange(int(np.prod(grid))) if ctas is None else np.asarray(ctas)
    chosen = chosen[::-1] if schedule == 2 else chosen
    at_once = len(chosen) if cooperative else max(1, _THREADS_AT_ONCE // size)
    with np.errstate(all="ignore"):
        for start in range(0, len(chosen), at_once):
            resident = chosen[start : start + at_once]
            Machine(kernel, tuple(grid), block, resident, arguments, memory, shared, schedule, cooperative).run()


class Machine:
    """The state of the resident CTAs of one launch.

    Here, a lane is the array element of one thread, not its index within the warp: the lanes of all resident CTAs are
    numbered consecutively, with each CTA padded to full warps.
    """

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
        self.serialize_ctas = cooperative and schedule > 0
        self.block_size, self.num_ctas, self.cta_ids = int(np.prod(block)), len(ctas), ctas
        self.warps_per_cta = -(-self.block_size // 32)
        # Padded to full warps, so that warp-wide instructions are reshapes; lanes beyond the block never run.
        self.num_lanes = self.num_ctas * self.warps_per_cta * 32
        self.thread = np.tile(np.arange(self.warps_per_cta * 32), self.num_ctas)
        self.cta = np.repeat(np.arange(self.num_ctas), self.warps_per_cta * 32)
        self.warp = self.thread // 32
        self.alive = self.thread < self.block_size
        self.at_barrier = np.zeros(self.num_lanes, bool)
        self.spinning = np.zeros(self.num_lanes, bool)  # in a spin-wait loop; other threads run first
        self._spins = 0
        self.program_counters = np.zeros(self.num_lanes, "i8")
        self.active = self.alive
        self.all_active = bool(self.alive.all())  # whether every lane is active
        self.special_registers = self._special(grid, block, ctas, shared)
        self.shared = SharedMemory(self.num_ctas, kernel.static_shared + shared, self.cta, self.warp)
        self.async_copies = AsyncCopies(self.num_lanes, self.shared)
        self.parameters = self._parameters(arguments)
        self.parameter_memory = Memory()
        self.parameter_addresses = {
            name: self.parameter_memory.map_buffer(
                np.frombuffer(value, "u1"), address=_PARAMETER_WINDOW * i, readonly=True
            )
            for i, (name, value) in enumerate(self.parameters.items(), 1)
        }
        self.carry = np.zeros(self.num_lanes, "u8")
        self.operands = Operands(self)
        self.decoded_steps: list[Step | None] = [None] * len(kernel.instructions)  # decoded on first execution

    def _special(self, grid: tuple[int, ...], block: tuple[int, ...], ctas: Array, shared: int) -> dict[str, Array]:
        (bx, by, bz), (gx, gy, gz) = ((*size, 1, 1)[:3] for size in (block, grid))
        id_ = ctas[self.cta]
        values = {
            **{"tid.x": self.thread % bx, "tid.y": self.thread // bx % by, "tid.z": self.thread // (bx * by)},
            **{"ctaid.x": id_ % gx, "ctaid.y": id_ // gx % gy, "ctaid.z": id_ // (gx * gy)},
            **{"ntid.x": bx, "ntid.y": by, "ntid.z": bz, "nctaid.x": gx, "nctaid.y": gy, "nctaid.z": gz},
            **{"laneid": self.thread % 32, "warpid": self.warp, "dynamic_smem_size": shared},
        }
        return {f"%{name}": np.broadcast_to(value, self.num_lanes).astype("u4") for name, value in values.items()}

    def _parameters(self, arguments: Sequence[Any]) -> dict[str, bytes]:
        parameters = self.kernel.parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"arguments of {self.kernel.name}: expected {len(parameters)}, got {len(arguments)}")
        return {p.name: pack_argument(a, p.type, p.size) for p, a in zip(parameters, arguments, strict=True)}

    def run(self, limit: int = 2_000_000) -> None:
        """Run all threads to their end, in at most `limit` instructions."""
        steps, end = self.decoded_steps, len(self.decoded_steps)
        while (group := self._select_threads()) is not None:
            pc, stop = group
            while pc < stop:
                limit -= 1
                if pc >= end:
                    raise Fault(f"{self.kernel.name} runs past its last instruction")
                if limit < 0:
                    raise Fault(f"{self.kernel.name} does not terminate within the limit of instructions")
                step = steps[pc]
                if step is None:
                    step = steps[pc] = decode(self.operands, self.kernel.instructions[pc])
                try:
                    target = step()
                except Fault as fault:
                    raise Fault(self._with_location(fault, pc)) from None
                if target is None:
                    pc += 1
                elif target == RESCHEDULE:
                    break
                else:
                    pc = target
            else:
                self.program_counters[self.active] = pc

    def _with_location(self, fault: Fault, pc: int) -> str:
        """Return the fault's message with kernel, source line, CTA, thread and instruction."""
        instruction, lane = self.kernel.instructions[pc], fault.lane
        thread = "" if lane is None else f", CTA {self.cta_ids[self.cta[lane]]}, thread {self.thread[lane]}"
        return f"{self.kernel.name}, {instruction.location}{thread}: {fault}: {instruction.text}"

    def _select_threads(self) -> tuple[int, int] | None:
        """Activate the runnable threads with the smallest program counter.

        Returns:
            Their program counter, and the next larger one of a runnable thread, where they may have to stop. None if
            all threads have returned.
        """
        if self.serialize_ctas:
            self._release_barriers(self._ctas_at_barrier())
        runnable = self.alive & ~self.at_barrier & ~self.spinning
        if not runnable.any():
            if not self.alive.any():
                return None
            self._resolve_stall()
            runnable = self.alive & ~self.at_barrier
        if self.schedule:
            group_of = self.cta if self.serialize_ctas else self.warp
            groups = np.unique(group_of[runnable])
            runnable = runnable & (group_of == groups[0 if self.schedule == 1 else -1])
        counters = self.program_counters[runnable]
        smallest = int(counters.min())
        later = counters[counters > smallest]
        self.activate(runnable & (self.program_counters == smallest))
        return smallest, int(later.min()) if later.size else len(self.decoded_steps) + 1

    def activate(self, active: Array) -> None:
        """Execute the following instructions in these lanes only."""
        self.active, self.all_active = active, bool(active.all())

    def _ctas_at_barrier(self) -> Array:
        """Return which CTAs have all of their threads waiting at the same barrier."""
        waiting, counters = (
            one.reshape(self.num_ctas, -1)[:, : self.block_size] for one in (self.at_barrier, self.program_counters)
        )
        return waiting.all(1) & (counters == counters[:, :1]).all(1)

    def _release_barriers(self, complete: Array) -> None:
        self.shared.barrier(np.flatnonzero(complete))
        self.at_barrier &= ~complete[self.cta]

    def _resolve_stall(self) -> None:
        """Make threads runnable when none is: release CTAs whose barrier is complete, and spinning threads.

        Raises:
            Fault: a barrier is divergent, or all runnable threads spin forever (a deadlock).
        """
        complete = self._ctas_at_barrier()
        for cta in np.unique(self.cta[self.at_barrier & ~complete[self.cta]]):
            of_cta = (self.cta == cta) & (self.thread < self.block_size)
            if not (of_cta & self.spinning).any():
                pcs = np.unique(self.program_counters[of_cta & self.at_barrier])
                locations = [self.kernel.instructions[pc - 1].location for pc in pcs]
                returned = int((of_cta & ~self.at_barrier).sum())
                raise Fault(
                    f"{self.kernel.name}: divergent barrier: threads wait at {locations}, {returned} have returned"
                )
        self._spins = 0 if complete.any() else self._spins + 1
        if self._spins > _MAX_SPINS:
            lane = int(np.flatnonzero(self.spinning)[0])
            raise Fault(
                self._with_location(
                    Fault("deadlock: spins on memory that no thread writes", lane), int(self.program_counters[lane])
                )
            )
        self._release_barriers(complete)
        self.spinning[:] = False
