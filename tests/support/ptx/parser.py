"""Parse the text of a PTX kernel as Triton's compiler writes it: a line holds one label, brace, declaration or instruction."""

import re
from typing import NamedTuple

BITS = {"b8": 8, "u8": 8, "b16": 16, "b32": 32, "u32": 32, "f32": 32, "b64": 64, "u64": 64, "f64": 64}  # Parameters' types.


class Instruction(NamedTuple):
    """An instruction. Its operands are split as far as registers, constants and symbols."""

    line: int
    guard: str | None  # The predicate, without the sign that negates it.
    guard_is_negated: bool
    name: str
    operands: list[str]


class Parameter(NamedTuple):
    """A kernel's parameter: where it lies in the parameter block, in bytes."""

    offset: int
    size: int


class Kernel(NamedTuple):
    """The parsed text of a kernel."""

    threads: int
    registers_per_thread: int  # At first; 0 where the text does not tell.
    parameters: dict[str, Parameter]  # In the order of the text.
    registers: set[str]  # Their names, or what their names begin with before a number.
    shared: list[str]  # The names of the array to which the launch gives its size.
    instructions: list[Instruction]
    labels: dict[str, int]  # The index of the instruction that a label stands before.

    @property
    def parameter_bytes(self) -> int:
        last = list(self.parameters.values())[-1]
        return last.offset + last.size


def parse(text: str) -> Kernel:
    """Parse the only kernel of a text."""
    text = _with_targets_in_branches(re.sub(r"//[^\n]*", "", text))
    start = text.index(".entry")
    body = text.index("\n{", start)
    threads = re.search(r"\.reqntid (\d+)", text[start:body])
    header = text[start:body].partition("(")[2].rpartition(")")[0]
    instructions, labels = _parse_body(text[body:], text.count("\n", 0, body) + 1)
    shared = re.findall(r"\.extern \.shared [^;]*?([\w$]+)\[\];", text[:start])
    most = re.search(r"\.maxnreg (\d+)", text[start:body])
    per_thread = int(most[1]) if most else 0
    return Kernel(int(threads[1]), per_thread, _parse_parameters(header), _parse_registers(text), shared, instructions, labels)


def _with_targets_in_branches(text: str) -> str:
    """Let each brx.idx name its targets, and not a table of them."""
    table = r"([\w$]+):\s*\.branchtargets\s*([^;]*);"
    targets = dict(re.findall(table, text))
    text = re.sub(table, lambda match: "\n" * match[0].count("\n"), text)
    return re.sub(r"(brx\.idx\s+[^;]*?)([\w$]+);", lambda match: f"{match[1]}{' '.join(targets[match[2]].split())};", text)


def _parse_parameters(header: str) -> dict[str, Parameter]:
    """Lay out parameters as the ABI does: each at the next multiple of its alignment."""
    parameters, end = {}, 0
    for declaration in filter(None, map(str.strip, header.split(","))):
        array = re.fullmatch(r"\.param \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", declaration)
        if array:
            alignment, name, size = int(array[1]), array[2], int(array[3])
        else:
            kind, name = re.fullmatch(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? ([\w$]+)", declaration).groups()
            alignment = size = BITS[kind] // 8
        offset = -(-end // alignment) * alignment
        parameters[name], end = Parameter(offset, size), offset + size
    return parameters


def _parse_registers(text: str) -> set[str]:
    """Return the declared names; `%r<9>` declares names that begin with `%r`."""
    declarations = re.findall(r"\.reg \.\w+\s+([^;]*);", text)
    return {name.partition("<")[0] for names in declarations for name in re.split(r",\s*", names)}


def _parse_body(body: str, first_line: int) -> tuple[list[Instruction], dict[str, int]]:
    """Parse the lines of a kernel's body. Labels of an inner scope are told apart by its number."""
    instructions, labels, depth, scope = [], {}, 0, 0
    for line, statement in enumerate(body.split("\n"), first_line):
        statement = statement.strip()
        label = re.fullmatch(r"([$\w]+):", statement)
        if statement == "{":
            depth, scope = depth + 1, scope + 1
        elif statement == "}":
            depth -= 1
            if not depth:
                break
        elif label:
            labels[_scoped(label[1], scope, depth)] = len(instructions)
        elif statement and not statement.startswith("."):
            instructions.append(_parse_instruction(line, statement, scope, depth))
    return instructions, labels


def _scoped(label: str, scope: int, depth: int) -> str:
    """Return the name of a label: its own in the kernel's scope, and one with the scope's number in an inner one."""
    return f"{label}@{scope}" if depth > 1 and not label.startswith("$") else label


def _parse_instruction(line: int, statement: str, scope: int, depth: int) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*);", statement)
    negated, guard, name, operands = match.groups()
    if name.startswith("bra"):
        return Instruction(line, guard, negated == "!", name, [_scoped(operands, scope, depth)])
    if name.startswith("mov") and "{" in operands:
        name = ("unpack" if operands.startswith("{") else "pack") + name.removeprefix("mov")
    return Instruction(line, guard, negated == "!", name, _split_operands(operands))


def _split_operands(operands: str) -> list[str]:
    """Split operands. An address becomes a base and an offset; a vector becomes its elements."""
    with_offsets = re.sub(r"\[\s*([^\s\[\]+,]+)\s*(?:\+\s*(-?\w+)\s*)?\]", lambda m: f"{m[1]}, {m[2] or 0}", operands)
    return [operand for operand in re.split(r"[\s,|{}\[\]]+", with_offsets) if operand]
