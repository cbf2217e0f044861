"""Turn TOML files under configs/ (and `--set` overrides) into typed, checked configs.

The only reader of configs/. A name such as `quickstart` or `llama3_70b` is looked up in
the checkout, then in the package; anything with a slash or `.toml` is a path.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax.config.build import build, to_table
from llmos_jax.config.override import apply_overrides
from llmos_jax.config.schema import RunConfig
from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir import ModelSpec, Prices
from llmos_jax.places import data_folder

_NO_RUNS = ("models", "calibration", "prices")
"""What lies under configs/ and is no run's config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A config with where it came from."""

    config: RunConfig
    source: str


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a run config, apply `key=value` overrides, check every key and type.

    Args:
        name: a path, a name under configs/, or None when overrides say enough.
        overrides: dotted `key=value` texts, later ones win.

    Raises:
        ConfigError: a missing file, invalid TOML, an unknown key, a wrong type.
    """
    if name is None:
        table: dict[str, Any] = {}
        source, stem = "--set", "run"
    else:
        path = _find(name, "", "config")
        table, source, stem = _read(path), str(path), path.stem
    table = _lay_over(table, overrides)
    config = build(RunConfig, table, source)
    folder = config.run.dir.replace("{name}", stem)
    if folder != config.run.dir:
        table = apply_overrides(table, [f"run.dir={folder}"], RunConfig)
        config = build(RunConfig, table, source)
    return Loaded(config=_check(config, source), source=source)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Lay `key=value` overrides over a config that is already there."""
    table = _lay_over(to_table(config), overrides)
    return _check(build(RunConfig, table, "--set"), "--set")


def load_model(name: str) -> ModelSpec:
    """Read a model file: a path, or a name under configs/models/."""
    path = _find(name, "models", "model")
    table = {"name": path.stem, **_read(path)}
    return build(ModelSpec, table, str(path)).check()


def load_prices(name: str | None = None) -> Prices:
    """Read a price list: a path, or configs/prices.toml.

    Raises:
        ConfigError: a missing file, an unknown key, a price that is not above zero.
    """
    path = _find(name or "prices", "", "price list")
    table = {"source": str(path), **_read(path)}
    prices = build(Prices, table, str(path))
    for chip, usd in prices.usd_per_chip_hour.items():
        if not 0 < usd < math.inf:
            raise ConfigError(
                f"{path}: usd_per_chip_hour.{chip} is {usd}; it must be more than 0. "
                "A chip without a price is left out."
            )
    return prices


def model_names() -> list[str]:
    """Names under configs/models/."""
    return sorted(path.stem for path in (data_folder("configs") / "models").glob("*"))


def _lay_over(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides; `batch.global` and `batch.per_device` replace one another."""
    batch = dict(table.get("batch", {}))
    for key, other in (("global", "per_device"), ("per_device", "global")):
        if any(text.split("=")[0].strip() == f"batch.{key}" for text in overrides):
            batch.pop(other, None)
    kept = {**table, "batch": batch} if "batch" in table else table
    return apply_overrides(kept, overrides, RunConfig)


def _find(name: str, folder: str, kind: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root = data_folder("configs") / folder
    named = root / name if name.endswith(".toml") else root / f"{name}.toml"
    if named.is_file():
        return named
    if "/" in name or name.endswith(".toml"):
        siblings = [str(p) for p in path.parent.glob("*.toml")] if path.parent else []
        hint = did_you_mean(str(path), siblings) if siblings else ""
        raise ConfigError(f"{kind} file {name} does not exist.{hint}")
    known = [found.relative_to(root).with_suffix("") for found in root.rglob("*.toml")]
    if not folder:
        known = [item for item in known if item.parts[0] not in _NO_RUNS]
    raise ConfigError(
        f"no {kind} is named {name!r}.{did_you_mean(name, map(str, known))}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; a config is TOML.") from None
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(f"{path} is not valid TOML: {problem}.") from None


def _check(config: RunConfig, source: str) -> RunConfig:
    """Refuse values that no type can refuse."""
    train, batch = config.train, config.batch
    if batch.global_ is not None and batch.per_device is not None:
        raise ConfigError(
            f"{source}: batch.global = {batch.global_} and batch.per_device = "
            f"{batch.per_device} both say how large a step is; keep one."
        )
    positive = {
        "batch.seq_len": batch.seq_len,
        "batch.global": batch.global_,
        "batch.per_device": batch.per_device,
        "train.steps": train.steps,
        "train.learning_rate": train.learning_rate,
        "train.max_minutes": train.max_minutes,
        "train.explode_ratio": train.explode_ratio,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.grace_s": config.checkpoint.grace_s,
        "plan.microbatches": config.plan.microbatches,
        "compress.sequences": config.compress.sequences,
        "compress.seq_len": config.compress.seq_len,
        "compress.max_kld": config.compress.max_kld,
        "compress.evaluate_batches": config.compress.evaluate_batches,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{source}: {key} is {value}; it must be more than 0.")
    if not 0 < config.data.validation_share < 1:
        raise ConfigError(
            f"{source}: data.validation_share is {config.data.validation_share}; "
            "it must lie between 0 and 1."
        )
    if not 0 <= config.compress.smooth <= 1:
        raise ConfigError(
            f"{source}: compress.smooth is {config.compress.smooth}; it must lie "
            "between 0 (nothing) and 1."
        )
    return config
