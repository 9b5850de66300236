"""Decode instructions to closures: dispatch, control flow and arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import arithmetic, collective, data_movement
from tools.ptx.memory import Fault
from tools.ptx.operands import Operands, Step, unsupported_instruction
from tools.ptx.parser import Instruction

#: Returned by a step that has set the threads' program counters itself, so that they have to be scheduled again.
RESCHEDULE = -1
_NO_OPS = {"membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard"}


def decode(operands: Operands, instruction: Instruction) -> Step:
    """Return a closure that executes the instruction in the active threads.

    The closure returns None to continue with the next instruction, the index of another one, or `RESCHEDULE`.
    """
    step = _decode_unpredicated(operands, instruction)
    if instruction.guard is None or instruction.opcode[0] in ("bra", "ret", "exit"):
        return step
    machine, guard = operands.machine, operands.reader(instruction.guard, "pred")

    def predicated() -> int | None:
        active, all_active = machine.active, machine.all_active
        taken = active & guard()
        if not taken.any():
            return None
        machine.activate(taken)
        target = step()
        machine.active, machine.all_active = active, all_active
        if target == RESCHEDULE:
            machine.program_counters[active & ~taken] = instruction.index + 1
        return target

    return predicated


def _decode_unpredicated(operands: Operands, instruction: Instruction) -> Step:
    parts = instruction.opcode
    if parts[0] in _NO_OPS or parts[:2] == ("bar", "warp"):
        return lambda: None
    if parts[0] in _DECODERS and (step := _DECODERS[parts[0]](operands, instruction)) is not None:
        return step
    operation = arithmetic.find_operation(parts)
    if operation is None:
        raise unsupported_instruction(instruction)
    return _arithmetic(operands, instruction, operation)


def _arithmetic(operands: Operands, instruction: Instruction, operation: arithmetic.ArithmeticOp) -> Step:
    target, *sources = instruction.operands
    if len(sources) != len(operation.source_types):
        raise unsupported_instruction(instruction)
    read = [operands.reader(operand, type_) for operand, type_ in zip(sources, operation.source_types, strict=True)]
    function = operation.function
    if isinstance(target, str) and "|" in target:
        if len(read) > 2:  # the third operand would have to be combined with each of the two results
            raise unsupported_instruction(instruction)
        first, second = (operands.writer(name.strip(), "pred") for name in target.split("|"))

        def both() -> None:
            result = function(*(one() for one in read))
            first(result)
            second(~result)

        return both
    write = operands.writer(target, operation.result_type)
    return lambda: write(function(*(one() for one in read)))


def _branch(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    (label,) = instruction.operands
    if not isinstance(label, str) or label not in machine.kernel.labels:
        raise unsupported_instruction(instruction)
    target = machine.kernel.labels[label]
    if _is_spin_loop(machine.kernel.instructions[target : instruction.index]):
        return _spin(operands, instruction, target)
    if instruction.guard is None:
        return lambda: target
    guard = operands.reader(instruction.guard, "pred")
    following = instruction.index + 1

    def step() -> int | None:
        taken = machine.active & guard()
        if not taken.any():
            return None
        stay = machine.active & ~taken
        if not stay.any():
            return target
        machine.program_counters[taken] = target
        machine.program_counters[stay] = following
        return RESCHEDULE

    return step


def _is_spin_loop(body: list[Instruction]) -> bool:
    """Return whether a loop only polls memory that another thread writes."""
    return any("acquire" in one.opcode or "volatile" in one.opcode for one in body) and not any(
        one.opcode[0] in ("st", "red", "atom", "bar", "barrier") for one in body
    )


def _spin(operands: Operands, instruction: Instruction, target: int) -> Step:
    machine = operands.machine
    again = operands.reader(instruction.guard, "pred") if instruction.guard else None

    def step() -> int | None:
        back = machine.active if again is None else machine.active & again()
        machine.program_counters[machine.active] = instruction.index + 1
        machine.program_counters[back] = target
        machine.spinning = machine.spinning | back
        return RESCHEDULE

    return step


def _return(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    guard = operands.reader(instruction.guard, "pred") if instruction.guard else None
    following = instruction.index + 1

    def step() -> int | None:
        leave = machine.active if guard is None else machine.active & guard()
        machine.alive = machine.alive & ~leave
        machine.program_counters[machine.active] = following
        return RESCHEDULE

    return step


def _barrier(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    name, *count = instruction.operands
    if "sync" not in instruction.opcode or name != "0" or (count and count != [str(machine.block_size)]):
        raise unsupported_instruction(instruction)
    following = instruction.index + 1

    def step() -> int | None:
        machine.program_counters[machine.active] = following
        machine.at_barrier = machine.at_barrier | machine.active
        return RESCHEDULE

    return step


def _trap(operands: Operands, instruction: Instruction) -> Step:
    def step() -> int | None:
        raise Fault("trap")

    return step


def _add_with_carry(operands: Operands, instruction: Instruction) -> Step | None:
    """Decode add.cc, addc, sub.cc and subc of 32 bits."""
    machine, parts = operands.machine, instruction.opcode
    target, *sources = instruction.operands
    if parts[-1] not in ("u32", "s32", "b32"):
        raise unsupported_instruction(instruction)
    put, (a, b) = operands.raw_writer(target, "b32"), [operands.raw_reader(one, "b32") for one in sources]
    subtract, with_carry_in = parts[0].startswith("sub"), parts[0] in ("addc", "subc")

    def step() -> None:
        carry = machine.carry if with_carry_in else np.zeros_like(machine.carry)
        left, right = a().astype("u8"), b().astype("u8")
        total = left - right - carry if subtract else left + right + carry
        put(total.astype("u4"))
        if "cc" in parts:
            machine.carry = np.where(machine.active, total >> np.uint64(32) & 1, machine.carry)

    return step


def _add_with_carry_out(operands: Operands, instruction: Instruction) -> Step | None:
    """Decode add.cc and sub.cc; return None for other additions, which are arithmetic."""
    return _add_with_carry(operands, instruction) if "cc" in instruction.opcode else None


_DECODERS: dict[str, Callable[[Operands, Instruction], Step | None]] = {
    **{"bra": _branch, "ret": _return, "exit": _return, "trap": _trap},
    **dict.fromkeys(("bar", "barrier"), _barrier),
    **data_movement.DECODERS,
    **collective.DECODERS,
    **{"add": _add_with_carry_out, "sub": _add_with_carry_out, "addc": _add_with_carry, "subc": _add_with_carry},
}
