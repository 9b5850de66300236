"""Instructions of whole warps: their operands, around what :mod:`ptx.warp` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import warp
from tools.ptx.memory import Fault
from tools.ptx.numerics import Array
from tools.ptx.operands import Operands, Step, unknown
from tools.ptx.parser import BITS, Instruction


def _ldmatrix(operands: Operands, instruction: Instruction) -> Step:
    machine, parts = operands.machine, instruction.parts
    target, source = instruction.operands
    targets = target if isinstance(target, tuple) else (target,)
    if "m8n8" not in parts or f"x{len(targets)}" not in parts:
        raise unknown(instruction)
    puts, address = [operands.put(one, "b32") for one in targets], operands.address(source)
    rows = 8 * len(targets)

    def step() -> None:
        present = _full_warps(machine.active)
        lanes = np.flatnonzero((np.arange(machine.lanes) % 32 < rows) & machine.active)
        items = np.zeros((len(present), rows, 8), "u2")
        items[present] = machine.shared.load(address()[lanes], 16, lanes).view("u2").reshape(-1, rows, 8)
        for put, value in zip(puts, warp.ldmatrix(items, "trans" in parts), strict=True):
            put(value.reshape(-1))

    return step


def _full_warps(active: Array) -> Array:
    """Which warps are here; none may be here in part."""
    present = active.reshape(-1, 32)
    if (present.any(1) != present.all(1)).any():
        raise Fault("a part of a warp comes to a warp-wide instruction")
    return present.all(1)


def _mma(operands: Operands, instruction: Instruction) -> Step:
    machine, parts = operands.machine, instruction.parts
    shape = next(part for part in parts if part.startswith("m") and part[1].isdigit())
    types = [part for part in parts if part in BITS]
    if "sync" not in parts or "row" not in parts or "col" not in parts or len(types) != 4:
        raise unknown(instruction)
    bits = "b64" if types[0] == "f64" else "b32"
    target, *sources = ((one,) if isinstance(one, str) else one for one in instruction.operands)
    puts = [operands.put(one, bits) for one in target]
    reads = [[operands.bits(one, bits) for one in source] for source in sources]

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
    put, flag = operands.put(name.strip(), "b32"), operands.put(predicate.strip() or "_", "pred")
    value, b, c, members = (operands.bits(one, "b32") for one in sources)

    def step() -> None:
        present = machine.active.reshape(-1, 32)
        warp.check_members(members().reshape(-1, 32), present)
        arrays = (read().reshape(-1, 32) for read in (value, b, c))
        received, valid = warp.shuffle(instruction.parts[2], *arrays, present)
        put(received.reshape(-1))
        flag(valid.reshape(-1))

    return step


def _vote(operands: Operands, instruction: Instruction) -> Step:
    machine, mode = operands.machine, instruction.parts[2]
    target, predicate, members = instruction.operands
    put = operands.put(target, instruction.parts[-1])
    read, named = operands.reader(predicate, "pred"), operands.bits(members, "b32")

    def step() -> None:
        present = machine.active.reshape(-1, 32)
        warp.check_members(named().reshape(-1, 32), present)
        put(warp.vote(mode, read().reshape(-1, 32), present))

    return step


def _reduce(operands: Operands, instruction: Instruction) -> Step:
    machine, (_, _, name, type_) = operands.machine, instruction.parts
    target, source, members = instruction.operands
    write, read = operands.writer(target, type_), operands.reader(source, type_)
    named, reduce = operands.bits(members, "b32"), warp.REDUCTIONS[name]

    def step() -> None:
        present = machine.active.reshape(-1, 32)
        warp.check_members(named().reshape(-1, 32), present)
        if (present.any(1) != present.all(1)).any():
            raise unknown(instruction)
        values = read().reshape(-1, 32)
        write(np.repeat(reduce(values, axis=1).astype(values.dtype), 32))

    return step


def _active_mask(operands: Operands, instruction: Instruction) -> Step:
    machine, put = operands.machine, operands.put(instruction.operands[0], "b32")

    def step() -> None:
        present = machine.active.reshape(-1, 32)
        put(warp.vote("ballot", present, present))

    return step


DECODERS: dict[str, Callable[[Operands, Instruction], Step]] = {
    **{"ldmatrix": _ldmatrix, "mma": _mma, "shfl": _shuffle, "vote": _vote, "redux": _reduce},
    "activemask": _active_mask,
}
