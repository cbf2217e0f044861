"""A model becomes a smaller one: a pass over its weights, or a chain of passes.

One device holds the model while it is made smaller. Nothing is written before the
result has been compared with its source, on the text that `evaluate` would take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmos_jax import resolve
from llmos_jax.config import RunConfig
from llmos_jax.ir import Plan
from llmos_jax.places import cache_folder
from llmos_jax.scoring import tell, windows_of

if TYPE_CHECKING:
    from llmos_jax.data import TokenStream
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Params, Skeleton
    from llmos_jax.training import Distance


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
) -> Distance:
    """How far a model in memory is from the one that it was made of."""
    import jax

    from llmos_jax import lowering, training

    dtype = config.train.compute_dtype
    scorer = training.open_comparison(
        skeleton, source.skeleton, chosen, dtype, windows_of(source, config)
    )
    everywhere = lowering.replicated(scorer.places.mesh)
    both = (
        jax.device_put(params, everywhere),
        resolve.read_to_compute(source, dtype, scorer.param_shardings),
    )
    limit = config.compress.evaluate_batches
    return training.distance(
        scorer.sums(text, *both, limit=limit, on_progress=tell("scoring", "batches"))
    )
