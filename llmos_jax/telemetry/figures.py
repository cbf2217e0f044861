"""Turn metrics rows into figures: SVG text for a page, PNG bytes for a file.

The SVG takes its colours from CSS variables of the page (`--ink`, `--muted`, `--grid`,
`--first`, `--second`, `--page`): one drawing serves light and dark. The PNG has the
light ones. Blue and vermilion are Okabe and Ito's, told apart by every kind of colour
vision (jfly.uni-koeln.de/color, 2008). Lines are labelled where they end: no legend to
match.

Caveats: with more than 800 rows each drawn point is the mean of a bin of steps, and the
first fall of a loss curve may begin above the frame, so that its end can be read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from llmos_jax.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, _MUTED, _GRID = "#1b2025", "#69717a", "#e3e6e9"
FIRST, SECOND = "#0072b2", "#d55e00"
PAGE = "#fefefe"
"""The colour of the page, for text on something dark; not quite white, so that it is
found in an SVG."""
_CSS = {
    INK: "--ink",
    PAGE: "--page",
    _MUTED: "--muted",
    _GRID: "--grid",
    FIRST: "--first",
    SECOND: "--second",
}
_MAX_POINTS = 800
_STYLE: Any = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmos",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One drawing, twice: `svg` to put into a page, `png` to save as a file."""

    svg: str
    png: bytes


def loss_figure(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tuple[int, float]] = (),
    baselines: Mapping[str, float] | None = None,
    *,
    bytes_per_token: float | None = None,
    unit: str = "nats per token",
) -> Plot:
    """Draw training and validation loss over steps.

    Args:
        rows: metrics rows with `step` and `loss`, in `unit`.
        evaluations: (step, validation loss in `unit`).
        baselines: name -> bits per byte, drawn as horizontal lines; they need
            `bytes_per_token`.
        bytes_per_token: of the validation text; with it the axis is bits per byte.
        unit: of a loss.
    """
    scale = 1.0 if bytes_per_token is None else 1 / (math.log(2) * bytes_per_token)
    unit = unit if bytes_per_token is None else "bits per byte"
    lines = dict(baselines or {}) if bytes_per_token is not None else {}
    steps, losses = _series(rows, "loss", scale)
    checks = [(step, loss * scale) for step, loss in evaluations if math.isfinite(loss)]

    def draw(axes: Axes) -> None:
        labels: list[tuple[float, str, str]] = []
        for name, level in lines.items():
            axes.axhline(level, color=_MUTED, linewidth=0.9, dashes=(4, 3))
            labels.append((level, f"{name} {level:.2f}", _MUTED))
        if losses:
            smooth = _smooth(losses)
            axes.plot(steps, losses, color=FIRST, linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth, color=FIRST, linewidth=1.6)
            labels.append((smooth[-1], f"training {smooth[-1]:.2f}", FIRST))
        if checks:
            dots = "o" if len(checks) <= 40 else ""
            xs, ys = [step for step, _ in checks], [loss for _, loss in checks]
            axes.plot(xs, ys, color=SECOND, linewidth=1.3, marker=dots, markersize=3.5)
            labels.append((ys[-1], f"validation {ys[-1]:.2f}", SECOND))
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        _frame_end(axes, losses, [*lines.values(), *(loss for _, loss in checks[-3:])])
        _label_right(axes, labels)

    return draw_plot(draw, f"Loss, {unit}", size=(5.4, 2.9))


def throughput_figure(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw tokens per second over steps, with the median named in the title."""
    steps, rates = _series(rows, "tokens_per_s", 1.0)
    title = "Tokens per second"
    if rates:
        title += f", median {median(rates):,.0f}"
        shares = _series(rows, "mfu", 1.0)[1]
        title += f" (MFU {median(shares):.1%})" if shares else ""

    def draw(axes: Axes) -> None:
        axes.plot(steps, rates, color=FIRST, linewidth=1.2)
        if rates:
            axes.axhline(median(rates), color=_MUTED, linewidth=0.9, dashes=(4, 3))
            axes.set_ylim(0, _nearly_all(rates) * 1.15)
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return draw_plot(draw, title, size=(4.2, 2.4))


def memory_figure(estimate_memory: Mapping[str, float], limit_bytes: float) -> Plot:
    """Draw the memory stack of one device, each part starting where the last ended."""
    parts = [(name, size) for name, size in estimate_memory.items() if size > 0]
    total = sum(size for _, size in parts)
    title = f"Memory per device, {format_bytes(total)} of {format_bytes(limit_bytes)}"
    near_limit = total > limit_bytes / 4

    def draw(axes: Axes) -> None:
        below = 0.0
        for row, (_, size) in enumerate(parts):
            axes.barh(row, size, left=below, height=0.62, color=FIRST, linewidth=0)
            below += size
            axes.annotate(
                format_bytes(size),
                (below, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        if near_limit:
            axes.axvline(limit_bytes, color=SECOND, linewidth=1.4)
            axes.annotate(
                "limit",
                (limit_bytes, -0.75),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=SECOND,
            )
        axes.set_yticks(range(len(parts)), [name for name, _ in parts])
        axes.set_ylim(len(parts) - 0.4, -1.1 if near_limit else -0.6)
        axes.set_xlim(0, max(total * 1.28, limit_bytes * 1.02 * near_limit) or 1)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    return draw_plot(draw, title, size=(4.2, 2.4))


def draw_plot(
    draw: Callable[[Axes], None],
    title: str,
    *,
    size: tuple[float, float],
) -> Plot:
    """Let `draw` fill a figure of `size` inches; the title is also what it is called
    by those who cannot see it, and holds no markup."""
    # NOTE: Figure without pyplot: no global state, no display, any thread.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        return Plot(svg=_svg(figure, title), png=_png(figure))


def _svg(figure: Figure, title: str) -> str:
    """SVG for a page: no header, no fixed size, CSS colours, ids of its own."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    prefix = re.sub(r"[^a-z]+", "-", title.lower())[:16]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    svg = re.sub(r"'DejaVu Sans', .*?sans-serif", "sans-serif", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, facecolor="white")
    return data.getvalue()


def _series(
    rows: Sequence[Mapping[str, Any]], key: str, scale: float
) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have `key`, averaged in bins when many."""
    pairs = [
        (row["step"], row[key] * scale)
        for row in rows
        if isinstance(row.get(key), int | float) and "step" in row
    ]
    size = -(-len(pairs) // _MAX_POINTS) or 1
    bins = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return (
        [sum(step for step, _ in part) / len(part) for part in bins],
        [sum(value for _, value in part) / len(part) for part in bins],
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a fiftieth of the run."""
    reach = len(values) // 100
    windows = (values[max(at - reach, 0) : at + reach + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _nearly_all(values: Sequence[float]) -> float:
    """The 98th percentile, so that one spike does not flatten the rest."""
    return sorted(values)[math.ceil(0.98 * len(values)) - 1]


def _frame_end(axes: Axes, values: Sequence[float], marks: Sequence[float]) -> None:
    """Set the height so that all but the first tenth of the curve fills the frame."""
    settled = [*values[len(values) // 10 :], *marks]
    if not settled:
        return
    low, high = min(settled), max(settled)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    axes.set_ylim(low - room, high + room)


def _label_right(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write each label right of the axes at its height, moved apart where they meet."""
    bottom, top = axes.get_ylim()
    heights = _apart([level for level, _, _ in sorted(labels)], (top - bottom) * 0.085)
    for height, (_, text, colour) in zip(heights, sorted(labels), strict=True):
        axes.annotate(
            text,
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            annotation_clip=False,
        )
    axes.set_ylim(bottom, top)


def _apart(levels: Sequence[float], gap: float) -> list[float]:
    """Ascending levels at least `gap` apart; those that meet share their mean place."""
    groups: list[list[float]] = []
    for level in levels:
        groups.append([level])
        while len(groups) > 1 and _edge(groups[-1], gap, -1) < _edge(
            groups[-2], gap, 1
        ):
            last = groups.pop()
            groups[-1] += last
    return [
        sum(group) / len(group) + gap * (at - (len(group) - 1) / 2)
        for group in groups
        for at in range(len(group))
    ]


def _edge(group: Sequence[float], gap: float, side: int) -> float:
    return sum(group) / len(group) + side * gap * len(group) / 2
