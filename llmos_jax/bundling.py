"""A model and `[serve]` become a Bundle: weights as they are served, and programs.

The Bundle is opened and put in place as `serve` does before it has its name, so what
was compiled is what will run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llmos_jax import resolve, service
from llmos_jax.config import RunConfig
from llmos_jax.ir import Plan

if TYPE_CHECKING:
    from llmos_jax.bundle import Bundle
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Params, Skeleton


def make_bundle(
    opened: OpenedModel,
    config: RunConfig,
    out: str,
    plan: Callable[[RunConfig], Plan],
    document: Callable[[Plan], dict[str, Any]],
) -> dict[str, Any]:
    """Write a Bundle; return what it holds, as plain figures.

    Args:
        opened: the model.
        config: `[serve]` and `[export]`, the dtypes, the topology, pins.
        out: a new folder.
        plan: how a model is split over the topology.
        document: plan.json of a plan.

    Raises:
        ConfigError: the folder is in use, or sizes that do not go with the model.
        BundleError: it cannot be written.
    """
    from llmos_jax import bundle, lowering, models
    from llmos_jax.telemetry import log

    topology = resolve.resolve_topology(config.topology)
    chosen = plan(resolve.to_serve(config))
    skeleton, params = service.in_few_bits(opened, config, topology)
    spec, params = _merged(skeleton, params)
    skeleton = models.skeleton(spec)
    page = bundle.Bundle(
        model=spec,
        topology=topology.name,
        plan_fingerprint=chosen.fingerprint,
        compute_dtype=config.train.compute_dtype,
        serve=msgspec.to_builtins(config.serve),
        weights=(),
        provenance=_provenance(config),
    )
    log(f"writing {out}")

    def fill(folder: Path) -> Bundle:
        if not config.export.programs:
            return page
        log("exporting portable programs")
        whole = replace(
            page, programs=_portable(folder, skeleton, params, config, chosen)
        )
        if config.topology is None and lowering.is_only_process():
            _compile(folder, config, plan)
        else:
            log(f"programs for {topology.name} are compiled where it is, at first use")
        return whole

    bundle.write_bundle(
        Path(out).expanduser(), page, params, opened.tokenizer, document(chosen), fill
    )
    return bundle.inspect(out)


def _merged(skeleton: Skeleton, params: Params) -> tuple[Any, Params]:
    """Without LoRA factors: a Bundle is served, not trained on."""
    from llmos_jax import interchange

    return interchange.merged(skeleton.spec, params)


def _provenance(config: RunConfig) -> dict[str, Any]:
    from llmos_jax.telemetry import environment

    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": resolve.lineage(config.model),
        "adapter": config.lora.adapter,
        "config": config.to_json(),
        "config_fingerprint": config.fingerprint,
        "environment": environment(),
    }


def _portable(
    folder: Path,
    skeleton: Skeleton,
    params: Params,
    config: RunConfig,
    chosen: Plan,
) -> tuple[Any, ...]:
    """Write the programs that need nothing of ours; return what they are."""
    from llmos_jax import bundle, serving

    asked = config.serve
    made = serving.portable_programs(
        skeleton,
        params,
        kv_dtype=config.train.compute_dtype
        if asked.kv_dtype == "bfloat16"
        else asked.kv_dtype,
        seats=asked.seats,
        context=chosen.workload.seq_len,
        chunk=min(asked.step_tokens, chosen.workload.seq_len),
    )
    (folder / bundle.PORTABLE).mkdir()
    programs = []
    for one in made:
        file = f"{bundle.PORTABLE}/{one.name}.stablehlo"
        (folder / file).write_bytes(one.code)
        programs.append(
            bundle.PortableProgram(
                file=file,
                platforms=serving.PLATFORMS,
                does=one.does,
                arguments=one.arguments,
                cache=one.cache,
            )
        )
    return tuple(programs)


def _compile(
    folder: Path, config: RunConfig, plan: Callable[[RunConfig], Plan]
) -> None:
    """Put what this machine runs beside the weights."""
    from llmos_jax import bundle

    opened = bundle.open_bundle(folder)
    asked = resolve.config_of(opened, str(folder), _pins(config))
    identity = service.identity_of(opened, asked)
    here = folder / bundle.MACHINES / identity[:12]
    here.mkdir(parents=True)
    made = service.make_ready(opened, asked, plan, folder=here)
    made.ready.prepare(lambda: True)
    weights = made.opened.weights
    laid_out = None if isinstance(weights, dict) else weights
    bundle.write_machine(here, identity, made.ready.room.pages, laid_out)


def _pins(config: RunConfig) -> list[str]:
    """The pins of a plan, as overrides: a Bundle's own config has none."""
    return [f"plan.mesh.{axis}={size}" for axis, size in config.plan.mesh.items()]
