"""Which classes a classifier takes for which: a picture, and a row for each class.

`confusion_figure(labels, counts) -> Plot` draws, `class_rows(labels, counts)` tells;
`write_report(..., confusion=Confusion(labels=..., counts=...))` puts both on the page.
`counts[i][j]` is how many texts of class i were called class j. A cell is as dark as
its share of its row: blue on the diagonal, vermilion beside it. In the SVG, resting the
mouse on a cell says what it counts.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmos_jax.telemetry.figures import (
    FIRST,
    INK,
    PAGE,
    SECOND,
    Plot,
    draw_plot,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 50
"""That are drawn by name: a judgement; more have no room for their names."""
_SHARES_UP_TO = 12
"""Classes up to which a cell has room for its share under its count: a judgement."""
_LONGEST_NAME = 24
_ON_PAGE = 1.2
"""Inches of a page for one of the figure: a judgement; its text is then 10 points."""
_DARK = 0.5
"""Share of a row from which text on a cell takes the colour of the page."""
_OTHERS = "(others)"

Counts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """What became of the texts of each class."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """[C][C]: counts[i][j] texts of class i were called class j."""


def confusion_figure(labels: Sequence[str], counts: Counts) -> Plot:
    """Draw a confusion matrix: true classes down, predicted ones across.

    Args:
        labels: names of the classes, [C]; of more than MOST_CLASSES, those with the
            most mistakes are drawn and the others are put together.
        counts: [C][C] of int; counts[i][j] texts of class i were called class j.

    Raises:
        ValueError: `counts` is not square, or not as long as `labels`.
    """
    _check(labels, counts)
    names, table = _fewer([_plain(label) for label in labels], counts)
    size = len(names)
    total = sum(map(sum, counts))
    right = sum(row[index] for index, row in enumerate(counts))
    title = f"Confusion matrix: {right:,} of {total:,} texts right"
    cells = {
        f"cell-{i}-{j}": (i, j, count, count / sum(row))
        for i, row in enumerate(table)
        for j, count in enumerate(row)
        if count
    }

    def draw(axes: Axes) -> None:
        _draw_cells(axes, cells, size)
        _name_axes(axes, names)

    side = min(15.0, max(2.6, 0.55 * size if size <= _SHARES_UP_TO else 0.3 * size))
    width = side + 0.07 * max(map(len, names)) + 0.5
    with warnings.catch_warnings():
        # Names in scripts that the PNG's font lacks are boxes there; the SVG has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        plot = draw_plot(draw, title, size=(max(width, 4.2), width))
    svg = _with_tooltips(plot.svg, cells, names)
    # Of its own size: two classes must not fill a page, nor fifty be squeezed into it.
    style = f'style="width: {_ON_PAGE * max(width, 4.2):.2f}in" '
    return Plot(svg=svg.replace("<svg ", f"<svg {style}", 1), png=plot.png)


def class_rows(labels: Sequence[str], counts: Counts) -> list[dict[str, Any]]:
    """A row for each class: `label`, `texts` (of this class), `precision`, `recall`,
    `f1` (in [0, 1]; 0 where nothing can be divided) and `taken_for`: (label, texts) of
    the class that it is most often taken for, None where it never is.

    Raises:
        ValueError: `counts` is not square, or not as long as `labels`.
    """
    _check(labels, counts)
    called = [sum(column) for column in zip(*counts, strict=True)]
    rows = []
    for index, (label, row) in enumerate(zip(labels, counts, strict=True)):
        right, texts = row[index], sum(row)
        wrong = [(n, j) for j, n in enumerate(row) if n and j != index]
        most, where = max(wrong, key=lambda one: (one[0], -one[1]), default=(0, 0))
        rows.append(
            {
                "label": label,
                "texts": texts,
                "precision": right / called[index] if called[index] else 0.0,
                "recall": right / texts if texts else 0.0,
                "f1": 2 * right / ((texts + called[index]) or 1),
                "taken_for": (labels[where], most) if most else None,
            }
        )
    return rows


def _check(labels: Sequence[str], counts: Counts) -> None:
    size = len(labels)
    if not size or len(counts) != size or any(len(row) != size for row in counts):
        found = sorted({len(row) for row in counts})
        raise ValueError(
            f"{size} labels need {size} rows of {size} counts; there are "
            f"{len(counts)} rows of {found}."
        )


def _plain(label: str) -> str:
    """A name in one line that a picture can hold."""
    shown = "".join(one if one.isprintable() else " " for one in label)
    name = " ".join(shown.split()) or "(empty)"
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026"


def _fewer(names: list[str], counts: Counts) -> tuple[list[str], Counts]:
    """The classes with the most mistakes, and one for all others, where many are."""
    size = len(names)
    if size <= MOST_CLASSES:
        return names, counts
    columns = [sum(column) for column in zip(*counts, strict=True)]
    mistakes = [sum(counts[i]) + columns[i] - 2 * counts[i][i] for i in range(size)]
    worst = sorted(range(size), key=lambda i: -mistakes[i])[: MOST_CLASSES - 1]
    place = {old: new for new, old in enumerate(sorted(worst))}
    last = MOST_CLASSES - 1
    table = [[0] * MOST_CLASSES for _ in range(MOST_CLASSES)]
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            table[place.get(i, last)][place.get(j, last)] += count
    return [*(names[i] for i in sorted(worst)), _OTHERS], table


Cells = dict[str, tuple[int, int, int, float]]
"""Id of a cell -> row, column, count, share of its row."""


def _draw_cells(axes: Axes, cells: Cells, size: int) -> None:
    from matplotlib.patches import Rectangle

    has_shares = size <= _SHARES_UP_TO
    font = 8.5 if has_shares else 6.5 if size <= 30 else 5.5
    for name, (i, j, count, share) in cells.items():
        colour = FIRST if i == j else SECOND
        # The eye must tell one in a hundred from none.
        strength = 0.08 + 0.92 * share
        cell = Rectangle(
            (j - 0.5, i - 0.5), 1, 1, facecolor=colour, alpha=strength, linewidth=0
        )
        cell.set_gid(name)
        axes.add_patch(cell)
        said = f"{count:,}\n{share:.0%}" if has_shares else _short(count)
        text = axes.text(
            j, i, said, ha="center", va="center", fontsize=font, linespacing=1.15,
            color=PAGE if share >= _DARK else INK,
        )  # fmt: skip
        text.set_gid(f"{name}-text")


def _short(count: int) -> str:
    """Four letters at most: 999, 12k, 3M."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if count >= 10 * unit or (unit == 10**6 and count >= unit):
            return f"{count // unit}{name}"
    return str(count)


def _name_axes(axes: Axes, names: Sequence[str]) -> None:
    size = len(names)
    font = 8.5 if size <= _SHARES_UP_TO else 7.0 if size <= 30 else 6.0
    is_long = size > 4 or max(map(len, names)) > 8
    axes.set_xticks(range(size), names, rotation=90 if is_long else 0, fontsize=font)
    axes.set_yticks(range(size), names, fontsize=font)
    for name in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        name.set_parse_math(False)  # a dollar is a dollar
    axes.set_xticks([at - 0.5 for at in range(size + 1)], minor=True)
    axes.set_yticks([at - 0.5 for at in range(size + 1)], minor=True)
    axes.grid(visible=False)
    axes.grid(visible=True, which="minor", axis="both")
    axes.tick_params(which="minor", length=0)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines["bottom"].set_visible(False)


def _with_tooltips(svg: str, cells: Cells, names: Sequence[str]) -> str:
    """Say what a cell counts where the mouse rests on it, or on its text."""
    for name, (i, j, count, share) in cells.items():
        said = f"{names[i]}, called {names[j]}: {count:,} texts, {share:.1%} of its row"
        for found in (f'{name}">', f'{name}-text">'):
            svg = svg.replace(found, f"{found}<title>{html.escape(said)}</title>", 1)
    return svg
