"""Parse PTX text into kernels and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 1,
    **{kind + str(bits): bits for kind in "usbf" for bits in (8, 16, 32, 64)},
    **{"bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32},
}


@dataclass(frozen=True)
class Address:
    """An address operand ``[base + offset]``; the base is a register, a parameter, a variable or empty."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # the fields of the opcode, which are separated by dots
    operands: tuple[Operand, ...]
    guard: str | None  # "%p1", or "!%p1"
    text: str
    location: str  # line of the PTX text, and of the source if there is line information
    index: int  # position in the kernel's instructions


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    size: int  # bytes


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    threads: tuple[int, ...] | None  # .reqntid
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # width by name
    register_families: dict[str, int] = field(default_factory=dict)  # width by prefix: "%r" for the registers %r<8>
    shared_addresses: dict[str, int] = field(default_factory=dict)  # address by variable
    static_shared: int = 0
    dynamic_shared: list[str] = field(
        default_factory=list
    )  # extern variables, all at the start of the dynamic shared memory

    def register_bits(self, register: str) -> int | None:
        """Return the width of a register in bits, or None if there is no register of this name."""
        if register in self.registers:
            return self.registers[register]
        return self.register_families.get(register.rstrip("0123456789"))


_SHARED = re.compile(
    r"(?P<extern>\.extern\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b[^,\[]*?([\w$]+)\s*(?:\[(\d+)\])?\s*$")


def parse(ptx: str) -> dict[str, Kernel]:
    """Return every ``.entry`` of a module by name."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), ptx, flags=re.DOTALL)
    text = re.sub(r"(\.loc[^\n/]*)//\s*(\S+)[^\n]*", r"\1 @\2", text)
    text = re.sub(r"//[^\n]*", "", text)
    kernels = {}
    for entry in _ENTRY.finditer(text):
        parameters = [_parameter(one) for one in entry[2].split(",") if one.strip()]
        threads = re.search(r"\.reqntid\s+([\d,\s]+)", entry[3])
        kernel = Kernel(entry[1], parameters, tuple(map(int, threads[1].split(","))) if threads else None)
        for variable in _SHARED.finditer(text[: entry.start()]):
            _allocate_shared(kernel, variable)
        _body(kernel, text, entry.end())
        if kernel.dynamic_shared:  # after the static variables
            kernel.static_shared = -(-kernel.static_shared // 16) * 16
            kernel.shared_addresses |= dict.fromkeys(kernel.dynamic_shared, kernel.static_shared)
        kernels[kernel.name] = kernel
    return kernels


def _parameter(text: str) -> Parameter:
    found = _PARAMETER.search(text.strip())
    if found is None:
        raise NotImplementedError(f"parameter {text.strip()!r}")
    return Parameter(found[2], found[1], BITS[found[1]] // 8 * int(found[3] or 1))


def _allocate_shared(kernel: Kernel, variable: re.Match[str]) -> None:
    if variable["extern"]:
        kernel.dynamic_shared.append(variable["name"])
        return
    align = int(variable["align"] or BITS[variable["type"]] // 8)
    kernel.shared_addresses[variable["name"]] = start = -(-kernel.static_shared // align) * align
    kernel.static_shared = start + BITS[variable["type"]] // 8 * int(variable["count"] or 1)


def _statements(text: str, start: int) -> Iterator[tuple[str, int]]:
    """Yield the braces, labels, directives and instructions of a body, with the positions at which they begin."""
    position, depth = start, 1
    token = re.compile(r"\s*(?:([{}])|(\.loc[^\n]*)|([\w$]+:)(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*;))", re.DOTALL)
    while depth:
        found = token.match(text, position)
        if found is None:
            raise NotImplementedError(
                f"line {text.count(chr(10), 0, position) + 1}: {text[position : position + 80]!r}"
            )
        depth += {"{": 1, "}": -1}.get(found[1], 0)
        begin = position + len(found[0]) - len(found[0].lstrip())
        yield found[0].strip(), begin
        position = found.end()


def _body(kernel: Kernel, text: str, start: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # unique names of the local registers of inline assembly
    line, scanned, source = text.count("\n", 0, start) + 1, start, ""
    for statement, position in _statements(text, start):
        line, scanned = line + text.count("\n", scanned, position), position
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.startswith(".loc"):
            source = f" ({statement.partition('@')[2]})" if "@" in statement else source
        elif statement.endswith(":"):
            if kernel.labels.setdefault(statement[:-1], len(kernel.instructions)) != len(kernel.instructions):
                raise NotImplementedError(f"line {line}: label {statement} occurs twice")
        elif statement.startswith(".reg"):
            _declare(kernel, statement, scopes, len(kernel.instructions))
        elif variable := _SHARED.match(statement):
            _allocate_shared(kernel, variable)
        elif statement.startswith(".pragma"):
            continue
        else:
            for name, unique in {k: v for scope in scopes for k, v in scope.items()}.items():
                statement = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?!\w)", unique, statement)
            kernel.instructions.append(_instruction(statement[:-1], f"line {line}{source}", len(kernel.instructions)))


def _declare(kernel: Kernel, statement: str, scopes: list[dict[str, str]], serial: int) -> None:
    _, type_, names = statement.rstrip(";").split(None, 2)
    for name in map(str.strip, names.split(",")):
        if family := re.fullmatch(r"(\S+)<\d+>", name):
            kernel.register_families[family[1]] = BITS[type_[1:]]
        elif len(scopes) > 1:
            unique = scopes[-1][name] = f"{name}@{serial}"
            kernel.registers[unique] = BITS[type_[1:]]
        else:
            kernel.registers[name] = BITS[type_[1:]]


def _instruction(text: str, location: str, index: int) -> Instruction:
    text = " ".join(text.split())
    guard = re.match(r"@(!?[\w%$.@]+)\s+", text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    operands = tuple(map(_operand, _split(rest)))
    return Instruction(tuple(opcode.split(".")), operands, guard[1] if guard else None, text, location, index)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    pieces = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(piece.strip() for piece in text[1:-1].split(","))
    if text.startswith("["):
        base, offset = re.fullmatch(r"((?:[^\d+-][^+-]*)?)(.*)", text[1:-1].replace(" ", "")).groups()
        return Address(base, sum(int(one, 0) for one in re.findall(r"-?\w+", offset)))
    return text
