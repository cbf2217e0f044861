"""The whole data flow, top to bottom, one function per verb.

Each reads as the picture in README.md does: a config becomes a model, a topology, rules
and a workload; these become a Plan; the Plan becomes Programs; the Programs run. A verb
imports the floors it needs when it is called, so that `plan` starts without Orbax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llmos_jax import (
    bundling,
    chaining,
    classifying,
    compressing,
    planner,
    resolve,
    rules,
    service,
    teaching,
)
from llmos_jax.config import RunConfig
from llmos_jax.errors import CheckpointError, ConfigError, DoesNotFit
from llmos_jax.ir import ModelSpec, Plan
from llmos_jax.places import cache_folder
from llmos_jax.resolve import (
    open_with_config,
    origin_of,
    pins_of,
    resolve_topology,
    resolve_workload,
    served,
    spec_of,
)
from llmos_jax.scoring import tell, windows_of

if TYPE_CHECKING:
    from llmos_jax.data import PreparedText
    from llmos_jax.lowering import Program
    from llmos_jax.models import Skeleton
    from llmos_jax.server import ServerOptions
    from llmos_jax.serving import Sampling
    from llmos_jax.telemetry import Heartbeat
    from llmos_jax.training import Outcome, Session


def plan(
    config: RunConfig, verify: str = "estimate", *, spec: ModelSpec | None = None
) -> Plan:
    """Config -> Plan. Touches devices only to learn what is here, if none is named.

    Args:
        config: what to plan for.
        verify: how it is proved: `estimate` (closed form), `probe` (few layers are
            compiled) or `compile` (the exact program is).
        spec: another model than the config names.

    Raises:
        NoFeasiblePlan: nothing fits, by the estimate or by the compiler's word.
    """
    from llmos_jax import models

    topology = resolve_topology(config.topology)
    asked = spec_of(config) if spec is None else spec
    skeleton = models.skeleton(served(asked, config, topology))
    workload = resolve_workload(config, skeleton.spec, topology)
    search = partial(
        planner.plan,
        skeleton.table,
        topology,
        workload,
        rules.load_rules(config.rules or skeleton.spec.rules, workload.phase),
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
        chosen: a plan to train, to prefill or to decode.
        skeleton: its model.
        config: for the optimizer and the dtypes.
        verify: `probe` or `compile`.
        options: XLA flags beside the plan's, for `compile`.

    Raises:
        DoesNotFit: the compiler needs more memory than a device has.
        LowerError: no compiler for this machine is here, or it refused; or no program
            of this release does what is planned.
    """
    from llmos_jax import lowering, models, serving, training

    devices = lowering.compile_devices(chosen.topology)
    chosen = serving.with_repeated_heads(chosen)

    def build(wanted: Plan) -> tuple[lowering.Program, Any]:
        mesh = lowering.device_mesh(wanted, devices)
        if wanted.workload.phase != "train":
            return _served(wanted, config, mesh), mesh
        model = models.skeleton(wanted.params.spec or skeleton.spec)
        return training.lower_train_step(model, wanted, config, mesh), mesh

    def shortened(wanted: Plan, layers: int) -> Plan:
        spec = replace(wanted.params.spec or skeleton.spec, num_layers=layers)
        return replace(wanted, params=models.param_table(spec))

    if verify == "compile":
        return lowering.compile_plan(chosen, build, options)
    return lowering.probe_plan(chosen, build, shortened, skeleton.spec.num_layers)


def _served(wanted: Plan, config: RunConfig, mesh: Any) -> Program:
    """The engine's own program; of a plan that splits sequences, a fixed batch's."""
    from llmos_jax import serving

    is_decode = wanted.workload.phase == "decode"
    if serving.serves_pages(wanted):
        lower = serving.lower_paged_decode if is_decode else serving.lower_paged_chunk
        return lower(wanted, config, mesh)
    fixed = serving.lower_decode_step if is_decode else serving.lower_prefill_step
    return fixed(wanted, config, mesh)


def prepare(config: RunConfig) -> dict[str, Any]:
    """Text -> a corpus in `prepare.out`: clean, no duplicates, in shards of tokens.

    The tokenizer is the one that `train` would take for `model`. A killed run goes on
    with what is done; a finished folder is left as it is.
    """
    from llmos_jax import corpus, models
    from llmos_jax.telemetry import log

    skeleton = models.skeleton(resolve.trainable(spec_of(config)))
    origin = origin_of(config)
    return corpus.make_corpus(
        config,
        own=None if origin is None else origin.tokenizer,
        vocab_size=skeleton.spec.vocab_size,
        model_name=skeleton.spec.name,
        say=log,
    )


def train(
    config: RunConfig,
    *,
    began: float | None = None,
    heartbeat: Heartbeat | None = None,
) -> dict[str, Any]:
    """Config -> checkpoints, metrics and a report in `run.dir`; returns report.json.

    Args:
        config: the run.
        began: when this process was started, as `time.time()`; None: now.
        heartbeat: of a process that a supervisor watches.
    """
    from llmos_jax import lowering

    lowering.join_processes()
    lowering.keep_compiled_programs()
    with lowering.shared_fate(), ExitStack() as holds:
        return _train(config, began, heartbeat, holds)


def _train(
    asked: RunConfig,
    began: float | None,
    heartbeat: Heartbeat | None,
    holds: ExitStack,
) -> dict[str, Any]:
    from llmos_jax import data, lowering, models, training
    from llmos_jax.telemetry import Ledger, log

    is_first = lowering.is_first_process()
    say = partial(log, enabled=is_first)

    config = training.refit(asked, may_drop=heartbeat is not None, say=say)
    skeleton = models.skeleton(resolve.trainable(spec_of(config)))
    origin = origin_of(config)
    training.check_qat(skeleton.spec, config.qat)
    teacher = teaching.teacher_of(config, skeleton.spec)
    chosen = plan(config)
    say(chosen.explain())
    folder = holds.enter_context(training.open_folder(config))
    folder.check_model(skeleton.spec)
    folder.check_replicas(training.local_replicas(chosen))
    finished = folder.finished_report(config.train.steps)
    if finished is not None:
        say(f"{folder.path} is finished: {folder.resume_step} steps, nothing to do.")
        return finished
    if is_first:
        folder.record(asked, plan_document(chosen))
    account = folder.path / "goodput.jsonl" if is_first else None
    ledger = Ledger(account, heartbeat=heartbeat, began=began)

    def tell(line: str) -> None:
        ledger.beat()
        say(line)

    if skeleton.spec.classes is not None:
        return classifying.train(
            *(config, skeleton, chosen, folder, origin, ledger),
            say=say,
            tell=tell,
            is_first=is_first,
        )
    own = origin or teacher
    text = data.prepare(
        config.data,
        own=None if own is None else own.tokenizer,
        vocab_size=skeleton.spec.vocab_size,
        model_name=skeleton.spec.name,
        cache=cache_folder(),
        on_progress=tell,
    )
    if text.train.is_chat or config.data.packing == "best_fit":
        say(data.packing_text(text.train, config.batch.seq_len))
    taught = None
    if teacher is not None:
        teaching.check_vocabulary(teacher, text.tokenizer, config)
        taught = teaching.taught(teacher, config, chosen, plan)
    session = training.open_session(
        skeleton, chosen, config, is_chat=text.train.is_chat, taught=taught
    )
    start = folder.resume_step
    source: training.Source = training.text_batches(session, text, start)
    if teacher is not None and config.distill.top_k is not None:
        source = teaching.source_of(teacher, session, text, start, plan, tell)
    outcome = training.conduct(
        session,
        source,
        folder,
        tokenizer=text.tokenizer,
        figures=partial(training.text_figures, session, text),
        origin=origin,
        say=say,
        is_first=is_first,
        ledger=ledger,
    )
    score = None
    samples: list[tuple[str, str]] = []
    if outcome.reason != "signal":
        with ledger.during("evaluating"):
            score = session.score(
                outcome.state.params, text.validation, None, ledger.beat
            )
        ledger.enter("stopping")
        samples = _samples(session, text, outcome)
    report = {}
    if is_first:
        report = training.summarise(
            session, text, folder, outcome, score, samples, ledger.goodput()
        )
    ledger.close(outcome.reason)
    return report


def generate(
    model: str,
    prompt: str,
    overrides: Sequence[str] = (),
    *,
    max_tokens: int,
    sampling: Sampling,
    is_chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Model + prompt -> its continuation; `on_text` sees it as it grows.

    It computes in the run's `train.compute_dtype`, which an override may change, and
    keeps keys and values in that dtype, or as `serve.kv_dtype` where that asks for
    fewer bits than its default.

    Args:
        model: whatever has weights.
        prompt: text to continue; with `is_chat`, what the user says.
        max_tokens: of the continuation, at most.
        sampling: how each of them is chosen.
        is_chat: put the prompt into the model's chat template.
        on_text: where nobody watches (None), it is faster.
    """
    from llmos_jax import data, lowering, serving

    sampling.check()
    lowering.keep_compiled_programs()
    opened, config = open_with_config(model, overrides)
    resolve.check_speaks(opened.skeleton.spec, "generate")
    tokenizer = opened.tokenizer
    decoder = data.StreamDecoder(tokenizer)
    if is_chat:
        said = [{"role": "user", "content": prompt}]
        prompt_ids = data.chat_prompt_ids(tokenizer, said)
    else:
        prompt_ids = data.prompt_ids(tokenizer, prompt)

    dtype = config.train.compute_dtype
    completion = serving.Generator(
        opened.skeleton,
        resolve.read_to_compute(opened, dtype),
        compute_dtype=dtype,
        kv_dtype=None if config.serve.kv_dtype == "bfloat16" else config.serve.kv_dtype,
        rotate_keys=config.serve.rotate_keys,
    ).complete(
        prompt_ids,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=tokenizer.stop_ids,
        on_token=on_text and (lambda token: on_text(decoder.push(token))),
    )
    if on_text is not None:
        on_text(decoder.flush() + "\n")
    return {
        "text": tokenizer.decode(list(completion.token_ids)),
        "token_ids": list(completion.token_ids),
        "prompt_tokens": completion.prompt_tokens,
        "tokens_per_s": completion.tokens_per_s,
        "finish_reason": completion.finish_reason,
    }


def serve(
    model: str,
    overrides: Sequence[str],
    options: ServerOptions,
    *,
    max_queue: int | None = None,
) -> dict[str, Any]:
    """Model -> an HTTP server, until it is told to stop.

    It computes as `generate` does; what fits into memory is the engine's to find out.

    Args:
        model: whatever has weights.
        overrides: config keys, those of `[serve]` among them.
        options: of the server.
        max_queue: requests that may wait; None: serving.MAX_QUEUE.
    """
    from llmos_jax import lowering, server
    from llmos_jax.telemetry import log

    options.check()
    lowering.join_processes()
    with lowering.shared_fate():
        opened, config = open_with_config(model, overrides)
        name = options.served_name or opened.skeleton.spec.name
        log(f"reading {model}")
        if opened.skeleton.spec.classes is not None:
            engine = service.open_classifier(opened, config, plan, max_queue=max_queue)
            return server.run(engine, opened.tokenizer, name, options)
        ready = service.make_ready(opened, config, plan)
        if not lowering.is_first_process():
            ready.follow()
            return {}
        engine = ready.engine(max_queue=max_queue)
        return server.run(engine, opened.tokenizer, name, options)


def export(
    model: str,
    out: str,
    overrides: Sequence[str] = (),
    *,
    form: Literal["bundle", "hf", "gguf"] = "bundle",
) -> dict[str, Any]:
    """Model -> a Bundle to be served, or what other programs read.

    Args:
        model: whatever has weights; `lora.adapter` may lie over it.
        out: a new folder, or a GGUF file.
        overrides: config keys, those of `[serve]` and `[export]` among them.
        form: of `out`.
    """
    if form != "bundle":
        return convert(model, out, overrides, form=form)
    opened, config = open_with_config(model, overrides)
    resolve.check_speaks(opened.skeleton.spec, "export")
    return bundling.make_bundle(opened, config, out, plan, plan_document)


Form = Literal["checkpoint", "hf", "gguf", "peft"]
Kind = Literal["f32", "f16", "q8_0"]


def convert(
    model: str,
    out: str,
    overrides: Sequence[str] = (),
    *,
    form: Form | None = None,
    kind: Kind = "f16",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Model -> the same model in another form, and how near its logits are.

    Works on the host's CPU, whatever else is here.

    Args:
        model: whatever has weights; `lora.adapter` may lie over it.
        out: a new folder, or a GGUF file.
        overrides: config keys.
        form: of `out`. None: GGUF by the file's name, else ours of a foreign model and
            Hugging Face's of ours.
        kind: of a GGUF file's weights.
        dtype: of the weights in a folder; None keeps what they are stored in.

    Raises:
        CheckpointError: the model cannot be read, or what was written is not like it.
    """
    import jax

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _convert(model, out, overrides, form, kind, dtype)


def _convert(
    model: str,
    out: str,
    overrides: Sequence[str],
    form: Form | None,
    kind: Kind,
    dtype: str | None,
) -> dict[str, Any]:
    from llmos_jax import __version__, checkpoint, interchange, models
    from llmos_jax.telemetry import log

    opened, _ = open_with_config(model, overrides)
    resolve.check_speaks(opened.skeleton.spec, "convert")
    form = form or resolve.usual_form(model, out)
    skeleton, tokenizer = opened.skeleton, opened.tokenizer
    if skeleton.spec.quantization is None:
        params = opened.params(dtype=dtype)
    else:
        log(f"{skeleton.spec.name} is quantized: writing the numbers it stands for")
        params = models.floats(skeleton.table, opened.params())
        skeleton = models.skeleton(replace(skeleton.spec, quantization=None))
        params = skeleton.cast(params, dtype or "float32")
    if form == "peft":
        interchange.write_adapter(out, skeleton.spec, params, model)
        return {"model": skeleton.spec.name, "form": form, "out": out}
    spec, params = interchange.merged(skeleton.spec, params)
    skeleton = models.skeleton(spec)
    dtype = str(params["embed.table"].dtype)
    before = interchange.probe(skeleton, params, tokenizer, dtype)
    log(f"writing {out}")
    if form == "checkpoint":
        made_by = {"llmos_jax": __version__, "converted_from": str(model)}
        checkpoint.save_model(out, skeleton, params, tokenizer, made_by)
    elif form == "hf":
        with interchange.ByteProgress(f"writing {out}") as bar:
            interchange.write_huggingface(
                out, spec, params, tokenizer, on_progress=bar.update
            )
    else:
        with interchange.ByteProgress(f"writing {out}") as bar:
            interchange.write_gguf(
                out, spec, params, tokenizer, kind=kind, on_progress=bar.update
            )
    num_params = skeleton.table.num_params
    del params  # before the other is read: a model is never in memory twice
    made = resolve.open_model(out)
    after = interchange.probe(made.skeleton, made.params(), made.tokenizer, dtype)
    alike = interchange.likeness(before, after)
    if form == "gguf":
        is_like = alike.same_top1 >= LIKE_ENOUGH
    else:
        is_like = alike.max_difference <= SAME * alike.largest
    if not is_like:
        raise CheckpointError(
            f"{out} was written and read back, and does not answer as {model} does: "
            f"the same next token after {alike.same_top1:.1%} of {alike.tokens}, "
            f"logits off by up to {alike.max_difference:.3g}. Do not use it; this is a "
            "fault of the conversion."
        )
    return {
        "model": spec.name,
        "form": form,
        "out": out,
        "params": num_params,
        "checked_tokens": alike.tokens,
        "max_logit_difference": alike.max_difference,
        "same_top1": alike.same_top1,
    }


LIKE_ENOUGH = 0.7
"""Share of next tokens that must stay the same through 8-bit weights, over the probe's
few dozen tokens. A judgement: SmolLM2 keeps 98.6 % in Q8_0 (`convert --kind q8_0`), and
weights in a wrong order should leave little."""

SAME = 1e-3
"""Of the largest logit: how far the same bits may be off; 0 was always seen."""


def evaluate(
    model: str, overrides: Sequence[str], *, predict: str | None = None
) -> dict[str, Any]:
    """Model + text -> perplexity and bits per byte; with `evaluate.against` also how
    far it is from another model. Of a classifier: accuracy, F1, who is taken for whom;
    with `predict`, what it says of every text is written to that file.

    The text is `data.test`, else `data.validation`, else the part that the run itself
    held out; always cut with the model's own tokenizer.
    """
    from llmos_jax import lowering

    lowering.join_processes()
    lowering.keep_compiled_programs()
    with lowering.shared_fate():
        return _evaluate(model, overrides, predict)


def _evaluate(
    model: str, overrides: Sequence[str], predict: str | None
) -> dict[str, Any]:
    from llmos_jax import data, lowering, training
    from llmos_jax.telemetry import log

    opened, config = open_with_config(model, overrides)
    if opened.skeleton.spec.classes is not None:
        return classifying.evaluate(opened, config, plan, predict)
    if predict is not None:
        raise ConfigError(
            f"--predict writes the classes of texts, and {model} is no classifier. "
            "Train one (configs/classify/), or ask it with generate."
        )
    reference = resolve.reference_of(opened, config)
    tokenizer = opened.tokenizer
    text = data.prepare_scored(
        config.data, tokenizer, cache=cache_folder(), on_progress=log
    )
    chosen = plan(resolve.to_score(config))
    windows = windows_of(opened, config)
    dtype, say_so = config.train.compute_dtype, tell("scoring", "batches")
    report: dict[str, Any] = {"model": opened.skeleton.spec.name, "step": opened.step}
    if reference is None:
        scorer = training.open_scorer(opened.skeleton, chosen, dtype, windows)
        params = resolve.read_to_compute(opened, dtype, scorer.param_shardings)
        score = scorer.score(params, text, on_progress=say_so)
    else:
        scorer = training.open_comparison(
            opened.skeleton, reference.skeleton, chosen, dtype, windows
        )
        like = resolve.on_same_mesh(config, chosen)
        theirs = lowering.param_shardings(plan(like), scorer.places.mesh)
        both = (
            resolve.read_to_compute(opened, dtype, scorer.param_shardings),
            resolve.read_to_compute(reference, dtype, theirs),
        )
        found = training.distance(scorer.sums(text, *both, on_progress=say_so))
        score = found.score
        report |= {
            "against": reference.skeleton.spec.name,
            "kld": found.kld,
            "same_top1": found.same_top1,
            "against_perplexity": found.reference.perplexity,
        }
    return {
        **report,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(text.num_bytes),
        "accuracy": score.accuracy,
        "tokens": score.tokens,
        "bytes": text.num_bytes,
        **data.compare(text.raw_bytes()),
    }


def compress(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Model -> a smaller checkpoint, and how far it is from what it was made of.

    Args:
        name: a model with weights, or a config whose `model` is one.
        overrides: config keys; `compress.*` say what is made.

    Raises:
        CompressError: it is further from its source than `compress.max_kld`.
    """
    from llmos_jax import lowering

    lowering.keep_compiled_programs()
    opened, config = resolve.open_to_compress(name, overrides)
    if config.compress.chain:
        verbs = chaining.Verbs(plan=plan, document=plan_document, train=train)
        return chaining.chained(config, overrides, verbs)
    if config.compress.kind == "prune":
        return compressing.pruned(opened, config, plan)
    if config.compress.kind == "distill":
        return compressing.trained(opened, config, plan, train)
    return compressing.quantized(opened, config, plan)


def doctor(model: str | None) -> dict[str, Any]:
    """This machine (and a model, if named) -> what works and what does not."""
    from llmos_jax import lowering
    from llmos_jax.telemetry import environment

    report: dict[str, Any] = {
        "environment": environment(),
        "checks": lowering.inspect(),
    }
    if model is not None:
        report["checkpoint"] = resolve.inspect(model)
    damaged = report.get("checkpoint", {}).get("damaged")
    checks = all(check["status"] != "fail" for check in report["checks"])
    report["ok"] = checks and not damaged
    return report


def plan_document(chosen: Plan) -> dict[str, Any]:
    """plan.json: the keys scripts rely on, and the whole artefact under `artefact`."""
    return {**chosen.summary(), "artefact": chosen.to_json()}


def _samples(
    session: Session, text: PreparedText, outcome: Outcome
) -> list[tuple[str, str]]:
    """What the trained model says after each of `generate.prompts`."""
    from llmos_jax import lowering, serving

    if not lowering.is_only_process():
        return []
    speaker = serving.Generator(
        session.skeleton,
        session.used(outcome.state.params),
        compute_dtype="float32",
    )
    wanted = session.config.generate
    sampling = serving.Sampling(
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        seed=session.config.run.seed,
    )
    said = speaker.complete_all(
        [text.tokenizer.encode(prompt) for prompt in wanted.prompts],
        [sampling] * len(wanted.prompts),
        max_tokens=wanted.max_tokens,
        stop_ids=text.tokenizer.stop_ids,
    )
    return [
        (prompt, text.tokenizer.decode(one.token_ids))
        for prompt, one in zip(wanted.prompts, said, strict=True)
    ]
