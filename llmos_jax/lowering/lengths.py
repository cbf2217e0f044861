"""A program for each of a few lengths of text, called as one."""

from __future__ import annotations

from typing import Any

from llmos_jax.lowering.program import Program


class ByLength:
    """A program for each of a few lengths of text; called as one."""

    def __init__(self, programs: dict[int, Program]):
        """Take a program for each number of tokens."""
        self._programs = programs
        self.arguments = next(iter(programs.values())).arguments

    def __call__(self, first: Any, batch: dict[str, Any]) -> Any:
        """Run the program of the batch's length."""
        return self._programs[batch["inputs"].shape[1]](first, batch)

    def compile(self) -> float:
        """Compile all; return seconds taken."""
        return sum(program.compile() for program in self._programs.values())
