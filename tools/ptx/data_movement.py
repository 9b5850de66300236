"""Instructions that move data: mov, cvta, ld, st, cp.async."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.memory import Fault
from tools.ptx.numerics import UNSIGNED, Array
from tools.ptx.operands import Operands, Step, unknown
from tools.ptx.parser import BITS, Address, Instruction

_SHARED_WINDOW = 1 << 60  # generic addresses of shared memory
_SPACES = ("param", "global", "shared", "const", "local")


def _move(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands
    type_ = instruction.parts[1]
    put, read = operands.put(target, type_), operands.bits(source, type_)
    return lambda: put(read())


def _window(operands: Operands, instruction: Instruction) -> Step:
    """cvta: only shared memory has generic addresses of its own."""
    target, source = instruction.operands
    type_ = instruction.parts[-1]
    put, read = operands.put(target, type_), operands.bits(source, type_)
    offset = UNSIGNED[BITS[type_]].type(_SHARED_WINDOW if "shared" in instruction.parts and BITS[type_] == 64 else 0)
    if "to" in instruction.parts:
        return lambda: put(read() - offset)
    return lambda: put(read() + offset)


def _policy(operands: Operands, instruction: Instruction) -> Step:
    put, zero = operands.put(instruction.operands[0], "b64"), np.zeros(operands.machine.lanes, "u8")
    return lambda: put(zero)


def _shape(instruction: Instruction) -> tuple[str, str, int]:
    """State space, item type and number of items of a ld or st."""
    types = [part for part in instruction.parts if part in BITS]
    vector = [int(part[1:]) for part in instruction.parts if part in ("v2", "v4", "v8")]
    space = next((part for part in instruction.parts if part.split("::")[0] in _SPACES), "generic")
    return space.split("::")[0], types[-1], vector[0] if vector else 1


def _load(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    space, type_, count = _shape(instruction)
    puts = [operands.put(one, type_) for one in (target if isinstance(target, tuple) else (target,))]
    item, width = UNSIGNED[BITS[type_]], BITS[type_] // 8 * count
    if len(puts) != count or width > 32:
        raise unknown(instruction)
    if space == "param" and isinstance(source, Address) and source.base in operands.machine.parameters:
        return _load_parameter(operands, instruction, source, puts, item)
    access, machine = _access(operands, instruction, space), operands.machine
    address = operands.address(source)

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        found = access(address()[lanes], width, lanes, None).view(item).reshape(-1, count)
        values = found
        if not machine.everyone:
            values = np.zeros((machine.lanes, count), item)
            values[lanes] = found
        for column, put in enumerate(puts):
            put(np.ascontiguousarray(values[:, column]))

    return step


def _load_parameter(
    operands: Operands, instruction: Instruction, source: Address, puts: list[Callable[[Array], None]], item: np.dtype
) -> Step:
    data = operands.machine.parameters[source.base][source.offset :][: item.itemsize * len(puts)]
    if len(data) < item.itemsize * len(puts):
        raise Fault(f"{instruction.where}: beyond the parameter: {instruction.text}")
    values = [np.full(operands.machine.lanes, value) for value in np.frombuffer(data, item)]

    def step() -> None:
        for put, value in zip(puts, values, strict=True):
            put(value)

    return step


def _store(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    space, type_, count = _shape(instruction)
    reads = [operands.bits(one, type_) for one in (source if isinstance(source, tuple) else (source,))]
    width = BITS[type_] // 8 * count
    if len(reads) != count or space == "param":
        raise unknown(instruction)
    access, machine = _access(operands, instruction, space), operands.machine
    address = operands.address(target)

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        values = np.stack([read()[lanes] for read in reads], 1).reshape(-1).view(f"V{width}")
        access(address()[lanes], width, lanes, values)

    return step


def _access(
    operands: Operands, instruction: Instruction, space: str
) -> Callable[[Array, int, Array, Array | None], Array]:
    """Loads, or stores where there are values, in one state space."""
    machine = operands.machine
    if space not in ("global", "shared", "generic", "param"):
        raise unknown(instruction)

    def access(addresses: Array, width: int, lanes: Array, values: Array | None) -> Array:
        shared = space == "shared"
        if space == "generic" and len(addresses):
            inside = addresses >= np.uint64(_SHARED_WINDOW)
            shared = bool(inside.all())
            if inside.any() != shared:
                raise NotImplementedError("a generic access to two state spaces at once")
            addresses = addresses - np.uint64(_SHARED_WINDOW) if shared else addresses
        memory = machine.shared if shared else machine.parameter_memory if space == "param" else machine.memory
        if values is None:
            return memory.load(addresses, width, lanes)
        memory.store(addresses, values, lanes)
        return values

    return access


_JOINED: dict[str, Callable[[Array, Array], Array]] = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _atomic(operands: Operands, instruction: Instruction) -> Step:
    """red and atom of whole numbers in global memory, one thread after another."""
    machine, parts = operands.machine, instruction.parts
    *result, target, source = instruction.operands
    space, type_, _ = _shape(instruction)
    join = next((function for name, function in _JOINED.items() if name in parts), None)
    if join is None or space not in ("global", "generic") or type_ not in ("u32", "s32", "u64", "s64"):
        raise unknown(instruction)
    address, read = operands.address(target), operands.bits(source, type_)
    put = operands.put(result[0] if result else "_", type_)
    access, dtype, width = (
        _access(operands, instruction, space),
        type_[0].replace("s", "i") + str(BITS[type_] // 8),
        BITS[type_] // 8,
    )

    def step() -> None:
        addresses, values = address(), read()
        found = np.zeros(machine.lanes, UNSIGNED[BITS[type_]])
        for lane in np.flatnonzero(machine.active):
            where, one = addresses[lane : lane + 1], np.array([lane])
            old = access(where, width, one, None).view(dtype)
            access(where, width, one, join(old, values[lane : lane + 1].view(dtype)).view(f"V{width}"))
            found[lane] = old.view(found.dtype)[0]
        put(found)

    return step


def _copy(operands: Operands, instruction: Instruction) -> Step:
    """cp.async: copies, and their groups."""
    machine, parts = operands.machine, instruction.parts
    if "commit_group" in parts:
        return lambda: machine.copies.commit(machine.active)
    if "wait_all" in parts:
        return lambda: machine.copies.wait(machine.active, -1)
    if "wait_group" in parts:
        groups = int(str(instruction.operands[0]), 0)
        return lambda: machine.copies.wait(machine.active, groups)
    if parts[2] not in ("ca", "cg") or "mbarrier" in parts:
        raise unknown(instruction)
    target, source, size, *rest = instruction.operands
    width = int(str(size), 0)
    if width not in ((4, 8, 16) if parts[2] == "ca" else (16,)):
        raise unknown(instruction)
    to, start = operands.address(target), operands.address(source)
    hinted = any("cache_hint" in part for part in parts)
    wanted = operands.bits(rest[0], "b32") if len(rest) > hinted else None

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        values = np.zeros(len(lanes) * width, "u1").reshape(-1, width)
        addresses = start()[lanes]
        bytes_ = np.full(len(lanes), width) if wanted is None else wanted()[lanes]
        for count in np.unique(bytes_[bytes_ > 0]):
            if count != width:
                raise Fault(f"copies {count} of {width} bytes; this project copies all or none")
            some = bytes_ == count
            values[some] = machine.memory.load(addresses[some], width, lanes[some]).view("u1").reshape(-1, width)
        machine.copies.issue(to()[lanes], values.reshape(-1).view(f"V{width}"), lanes)

    return step


DECODERS: dict[str, Callable[[Operands, Instruction], Step]] = {
    **{"mov": _move, "cvta": _window, "createpolicy": _policy},
    **{"ld": _load, "ldu": _load, "st": _store, "cp": _copy, "red": _atomic, "atom": _atomic},
}
