"""Turn two plans' facts into what differs between them, section by section.

Facts come from plans, locks or the JSON of `plan --json`; what only one side can say
(a JSON without its artefact has no specs) does not count as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos_jax.ir.facts import SECTIONS, Facts
from llmos_jax.planner.text import change_text, clip, clipped, columns
from llmos_jax.units import format_bytes, format_seconds, format_si

_SAME = 1e-6
"""Relative: what two releases of a float library may differ by."""
_PARTIAL = ("inputs", "specs", "compiled")
"""Sections in which one side may know less."""
_SHOWN_SPECS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two things that are compared."""

    label: str
    fingerprint: str
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs: section -> name -> (one, other); None is `not there`."""

    one: Side
    other: Side
    changed: dict[str, dict[str, tuple[Any, Any]]]

    @property
    def same_decision(self) -> bool:
        """Whether both decide the same, for the same inputs."""
        return self.one.fingerprint == self.other.fingerprint

    def summary(self) -> dict[str, Any]:
        """The JSON of `plan --diff`."""
        return {
            "a": self.one.label,
            "b": self.other.label,
            "same_decision": self.same_decision,
            "fingerprints": {"a": self.one.fingerprint, "b": self.other.fingerprint},
            **{
                section: {
                    name: {"a": one, "b": other, **_ratio(one, other)}
                    for name, (one, other) in self.changed[section].items()
                }
                for section in SECTIONS
            },
        }


def compare(one: Side, other: Side) -> Difference:
    """Return what differs between two sides."""
    changed = {}
    for section in SECTIONS:
        mine, theirs = one.facts.get(section, {}), other.facts.get(section, {})
        names = [*mine, *(name for name in theirs if name not in mine)]
        if section in _PARTIAL and not (mine and theirs):
            names = []
        if section == "inputs":
            names = [name for name in names if name in mine and name in theirs]
        changed[section] = {
            name: (mine.get(name), theirs.get(name))
            for name in names
            if not _same(mine.get(name), theirs.get(name))
        }
    return Difference(one=one, other=other, changed=changed)


def explain_difference(found: Difference) -> str:
    """Return the difference as aligned tables."""
    decision = "the same decision" if found.same_decision else "another decision"
    lines = [
        f"A  {found.one.fingerprint}  {found.one.label}",
        f"B  {found.other.fingerprint}  {found.other.label}",
        f"   {decision}",
    ]
    for section, title in (
        ("inputs", "Asked"),
        ("choice", "Chosen"),
        ("specs", "Split"),
        ("predicted", "Predicted"),
        ("compiled", "Compiled"),
    ):
        changed = found.changed[section]
        if changed:
            lines += ["", title, *_table(section, changed)]
    if not any(found.changed.values()):
        lines += ["", "Nothing differs."]
    return clipped("\n".join(lines))


def _table(section: str, changed: dict[str, tuple[Any, Any]]) -> list[str]:
    shown = (
        dict(list(changed.items())[:_SHOWN_SPECS]) if section == "specs" else changed
    )
    cells = [("", "A", "B", "")]
    for name, (one, other) in shown.items():
        texts = (_shown(name, one), _shown(name, other))
        cells.append((_title(name), *texts, _change(one, other)))
    if any(len(one) + len(other) > 52 for _, one, other, _ in cells):
        return _stacked(cells[1:])
    left = len(changed) - len(shown)
    rest = [f"  ... and {left} more parameters"] if left else []
    return [*columns(cells), *rest]


def _stacked(cells: list[tuple[str, str, str, str]]) -> list[str]:
    """Wide values, one below the other."""
    width = max(len(name) for name, *_ in cells)
    return [
        clip(f"  {name if side == 'A' else '':<{width}}  {side}  {text}")
        for name, one, other, _ in cells
        for side, text in (("A", one), ("B", other))
    ]


def _same(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return bool(abs(one - other) <= _SAME * max(abs(one), abs(other)))
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ratio(one: Any, other: Any) -> dict[str, float]:
    if _is_number(one) and _is_number(other) and one:
        return {"ratio": other / one}
    return {}


def _change(one: Any, other: Any) -> str:
    return change_text(one, other) if _is_number(one) and _is_number(other) else ""


_TITLES = {
    "step_s": "step time",
    "peak_hbm_bytes": "peak memory",
    "tflops_per_s_per_chip": "TFLOP/s per chip",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "argument_bytes": "arguments",
    "temp_bytes": "temporaries",
    "hlo_fingerprint": "HLO fingerprint",
}


def _title(name: str) -> str:
    """`ici, s` -> `time of ici`; `params, bytes` -> `memory of params`."""
    for ending, what in ((", s", "time of "), (", bytes", "memory of ")):
        if name.endswith(ending) and " over " not in name:
            return what + name.removesuffix(ending)
    return _TITLES.get(name, name.replace("_", " "))


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not _is_number(value):
        return str(value)
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith((", s", "step_s")):
        return format_seconds(value)
    if name in ("mfu", "error"):
        return f"{value:.1%}"
    if isinstance(value, int) and value < 1e6:
        return f"{value:,}"
    return format_si(value)
