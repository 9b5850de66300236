"""Decode warp-level instructions, which :mod:`tools.ptx.warp` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import warp
from tools.ptx.memory import Fault
from tools.ptx.numerics import Array
from tools.ptx.operands import Operands, Step, unsupported_instruction
from tools.ptx.parser import BITS, Instruction


def _ldmatrix(operands: Operands, instruction: Instruction) -> Step:
    machine, parts = operands.machine, instruction.opcode
    target, source = instruction.operands
    targets = target if isinstance(target, tuple) else (target,)
    if "m8n8" not in parts or f"x{len(targets)}" not in parts:
        raise unsupported_instruction(instruction)
    puts, address = [operands.raw_writer(one, "b32") for one in targets], operands.address_reader(source)
    rows = 8 * len(targets)

    def step() -> None:
        active_warps = _full_warps(machine.active)
        lanes = np.flatnonzero((np.arange(machine.num_lanes) % 32 < rows) & machine.active)
        items = np.zeros((len(active_warps), rows, 8), "u2")
        items[active_warps] = machine.shared.load(address()[lanes], 16, lanes).view("u2").reshape(-1, rows, 8)
        for put, value in zip(puts, warp.ldmatrix(items, "trans" in parts), strict=True):
            put(value.reshape(-1))

    return step


def _full_warps(active: Array) -> Array:
    """Return which warps are active. A warp with some inactive lanes is a fault."""
    active_lanes = active.reshape(-1, 32)
    if (active_lanes.any(1) != active_lanes.all(1)).any():
        raise Fault("divergent warp at a warp-synchronous instruction")
    return active_lanes.all(1)


def _mma(operands: Operands, instruction: Instruction) -> Step:
    machine, parts = operands.machine, instruction.opcode
    shape = next(part for part in parts if part.startswith("m") and part[1].isdigit())
    types = [part for part in parts if part in BITS]
    if "sync" not in parts or "row" not in parts or "col" not in parts or len(types) != 4:
        raise unsupported_instruction(instruction)
    bits = "b64" if types[0] == "f64" else "b32"
    target, *sources = ((one,) if isinstance(one, str) else one for one in instruction.operands)
    puts = [operands.raw_writer(one, bits) for one in target]
    reads = [[operands.raw_reader(one, bits) for one in source] for source in sources]

    def step() -> None:
        _full_warps(machine.active)
        a, b, c = ([read().reshape(-1, 32) for read in source] for source in reads)
        for put, value in zip(puts, warp.mma(shape, types, a, b, c), strict=True):
            put(value.reshape(-1))

    return step


def _shuffle(operands: Operands, instruction: Instruction) -> Step:
    machine = operands.machine
    target, *sources = instruction.operands
    name, _, predicate = str(target).partition("|")
    put, flag = operands.raw_writer(name.strip(), "b32"), operands.raw_writer(predicate.strip() or "_", "pred")
    value, b, c, members = (operands.raw_reader(one, "b32") for one in sources)

    def step() -> None:
        active_lanes = machine.active.reshape(-1, 32)
        warp.check_member_mask(members().reshape(-1, 32), active_lanes)
        arrays = (read().reshape(-1, 32) for read in (value, b, c))
        received, valid = warp.shuffle(instruction.opcode[2], *arrays, active_lanes)
        put(received.reshape(-1))
        flag(valid.reshape(-1))

    return step


def _vote(operands: Operands, instruction: Instruction) -> Step:
    machine, mode = operands.machine, instruction.opcode[2]
    target, predicate, members = instruction.operands
    put = operands.raw_writer(target, instruction.opcode[-1])
    read, mask = operands.reader(predicate, "pred"), operands.raw_reader(members, "b32")

    def step() -> None:
        active_lanes = machine.active.reshape(-1, 32)
        warp.check_member_mask(mask().reshape(-1, 32), active_lanes)
        put(warp.vote(mode, read().reshape(-1, 32), active_lanes))

    return step


def _reduce(operands: Operands, instruction: Instruction) -> Step:
    machine, (_, _, name, type_) = operands.machine, instruction.opcode
    target, source, members = instruction.operands
    write, read = operands.writer(target, type_), operands.reader(source, type_)
    mask, reduce = operands.raw_reader(members, "b32"), warp.REDUCTIONS[name]

    def step() -> None:
        active_lanes = machine.active.reshape(-1, 32)
        warp.check_member_mask(mask().reshape(-1, 32), active_lanes)
        if (active_lanes.any(1) != active_lanes.all(1)).any():
            raise unsupported_instruction(instruction)
        values = read().reshape(-1, 32)
        write(np.repeat(reduce(values, axis=1).astype(values.dtype), 32))

    return step


def _active_mask(operands: Operands, instruction: Instruction) -> Step:
    machine, put = operands.machine, operands.raw_writer(instruction.operands[0], "b32")

    def step() -> None:
        active_lanes = machine.active.reshape(-1, 32)
        put(warp.vote("ballot", active_lanes, active_lanes))

    return step


DECODERS: dict[str, Callable[[Operands, Instruction], Step]] = {
    **{"ldmatrix": _ldmatrix, "mma": _mma, "shfl": _shuffle, "vote": _vote, "redux": _reduce},
    "activemask": _active_mask,
}
