"""A model becomes a smaller one: a pass over its weights, or a chain of passes.

One device holds the model while it is made smaller. Nothing is written before the
result has been compared with its source, on the text that `evaluate` would take.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos_jax import resolve
from llmos_jax.config import RunConfig
from llmos_jax.errors import ConfigError, PlanError, TrainingError
from llmos_jax.ir import ModelSpec, Plan
from llmos_jax.places import cache_folder
from llmos_jax.scoring import tell, windows_of

if TYPE_CHECKING:
    from llmos_jax.compression import Cost
    from llmos_jax.data import TokenStream
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Params, Skeleton
    from llmos_jax.training import Distance, Score


def quantized(
    opened: OpenedModel, config: RunConfig, plan: Callable[[RunConfig], Plan]
) -> dict[str, Any]:
    """Write the model in few bits, and its report; return the report.

    Raises:
        CompressError: it is further from its source than `compress.max_kld`.
    """
    from llmos_jax import __version__, checkpoint, compression, data
    from llmos_jax.telemetry import log

    asked, spec = config.compress, opened.skeleton.spec
    how = compression.how_of(asked)
    compression.quantized_spec(spec, how.quantization)
    folder = checkpoint.new_folder(resolve.out_of(config))
    text = data.prepare_scored(
        config.data, opened.tokenizer, cache=cache_folder(), on_progress=log
    )
    batches = calibration_batches(opened, config) if how.is_calibrated else ()
    chosen = plan(resolve.to_score(config))

    clock = compression.Clock()
    params = opened.params()
    before = compression.num_bytes(params)
    log(f"quantizing the {spec.num_layers} layers of {spec.name}")
    made = compression.quantize(
        *(opened.skeleton, params, how, batches), on_progress=tell("quantizing")
    )
    del params  # read again in the dtype that is computed in: never in memory twice
    clock.lap("quantize")
    found = distance_to(opened, made.skeleton, made.params, text, chosen, config)
    clock.lap("evaluate")
    compression.check_distance(found.kld, asked)

    log(f"writing {folder}")
    made_by = {"llmos_jax": __version__, "quantized_from": config.model}
    checkpoint.save_model(
        str(folder), made.skeleton, made.params, opened.tokenizer, made_by
    )
    return compression.write_report(
        folder,
        {
            "model": spec.name,
            "kind": asked.kind,
            "out": str(folder),
            **compression.sizes(opened.skeleton.table, before, made.params),
            "perplexity": found.score.perplexity,
            "perplexity_before": found.reference.perplexity,
            "kld": found.kld,
            "same_top1": found.same_top1,
            "evaluated_tokens": found.score.tokens,
            "calibration_tokens": made.calibration_tokens,
            "errors": made.errors,
            "seconds": clock.laps,
            "made_by": made_by,
            "config": config.to_json(),
        },
    )


def pruned(
    opened: OpenedModel, config: RunConfig, plan: Callable[..., Plan]
) -> dict[str, Any]:
    """Write the model with zeros, or with fewer channels, heads and layers, and its
    report; return the report.

    It is cut for decoding on `topology` with matrices as `compress.weights` says; it is
    scored on the devices here.

    Args:
        opened: the model.
        config: `prune.*` say what is made.
        plan: (config, spec=None) -> how the config's model, or another, runs.

    Raises:
        CompressError: it is further from its source than `compress.max_kld`.
    """
    from llmos_jax import __version__, checkpoint, compression, data, models
    from llmos_jax.telemetry import log

    asked, source = config.prune, opened.skeleton
    is_cut = asked.method == "structured"
    if is_cut:
        compression.check_prunable(source.spec)
        compression.check_shapes(source.spec, asked)
        topology = resolve.resolve_topology(config.topology)
        resolve.served(source.spec, _to_decode(config), topology)  # or ConfigError
    else:
        compression.check_masks(source.spec, asked)
    folder = checkpoint.new_folder(resolve.out_of(config))
    text = data.prepare_scored(
        config.data, opened.tokenizer, cache=cache_folder(), on_progress=log
    )
    needs_text = asked.method != "magnitude"
    batches = calibration_batches(opened, config) if needs_text else []
    chosen = plan(resolve.to_score(replace(config, topology=None)))

    clock = compression.Clock()
    params = opened.params()
    before = compression.num_bytes(params)
    log(f"pruning {source.spec.name}: {asked.method}")
    if is_cut:
        made = compression.prune(
            *(source, params, asked, batches),
            multiple=compression.multiple_of(asked, topology),
            predict=lambda spec: _decode_cost(spec, config, plan),
            on_progress=tell("studying"),
            on_candidate=lambda one: log(f"tried {one.explain()}"),
        )
        skeleton, smaller, found = made.skeleton, made.params, made.figures()
    else:
        masked = compression.mask(
            *(source, params, asked, batches), on_progress=tell("pruning")
        )
        skeleton, smaller, found = source, masked.params, masked.figures()
    del params
    clock.lap("prune")
    distance = distance_to(opened, skeleton, smaller, text, chosen, config)
    clock.lap("evaluate")
    compression.check_distance(
        distance.kld, config.compress, "pruned model", "keeping more of it"
    )

    log(f"writing {folder}")
    made_by = {"llmos_jax": __version__, "pruned_from": config.model}
    checkpoint.save_model(str(folder), skeleton, smaller, opened.tokenizer, made_by)
    return compression.write_report(
        folder,
        {
            "model": skeleton.spec.name,
            "kind": "prune",
            "method": asked.method,
            "out": str(folder),
            "params": models.param_table(skeleton.spec).num_params,
            "params_before": source.table.num_params,
            **compression.sizes(skeleton.table, before, smaller),
            "perplexity": distance.score.perplexity,
            "perplexity_before": distance.reference.perplexity,
            "kld": distance.kld,
            "same_top1": distance.same_top1,
            "evaluated_tokens": distance.score.tokens,
            **found,
            "seconds": clock.laps,
            "made_by": made_by,
            "config": config.to_json(),
        },
    )


Train = Callable[[RunConfig], dict[str, Any]]
"""A run config -> the report of its run, finished or gone on with."""


def trained(
    opened: OpenedModel,
    config: RunConfig,
    plan: Callable[[RunConfig], Plan],
    train: Train,
    *,
    kind: str = "distill",
) -> dict[str, Any]:
    """Train a model on, with a teacher or without, and write it and its report; return
    the report. The run lies in `run` below the new folder; a killed one goes on.

    Args:
        opened: the student.
        config: `model` is the student, `[train]` and `[data]` say how it learns.
        plan: how a config's model runs.
        train: trains.
        kind: `distill`, from `distill.teacher`, or `train`, from the text alone.

    Raises:
        ConfigError: no teacher; a folder in use.
        CompressError: it is further from its teacher than `compress.max_kld`.
        TrainingError: a signal stopped the run.
    """
    from llmos_jax import __version__, compression, data, lowering, models, training
    from llmos_jax.models.matrices import as_stored
    from llmos_jax.telemetry import log

    teacher_name = config.distill.teacher if kind == "distill" else None
    if kind == "distill" and teacher_name is None:
        raise ConfigError(
            "compress.kind = distill needs a teacher. Set distill.teacher to a larger "
            "model with the same vocabulary."
        )
    out = _folder_to_train_in(config)
    run = replace(
        config,
        run=replace(config.run, dir=str(out / "run")),
        distill=replace(config.distill, teacher=teacher_name),
    )
    clock = compression.Clock()
    ran = train(run)
    if str(ran.get("stopped_by", "")).startswith("SIG"):
        raise TrainingError(
            f"{ran['stopped_by']} stopped the run at step {ran['steps']}; it is saved "
            "in the run folder, and the same command goes on."
        )
    clock.lap("train")
    made = resolve.open_model(ran["checkpoint"])
    params = made.params(dtype="float32")
    how = training.check_qat(made.skeleton.spec, config.qat)
    used = params if how is None else as_stored(params, how)
    text = data.prepare_scored(
        config.data, opened.tokenizer, cache=cache_folder(), on_progress=log
    )
    chosen = plan(resolve.to_score(config))
    source, shardings = opened, None
    if teacher_name is not None:
        source = resolve.open_model(teacher_name)
        against = replace(config.evaluate, against=teacher_name)
        like = resolve.on_same_mesh(
            replace(config, rules=None, evaluate=against), chosen
        )
        mesh = lowering.device_mesh(chosen)
        shardings = dict(lowering.param_shardings(plan(like), mesh))
    found = distance_to(
        *(source, made.skeleton, used, text, chosen, config), shardings=shardings
    )
    before = found.reference
    if teacher_name is not None:
        before = _score_of(opened, text, chosen, config)
    clock.lap("evaluate")
    compression.check_distance(
        found.kld, config.compress, "trained model", "more steps (train.steps)"
    )

    log(f"writing {out}")
    made_by = {"llmos_jax": __version__, "trained_from": config.model}
    if teacher_name is not None:
        made_by["taught_by"] = teacher_name
    _write_beside(out, made, params, made_by)
    stored = opened.params()
    table = models.param_table(made.skeleton.spec)
    return compression.write_report(
        out,
        {
            "model": made.skeleton.spec.name,
            "kind": kind,
            "out": str(out),
            "run": str(out / "run"),
            "teacher": teacher_name,
            "params": table.num_params,
            **compression.sizes(table, compression.num_bytes(stored), params),
            "perplexity": found.score.perplexity,
            "perplexity_before": before.perplexity,
            "perplexity_of_teacher": found.reference.perplexity
            if teacher_name
            else None,
            "kld": found.kld,
            "same_top1": found.same_top1,
            "evaluated_tokens": found.score.tokens,
            "steps": ran["steps"],
            "tokens_seen": ran["tokens_seen"],
            "stored_as": None if how is None else how.weights,
            "seconds": clock.laps,
            "made_by": made_by,
            "config": config.to_json(),
        },
    )


def _folder_to_train_in(config: RunConfig) -> Path:
    """`compress.out`, new or with an unfinished run.

    Raises:
        ConfigError: it is in use.
    """
    out = Path(resolve.out_of(config)).expanduser()
    known = {"run", "checkpoints", "config.toml", ".new", "report.json.part"}
    others = {one.name for one in out.iterdir()} - known if out.is_dir() else set()
    if others or (out.exists() and not out.is_dir()):
        raise ConfigError(
            f"{out} exists and is not empty; a model is written to a new folder."
        )
    return out


def _write_beside(
    out: Path, made: OpenedModel, params: Params, made_by: dict[str, str]
) -> None:
    """Write a checkpoint and its config beside the run that made them."""
    from llmos_jax import checkpoint

    fresh = out / ".new"
    for old in (fresh, out / "checkpoints"):
        shutil.rmtree(old, ignore_errors=True)
    checkpoint.save_model(str(fresh), made.skeleton, params, made.tokenizer, made_by)
    shutil.copyfile(out / "run" / "config.toml", out / "config.toml")
    (fresh / "checkpoints").rename(out / "checkpoints")
    shutil.rmtree(fresh)


def _score_of(
    opened: OpenedModel, text: TokenStream, chosen: Plan, config: RunConfig
) -> Score:
    """What a model says of a text."""
    from llmos_jax import training

    dtype = config.train.compute_dtype
    scorer = training.open_scorer(
        opened.skeleton, chosen, dtype, windows_of(opened, config)
    )
    params = resolve.read_to_compute(opened, dtype, scorer.param_shardings)
    limit = config.compress.evaluate_batches
    return scorer.score(params, text, limit, tell("scoring", "batches"))


def _to_decode(config: RunConfig) -> RunConfig:
    """How a model is served once it is in as few bits as `compress.weights` says."""
    asked = config.compress
    serve = replace(config.serve, weight_dtype=asked.weights, group=asked.group)
    return resolve.to_serve(replace(config, serve=serve))


def _decode_cost(spec: ModelSpec, config: RunConfig, plan: Callable[..., Plan]) -> Cost:
    """What the planner says of serving a model that may be made."""
    import jax.numpy as jnp

    from llmos_jax import compression

    try:
        chosen = plan(_to_decode(config), spec=spec)
    except (PlanError, ConfigError) as problem:
        return compression.Cost(problem=str(problem).partition("\n")[0])
    rows = chosen.params.rows
    return compression.Cost(
        bytes_=sum(row.size * jnp.dtype(row.dtype).itemsize for row in rows),
        step_s=chosen.predicted.step_s,
    )


def calibration_batches(opened: OpenedModel, config: RunConfig) -> list[dict[str, Any]]:
    """Sequences of the training side of a text, spread over it."""
    from llmos_jax import data
    from llmos_jax.telemetry import log

    asked, spec, tokenizer = config.compress, opened.skeleton.spec, opened.tokenizer
    section = replace(config.data, tokenizer="auto", test=())
    if asked.calibration:
        section = replace(section, train=asked.calibration, validation=())
    text = data.prepare(
        section,
        own=tokenizer,
        vocab_size=spec.vocab_size,
        model_name=spec.name,
        cache=cache_folder(),
        on_progress=log,
    ).train
    rows = min(CALIBRATION_ROWS, asked.sequences)
    found = data.evaluation_batches(
        text,
        seq_len=min(asked.seq_len, spec.max_seq_len),
        batch=rows,
        limit=-(-asked.sequences // rows),
        begin_id=tokenizer.begin_id if tokenizer.marks.adds_bos else None,
    )
    return list(found)


CALIBRATION_ROWS = 4
"""Sequences that run at once, for memory's sake: attention and feed-forward blocks make
more of a token than what lies between layers."""


def distance_to(
    source: OpenedModel,
    skeleton: Skeleton,
    params: Params,
    text: TokenStream,
    chosen: Plan,
    config: RunConfig,
    *,
    shardings: dict[str, Any] | None = None,
) -> Distance:
    """How far a model in memory is from the one that it was made of.

    `shardings` are the source's, where it has other parameters than the plan's model.
    """
    import jax

    from llmos_jax import lowering, training

    dtype = config.train.compute_dtype
    scorer = training.open_comparison(
        skeleton, source.skeleton, chosen, dtype, windows_of(source, config)
    )
    everywhere = lowering.replicated(scorer.places.mesh)
    both = (
        jax.device_put(params, everywhere),
        resolve.read_to_compute(source, dtype, shardings or scorer.param_shardings),
    )
    limit = config.compress.evaluate_batches
    return training.distance(
        scorer.sums(text, *both, limit=limit, on_progress=tell("scoring", "batches"))
    )
