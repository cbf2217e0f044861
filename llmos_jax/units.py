"""Turn bytes, FLOP/s and seconds into text a person reads, in one way everywhere.

Inside the house bytes are bytes and times are seconds; GiB and ms appear only when
shown.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_bytes(count: float) -> str:
    """1234567890 -> '1.15 GiB' (binary units, three significant digits)."""
    for size, unit in ((1024**4, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f} B"


def format_si(value: float, unit: str = "") -> str:
    """4.59e14, 'FLOP/s' -> '459 TFLOP/s' (decimal prefixes, three digits)."""
    for size, prefix in _SI:
        if abs(value) >= size:
            return f"{_three(value / size)} {prefix}{unit}".rstrip()
    return f"{_three(value)} {unit}".rstrip()


def format_seconds(seconds: float) -> str:
    """0.0123 -> '12.3 ms'; 75 -> '1m15s'; 7260 -> '2h01m'."""
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 1e-3:
        return f"{_three(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_three(seconds * 1e3)} ms"
    if seconds < 60:
        return f"{_three(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _three(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 100 or magnitude == 0:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
