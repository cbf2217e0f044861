"""Turn cells into aligned lines of plain text, at most 88 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 88
_BAR = 24
_LABEL = 12


def row(name: str, value: str) -> str:
    """`  name         value`."""
    return f"  {name:<{_LABEL}} {value}"


def rows(name: str, value: str) -> list[str]:
    """A row whose value may need several lines."""
    room = WIDTH - _LABEL - 3
    first, *rest = textwrap.wrap(value, room, break_on_hyphens=False) or [""]
    return [row(name, first), *(row("", line) for line in rest)]


def bar(share: float) -> str:
    """A bar of 24 cells for a share of one."""
    return ("#" * min(_BAR, round(share * _BAR))).ljust(_BAR)


def clip(line: str, width: int = WIDTH) -> str:
    """Cut a line that is too wide, and show that it was cut."""
    line = line.rstrip()
    return line if len(line) <= width else line[: width - 3] + "..."


def clipped(text: str) -> str:
    """Cut every line of a text to the page."""
    return "\n".join(clip(line) for line in text.splitlines())


def columns(cells: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """Lines of a table, indented by two; `right` has an `r` for each column to the
    right."""
    if not cells:
        return []
    count = len(cells[0])
    widths = [max(len(line[column]) for line in cells) for column in range(count)]
    sides = right.ljust(count, "l")
    return [
        clip(
            "  "
            + "  ".join(
                cell.rjust(width) if side == "r" else cell.ljust(width)
                for cell, width, side in zip(line, widths, sides, strict=True)
            )
        )
        for line in cells
    ]


def change_text(before: float, after: float) -> str:
    """1.0, 1.25 -> '+25%'; what more than doubled is said as a factor."""
    if not before:
        return ""
    ratio = after / before
    if abs(ratio - 1) < 0.0005:
        return "same"
    if ratio > 2.0005:
        return f"x{ratio:.3g}"
    digits = 0 if abs(ratio - 1) >= 0.1 else 1
    return f"{100 * (ratio - 1):+.{digits}f}%"
