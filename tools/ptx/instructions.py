"""Instructions to closures: what comes next, and everything that only computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import arithmetic, collective
from tools.ptx import data_movement as movement
from tools.ptx.memory import Fault
from tools.ptx.operands import Operands, Step, unknown
from tools.ptx.parser import Instruction

#: Where the threads went: a step that returns this has set their program counters itself.
REGROUP = -1
_NOTHING_TO_DO = {"membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard"}


def decode(operands: Operands, instruction: Instruction) -> Step:
    """A closure that executes the instruction in the active threads; it returns where to go on, if not below."""
    step = _unguarded(operands, instruction)
    if instruction.guard is None or instruction.parts[0] in ("bra", "ret", "exit"):
        return step
    machine, guard = operands.machine, operands.reader(instruction.guard, "pred")

    def guarded() -> int | None:
        active, everyone = machine.active, machine.everyone
        taken = active & guard()
        if not taken.any():
            return None
        machine.activate(taken)
        target = step()
        machine.active, machine.everyone = active, everyone
        if target == REGROUP:
            machine.counters[active & ~taken] = instruction.position + 1
        return target

    return guarded


def _unguarded(operands: Operands, instruction: Instruction) -> Step:
    parts = instruction.parts
    if parts[0] in _NOTHING_TO_DO or parts[:2] == ("bar", "warp"):
        return lambda: None
    if parts[0] in _DECODERS and (step := _DECODERS[parts[0]](operands, instruction)) is not None:
        return step
    operation = arithmetic.operation(parts)
    if operation is None:
        raise unknown(instruction)
    return _arithmetic(operands, instruction, operation)


def _arithmetic(operands: Operands, instruction: Instruction, operation: arithmetic.Operation) -> Step:
    target, *sources = instruction.operands
    if len(sources) != len(operation.sources):
        raise unknown(instruction)
    read = [operands.reader(operand, type_) for operand, type_ in zip(sources, operation.sources, strict=True)]
    function = operation.function
    if isinstance(target, str) and "|" in target:
        if len(read) > 2:
            raise unknown(instruction)  # a third operand joins each of the two results
        first, second = (operands.writer(name.strip(), "pred") for name in target.split("|"))

        def both() -> None:
            result = function(*(one() for one in read))
            first(result)
            second(~result)

        return both
    write = operands.writer(target, operation.result)
    return lambda: write(function(*(one() for one in read)))


def _branch(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    (label,) = instruction.operands
    if not isinstance(label, str) or label not in machine.kernel.labels:
        raise unknown(instruction)
    target = machine.kernel.labels[label]
    if _waits(machine.kernel.instructions[target : instruction.position]):
        return _spin(operands, instruction, target)
    if instruction.guard is None:
        return lambda: target
    guard = operands.reader(instruction.guard, "pred")
    following = instruction.position + 1

    def step() -> int | None:
        taken = machine.active & guard()
        if not taken.any():
            return None
        stay = machine.active & ~taken
        if not stay.any():
            return target
        machine.counters[taken] = target
        machine.counters[stay] = following
        return REGROUP

    return step


def _waits(body: list[Instruction]) -> bool:
    """Whether a loop only looks at memory until another thread has written there."""
    return any("acquire" in one.parts or "volatile" in one.parts for one in body) and not any(
        one.parts[0] in ("st", "red", "atom", "bar", "barrier") for one in body
    )


def _spin(operands: Operands, instruction: Instruction, target: int) -> Step:
    machine = operands.machine
    again = operands.reader(instruction.guard, "pred") if instruction.guard else None

    def step() -> int | None:
        back = machine.active if again is None else machine.active & again()
        machine.counters[machine.active] = instruction.position + 1
        machine.counters[back] = target
        machine.spinning = machine.spinning | back
        return REGROUP

    return step


def _return(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    guard = operands.reader(instruction.guard, "pred") if instruction.guard else None
    following = instruction.position + 1

    def step() -> int | None:
        leave = machine.active if guard is None else machine.active & guard()
        machine.alive = machine.alive & ~leave
        machine.counters[machine.active] = following
        return REGROUP

    return step


def _barrier(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    name, *count = instruction.operands
    if "sync" not in instruction.parts or name != "0" or (count and count != [str(machine.block)]):
        raise unknown(instruction)
    following = instruction.position + 1

    def step() -> int | None:
        machine.counters[machine.active] = following
        machine.waiting = machine.waiting | machine.active
        return REGROUP

    return step


def _trap(operands: Operands, instruction: Instruction) -> Step:
    def step() -> int | None:
        raise Fault("trap")

    return step


def _carried(operands: Operands, instruction: Instruction) -> Step | None:
    """add.cc, addc, sub.cc, subc of 32 bits."""
    machine, parts = operands.machine, instruction.parts
    target, *sources = instruction.operands
    if parts[-1] not in ("u32", "s32", "b32"):
        raise unknown(instruction)
    put, (a, b) = operands.put(target, "b32"), [operands.bits(one, "b32") for one in sources]
    subtract, takes = parts[0].startswith("sub"), parts[0] in ("addc", "subc")

    def step() -> None:
        carry = machine.carry if takes else np.zeros_like(machine.carry)
        left, right = a().astype("u8"), b().astype("u8")
        total = left - right - carry if subtract else left + right + carry
        put(total.astype("u4"))
        if "cc" in parts:
            machine.carry = np.where(machine.active, total >> np.uint64(32) & 1, machine.carry)

    return step


def _sum(operands: Operands, instruction: Instruction) -> Step | None:
    return _carried(operands, instruction) if "cc" in instruction.parts else None


_DECODERS: dict[str, Callable[[Operands, Instruction], Step | None]] = {
    **{"bra": _branch, "ret": _return, "exit": _return, "trap": _trap},
    **dict.fromkeys(("bar", "barrier"), _barrier),
    **movement.DECODERS,
    **collective.DECODERS,
    **{"add": _sum, "sub": _sum, "addc": _carried, "subc": _carried},
}
