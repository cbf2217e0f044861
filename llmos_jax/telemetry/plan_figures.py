"""Turn a Plan or a Front into SVG text for a page.

Places are percentages of the width and pixels of the height, and there is no viewBox: a
drawing fills any width while its words keep their size. Colours are CSS variables of
the page, so that one drawing serves light and dark. Blue parts of the memory stay from
step to step, orange ones are made in a step: a pair that every kind of colour vision
tells apart (Okabe and Ito, jfly.uni-koeln.de/color, 2008).
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmos_jax.ir import Candidate, Front, Plan, Slice, fidelity_of
from llmos_jax.units import format_bytes, format_seconds

_KEPT = ("params", "optimizer", "replicas", "velocity", "gradients", "KV cache")
_LEFT, _RIGHT = 9.0, 95.0
"""Percent of the width between which dots lie: heights are written left of them."""
_WIDTH = 900
"""Pixels that a figure is wide on a screen: numbers are kept apart for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One dot of a plot; the larger `rank`, the later it is drawn."""

    x: float
    y: float
    style: str
    """CSS class."""
    told: str
    """Shown when the mouse rests on it."""
    label: str = ""
    """Beside it; numbers keep apart from each other and from numbered dots."""
    colour: str = "var(--muted)"
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What one direction of a plot means."""

    title: str
    text: Callable[[float], str]
    limit: float | None = None
    limit_text: str = ""
    from_zero: bool = False
    log: bool = False
    """Logarithmic where the values span much."""


def part_colours(memory: Mapping[str, float]) -> dict[str, str]:
    """Memory part -> CSS colour: blues for what stays, oranges for what passes."""
    kept = [name for name, size in memory.items() if size > 0 and name in _KEPT]
    made = [name for name, size in memory.items() if size > 0 and name not in _KEPT]
    colours = {name: f"var(--kept-{i % 4})" for i, name in enumerate(kept)}
    return colours | {name: f"var(--made-{i % 4})" for i, name in enumerate(made)}


def memory_bars(plan: Plan, budget_bytes: float) -> str:
    """The memory stack of one device; the compiler's below it, where it was asked."""
    memory = {name: size for name, size in plan.predicted.memory.items() if size > 0}
    colours = part_colours(memory)
    peak = plan.predicted.peak_hbm_bytes
    bars = [("estimate", peak, [(n, size, colours[n]) for n, size in memory.items()])]
    if plan.compiled is not None:
        held = float(plan.compiled["argument_bytes"])
        whole = float(plan.compiled["peak_hbm_bytes"])
        made = max(0.0, whole - held)
        parts = [
            ("arguments", held, "var(--kept-0)"),
            ("temporaries", made, "var(--made-0)"),
        ]
        bars.append((f"compiler ({fidelity_of(plan)})", whole, parts))
    limit = plan.topology.hbm_bytes_per_device
    scale = max(limit, *(total for _, total, _ in bars)) / 100
    lines = [
        line
        for index, (name, total, parts) in enumerate(bars)
        for line in _memory_bar(
            68 * index, name, total, parts, limit / scale, budget_bytes / scale, scale
        )
    ]
    return _svg("Memory of one device", 68 * len(bars) - 10, lines)


def _memory_bar(
    top: int,
    name: str,
    total: float,
    parts: Sequence[tuple[str, float, str]],
    limit: float,
    budget: float,
    scale: float,
) -> list[str]:
    over = "  does not fit" if total / scale > limit else ""
    lines = [
        _text(0, top + 14, name, "name"),
        _text(100, top + 14, f"{format_bytes(total)}{over}", "value", "end"),
        _rect(0, top + 22, limit, 32, "var(--track)"),
        _rect(budget, top + 22, limit - budget, 32, "url(#reserve)", "reserve"),
    ]
    below = 0.0
    for part, size, colour in parts:
        told = f"{part}: {format_bytes(size)}"
        lines.append(_rect(below, top + 22, size / scale, 32, colour, told))
        below += size / scale
    if limit < 99.9:
        lines.append(_line(limit, top + 18, limit, top + 58, "limit"))
    return lines


def time_bars(plan: Plan, meanings: Mapping[str, str]) -> str:
    """How long each resource is busy, against the step."""
    seconds, step_s = plan.predicted.seconds, plan.predicted.step_s
    longest = max(step_s, *seconds.values()) or 1.0
    lines = []
    for index, (name, busy_s) in enumerate(seconds.items()):
        top = 46 * index
        bound = name == plan.predicted.bound_by
        colour = "var(--second)" if bound else "var(--first)"
        meaning = meanings.get(name, "")
        share = busy_s / step_s if step_s else 0.0
        value = f"{format_seconds(busy_s)}, {share:.0%}" if busy_s else "not used"
        lines += [
            f'<text x="0" y="{top + 14}"><tspan class="name">{_escape(name)}</tspan>'
            f'<tspan class="note" dx="8">{_escape(meaning)}</tspan></text>',
            _text(100, top + 14, value, "value", "end"),
            _rect(0, top + 21, 100 * step_s / longest, 12, "var(--track)"),
            _rect(0, top + 21, 100 * busy_s / longest, 12, colour, f"{name}: {value}"),
        ]
    return _svg("Time by resource", 46 * len(seconds) - 8, lines)


def candidates_plot(plan: Plan, budget_bytes: float) -> str:
    """Step time against peak memory of the ways that fit."""
    chosen, second = plan.chosen, plan.runner_up
    special = [item for item in (chosen, second) if item is not None]
    others = [item for item in plan.others if item not in special]
    everyone = [*others, *special]
    most = max(item.predicted.peak_hbm_bytes for item in everyone)
    near = most > budget_bytes / 4
    dots = [_other_dot(item, everyone) for item in others]
    if second is not None:
        dots.append(_way_dot(second, "second", "runner-up", "var(--first)", 1))
    dots.append(_way_dot(chosen, "chosen", "chosen", "var(--second)", 2))
    return scatter(
        "Candidates by step time and memory",
        dots,
        Axis(title="step time, less is better", text=_brief(format_seconds), log=True),
        Axis(
            title="peak memory of one device",
            text=_brief(format_bytes),
            limit=budget_bytes if near else None,
            limit_text=f"may use {format_bytes(budget_bytes)}",
            from_zero=True,
        ),
    )


def _other_dot(item: Candidate, everyone: Sequence[Candidate]) -> Dot:
    mine = item.predicted
    beaten = any(
        other.predicted.step_s <= mine.step_s
        and other.predicted.peak_hbm_bytes < mine.peak_hbm_bytes
        for other in everyone
    )
    if beaten:
        return _way_dot(item, "beaten", "", "var(--muted)", 0)
    return _way_dot(item, "unbeaten", "", "var(--first)", 0)


def _way_dot(item: Candidate, style: str, label: str, colour: str, rank: int) -> Dot:
    found = item.predicted
    told = (
        f"{item.way}: {format_seconds(found.step_s)} a step, "
        f"{format_bytes(found.peak_hbm_bytes)}, MFU {found.mfu:.1%}"
    )
    return Dot(
        x=found.step_s,
        y=found.peak_hbm_bytes,
        style=style,
        told=told,
        label=label,
        colour=colour,
        rank=rank,
    )


def chip_colours(front: Front) -> dict[str, str]:
    """Chip -> CSS colour, in the order of the front and then of the rest."""
    chips = dict.fromkeys(item.chip for item in (*front.front, *front.beaten))
    return {chip: f"var(--chip-{index % 6})" for index, chip in enumerate(chips)}


def front_plot(front: Front) -> str:
    """Step time against cost of every slice; numbers are rows of the front's table."""
    priced = [item for item in front.front if item.usd_per_hour is not None]
    use_hours = not priced
    colours = chip_colours(front)
    dots = [
        _slice_dot(item, str(row), colours, use_hours)
        for row, item in enumerate(front.front, start=1)
        if use_hours or item.usd_per_hour is not None
    ] + [
        _slice_dot(item, "", colours, use_hours)
        for item in front.beaten
        if use_hours or item.usd_per_hour is not None
    ]
    what = "chip-hours" if use_hours else "US dollars"
    return scatter(
        "Slices by step time and cost",
        dots,
        Axis(title="step time, less is better", text=_brief(format_seconds), log=True),
        Axis(
            title=f"{what} per million tokens",
            text=lambda value: f"{value:.3g}",
            log=True,
        ),
    )


def _slice_dot(
    item: Slice, label: str, colours: Mapping[str, str], use_hours: bool
) -> Dot:
    found, usd = item.best.predicted, item.usd_per_million_tokens
    cost = item.chip_hours_per_million_tokens if use_hours or usd is None else usd
    told = (
        f"{item.topology}: {format_seconds(found.step_s)} a step, {cost:.3g} "
        f"per million tokens, {item.headroom:.0%} of memory free"
    )
    return Dot(
        x=found.step_s,
        y=cost,
        style="front" if label else "beaten",
        told=told,
        label=label,
        colour=colours[item.chip],
        rank=1 if label else 0,
    )


def scatter(name: str, dots: Sequence[Dot], x: Axis, y: Axis) -> str:
    """Dots over two axes. Sizes are pixels, but widths are percentages."""
    height, top, bottom = 340, 44, 300
    across = _scale([dot.x for dot in dots], log=x.log)
    heights = [dot.y for dot in dots] + ([y.limit] if y.limit else [])
    up = _scale(heights, log=y.log, from_zero=y.from_zero)

    def at(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * across.place(value)

    def over(value: float) -> float:
        return round(bottom - (bottom - top) * up.place(value), 1)

    lines = [_text(0, 14, y.title, "title")]
    for tick in up.ticks:
        if y.limit and abs(over(tick) - over(y.limit)) < 14:
            continue  # the limit has a line and words of its own
        lines += [
            _line(0, over(tick), 100, over(tick), "grid"),
            _text(0, over(tick) - 4, y.text(tick), "tick"),
        ]
    for tick in across.ticks:
        lines += [
            _line(at(tick), bottom, at(tick), bottom + 5, "grid"),
            _text(at(tick), bottom + 18, x.text(tick), "tick", "middle"),
        ]
    lines.append(_text(100, height - 4, x.title, "title", "end"))
    if y.limit:
        level = over(y.limit)
        lines += [
            _line(0, level, 100, level, "limit"),
            _text(100, level - 5, y.limit_text, "limit-text", "end"),
        ]
    marked = [dot for dot in dots if dot.label.isdigit()]
    taken = [(at(dot.x), over(dot.y)) for dot in marked]
    for dot in sorted(dots, key=lambda dot: dot.rank):
        lines += _dot(dot, at(dot.x), over(dot.y), taken)
    return _svg(name, height, lines)


def _dot(dot: Dot, x: float, y: float, taken: list[tuple[float, float]]) -> list[str]:
    radius = {"chosen": 8, "second": 7, "front": 6.5}.get(dot.style, 4.5)
    lines = [
        f'<circle class="dot {dot.style}" cx="{x:.2f}%" cy="{y}" r="{radius}" '
        f'style="--dot: {dot.colour}"><title>{_escape(dot.told)}</title></circle>'
    ]
    if dot.label.isdigit():
        lines.append(_number(dot.label, x, y, taken))
    elif dot.label:
        level = y + 4
        while any(abs(x - ox) < 22 and abs(level - oy) < 15 for ox, oy in taken):
            level += 15  # two labels that meet stand one below the other
        taken.append((x, level))
        side = (13, "start") if x < 60 else (-13, "end")
        lines.append(_text(x, level, dot.label, "label", side[1], shift=side[0]))
    return lines


_SIDES = ((11, 4, "start"), (0, -11, "middle"), (0, 20, "middle"), (-11, 4, "end"))
"""Where a number may stand: pixels right of its dot, pixels below, anchor."""


def _number(label: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """A number beside its dot, on the first side where nothing stands yet."""

    def free(side: tuple[int, int, str]) -> bool:
        here = place(side)
        return not any(
            abs(here[0] - ox) * _WIDTH / 100 < 13 and abs(here[1] - oy) < 13
            for ox, oy in taken
        )

    def place(side: tuple[int, int, str]) -> tuple[float, float]:
        return x + 100 * side[0] / _WIDTH, y + side[1] - 4

    best = next(filter(free, _SIDES), _SIDES[0])
    taken.append(place(best))
    return _text(x, y + best[1], label, "inside", best[2], shift=best[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """A range of values, linear or logarithmic, with round ticks in it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def _scale(
    values: Sequence[float], *, log: bool = False, from_zero: bool = False
) -> _Scale:
    low, high = min(values), max(values)
    if log and high > 3 * low > 0:
        low, high = low / 1.12, high * 1.12
        marks = [m * 10.0**p for p in range(-9, 13) for m in (1, 2, 5)]
        inside = [mark for mark in marks if low <= mark <= high]
        return _Scale(low=low, high=high, log=True, ticks=tuple(inside))
    room = max((high - low) * 0.06, abs(high) * 0.03) or 1.0
    low, high = (0.0 if from_zero else low - room), high + room
    step = _round_step((high - low) / 5)
    first = math.ceil(low / step)
    ticks = [step * number for number in range(first, math.floor(high / step) + 1)]
    return _Scale(low=low, high=high, log=False, ticks=tuple(ticks))


def _brief(text: Callable[[float], str]) -> Callable[[float], str]:
    """`20.0 GiB` as `20 GiB`: ticks are round."""
    return lambda value: re.sub(r"\.0+ ", " ", text(value))


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten; what is as large as bytes also of 1024."""
    unit = 1024.0 ** math.floor(math.log(step, 1024)) if step > 1e5 else 1.0
    power = 10.0 ** math.floor(math.log10(step / unit))
    return unit * power * min((1, 2, 5, 10), key=lambda m: abs(m - step / unit / power))


def _svg(name: str, height: float, lines: Sequence[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<svg role="img" aria-label="{_escape(name)}" width="100%" '
        f'height="{height}">\n{body}\n</svg>'
    )


def _rect(
    x: float, y: float, width: float, height: float, fill: str, told: str = ""
) -> str:
    inner = f"<title>{_escape(told)}</title>" if told else ""
    return (
        f'<rect x="{x:.3f}%" y="{y}" width="{max(0.0, width):.3f}%" '
        f'height="{height}" style="fill: {fill}">{inner}</rect>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.2f}%" y1="{y1}" x2="{x2:.2f}%" y2="{y2}"/>'


def _text(
    x: float, y: float, text: str, style: str, anchor: str = "start", shift: int = 0
) -> str:
    moved = f' dx="{shift}"' if shift else ""
    return (
        f'<text class="{style}" x="{x:.2f}%" y="{y}"{moved} '
        f'text-anchor="{anchor}">{_escape(text)}</text>'
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
