"""Operands as closures that read and write registers, special registers, variables and constants of all threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptx import numerics
from tools.ptx.numerics import UNSIGNED, Array
from tools.ptx.parser import BITS, Address, Instruction, Operand

if TYPE_CHECKING:
    from tools.ptx.machine import Machine


#: Executes an instruction in the active threads; returns the next instruction's index, or None for the following one.
Step = Callable[[], int | None]


def unsupported_instruction(instruction: Instruction) -> NotImplementedError:
    """Return the exception for an instruction that the interpreter does not support."""
    return NotImplementedError(f"{instruction.location}: {instruction.text}")


class Operands:
    """The registers of a machine, and closures that read and write them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._slots: list[Array] = []
        self._names: dict[Any, int] = {}

    def _slot(self, name: str, bits: int) -> int:
        """Return the slot of a register, a special register, a variable or a constant, allocating it on first use."""
        machine = self.machine
        declared = machine.kernel.register_bits(name)
        key = name if declared is not None else (name, bits)
        if key not in self._names:
            self._names[key] = len(self._slots)
            self._slots.append(self._initial(name, bits if declared is None else declared, declared is not None))
        return self._names[key]

    def _initial(self, name: str, bits: int, register: bool) -> Array:
        machine, dtype = self.machine, UNSIGNED[bits]
        if register:
            return np.zeros(machine.num_lanes, dtype)
        if name in machine.special_registers:
            return machine.special_registers[name].astype(dtype)
        if name in machine.parameter_addresses:
            return np.full(machine.num_lanes, machine.parameter_addresses[name], dtype)
        if name in machine.kernel.shared_addresses:
            return np.full(machine.num_lanes, machine.kernel.shared_addresses[name], dtype)
        return np.full(machine.num_lanes, _constant(name, bits), dtype)

    def raw_reader(self, operand: Operand, type_: str) -> Callable[[], Array]:
        """Return a closure that reads an operand as unsigned integers of the width of ``type_``."""
        slots, width = self._slots, BITS[type_]
        if isinstance(operand, tuple):
            pieces = [self.raw_reader(piece, f"b{width // len(operand)}") for piece in operand]
            return lambda: np.stack([piece() for piece in pieces], 1).reshape(-1).view(UNSIGNED[width])
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand.startswith("!"):
            positive = self._slot(operand[1:], width)
            return lambda: ~slots[positive]
        slot = self._slot(operand, width)
        if slots[slot].dtype.itemsize * 8 > width > 1:
            narrow = UNSIGNED[width]
            return lambda: slots[slot].astype(narrow)
        return lambda: slots[slot]

    def reader(self, operand: Operand, type_: str) -> Callable[[], Array]:
        """Return a closure that reads an operand as values of ``type_``."""
        read = self.raw_reader(operand, type_)
        if type_ == "pred" or (type_[0] in "bu" and "f" not in type_):
            return read
        unpack = numerics.unpacker(type_)
        return lambda: unpack(read())

    def raw_writer(self, operand: Operand, type_: str) -> Callable[[Array], None]:
        """Return a closure that writes unsigned integers of the width of ``type_`` in the active threads.

        They are sign- or zero-extended to the width of the register.
        """
        machine, slots = self.machine, self._slots
        if isinstance(operand, tuple):
            return self._vector_writer(operand, type_)
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand == "_":
            return lambda values: None
        slot = self._slot(operand, BITS[type_])
        dtype, width = slots[slot].dtype, BITS[type_]
        if dtype.itemsize * 8 <= width or type_ == "pred":
            widen = None
        elif type_[0] == "s":
            widen = (f"i{width // 8}", f"i{dtype.itemsize}")
        else:
            widen = (f"u{width // 8}", f"u{dtype.itemsize}")

        def put(values: Array) -> None:
            if widen is not None:
                values = values.view(widen[0]).astype(widen[1]).view(dtype)
            slots[slot] = values if machine.all_active else np.where(machine.active, values, slots[slot])

        return put

    def _vector_writer(self, operand: tuple[str, ...], type_: str) -> Callable[[Array], None]:
        width = BITS[type_] // len(operand)
        puts = [self.raw_writer(piece, f"b{width}") for piece in operand]

        def put_all(values: Array) -> None:
            pieces = values.view(UNSIGNED[width]).reshape(-1, len(puts))
            for column, put in enumerate(puts):
                put(np.ascontiguousarray(pieces[:, column]))

        return put_all

    def writer(self, operand: Operand, type_: str) -> Callable[[Array], None]:
        """Return a closure that writes values of ``type_``."""
        put, pack = self.raw_writer(operand, type_), numerics.packer(type_)
        return lambda values: put(pack(values))

    def address_reader(self, operand: Operand) -> Callable[[], Array]:
        """Return a closure that computes ``[base + offset]`` as 64-bit addresses."""
        if not isinstance(operand, Address):
            raise NotImplementedError(f"address {operand}")
        wide = self.machine.kernel.register_bits(operand.base) or 64
        read, offset = self.raw_reader(operand.base or "0", f"b{wide}"), np.uint64(operand.offset % (1 << 64))
        return lambda: read().astype("u8") + offset


def _constant(text: str, bits: int) -> int:
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if text == "WARP_SZ":
        return 32
    try:
        return int(text.rstrip("uU"), 0) % (1 << bits)
    except ValueError:
        pass
    try:
        return int(np.array(float(text), f"f{bits // 8}").view(UNSIGNED[bits]))
    except ValueError:
        raise NotImplementedError(f"operand {text!r}") from None
