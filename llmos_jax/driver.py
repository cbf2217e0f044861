"""The whole data flow, top to bottom, one function per verb.

Each reads as the picture in README.md does: a config becomes a model, a topology, rules
and a workload; these become a Plan; the Plan becomes Programs; the Programs run. A verb
imports the floors it needs when it is called, so that `plan` starts without Orbax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos_jax import hardware, planner, rules
from llmos_jax.config import (
    BatchSection,
    PlanSection,
    RunConfig,
    SyncSection,
    load_config,
    load_model,
    override_config,
)
from llmos_jax.errors import (
    ConfigError,
    DoesNotFit,
    PlanError,
)
from llmos_jax.ir import (
    ModelSpec,
    Pins,
    Plan,
    Topology,
    Workload,
)
from llmos_jax.places import cache_folder

if TYPE_CHECKING:
    from llmos_jax.checkpoint import OpenedCheckpoint
    from llmos_jax.data import PreparedText
    from llmos_jax.models import Skeleton
    from llmos_jax.serving import Sampling
    from llmos_jax.training import Outcome, Session


def plan(config: RunConfig, verify: str = "estimate") -> Plan:
    """Config -> Plan. Touches devices only to learn what is here, if none is named.

    Args:
        config: what to plan for.
        verify: how it is proved: `estimate` (closed form), `probe` (few layers are
            compiled) or `compile` (the exact program is).

    Raises:
        NoFeasiblePlan: nothing fits, by the estimate or by the compiler's word.
    """
    from llmos_jax import models

    skeleton = models.skeleton(resolve_model(config.model))
    topology = resolve_topology(config.topology)
    workload = resolve_workload(config, skeleton.spec, topology)
    search = partial(
        planner.plan,
        skeleton.table,
        topology,
        workload,
        rules.load_rules(config.rules or skeleton.spec.family, workload.phase),
        pins_of(config),
    )
    if verify == "estimate":
        return search()
    return _proved(search, skeleton, config, verify)


MOST_REFUTED = 6
"""Choices that the compiler may turn down before the search gives up."""


def _proved(
    search: Callable[..., Plan], skeleton: Skeleton, config: RunConfig, verify: str
) -> Plan:
    """Search, ask the compiler, and search on with what it said, until it agrees."""
    from llmos_jax.telemetry import log

    refuted: tuple[planner.Refuted, ...] = ()
    while True:
        chosen = search(refuted=refuted)
        try:
            return chosen.with_compiled(ask_compiler(chosen, skeleton, config, verify))
        except DoesNotFit as problem:
            refuted += (
                planner.Refuted(
                    way=chosen.way,
                    needed_bytes=problem.needed_bytes,
                    memory=chosen.predicted.memory,
                ),
            )
            if len(refuted) >= MOST_REFUTED:
                raise
            log(f"{chosen.way}: {problem} Searching on.")


def ask_compiler(
    chosen: Plan,
    skeleton: Skeleton,
    config: RunConfig,
    verify: str,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Plan -> what the compiler says of it: the `compiled` part of `plan --json`.

    Args:
        chosen: a plan for training.
        skeleton: its model.
        config: for the optimizer and the dtypes.
        verify: `probe` or `compile`.
        options: XLA flags beside the plan's, for `compile`.

    Raises:
        DoesNotFit: the compiler needs more memory than a device has.
        LowerError: no compiler for this machine is here, or it refused.
        PlanError: a step that no program of this release runs.
    """
    from llmos_jax import lowering, models, training

    if chosen.workload.phase != "train":
        raise PlanError(
            f"a {chosen.workload.phase} step is planned in closed form only: this "
            "release has no program for it. Leave --verify out."
        )
    devices = lowering.compile_devices(chosen.topology)

    def build(wanted: Plan) -> tuple[lowering.Program, Any]:
        mesh = lowering.device_mesh(wanted, devices)
        spec = wanted.params.spec or skeleton.spec
        model = models.skeleton(spec)
        return training.lower_train_step(model, wanted, config, mesh), mesh

    def shortened(wanted: Plan, layers: int) -> Plan:
        spec = replace(skeleton.spec, num_layers=layers)
        return replace(wanted, params=models.param_table(spec))

    if verify == "compile":
        return lowering.compile_plan(chosen, build, options)
    return lowering.probe_plan(chosen, build, shortened, skeleton.spec.num_layers)


def train(config: RunConfig) -> dict[str, Any]:
    """Config -> checkpoints, metrics and a report in `run.dir`; returns report.json."""
    from llmos_jax import lowering

    lowering.join_processes()
    lowering.keep_compiled_programs()
    with lowering.shared_fate():
        return _train(config)


def _train(config: RunConfig) -> dict[str, Any]:
    from llmos_jax import data, lowering, models, training
    from llmos_jax.telemetry import log

    is_first = lowering.is_first_process()
    say = partial(log, enabled=is_first)

    skeleton = models.skeleton(resolve_model(config.model))
    chosen = plan(config)
    say(chosen.explain())
    folder = training.open_folder(config)
    folder.check_model(skeleton.spec)
    folder.check_replicas(training.local_replicas(chosen))
    finished = folder.finished_report(config.train.steps)
    if finished is not None:
        say(f"{folder.path} is finished: {folder.resume_step} steps, nothing to do.")
        return finished
    if is_first:
        folder.record(config, plan_document(chosen))

    text = data.prepare(
        config.data,
        vocab_size=skeleton.spec.vocab_size,
        model_name=skeleton.spec.name,
        cache=cache_folder(),
        on_progress=say,
    )
    session = training.open_session(skeleton, chosen, config)
    outcome = training.conduct(session, text, folder, say=say, is_first=is_first)
    score = None
    samples: list[tuple[str, str]] = []
    if outcome.reason != "signal":
        score = session.score(outcome.state.params, text.validation, None)
        samples = _samples(session, text, outcome)
    if not is_first:
        return {}
    return training.summarise(session, text, folder, outcome, score, samples)


def generate(
    model: str,
    prompt: str,
    overrides: Sequence[str] = (),
    *,
    max_tokens: int,
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Checkpoint + prompt -> its continuation; `on_text` sees it as it grows.

    It computes in the run's `train.compute_dtype`, which an override may change.
    """
    from llmos_jax import checkpoint, data, lowering, serving

    lowering.keep_compiled_programs()
    opened = checkpoint.open_checkpoint(model)
    config = _config_of(opened, model, overrides)
    decoder = data.StreamDecoder(opened.tokenizer)

    completion = serving.Generator(
        opened.skeleton, opened.params(), compute_dtype=config.train.compute_dtype
    ).complete(
        opened.prompt_ids(prompt),
        max_tokens=max_tokens,
        sampling=sampling.check(),
        stop_ids=frozenset({opened.tokenizer.eos_id}),
        on_token=lambda token: on_text(decoder.push(token)),
    )
    on_text(decoder.flush() + "\n")
    return {
        "text": opened.tokenizer.decode(list(completion.token_ids)),
        "token_ids": list(completion.token_ids),
        "prompt_tokens": completion.prompt_tokens,
        "tokens_per_s": completion.tokens_per_s,
        "finish_reason": completion.finish_reason,
    }


def evaluate(model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Checkpoint + text -> perplexity and bits per byte.

    The text is `data.test`, else `data.validation`, else the part that the run itself
    held out; always cut with the tokenizer that the checkpoint carries.
    """
    from llmos_jax import lowering

    lowering.join_processes()
    lowering.keep_compiled_programs()
    with lowering.shared_fate():
        return _evaluate(model, overrides)


def _evaluate(model: str, overrides: Sequence[str]) -> dict[str, Any]:
    from llmos_jax import checkpoint, data, training
    from llmos_jax.telemetry import log

    opened = checkpoint.open_checkpoint(model)
    config = _config_of(opened, model, overrides)
    text = data.prepare_scored(
        config.data, opened.tokenizer, cache=cache_folder(), on_progress=log
    )
    session = training.open_session(opened.skeleton, plan(config), config)
    params = opened.params(session.param_shardings)
    score = session.score(params, text, None)
    return {
        "model": opened.skeleton.spec.name,
        "step": opened.step,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(text.num_bytes),
        "accuracy": score.accuracy,
        "tokens": score.tokens,
        "bytes": text.num_bytes,
        **data.compare(text.raw_bytes()),
    }


def doctor(model: str | None) -> dict[str, Any]:
    """This machine (and a checkpoint, if named) -> what works and what does not."""
    from llmos_jax import lowering
    from llmos_jax.telemetry import environment

    report: dict[str, Any] = {
        "environment": environment(),
        "checks": lowering.inspect(),
    }
    if model is not None:
        from llmos_jax import checkpoint

        report["checkpoint"] = checkpoint.inspect(model)
    report["ok"] = all(check["status"] != "fail" for check in report["checks"])
    return report


def plan_document(chosen: Plan) -> dict[str, Any]:
    """plan.json: the keys scripts rely on, and the whole artefact under `artefact`."""
    return {**chosen.summary(), "artefact": chosen.to_json()}


def resolve_model(name: str) -> ModelSpec:
    """A name under configs/models/, a TOML path, a run folder or a checkpoint."""
    if Path(name).expanduser().is_dir():
        from llmos_jax.checkpoint import find_checkpoint

        found = find_checkpoint(name)
        return found.store.manifest(found.step).model
    return load_model(name)


def resolve_topology(name: str | None) -> Topology:
    """A topology by name, or the devices that are here, as fast as they are."""
    if name is not None:
        return hardware.parse_topology(name)
    from llmos_jax import lowering

    return lowering.measured_topology(lowering.local_topology())


def resolve_workload(
    config: RunConfig, spec: ModelSpec, topology: Topology
) -> Workload:
    """The step a config asks for on a machine.

    Raises:
        ConfigError: a sequence longer than the model's context, a `batch.per_device`
            that makes no whole batch, or replicas that never agree.
    """
    batch = config.batch
    if batch.seq_len > spec.max_seq_len:
        raise ConfigError(
            f"batch.seq_len = {batch.seq_len} is longer than the context of "
            f"{spec.name} ({spec.max_seq_len}). Set batch.seq_len to at most that."
        )
    if batch.global_ is not None:
        global_batch = float(batch.global_)
    else:
        per_device = 1.0 if batch.per_device is None else batch.per_device
        global_batch = per_device * topology.num_devices
    if global_batch != round(global_batch):
        raise ConfigError(
            f"batch.per_device = {batch.per_device} on {topology.num_devices} devices "
            f"makes {global_batch:g} sequences, which is no whole number."
        )
    step = Workload(
        phase=config.plan.phase,
        global_batch=round(global_batch),
        seq_len=batch.seq_len,
        compute_dtype=config.train.compute_dtype,
        optimizer_moments=2 if config.train.optimizer == "adamw" else 0,
    )
    if config.sync.strategy == "local" and step.phase == "train":
        step = replace(step, local_steps=_local_steps(config))
    if step.phase != "train":
        goal_ms = config.serve.max_step_ms
        step = replace(
            step,
            param_dtype=config.serve.weight_dtype,
            kv_dtype=config.serve.kv_dtype,
            max_step_s=None if goal_ms is None else goal_ms / 1000,
        )
    return step.check()


def _local_steps(config: RunConfig) -> int:
    if config.sync.steps < 1:
        raise ConfigError(
            f"sync.steps = {config.sync.steps}: replicas that learn alone must agree "
            "after some number of steps. Set sync.steps to 1 or more."
        )
    return config.sync.steps


def _config_of(
    opened: OpenedCheckpoint, model: str, overrides: Sequence[str]
) -> RunConfig:
    """The config of a checkpoint's run, freed of what only training needs.

    The devices here may be others than the run had, so its batch, mesh, topology and
    way of agreeing go; overrides may set them again. A checkpoint away from its run has
    the defaults.
    """
    from llmos_jax import lowering

    source = None if opened.config_path is None else str(opened.config_path)
    pins = [f"model={model}"]
    kept = load_config(source, pins).config
    spec, devices = opened.skeleton.spec, lowering.local_topology().num_devices
    freed = replace(
        kept,
        topology=None,
        plan=PlanSection(),
        sync=SyncSection(),
        batch=BatchSection(
            seq_len=min(kept.batch.seq_len, spec.max_seq_len), global_=8 * devices
        ),
    )
    return override_config(freed, overrides)


def _samples(
    session: Session, text: PreparedText, outcome: Outcome
) -> list[tuple[str, str]]:
    """What the trained model says after each of `generate.prompts`."""
    from llmos_jax import lowering, serving

    if not lowering.is_only_process():
        return []
    speaker = serving.Generator(
        session.skeleton, outcome.state.params, compute_dtype="float32"
    )
    wanted = session.config.generate
    sampling = serving.Sampling(
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        seed=session.config.run.seed,
    ).check()
    return [
        (
            prompt,
            text.tokenizer.decode(
                speaker.complete(
                    text.tokenizer.encode(prompt),
                    max_tokens=wanted.max_tokens,
                    sampling=sampling,
                    stop_ids=frozenset({text.tokenizer.eos_id}),
                ).token_ids
            ),
        )
        for prompt in wanted.prompts
    ]


def pins_of(config: RunConfig) -> Pins:
    """The decisions that a config makes by hand."""
    known = {field.name for field in fields(Pins)}
    asked = {
        field.name: getattr(config.plan, field.name)
        for field in fields(config.plan)
        if field.name in known
    }
    return Pins(**{**asked, "mesh": config.plan.mesh or None})
