"""Static checks of the byte code of a function that is to be recorded."""

from __future__ import annotations

import dis
import types
from typing import Any


def may_be_bool(name: Any) -> bool:
    """Return whether this is the name of a property, method or function that returns a bool of Python."""
    return isinstance(name, str) and (name.startswith("is_") or name in ("requires_grad", "equal", "allclose"))


def side_effect(code: types.CodeType, outer: tuple[str, ...]) -> str | None:
    """Return what a function does that a recording would miss, or None."""
    before: tuple[Any, Any] = (None, None)  # the two instructions before
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name == "IS_OP" and (before[1].opname != "LOAD_CONST" or may_be_bool(before[0].argval)):
            return "compares identities, which a recording does not preserve"
        if name.startswith("MATCH_"):
            return "matches patterns"
        if (
            instruction.argval in ("__class__", "__dict__") and getattr(before[1], "argval", "") != "super"
        ):  # super() in Python 3.12
            return f"reads {instruction.argval}"
        before = before[1], instruction
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"sets the global variable {instruction.argval}"
        if name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in outer:
            return f"sets the variable {instruction.argval} of an outer function"
        if name in ("POP_EXCEPT", "CHECK_EXC_MATCH"):
            return "handles exceptions, or uses a context manager"
    nested = [side_effect(value, outer) for value in code.co_consts if isinstance(value, types.CodeType)]
    return next(filter(None, nested), None)


_IN_MESSAGE = ("LOAD_", "FORMAT_", "BINARY_SUBSCR", "BUILD_STRING", "CONVERT_VALUE", "PRECALL", "CACHE")


def call_of_message(code: types.CodeType, offset: int) -> range | None:
    """Return the offsets of the call ``function(condition, f"... {value} ...")`` that formats the value at `offset`.

    None if the text is not the last of two arguments of a call whose result is dropped.
    """
    following = [instruction for instruction in dis.get_instructions(code) if instruction.offset >= offset]
    names: list[str] = []
    for index, instruction in enumerate(following[:-1]):
        if instruction.opname in ("CALL", "CALL_FUNCTION"):
            last = next((name for name in reversed(names) if name not in ("PRECALL", "CACHE")), "")
            fits = (
                instruction.arg == 2
                and (last == "BUILD_STRING" or last.startswith("FORMAT_"))
                and following[index + 1].opname == "POP_TOP"
            )
            return range(instruction.offset, following[index + 1].offset) if fits else None
        if not instruction.opname.startswith(_IN_MESSAGE):
            return None
        names.append(instruction.opname)
    return None


def tests_value_for_none(code: types.CodeType) -> bool:
    """Return whether a function tests by ``is`` a value that is not the attribute of a module."""
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        operand = None
        if instruction.opname == "IS_OP":
            operand = instructions[index - 2]
        elif instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            operand = instructions[index - 1]
        if operand is not None and operand.opname != "LOAD_ATTR":
            return True
    return any(tests_value_for_none(value) for value in code.co_consts if isinstance(value, types.CodeType))
