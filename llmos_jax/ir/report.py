"""ReportRow: one figure of a report, with its unit and how it was obtained."""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.units import format_bytes, format_seconds, format_si


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """One result: `value` in `unit`, obtained as `how` says (a command, a formula).

    Three units have a form of their own when shown: `bytes`, `s`, and `share` (of one,
    in percent); any other follows the number.
    """

    name: str
    value: float | int | str | None
    unit: str = ""
    how: str = ""

    @property
    def text(self) -> str:
        """Value and unit as people read them: '2.314 bits/byte', '12,345 tokens/s'."""
        value = self.value
        if value is None:
            return "not measured"
        if isinstance(value, str):
            shown = value
        elif self.unit == "bytes":
            return format_bytes(value)
        elif self.unit == "s":
            return format_seconds(value)
        elif self.unit == "share":
            return f"{value:.1%}"
        elif abs(value) >= 1e6:
            shown = format_si(value).replace(" ", "")
        else:
            whole = isinstance(value, int) or abs(value) >= 1000
            shown = f"{value:,.0f}" if whole else f"{value:.4g}"
        return f"{shown} {self.unit}".rstrip()
