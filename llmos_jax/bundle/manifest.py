"""The page that says what a Bundle is, and by which its files are checked."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmos_jax.errors import BundleError, ConfigError
from llmos_jax.ir import Artefact, ModelSpec

PAGE = "bundle.json"
TOKENIZER = "tokenizer.json"
PLAN = "plan.json"
PORTABLE = "programs"
"""Folder of StableHLO programs."""
MACHINES = "machines"
"""Folder of what was compiled, one sub-folder for each kind of machine."""
_SEAL = "seal"
_READERS = 4
"""Files that are read at once to be checked: a judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file must be."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableProgram:
    """A program that jax.export wrote, which needs nothing of ours to run."""

    file: str
    platforms: tuple[str, ...]
    does: str
    """In words: what it is given and what it returns."""
    arguments: dict[str, str]
    """Name -> dtype and shape, in the order of the call; `params` and `cache` are dicts
    of arrays, by the names in the weights' files and in `cache`."""
    cache: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Artefact):
    """What bundle.json says."""

    model: ModelSpec
    topology: str
    """What the plan is for."""
    plan_fingerprint: str
    compute_dtype: Literal["float32", "bfloat16"]
    serve: dict[str, Any]
    """The `[serve]` keys it was made with: what `serve` takes if nobody says else."""
    weights: tuple[str, ...]
    """Safetensors files of the parameters, by path, as they are served."""
    programs: tuple[PortableProgram, ...] = ()
    files: dict[str, FileFacts] = field(default_factory=dict)
    """Every file but bundle.json and those under machines/, which have a page each."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: parents and their fingerprints, config, versions, date."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_of(path: Path) -> FileFacts:
    """What a file is."""
    return FileFacts(size=path.stat().st_size, sha256=digest_of(path))


def write_page(folder: Path, page: Bundle) -> None:
    """Write bundle.json, sealed with its own fingerprint."""
    text = json.dumps({**page.to_json(), _SEAL: page.fingerprint}, indent=1)
    (folder / PAGE).write_text(text + "\n", encoding="utf-8")


def read_page(folder: Path) -> Bundle:
    """Read bundle.json.

    Raises:
        BundleError: there is none, or it was altered, or another release wrote it.
    """
    path = folder / PAGE
    try:
        plain = json.loads(path.read_bytes())
        seal = plain.pop(_SEAL)
        page = Bundle.from_json(plain)
    except OSError as problem:
        raise BundleError(f"{path} cannot be read: {problem.strerror}.") from None
    except ConfigError as problem:
        raise BundleError(f"{path}: {problem}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path} is damaged. {REMEDY}") from None
    if page.fingerprint != seal:
        raise BundleError(f"{path} was altered. {REMEDY}")
    return page


REMEDY = "Copy the Bundle again, or export it anew: python -m llmos_jax.export."


def check_sizes(folder: Path, files: dict[str, FileFacts]) -> None:
    """Look whether every file is there, and as long as it should be.

    Raises:
        BundleError: naming the first that is not.
    """
    for name, facts in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as problem:
            raise BundleError(
                f"{folder / name} is missing ({problem.strerror}). {REMEDY}"
            ) from None
        if size != facts.size:
            raise BundleError(
                f"{folder / name} has {size:,} bytes and should have {facts.size:,}. "
                f"{REMEDY}"
            )


def damaged(folder: Path, files: dict[str, FileFacts]) -> list[str]:
    """Read files whole; return the names of those that are not what they should be."""

    def is_damaged(name: str) -> bool:
        try:
            return facts_of(folder / name) != files[name]
        except OSError:
            return True

    with ThreadPoolExecutor(_READERS) as pool:
        verdicts = list(pool.map(is_damaged, files))
    return [name for name, is_bad in zip(files, verdicts) if is_bad]
