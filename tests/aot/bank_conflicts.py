"""Counts the bank conflicts of a compiled kernel's loops, from the shared-memory addresses in its PTX.

Shared memory has 32 banks of 4 bytes. A warp's access takes one wavefront (one cycle of the memory) for each different
word of the busiest bank. Of an access of 16 bytes, 8 threads are served at a time; of 8 bytes, 16 threads. Two such
groups that read the same words are served together. ldmatrix and stmatrix access a row of 16 bytes for each of up to
32 threads.

`accesses` runs the integer instructions of the kernel once, in the order of the text, for all threads of a block.
Kernel arguments and block numbers are 0: they are the same for all threads, and shift an address of all threads alike,
which changes no conflict. A register that a loop carries has its first value. Numbers from memory are unknown, and so
is an address that depends on them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WARP, BANKS, WORD = 32, 32, 4
_SIGNED = {"s": True, "u": False, "b": True}
_OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "min": np.minimum,
    "max": np.maximum,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
    "mov": lambda a: a,
    "cvt": lambda a: a,
}
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_STATEMENT = re.compile(r"^\s*(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s+(.*);")
_ACCESS = re.compile(r"^(ld|st)\.shared(?:\.v([24]))?\.[a-z](\d+)$|^(ld|st)matrix\..*\.x([124])\.")


class Access(NamedTuple):
    instruction: str
    loop: int | None  # the innermost loop that contains it, by number
    reads: bool
    wavefronts: int | None  # of all warps of the block together; None: the addresses are unknown
    ideal: int | None  # with the same words, evenly spread over the banks


def accesses(ptx: str) -> list[Access]:
    """Every load from and store to shared memory, in the order of the text, without asynchronous copies."""
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1])
    lines = ptx.splitlines()
    loops = _innermost_loops(lines)
    registers: dict[str, np.ndarray | None] = {}
    found = []
    for number, line in enumerate(lines):
        statement = _STATEMENT.match(line)
        if statement is None:
            continue
        _, instruction, operands = statement.groups()
        if access := _ACCESS.match(instruction):
            loop = next((index for index, (first, last) in enumerate(loops) if first <= number <= last), None)
            found.append(_count(instruction, access, loop, _address(operands, registers, threads)))
        _execute(instruction, operands, registers, threads)
    return found


def _innermost_loops(lines: list[str]) -> list[tuple[int, int]]:
    """(first line, last line) of every backward branch that encloses no other."""
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$L__BB\w+):", line))}
    jumps = [
        (labels[match[1]], number)
        for number, line in enumerate(lines)
        if (match := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and labels[match[1]] <= number
    ]
    return [one for one in jumps if not any(one[0] <= a and b <= one[1] for a, b in jumps if (a, b) != one)]


def _execute(instruction: str, operands: str, registers: dict, threads: int) -> None:
    name, *types = instruction.split(".")
    written, *read = (part.strip() for part in re.split(r",\s*(?![^{]*\})", operands))
    targets = re.findall(r"%\w+", written)
    if name in ("st", "bra", "bar", "cp", "ret", "red", "stmatrix") or not targets:
        return
    if name == "ld" and types[0] == "param":
        registers[targets[0]] = np.zeros(threads, dtype=np.int64)
        return
    value = _result(name, types, [_value(one, registers, threads) for one in read])
    # A loop carries some registers: what the end of the loop gives them may be unknown, and their first value is not.
    if value is not None or name.startswith("ld"):
        registers.update(dict.fromkeys(targets, value))


def _result(name: str, types: list[str], values: list) -> np.ndarray | None:
    if name == "selp" and values[2] is None:
        # The condition of a whole block, such as the number of a pipeline's stage.
        return values[0]
    if any(value is None for value in values) or (types and types[-1][0] == "f"):
        return None
    if name == "selp":
        return np.where(values[2] != 0, *values[:2])
    if name == "setp":
        return _COMPARISONS[types[0]](*values).astype(np.int64)
    if name not in _OPERATIONS or "hi" in types:
        return None
    with np.errstate(over="ignore"):
        result = _OPERATIONS[name](*values)
    if types[-1] == "pred":
        return result & 1
    kind = re.fullmatch(r"([sub])(\d+)", types[0] if name == "cvt" else types[-1])
    bits = int(kind[2]) * (2 if "wide" in types else 1)
    if bits >= 64:
        return result
    result = result & ((1 << bits) - 1)
    return np.where(_SIGNED[kind[1]] & (result >> (bits - 1) == 1), result - (1 << bits), result)


def _value(operand: str, registers: dict, threads: int) -> np.ndarray | None:
    if operand == "%tid.x":
        return np.arange(threads, dtype=np.int64)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
        return np.full(threads, int(operand, 0), dtype=np.int64)
    if operand.startswith("%ctaid") or re.fullmatch(r"\w*smem\w*", operand):
        return np.zeros(threads, dtype=np.int64)
    return registers.get(operand)


def _address(operands: str, registers: dict, threads: int) -> np.ndarray | None:
    base, offset = re.search(r"\[\s*([\w%.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operands).groups()
    value = _value(base, registers, threads)
    return None if value is None else value + int(offset or 0)


def _count(instruction: str, access: re.Match, loop: int | None, address: np.ndarray | None) -> Access:
    kind, vector, bits, matrix_kind, matrices = access.groups()
    size = 16 if matrices else int(vector or 1) * int(bits) // 8
    reads = (kind or matrix_kind) == "ld"
    if address is None:
        return Access(instruction, loop, reads, None, None)
    wavefronts = ideal = 0
    for warp in np.split(address, len(address) // WARP):
        lanes = warp[: 8 * int(matrices)] if matrices else warp
        group = min(WARP, WARP * WORD // size)
        words = [
            frozenset(int(start) // WORD + i for start in lanes[at : at + group] for i in range(max(size // WORD, 1)))
            for at in range(0, len(lanes), group)
        ]
        wavefronts += sum(_busiest(group) for group in set(words))
        ideal += -(-len(frozenset().union(*words)) // BANKS)
    return Access(instruction, loop, reads, wavefronts, ideal)


def _busiest(words: frozenset[int]) -> int:
    return int(np.bincount([word % BANKS for word in words]).max())
