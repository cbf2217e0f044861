"""Write a Bundle, and open it as any model with weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos_jax.bundle.arrays import StoredArrays, write_arrays
from llmos_jax.bundle.machine import OpenedMachine, find_machine
from llmos_jax.bundle.manifest import (
    MACHINES,
    PAGE,
    PLAN,
    REMEDY,
    TOKENIZER,
    Bundle,
    check_sizes,
    damaged,
    facts_of,
    read_page,
    write_page,
)
from llmos_jax.data import Tokenizer
from llmos_jax.errors import BundleError, ConfigError
from llmos_jax.models import Params, Skeleton, skeleton


@dataclass(frozen=True)
class OpenedBundle:
    """A Bundle that says what it is; it has the face of every opened model."""

    folder: Path
    page: Bundle
    step: int = 0
    config_path: Path | None = None

    @functools.cached_property
    def skeleton(self) -> Skeleton:
        """What it is."""
        return skeleton(self.page.model)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That goes with the weights."""
        path = self.folder / TOKENIZER
        try:
            return Tokenizer.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ConfigError) as problem:
            raise BundleError(f"{path} cannot be read: {problem} {REMEDY}") from None

    def params(
        self, shardings: dict[str, Any] | None = None, *, dtype: str | None = None
    ) -> Params:
        """Read parameters onto `shardings` (by path; only those), or all of them onto
        the first device; in `dtype`, or as they are stored.

        Raises:
            BundleError: a file is damaged, or lacks a parameter.
        """
        self.check(self.page.weights)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = StoredArrays(self.folder, self.page.weights)
        wanted = [
            row.path
            for row in self.skeleton.table.rows
            if shardings is None or row.path in shardings
        ]
        return {
            path: stored.placed(
                path, here if shardings is None else shardings[path], dtype
            )
            for path in wanted
        }

    def check(self, names: tuple[str, ...] | None = None) -> None:
        """Read files (None: all) and compare them with the page.

        Raises:
            BundleError: naming the first that is missing, cut short or altered.
        """
        files = self.page.files
        chosen = files if names is None else {name: files[name] for name in names}
        check_sizes(self.folder, chosen)
        bad = damaged(self.folder, chosen)
        if bad:
            raise BundleError(f"{self.folder / bad[0]} was altered. {REMEDY}")

    def machine(self, identity: str) -> OpenedMachine | str:
        """What was compiled for this machine; or why there is nothing."""
        return find_machine(self.folder / MACHINES, identity)


def is_bundle(name: str | Path) -> bool:
    """Whether this is the name of a Bundle."""
    return (Path(name).expanduser() / PAGE).is_file()


def open_bundle(name: str | Path) -> OpenedBundle:
    """Open a Bundle; its files are looked for, and read when they are needed.

    Raises:
        BundleError: damaged, or of another release.
    """
    folder = Path(name).expanduser()
    page = read_page(folder)
    check_sizes(folder, page.files)
    return OpenedBundle(folder, page)


def write_bundle(
    folder: Path,
    page: Bundle,
    params: Mapping[str, jax.Array | np.ndarray],
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    fill: Callable[[Path], Bundle],
) -> None:
    """Write a Bundle under another name beside it, which is changed at the end.

    Args:
        folder: to be made; it may exist if it is empty.
        page: what is known of it; `weights` and `files` are filled in here.
        params: by path, as they are to be served, whole on this process.
        tokenizer: goes along.
        plan: plan.json.
        fill: given the folder with a Bundle that can be opened, adds programs, and
            returns the page with them.

    Raises:
        ConfigError: the folder is in use.
        BundleError: it cannot be written; no space, for example.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not empty; a Bundle is written to a new folder."
        )
    partial = folder.absolute().parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights = write_arrays(partial, "weights", params)
        (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
        opening = _with_files(partial, replace(page, weights=tuple(weights)))
        write_page(partial, opening)
        filled = replace(fill(partial), weights=opening.weights, files=opening.files)
        write_page(partial, _with_files(partial, filled))
        partial.rename(folder)
    except OSError as problem:
        raise BundleError(
            f"{folder} cannot be written: {problem.strerror or problem}. "
            "Nothing is left of it."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_files(folder: Path, page: Bundle) -> Bundle:
    """The page with the facts of every file that it answers for; those that it has
    already are not read again."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    files = {
        name: page.files.get(name) or facts_of(folder / name)
        for name in names
        if name != PAGE and not name.startswith(f"{MACHINES}/")
    }
    return replace(page, files=files)


def inspect(name: str | Path) -> dict[str, Any]:
    """What a Bundle holds, as plain figures; every file is read and checked.

    Raises:
        BundleError: naming what is missing or altered.
    """
    opened = open_bundle(name)
    opened.check()
    page = opened.page
    machines = sorted(path.name for path in (opened.folder / MACHINES).glob("*"))
    return {
        "bundle": str(opened.folder),
        "model": page.model.name,
        "params": opened.skeleton.table.num_params,
        "weights": "float" if page.model.quantization is None
        else page.model.quantization.weights,
        "topology": page.topology,
        "plan_fingerprint": page.plan_fingerprint,
        "files": len(page.files),
        "bytes": sum(facts.size for facts in page.files.values()),
        "programs": len(page.programs),
        "machines": len(machines),
        "made_at": page.provenance.get("made_at", "unknown"),
        "made_from": _first_value(page.provenance.get("parent")),
        "provenance": page.provenance,
    }  # fmt: skip


def _first_value(parent: Any) -> str:
    """Where a parent lay: the first thing that lineage says of it."""
    return str(next(iter(parent.values()))) if parent else "unknown"
