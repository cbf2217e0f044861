"""Turn the text of optimized HLO into computations, and how often each one runs.

Plain text in, plain data out: no jax. A step runs its ENTRY computation once; a `while`
multiplies what it calls by its trip count, which the text names (XLA:CPU) or which is
found here by running the loop's integer counters (XLA:TPU names none). Both branches of
a conditional count as taken.

Known lies: a loop whose end depends on data is counted once, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmos_jax.errors import LowerError

MAX_TRIPS = 5000
"""Iterations of one loop that are followed before its length is called unknown."""

BITS = {
    **{name: 8 for name in ("pred", "s8", "u8")},
    **{name: 16 for name in ("s16", "u16", "f16", "bf16")},
    **{name: 32 for name in ("s32", "u32", "f32")},
    **{name: 64 for name in ("s64", "u64", "f64", "c64")},
    **{name: 4 for name in ("s4", "u4", "f4e2m1fn")},
    **{name: 2 for name in ("s2", "u2")},
    "c128": 128,
}
"""Bits of one element (xla/primitive_util.h); every f8 variant has 8."""


@dataclass(frozen=True, slots=True)
class Array:
    """One array of an HLO shape: element type and dimensions, without layout."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.dims:
            count *= dim
        return count

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
        return -(-self.elements * bits // 8)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    """The text between the parentheses: operands, or a literal."""
    attributes: str
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(_NAME.findall(self.inside))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result's shape, tuples flattened."""
        return arrays_of(self.shape)

    @property
    def halves(self) -> tuple[str, ...]:
        """The elements of a tuple shape, each as text; the shape itself if no tuple."""
        return _elements(self.shape)

    def attribute(self, key: str) -> str | None:
        """The value of `key=`, up to the next comma outside brackets."""
        found = re.search(rf"(?:^|[ ,{{]){re.escape(key)}=", self.attributes)
        return None if found is None else _value(self.attributes[found.end() :])

    def calls(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations that these attributes call."""
        values = [self.attribute(key) or "" for key in keys]
        return tuple(name for value in values for name in _NAME.findall(value))


@dataclass(frozen=True, slots=True)
class Computation:
    """A named list of instructions in which each name is defined once."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(line for line in self.instructions.values() if line.is_root)

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read `name`."""
        return [line for line in self.instructions.values() if name in line.operands]


@dataclass(frozen=True, slots=True)
class Times:
    """How often a computation runs in one step."""

    count: int
    is_known: bool
    """False where a loop of unknown length is counted once."""


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled program: its computations, by name, and the one that is run."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    """Devices that run it together: on several TPU slices, those of one slice."""
    frames: dict[str, str] = field(default_factory=dict)
    """Stack frame number -> `file:line` of its innermost frame."""

    def runs(self) -> dict[str, Times]:
        """Computation -> how often one step runs it; what never runs is left out."""
        total: dict[str, Times] = {}
        waiting = [(self.entry, Times(1, True))]
        while waiting:
            name, times = waiting.pop()
            before = total.get(name, Times(0, True))
            known = before.is_known and times.is_known
            total[name] = Times(before.count + times.count, known)
            for line in self.computations[name].instructions.values():
                trips = _trips(self, name, line) if line.opcode == "while" else 1
                inner = Times(
                    times.count * (1 if trips is None else trips),
                    times.is_known and trips is not None,
                )
                waiting += [(called, inner) for called in _called(line)]
        return total

    def source(self, line: Instruction) -> str:
        """`op_name` of an instruction and, where the text has it, file and line."""
        name = re.search(r'op_name="([^"]*)"', line.attributes)
        frame = re.search(r"stack_frame_id=(\d+)", line.attributes)
        place = self.frames.get(frame.group(1), "") if frame else ""
        old = re.search(
            r'source_file="([^"]*)"(?: source_line=(\d+))?', line.attributes
        )
        if old and not place:
            place = f"{old.group(1)}:{old.group(2) or 0}"
        words = (name.group(1) if name else "", f"({place})" if place else "")
        return " ".join(word for word in words if word)


def parse_hlo(text: str) -> Module:
    """Parse what `compiled.as_text()` returns.

    Raises:
        LowerError: the text holds no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _statements(text):
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            found = _NAME.search(line)
            assert found is not None, line[:80]
            current = Computation(found.group(), {})
            computations[current.name] = current
            entry = current.name if line.startswith("ENTRY ") else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not entry:
        raise LowerError(
            f"this is no text of a compiled program: it begins {text[:40]!r} and has "
            "no ENTRY computation. Give what compiled.as_text() returns."
        )
    return Module(computations, entry, _partitions(text), _frames(text))


def _statements(text: str) -> Iterator[str]:
    """The lines of a program; an instruction whose attributes hold line ends is one.

    Pallas kernels write their metadata that way: `{kernel_metadata={`, a line of JSON,
    then `}}, metadata=...`.
    """
    kept: list[str] = []
    for line in text.splitlines():
        starts = line.startswith(("  ", "%", "ENTRY ", "HloModule")) or line in (
            "}",
            "",
        )
        if starts and kept:
            yield " ".join(kept)
            kept = []
        kept.append(line)
    yield " ".join(kept)


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as HLO prints it: `(bf16[8,4]{1,0}, u32[])` has two."""
    return tuple(
        Array(dtype, tuple(int(dim.strip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims in _ARRAY.findall(shape)
        if dtype != "token"
    )


_NAME = re.compile(r"%[\w.\-]+")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_LINE = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OPEN, _CLOSE = "([{", ")]}"


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    closing = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=head.group(2),
        shape=rest[:end],
        opcode=opcode.group(1),
        inside=rest[opcode.end() : closing],
        attributes=rest[closing + 1 :],
        is_root=head.group(1) is not None,
    )


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`; strings are skipped."""
    depth, quoted = 0, False
    for position in range(start, len(text)):
        char = text[position]
        if char == '"' and text[position - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return position
    return len(text)


def _value(text: str) -> str:
    """The text up to the first comma outside brackets and quotes."""
    depth, quoted = 0, False
    for position, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        depth += 0 if quoted else (char in _OPEN) - (char in _CLOSE)
        if depth < 0 or (char == "," and depth == 0 and not quoted):
            return text[:position].strip()
    return text.strip()


def _elements(shape: str) -> tuple[str, ...]:
    if not shape.startswith("("):
        return (shape,)
    inside, parts = shape[1:-1], []
    while inside:
        part = _value(inside)
        parts.append(part)
        inside = inside[inside.find(part) + len(part) :].lstrip(" ,")
    return tuple(parts)


def _partitions(text: str) -> int:
    head = text[: text.find("\n")]
    sizes = [
        int(found.group(1))
        for key in ("num_partitions", "replica_count")
        if (found := re.search(rf"\b{key}=(\d+)", head))
    ]
    return max([1, *sizes])


def _frames(text: str) -> dict[str, str]:
    """Read the tables of stack frames that newer texts carry before the program."""
    files = dict(re.findall(r'^(\d+) "([^"]*)"$', _table(text, "FileNames"), re.M))
    places = {
        number: f"{files.get(file, '?')}:{line}"
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)",
            _table(text, "FileLocations"),
            re.M,
        )
    }
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+)", _table(text, "StackFrames"), re.M
    )
    return {frame: places.get(place, "") for frame, place in frames}


def _table(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
    return found.group(1) if found else ""


def _called(line: Instruction) -> tuple[str, ...]:
    """The computations an instruction runs; reducers and comparators do not count."""
    if line.opcode == "while":
        return line.calls("body")
    if line.opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        return line.calls(*keys)
    if line.opcode == "call":
        return line.calls("to_apply")
    if line.opcode in ("fusion", "async-start"):
        return line.calls("calls")
    if line.opcode == "custom-call":
        return line.calls("called_computations", "calls")
    return ()


def _trips(module: Module, parent: str, line: Instruction) -> int | None:
    """Iterations of a `while`, or None where they cannot be known."""
    named = re.search(r'known_trip_count"?:\{"n":"?(\d+)', line.attributes)
    if named:
        return int(named.group(1))
    condition, body = line.calls("condition") + line.calls("body")
    state = _Frame(module, parent, []).value(line.operands[0])
    for trips in range(MAX_TRIPS):
        goes_on = _Frame(module, condition, [state]).result()
        if not isinstance(goes_on, bool):
            return None
        if not goes_on:
            return trips
        state = _Frame(module, body, [state]).result()
    return None


class _Frame:
    """One run of a computation over integers: what is no integer counter is None."""

    def __init__(self, module: Module, name: str, arguments: list[Any]):
        self.module, self.arguments = module, arguments
        self.computation = module.computations[name]
        self.known: dict[str, Any] = {}

    def result(self) -> Any:
        return self.value(self.computation.root.name)

    def value(self, name: str) -> Any:
        """An int, a bool, a list for a tuple, or None."""
        if name not in self.known:
            self.known[name] = self._compute(self.computation.instructions[name])
        return self.known[name]

    def _compute(self, line: Instruction) -> Any:
        if line.opcode == "parameter":
            place = int(line.inside)
            return self.arguments[place] if place < len(self.arguments) else None
        if line.opcode == "constant":
            return _literal(line)
        if line.opcode == "tuple":
            return [self.value(name) for name in line.operands]
        if line.opcode == "get-tuple-element":
            whole, index = self.value(line.operands[0]), line.attribute("index")
            return whole[int(index or 0)] if isinstance(whole, list) else None
        if "[]" not in line.shape and not line.shape.startswith("("):
            return None
        if line.opcode in _SAME:
            return self.value(line.operands[0])
        if line.opcode in ("fusion", "call"):
            arguments = [self.value(name) for name in line.operands]
            called = _called(line)[0]
            return _Frame(self.module, called, arguments).result()
        return self._arithmetic(line)

    def _arithmetic(self, line: Instruction) -> Any:
        operation = _COMPARE if line.opcode == "compare" else _INTEGER
        key = line.attribute("direction") if line.opcode == "compare" else line.opcode
        if key not in operation:
            return None
        values = [self.value(name) for name in line.operands]
        if any(value is None or isinstance(value, list) for value in values):
            return None
        return operation[key](*values)


_SAME = frozenset(
    {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
)
"""Operations that hand an integer on."""
_INTEGER: dict[str | None, Any] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
}
_COMPARE: dict[str | None, Any] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _literal(line: Instruction) -> int | bool | None:
    if line.inside in ("true", "false"):
        return line.inside == "true"
    is_scalar = re.fullmatch(r"-?\d+", line.inside) and line.shape[0] in "su"
    return int(line.inside) if is_scalar else None
