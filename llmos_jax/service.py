"""A model and `[serve]` become a service: weights where they run, and an engine.

On one device the model runs as it is, or rounded to few bits; on several it is split as
a plan for decoding says. The first process leads, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmos_jax import resolve
from llmos_jax.config import RunConfig
from llmos_jax.config.schema import ServeSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Plan, Topology

if TYPE_CHECKING:
    from llmos_jax.bundle import OpenedMachine
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Params, Skeleton
    from llmos_jax.serving import Engine, Opened, Ready


@dataclass(frozen=True, slots=True)
class Service:
    """A model in place: what the first process leads, and the others follow."""

    opened: Opened
    ready: Ready
    asked: ServeSection

    def engine(self, *, max_queue: int | None = None) -> Engine:
        """An engine that makes itself ready."""
        from llmos_jax import serving

        options = serving.Options(
            max_queue=serving.MAX_QUEUE if max_queue is None else max_queue,
            drafts=self.asked.drafts,
            overlaps=self.asked.overlap,
            keeps_prefixes=self.asked.prefix_cache,
        )
        return serving.open_engine(self.opened, self.ready, options)

    def follow(self) -> None:
        """Do as the first process does, until it ends."""
        from llmos_jax import serving

        self.ready.prepare(lambda: True)
        serving.follow(self.ready.runner.send_words)


def make_ready(
    opened: OpenedModel,
    config: RunConfig,
    plan: Callable[[RunConfig], Plan],
    *,
    folder: Path | None = None,
) -> Service:
    """Put a model in place; its programs are still to be prepared.

    Args:
        opened: the model.
        config: `[serve]`, the dtypes and pins.
        plan: how a model is split over several devices.
        folder: where compiled programs are kept, and none is looked for; None: in the
            cache.

    Raises:
        ConfigError: sizes or few bits that do not go with it, or too little memory.
        BundleError: a Bundle whose files were altered.
    """
    from llmos_jax import lowering, serving
    from llmos_jax.telemetry import log

    asked, identity = config.serve, identity_of(opened, config)
    kept = lowering.keep_compiled_programs() / "serving"
    machine = None if folder else _machine_of(opened, identity)
    placed = _placed(opened, config, plan, machine)
    ready = serving.make_ready(
        placed,
        asked,
        guesses=asked.drafts > 0,
        identity=identity,
        folder=(folder or kept) if lowering.is_only_process() else None,
        ready_made=machine and serving.ReadyMade(machine.folder, machine.page.pages),
        on_progress=log,
    )
    return Service(placed, ready, asked)


def open_classifier(
    opened: OpenedModel,
    config: RunConfig,
    plan: Callable[[RunConfig], Plan],
    *,
    max_queue: int | None = None,
) -> Engine:
    """An engine that classifies texts, and makes itself ready.

    Args:
        opened: a model with classes.
        config: `[serve]`, the dtype and pins; texts are as long as in training
            (`batch.seq_len`), if `serve.context` says nothing else.
        plan: how it is split over several devices.
        max_queue: texts that may wait; None: serving.MAX_QUEUE.

    Raises:
        ConfigError: several processes, few bits, or sizes that cannot be.
    """
    import jax

    from llmos_jax import lowering, serving
    from llmos_jax.telemetry import log

    context = config.serve.context or config.batch.seq_len
    config = replace(config, serve=replace(config.serve, context=context))
    asked, dtype = config.serve, config.train.compute_dtype
    if not lowering.is_only_process():
        raise ConfigError(
            f"{opened.skeleton.spec.name} is a classifier, and one process serves it; "
            f"{jax.process_count()} were started. Start one, with its own devices, for "
            "each copy."
        )
    if asked.weight_dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"serve.weight_dtype = {asked.weight_dtype}: a classifier is served in "
            "floating point. Leave it out."
        )
    lowering.keep_compiled_programs()
    placement, shardings = None, None
    if resolve.resolve_topology(config.topology).num_devices > 1:
        chosen = plan(resolve.to_classify(config))
        placement = chosen, lowering.device_mesh(chosen, jax.devices())
        shardings = lowering.param_shardings(*placement)
    return serving.open_classifier(
        opened.skeleton,
        resolve.read_to_compute(opened, dtype, shardings),
        asked,
        serving.Options(
            max_queue=serving.MAX_QUEUE if max_queue is None else max_queue,
            overlaps=asked.overlap,
        ),
        placement=placement,
        on_progress=log,
    )


def identity_of(opened: OpenedModel, config: RunConfig) -> str:
    """All that compiled programs depend on beside their shapes, as one word."""
    import jax

    from llmos_jax import lowering, serving
    from llmos_jax.telemetry import versions

    return serving.identity_of(
        *(opened.skeleton.spec, config.train.compute_dtype, config.serve, config.plan),
        *(versions(), lowering.cpu_name(), jax.devices()[0].device_kind),
        jax.device_count(),
    )


def _machine_of(opened: OpenedModel, identity: str) -> OpenedMachine | None:
    """What a Bundle brought for this machine."""
    from llmos_jax import bundle
    from llmos_jax.telemetry import log

    if not isinstance(opened, bundle.OpenedBundle):
        return None
    found = opened.machine(identity)
    if isinstance(found, bundle.OpenedMachine):
        return found
    log(f"the Bundle's compiled programs cannot be used: {found}")
    return None


def _placed(
    opened: OpenedModel,
    config: RunConfig,
    plan: Callable[[RunConfig], Plan],
    machine: OpenedMachine | None,
) -> Opened:
    """Read a model to where it runs: the one device here, or a mesh of all of them."""
    import jax

    from llmos_jax import lowering, models, serving

    asked, dtype = config.serve, config.train.compute_dtype
    topology = resolve.resolve_topology(config.topology)
    kv_dtype = None if asked.kv_dtype == "bfloat16" else asked.kv_dtype
    open_forward = partial(
        serving.open_forward,
        compute_dtype=dtype,
        kv_dtype=kv_dtype,
        rotate_keys=asked.rotate_keys,
    )
    laid_out = None if machine is None else machine.weights()
    if laid_out is not None:
        made = open_forward(opened.skeleton, laid_out, is_laid_out=True)
        return serving.Opened(opened.skeleton.spec, *made, topology)
    skeleton, params = in_few_bits(opened, config, topology)
    if topology.num_devices == 1:
        made = open_forward(skeleton, params)
        return serving.Opened(skeleton.spec, *made, topology)
    chosen = serving.with_repeated_heads(plan(resolve.to_serve(config)))
    mesh = lowering.device_mesh(chosen, jax.devices())
    shardings = lowering.param_shardings(chosen, mesh)
    params = {
        path: lowering.placed(x, shardings[path])
        for path, x in serving.repeated_params(params, chosen.params).items()
    }
    wider = models.skeleton(chosen.params.spec or skeleton.spec)
    made = open_forward(wider, params)
    return serving.Opened(wider.spec, *made, topology, serving.Placement(chosen, mesh))


def in_few_bits(
    opened: OpenedModel, config: RunConfig, topology: Topology
) -> tuple[Skeleton, Params]:
    """Read a model, and round its weights if `serve.weight_dtype` asks for few bits
    that it has not; `compress` does so with more care."""
    from llmos_jax import compression, models
    from llmos_jax.telemetry import log

    spec = opened.skeleton.spec
    wanted = resolve.served(spec, resolve.to_serve(config), topology)
    if wanted.quantization == spec.quantization:
        params = resolve.read_to_compute(opened, config.train.compute_dtype)
        return opened.skeleton, params
    assert wanted.quantization is not None
    log(f"rounding the weights to {wanted.quantization.weights}")
    how = compression.How(quantization=wanted.quantization)
    made = compression.quantize(opened.skeleton, opened.params(dtype="float32"), how)
    return models.skeleton(made.skeleton.spec), dict(made.params)
