"""Fit a run's config to the devices that are here now, when it goes on.

What a run learns must not depend on where it goes on, so its global batch is that of
its first start, whatever `batch.per_device` comes to on the devices of today; the
planner cuts it into as many microbatches as these need. Pins that ask for devices which
are gone are an error, as they are in a new run, but where a supervisor restarts the run
and nobody is there to change them: they are dropped, and a line says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmos_jax.config import BatchSection, PlanSection, RunConfig, load_config
from llmos_jax.errors import ConfigError
from llmos_jax.hardware import parse_topology
from llmos_jax.lowering import local_topology

_DROPPED = ("mesh", "microbatches", "schedule", "rounds", "context_exchange")
"""Pins of `[plan]` that are of a mesh; the others hold on any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """What the run folder says of the starts before."""

    batch: BatchSection
    global_batch: int


def refit(
    config: RunConfig, *, may_drop: bool, say: Callable[[str], None]
) -> RunConfig:
    """The config that goes on with the run in `run.dir` on the devices that are here.

    The config of a run that has done no step stays as it is.

    Args:
        config: as asked.
        may_drop: pins that ask for other devices, rather than leave them to be refused.
        say: writes a line.
    """
    recorded = _recorded(Path(config.run.dir).expanduser())
    if recorded is None:
        return config
    here = local_topology().num_devices
    config = _same_batch(config, recorded, here, say)
    return _without_pins(config, recorded, here, say) if may_drop else config


def _same_batch(
    config: RunConfig, recorded: _Recorded, here: int, say: Callable[[str], None]
) -> RunConfig:
    asked, kept = config.batch, recorded.global_batch
    if asked.global_ is not None or asked != recorded.batch:
        return config  # another batch is refused by the place in the data
    per_device = 1.0 if asked.per_device is None else asked.per_device
    devices = here
    if config.topology is not None:
        devices = parse_topology(config.topology).num_devices
    if per_device * devices != kept:
        say(
            f"batch.per_device = {per_device:g} made a global batch of {kept} when "
            f"this run began: it stays {kept} on {here} devices"
        )
    return replace(config, batch=replace(asked, global_=kept, per_device=None))


def _without_pins(
    config: RunConfig, recorded: _Recorded, here: int, say: Callable[[str], None]
) -> RunConfig:
    asked = []
    if config.topology is not None:
        devices = parse_topology(config.topology).num_devices
        if devices != here:
            asked.append((f"topology={config.topology}", devices))
    sizes = config.plan.mesh
    if here % math.prod(sizes.values()):
        pins = " ".join(f"plan.mesh.{axis}={size}" for axis, size in sizes.items())
        asked.append((pins, math.prod(sizes.values())))
    if not asked:
        return config
    reasons = " and ".join(f"{pins} asks for {count} devices" for pins, count in asked)
    say(
        f"{reasons}, {here} {'is' if here == 1 else 'are'} here: planning anew with "
        f"the same global batch of {config.batch.global_ or recorded.global_batch}"
    )
    free = PlanSection()
    plan = replace(config.plan, **{name: getattr(free, name) for name in _DROPPED})
    return replace(config, topology=None, plan=plan)


def _recorded(folder: Path) -> _Recorded | None:
    """None for a run without a step, and for a folder whose pages nobody can read."""
    try:
        if not (folder / "metrics.jsonl").stat().st_size:
            return None
        document = json.loads((folder / "plan.json").read_text())
        global_batch = int(document["batch"]["global"])
        batch = load_config(str(folder / "config.toml"), []).config.batch
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return _Recorded(batch=batch, global_batch=global_batch)
