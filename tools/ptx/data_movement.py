"""Decode data movement instructions: mov, cvta, createpolicy, ld, st, red, atom and cp.async."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.memory import Fault
from tools.ptx.numerics import UNSIGNED, Array
from tools.ptx.operands import Operands, Step, unsupported_instruction
from tools.ptx.parser import BITS, Address, Instruction

_SHARED_WINDOW = 1 << 60  # start of shared memory in the generic address space
_SPACES = ("param", "global", "shared", "const", "local")


def _move(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands
    type_ = instruction.opcode[1]
    put, read = operands.raw_writer(target, type_), operands.raw_reader(source, type_)
    return lambda: put(read())


def _convert_address(operands: Operands, instruction: Instruction) -> Step:
    """Decode cvta. Only shared memory has generic addresses that differ from those of its state space."""
    target, source = instruction.operands
    type_ = instruction.opcode[-1]
    put, read = operands.raw_writer(target, type_), operands.raw_reader(source, type_)
    offset = UNSIGNED[BITS[type_]].type(_SHARED_WINDOW if "shared" in instruction.opcode and BITS[type_] == 64 else 0)
    if "to" in instruction.opcode:
        return lambda: put(read() - offset)
    return lambda: put(read() + offset)


def _policy(operands: Operands, instruction: Instruction) -> Step:
    put, zero = operands.raw_writer(instruction.operands[0], "b64"), np.zeros(operands.machine.num_lanes, "u8")
    return lambda: put(zero)


def _access_type(instruction: Instruction) -> tuple[str, str, int]:
    """Return state space, item type and vector length of a ld or st."""
    types = [part for part in instruction.opcode if part in BITS]
    vector = [int(part[1:]) for part in instruction.opcode if part in ("v2", "v4", "v8")]
    space = next((part for part in instruction.opcode if part.split("::")[0] in _SPACES), "generic")
    return space.split("::")[0], types[-1], vector[0] if vector else 1


def _load(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    space, type_, count = _access_type(instruction)
    puts = [operands.raw_writer(one, type_) for one in (target if isinstance(target, tuple) else (target,))]
    item, width = UNSIGNED[BITS[type_]], BITS[type_] // 8 * count
    if len(puts) != count or width > 32:
        raise unsupported_instruction(instruction)
    if space == "param" and isinstance(source, Address) and source.base in operands.machine.parameters:
        return _load_parameter(operands, instruction, source, puts, item)
    access, machine = _access(operands, instruction, space), operands.machine
    address = operands.address_reader(source)

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        found = access(address()[lanes], width, lanes, None).view(item).reshape(-1, count)
        values = found
        if not machine.all_active:
            values = np.zeros((machine.num_lanes, count), item)
            values[lanes] = found
        for column, put in enumerate(puts):
            put(np.ascontiguousarray(values[:, column]))

    return step


def _load_parameter(
    operands: Operands, instruction: Instruction, source: Address, puts: list[Callable[[Array], None]], item: np.dtype
) -> Step:
    data = operands.machine.parameters[source.base][source.offset :][: item.itemsize * len(puts)]
    if len(data) < item.itemsize * len(puts):
        raise Fault(f"{instruction.location}: access beyond the end of the parameter: {instruction.text}")
    values = [np.full(operands.machine.num_lanes, value) for value in np.frombuffer(data, item)]

    def step() -> None:
        for put, value in zip(puts, values, strict=True):
            put(value)

    return step


def _store(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    space, type_, count = _access_type(instruction)
    reads = [operands.raw_reader(one, type_) for one in (source if isinstance(source, tuple) else (source,))]
    width = BITS[type_] // 8 * count
    if len(reads) != count or space == "param":
        raise unsupported_instruction(instruction)
    access, machine = _access(operands, instruction, space), operands.machine
    address = operands.address_reader(target)

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        values = np.stack([read()[lanes] for read in reads], 1).reshape(-1).view(f"V{width}")
        access(address()[lanes], width, lanes, values)

    return step


def _access(
    operands: Operands, instruction: Instruction, space: str
) -> Callable[[Array, int, Array, Array | None], Array]:
    """Return a function that accesses one state space: a load, or a store if it gets values."""
    machine = operands.machine
    if space not in ("global", "shared", "generic", "param"):
        raise unsupported_instruction(instruction)

    def access(addresses: Array, width: int, lanes: Array, values: Array | None) -> Array:
        shared = space == "shared"
        if space == "generic" and len(addresses):
            inside = addresses >= np.uint64(_SHARED_WINDOW)
            shared = bool(inside.all())
            if inside.any() != shared:
                raise NotImplementedError("generic access in which threads address both shared and global memory")
            addresses = addresses - np.uint64(_SHARED_WINDOW) if shared else addresses
        memory = machine.shared if shared else machine.parameter_memory if space == "param" else machine.memory
        if values is None:
            return memory.load(addresses, width, lanes)
        memory.store(addresses, values, lanes)
        return values

    return access


_ATOMIC_OPS: dict[str, Callable[[Array, Array], Array]] = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _atomic(operands: Operands, instruction: Instruction) -> Step:
    """Decode red and atom of integers in global memory, executed one thread after another."""
    machine, parts = operands.machine, instruction.opcode
    *result, target, source = instruction.operands
    space, type_, _ = _access_type(instruction)
    combine = next((function for name, function in _ATOMIC_OPS.items() if name in parts), None)
    if combine is None or space not in ("global", "generic") or type_ not in ("u32", "s32", "u64", "s64"):
        raise unsupported_instruction(instruction)
    address, read = operands.address_reader(target), operands.raw_reader(source, type_)
    put = operands.raw_writer(result[0] if result else "_", type_)
    access, dtype, width = (
        _access(operands, instruction, space),
        type_[0].replace("s", "i") + str(BITS[type_] // 8),
        BITS[type_] // 8,
    )

    def step() -> None:
        addresses, values = address(), read()
        found = np.zeros(machine.num_lanes, UNSIGNED[BITS[type_]])
        for lane in np.flatnonzero(machine.active):
            address_, one = addresses[lane : lane + 1], np.array([lane])
            old = access(address_, width, one, None).view(dtype)
            access(address_, width, one, combine(old, values[lane : lane + 1].view(dtype)).view(f"V{width}"))
            found[lane] = old.view(found.dtype)[0]
        put(found)

    return step


def _copy(operands: Operands, instruction: Instruction) -> Step:
    """Decode cp.async, and its commit and wait instructions."""
    machine, parts = operands.machine, instruction.opcode
    if "commit_group" in parts:
        return lambda: machine.async_copies.commit(machine.active)
    if "wait_all" in parts:
        return lambda: machine.async_copies.wait(machine.active, -1)
    if "wait_group" in parts:
        groups = int(str(instruction.operands[0]), 0)
        return lambda: machine.async_copies.wait(machine.active, groups)
    if parts[2] not in ("ca", "cg") or "mbarrier" in parts:
        raise unsupported_instruction(instruction)
    target, source, size, *rest = instruction.operands
    width = int(str(size), 0)
    if width not in ((4, 8, 16) if parts[2] == "ca" else (16,)):
        raise unsupported_instruction(instruction)
    to, start = operands.address_reader(target), operands.address_reader(source)
    hinted = any("cache_hint" in part for part in parts)
    source_size = operands.raw_reader(rest[0], "b32") if len(rest) > hinted else None

    def step() -> None:
        lanes = np.flatnonzero(machine.active)
        values = np.zeros(len(lanes) * width, "u1").reshape(-1, width)
        addresses = start()[lanes]
        bytes_ = np.full(len(lanes), width) if source_size is None else source_size()[lanes]
        for count in np.unique(bytes_[bytes_ > 0]):
            if count != width:
                raise NotImplementedError(f"{instruction.location}: cp.async with a source of {count} of {width} bytes")
            copied = bytes_ == count
            values[copied] = machine.memory.load(addresses[copied], width, lanes[copied]).view("u1").reshape(-1, width)
        machine.async_copies.issue(to()[lanes], values.reshape(-1).view(f"V{width}"), lanes)

    return step


DECODERS: dict[str, Callable[[Operands, Instruction], Step]] = {
    **{"mov": _move, "cvta": _convert_address, "createpolicy": _policy},
    **{"ld": _load, "ldu": _load, "st": _store, "cp": _copy, "red": _atomic, "atom": _atomic},
}
