"""Number the registers of a kernel. Constants, symbols and labels become registers, too, which nothing writes."""

import re

import numpy as np

from .parser import Instruction, parse

LANES = 32
SPECIAL = ("%tid.x", "%ctaid.x", "%laneid", "%warpid")  # Set by the interpreter (block.cpp), in this order.


class Program:
    """A kernel as the interpreter takes it."""

    def __init__(self, text: str):
        self.kernel = parse(text)
        self.numbers = {name: number for number, name in enumerate(SPECIAL)}
        self.constants: dict[int, int] = {}  # Values by register.
        self.symbols = {name: parameter.offset for name, parameter in self.kernel.parameters.items()}
        self.symbols |= dict.fromkeys(self.kernel.shared, 0) | self.kernel.labels
        operands = [[self._register(operand) for operand in one.operands] for one in self.kernel.instructions]
        self.names = b"".join(one.name.encode() + b"\0" for one in self.kernel.instructions)
        self.lines = _int32(one.line for one in self.kernel.instructions)
        self.guards = _int32(map(self._guard, self.kernel.instructions))
        self.operands = _int32(register for registers in operands for register in registers)
        self.first_operands = _int32(np.cumsum([0, *map(len, operands)]))

    def registers(self) -> np.ndarray:
        """Return the values that the registers have at first: uint64 (registers, LANES)."""
        values = np.zeros((len(self.numbers), LANES), np.uint64)
        for register, value in self.constants.items():
            values[register] = value
        return values

    def _guard(self, instruction: Instruction) -> int:
        """Return twice the guard's register, plus 1 where it is negated; -1 without a guard."""
        if instruction.guard is None:
            return -1
        return 2 * self._register(instruction.guard) + instruction.guard_is_negated

    def _register(self, operand: str) -> int:
        """Return the number of a register, of which there is a new one for each new name."""
        if operand not in self.numbers:
            self.numbers[operand] = len(self.numbers)
            if (value := self._constant(operand)) is not None:
                self.constants[self.numbers[operand]] = value % (1 << 64)
        return self.numbers[operand]

    def _constant(self, operand: str) -> int | None:
        """Return the value of a constant or symbol; None for a register."""
        if operand in self.symbols:
            return self.symbols[operand]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", operand):
            return int(operand[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0)
        if operand == "_" or {operand, operand.rstrip("0123456789")} & self.kernel.registers:
            return None
        raise ValueError(f"unknown operand {operand}")


def _int32(numbers) -> np.ndarray:
    return np.fromiter(numbers, np.int32)
