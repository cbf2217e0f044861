"""A chain of passes: each works on what the one before it made.

`compress.chain = ["prune", "distill", "quantize", "export"]` makes the folders 1-prune,
2-distill, ... below `compress.out`. chain.json says of each from what it was made and
with which settings, written before it begins; a link is done when its report.json is
there, which is the last thing that a pass writes. So the same command goes on after
whatever stopped it, and another setting does its link and all that follow again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from llmos_jax import bundling, compressing, resolve
from llmos_jax.config import RunConfig
from llmos_jax.errors import CompressError, ConfigError
from llmos_jax.ir import Plan, fingerprint_of

PAGE = "chain.json"
OF_TEXT = ("calibration", "sequences", "seq_len", "evaluate_batches", "max_kld")
OF_NUMBERS = ("weights", "group", "activations", "embedding", "head")
READS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prune": (
        ("prune", "data", "evaluate", "topology", "serve"),
        (*OF_TEXT, "weights", "group"),
    ),
    "distill": (
        ("train", "batch", "plan", "sync", "qat", "data", "run", "distill", "evaluate"),
        OF_TEXT,
    ),
    "train": (
        ("train", "batch", "plan", "sync", "qat", "data", "run", "evaluate"),
        OF_TEXT,
    ),
    "quantize": (
        ("data", "evaluate"),
        (*OF_TEXT, *OF_NUMBERS, "method", "smooth", "clip"),
    ),
    "export": (("export", "serve", "topology"), ()),
}
"""What a link depends on: sections of a config, and keys of `[compress]`."""

TRAINS = ("distill", "train")
"""Links that go on in the middle; others begin again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verbs:
    """What the driver does, for links to call."""

    plan: Callable[..., Plan]
    document: Callable[[Plan], dict[str, Any]]
    train: compressing.Train


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One pass of a chain."""

    kind: str
    folder: Path
    config: RunConfig
    """`model` is what it works on, `compress.out` its folder."""

    @property
    def made(self) -> str:
        """What the next link works on."""
        is_export = self.kind == "export"
        return str(self.folder / "bundle" if is_export else self.folder)

    def asked(self, overrides: Sequence[str]) -> dict[str, str]:
        """What it would be made of, and how: fingerprints. Which numbers are asked for
        by name counts, too: the others follow `[qat]` of the run before."""
        sections, keys = READS[self.kind]
        config = self.config
        parts = {name: msgspec.to_builtins(getattr(config, name)) for name in sections}
        parts["compress"] = {name: getattr(config.compress, name) for name in keys}
        if self.kind == "quantize":
            given = {text.partition("=")[0].strip() for text in overrides}
            named = {f"compress.{name}" for name in (*OF_NUMBERS, "method", "clip")}
            parts["named"] = dict.fromkeys(sorted(given & named))
        parts["dtype"] = config.train.compute_dtype
        parts.get("run", {}).pop("dir", None)
        lineage = resolve.lineage(config.model)
        return {"input": lineage["fingerprint"], "settings": fingerprint_of(parts)}

    def report(self) -> dict[str, Any] | None:
        """Of a finished link."""
        try:
            found = json.loads((self.folder / "report.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def chained(
    config: RunConfig, overrides: Sequence[str], verbs: Verbs
) -> dict[str, Any]:
    """Do what is left of a chain; return its report, and write it.

    Args:
        config: `compress.chain` says which passes; `distill.teacher` is the model
            that the chain begins with, if nobody says.
        overrides: keys that are asked for by name.
        verbs: what links call.

    Raises:
        ConfigError: a chain that makes no sense; a folder in use.
        CompressError: a link is too far from what it was made of.
    """
    from llmos_jax.compression import write_report
    from llmos_jax.telemetry import log

    links = links_of(config)
    out = Path(resolve.out_of(config)).expanduser()
    if out.exists() and not (out / PAGE).is_file() and any(out.iterdir()):
        raise ConfigError(
            f"{out} exists and is not empty, and no chain was begun in it. Set "
            "compress.out to a new folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out)
    reports = []
    for number, link in enumerate(links):
        name, asked = link.folder.name, link.asked(overrides)
        before = known.get(name)
        found = link.report() if before == asked else None
        if found is not None:
            log(f"{name} is done")
            reports.append(found)
            continue
        if before is not None and before != asked:
            what = " and ".join(key for key in asked if before.get(key) != asked[key])
            log(f"{name}: other {what} than before; it and what follows is done again")
        is_resumed = before == asked and link.kind in TRAINS
        for later in links[number + is_resumed :]:
            shutil.rmtree(later.folder, ignore_errors=True)
            known.pop(later.folder.name, None)
        known[name] = asked
        _write(out, known)
        log(f"{name}: {link.config.model} -> {link.folder}")
        reports.append(_made(link, overrides, verbs))
    whole = _report(config, links, reports)
    return write_report(out, {**whole, "out": str(out)})


def links_of(config: RunConfig) -> list[Link]:
    """The passes of a chain, checked to follow each other.

    Raises:
        ConfigError: a pass after one that ends the chain.
    """
    chain = config.compress.chain
    out = Path(resolve.out_of(config)).expanduser()
    for kind, following in zip(chain, chain[1:]):
        if kind == "export" or (kind == "quantize" and following != "export"):
            raise ConfigError(
                f"compress.chain: {following} cannot follow {kind}: "
                + (
                    "a Bundle is served, not worked on."
                    if kind == "export"
                    else "whole numbers are not trained or pruned. Quantize last, "
                    "before export."
                )
            )
    taught = replace(config.distill, teacher=config.distill.teacher or config.model)
    links: list[Link] = []
    for number, kind in enumerate(chain, start=1):
        folder = out / f"{number}-{kind}"
        # What is made is planned for `topology`; what runs, runs here.
        topology = config.topology if kind in ("prune", "export") else None
        links.append(
            Link(
                kind=kind,
                folder=folder,
                config=replace(
                    config,
                    model=links[-1].made if links else config.model,
                    topology=topology,
                    distill=taught if kind == "distill" else type(taught)(),
                    compress=replace(
                        config.compress,
                        kind=kind if kind in ("prune", "distill") else "quantize",
                        chain=(),
                        out=str(folder),
                    ),
                ),
            )
        )
    return links


def _made(link: Link, overrides: Sequence[str], verbs: Verbs) -> dict[str, Any]:
    """Do one pass."""
    from llmos_jax.compression import write_report

    opened, config = resolve.open_model(link.config.model), link.config
    if link.kind == "prune":
        return compressing.pruned(opened, config, verbs.plan)
    if link.kind in TRAINS:
        return compressing.trained(
            *(opened, config, verbs.plan, verbs.train), kind=link.kind
        )
    if link.kind == "quantize":
        config = resolve.as_it_was_trained(opened, config, overrides)
        return compressing.quantized(opened, config, verbs.plan)
    found = bundling.make_bundle(
        *(opened, config, link.made, verbs.plan, verbs.document)
    )
    return write_report(link.folder, {**found, "kind": "export", "out": link.made})


FIGURES = (
    "params bytes perplexity perplexity_before kld same_top1 zeros steps teacher "
    "stored_as seconds"
).split()


def _report(
    config: RunConfig, links: list[Link], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """What each link came to, and the whole."""
    rows = [
        {
            "link": link.folder.name,
            "out": link.made,
            "made_from": link.config.model,
            **{name: found[name] for name in FIGURES if name in found},
        }
        for link, found in zip(links, reports, strict=True)
    ]
    scored = [found for found in reports if "perplexity" in found]
    whole: dict[str, Any] = {
        "model": reports[-1]["model"],
        "kind": "chain",
        "made": rows[-1]["out"],
        "chain": rows,
        "bytes": reports[-1]["bytes"],
        "seconds": {row["link"]: sum(row.get("seconds", {}).values()) for row in rows},
        "lineage": [resolve.lineage(config.model)]
        + [resolve.lineage(link.made) for link in links],
        "config": config.to_json(),
    }
    if scored:
        whole |= {
            "bytes_before": scored[0]["bytes_before"],
            "perplexity": scored[-1]["perplexity"],
            "perplexity_before": scored[0]["perplexity_before"],
        }
    return whole


def _known(out: Path) -> dict[str, dict[str, str]]:
    """What chain.json says: folder -> what it was made of, and how."""
    try:
        found = json.loads((out / PAGE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise CompressError(
            f"{out / PAGE} cannot be read ({problem}). Set compress.out to a new "
            "folder."
        ) from None
    return dict(found)


def _write(out: Path, known: dict[str, dict[str, str]]) -> None:
    fresh = out / f"{PAGE}.part"
    with fresh.open("w", encoding="utf-8") as file:
        file.write(json.dumps(known, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(out / PAGE)
