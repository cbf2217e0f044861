"""The part of a Bundle for one kind of machine: weights as its kernels read them, and
compiled programs.

Compiled programs are native code, and are unpickled: whoever may write them may do
anything as whoever loads them. So a part is signed with a key that only this user has
(LLMOS_BUNDLE_KEY, or a file of the cache), and one that was signed by somebody else is
left alone: its programs are compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import pickle
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec

from llmos_jax.bundle.arrays import StoredArrays, write_arrays
from llmos_jax.bundle.manifest import FileFacts, check_sizes, damaged, facts_of
from llmos_jax.errors import BundleError
from llmos_jax.places import cache_folder

_PAGE = "machine.json"
_LAYOUT = "layout.pickle"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine's page says."""

    identity: str
    """What its programs depend on (serving.identity_of)."""
    pages: int
    """Pages of keys and values that the programs are for."""
    weights: tuple[str, ...]
    """Files of the weights; empty: those of the Bundle are read as they are."""
    files: dict[str, FileFacts]


class OpenedMachine(NamedTuple):
    """A part that is whole, and ours."""

    folder: Path
    page: Machine

    def weights(self) -> Any:
        """What the model's kernels read, as `write_machine` was given it; None: the
        Bundle's own weights are that."""
        if not self.page.weights:
            return None
        stored = StoredArrays(self.folder, self.page.weights)
        layout = pickle.loads((self.folder / _LAYOUT).read_bytes())
        leaves = [jnp.asarray(stored.read(name)) for name in sorted(stored.names())]
        return jax.tree.unflatten(layout, leaves)


def write_machine(folder: Path, identity: str, pages: int, weights: Any) -> None:
    """Seal a folder that compiled programs were put into.

    Args:
        folder: holds programs already.
        identity: what they depend on.
        pages: that they are for.
        weights: a tree of arrays, if kernels read others than the Bundle's own.
    """
    names: list[str] = []
    if weights is not None:
        leaves, layout = jax.tree.flatten(weights)
        arrays = {f"{number:05d}": x for number, x in enumerate(leaves)}
        names = write_arrays(folder, "weights", arrays)
        (folder / _LAYOUT).write_bytes(pickle.dumps(layout))
    files = {path.name: facts_of(path) for path in sorted(folder.iterdir())}
    page = Machine(identity=identity, pages=pages, weights=tuple(names), files=files)
    plain = msgspec.to_builtins(page)
    signed = {"machine": plain, "signature": _signature(plain)}
    (folder / _PAGE).write_text(json.dumps(signed, indent=1), encoding="utf-8")


def find_machine(folder: Path, identity: str) -> OpenedMachine | str:
    """Open the part of a folder of machines that fits, or say why there is none.

    Files are read whole and compared with the page before anything is made of them.

    Raises:
        BundleError: one that fits is damaged.
    """
    why = "it has none for this machine"
    for path in sorted(folder.glob(f"*/{_PAGE}")):
        try:
            signed = json.loads(path.read_bytes())
            page = msgspec.convert(signed["machine"], Machine)
            signature = str(signed["signature"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            why = f"{path} cannot be read ({type(problem).__name__})"
            continue
        if page.identity != identity:
            continue
        if not hmac.compare_digest(signature, _signature(signed["machine"])):
            why = "another user made them (LLMOS_BUNDLE_KEY shares trust)"
            continue
        check_sizes(path.parent, page.files)
        signed_for = {_PAGE, *page.files}
        bad = [one.name for one in path.parent.iterdir() if one.name not in signed_for]
        bad += damaged(path.parent, page.files)
        if bad:
            raise BundleError(
                f"{path.parent / bad[0]} was altered or added. Delete {path.parent}: "
                "its programs are then compiled anew; or copy the Bundle again."
            )
        return OpenedMachine(path.parent, page)
    return why


def _signature(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(_key(), text, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's secret; made when it is first asked for."""
    given = os.environ.get("LLMOS_BUNDLE_KEY")
    if given:
        return given.encode()
    path = cache_folder() / "bundle.key"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_key(path)
        return path.read_bytes()
    except OSError as problem:
        raise BundleError(
            f"{path} cannot be kept: {problem.strerror}. Set LLMOS_CACHE to a folder "
            "that can be written, or LLMOS_BUNDLE_KEY."
        ) from None


def _make_key(path: Path) -> None:
    """Put a fresh key there; of two processes at once, the first one's stays."""
    beside = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
    with contextlib.suppress(FileExistsError):
        os.link(beside, path)
    beside.unlink()
