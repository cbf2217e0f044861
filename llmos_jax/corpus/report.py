"""Say what became of every document: for report.json, and for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmos_jax.corpus.duplicates import EXACT, NEAR
from llmos_jax.corpus.shards import Written
from llmos_jax.corpus.sift import MOST_EXAMPLES, Part
from llmos_jax.corpus.units import Unit, name_of
from llmos_jax.units import format_bytes, format_seconds, format_si

_DUPLICATES = {EXACT: "exact_duplicate", NEAR: "near_duplicate"}

Counts = dict[str, Any]


def source_rows(
    units: Sequence[Unit],
    entries: Sequence[Counts],
    parts: Sequence[Part],
    fate: np.ndarray,
    written: Written,
) -> list[Counts]:
    """Return for each side and source what was read, dropped (by reason) and kept.

    Each is {documents, bytes}, bytes of UTF-8 text; kept text has `tokens`, dropped
    text `tokens_estimated` by what kept text of the corpus takes, and `examples`.
    """
    rows: dict[tuple[str, str], Counts] = {}
    bounds = np.cumsum([part.facts.size for part in parts])[:-1]
    for unit, entry, part, ends in zip(units, entries, parts, np.split(fate, bounds)):
        row = rows.setdefault(
            (unit.side, unit.source),
            {"source": unit.source, "named_as": unit.side, "read": _count(0, 0)}
            | {"dropped": {}},
        )
        _add(row["read"], *entry["read"])
        for reason, counts in entry["dropped"].items():
            places = entry["examples"][reason]
            _drop(row["dropped"], reason, counts, unit, places)
        for code, reason in _DUPLICATES.items():
            gone = part.facts[ends == code]
            if gone.size:
                counts = (int(gone.size), int(gone["size"].sum()))
                first = gone[:MOST_EXAMPLES][["file", "row"]].tolist()
                _drop(row["dropped"], reason, counts, unit, first)
    kept = _kept(written)
    bytes_per_token = _total(kept, "bytes") / max(1, _total(kept, "tokens"))
    for (_, source), row in rows.items():
        for dropped in row["dropped"].values():
            dropped["tokens_estimated"] = round(dropped["bytes"] / bytes_per_token)
        row["kept"] = {
            side: counts
            for (side, name), counts in kept.items()
            if name == _key(row["named_as"], source)
        }
    return list(rows.values())


def totals(rows: Sequence[Counts]) -> Counts:
    """Return read, dropped by reason and kept over all sources."""
    read = _count(0, 0)
    dropped: Counts = {}
    kept = {"documents": 0, "bytes": 0, "tokens": 0}
    for row in rows:
        _add(read, row["read"]["documents"], row["read"]["bytes"])
        for reason, counts in row["dropped"].items():
            total = dropped.setdefault(
                reason, {**_count(0, 0), "tokens_estimated": 0, "examples": []}
            )
            _add(total, counts["documents"], counts["bytes"])
            total["tokens_estimated"] += counts["tokens_estimated"]
            left = MOST_EXAMPLES - len(total["examples"])
            total["examples"] += counts["examples"][:left]
        for counts in row["kept"].values():
            for name in kept:
                kept[name] += counts[name]
    return {"read": read, "dropped": dropped, "kept": kept}


def report_text(report: Counts) -> str:
    """Return the table that a person reads."""
    total = report["total"]
    lines: list[tuple[str, ...]] = [("", "documents", "text", "tokens")]
    lines.append(_line("read", total["read"], None))
    for reason, counts in sorted(total["dropped"].items()):
        about = f"~{format_si(counts['tokens_estimated'])}"
        lines.append(_line(f"  {reason.replace('_', ' ')}", counts, about))
    for side, counts in report["sides"].items():
        lines.append(_line(side, counts, f"{counts['tokens']:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = [
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{line[column]:>{widths[column]}}" for column in (1, 2, 3))
        for line in lines
    ]
    took = ", ".join(
        f"{stage} {format_seconds(seconds)}"
        for stage, seconds in report["seconds"].items()
    )
    shards = sum(counts["shards"] for counts in report["sides"].values())
    return "\n".join(
        [
            *table,
            "",
            f"shards      {shards}, of them {report['resumed']['shards']} from before",
            f"held out    {report['held_out_by']}",
            f"time        {took}",
            f"corpus      {report['out']}",
            f"report      {report['out']}/report.json",
            "",
            "next",
            f"  python -m llmos_jax.train --set data.train={report['out']}",
        ]
    )


def _line(name: str, counts: Counts, tokens: str | None) -> tuple[str, ...]:
    documents = f"{counts['documents']:,}"
    return name, documents, format_bytes(counts["bytes"]), tokens or ""


def _count(documents: int, num_bytes: int) -> Counts:
    return {"documents": documents, "bytes": num_bytes}


def _add(counts: Counts, documents: int, num_bytes: int) -> None:
    counts["documents"] += documents
    counts["bytes"] += num_bytes


def _drop(
    dropped: Counts,
    reason: str,
    counts: Sequence[int],
    unit: Unit,
    places: Sequence[Sequence[int]],
) -> None:
    total = dropped.setdefault(reason, {**_count(0, 0), "examples": []})
    _add(total, *counts)
    left = MOST_EXAMPLES - len(total["examples"])
    total["examples"] += [name_of(unit, *place) for place in places[:left]]


def source_key(unit: Unit) -> str:
    """Name a unit's source where jobs are told apart."""
    return _key(unit.side, unit.source)


def _key(named_as: str, source: str) -> str:
    return f"{named_as}:{source}"


def _kept(written: Written) -> dict[tuple[str, str], Counts]:
    kept = {}
    for key, counts in written.sources.items():
        side, _, name = key.partition(":")
        kept[side, name] = dict(zip(("documents", "bytes", "tokens"), counts))
    return kept


def _total(kept: dict[tuple[str, str], Counts], name: str) -> int:
    return sum(counts[name] for counts in kept.values())
