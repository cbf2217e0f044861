"""A run learns from a teacher: which it is, whether it goes with the student, and where
its answers come from.

Any model with weights can teach: another family, one in few bits, a Bundle. It predicts
the same tokens as the student, or there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos_jax import resolve
from llmos_jax.config import LoraSection, PlanSection, RunConfig
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, Plan, fingerprint_of

if TYPE_CHECKING:
    from llmos_jax.data import PreparedText, Tokenizer
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.training import Session, Source, Taught

Planned = Callable[[RunConfig], Plan]


def teacher_of(config: RunConfig, student: ModelSpec) -> OpenedModel | None:
    """Open what `distill.teacher` names.

    Raises:
        ConfigError: it has no weights; `[distill]` cannot be meant.
        CheckpointError: it cannot be read.
    """
    from llmos_jax import training

    name = config.distill.teacher
    if name is None:
        return None
    training.check_distill(config)
    if student.classes is not None:
        raise ConfigError(
            f"distill.teacher is for models that predict tokens, and {student.name} is "
            "a classifier. Leave distill.teacher out."
        )
    if not resolve.has_weights(name):
        raise ConfigError(
            f"distill.teacher = {name} has no weights here, and what it says is to be "
            "learnt. Name a run, a checkpoint, a Hugging Face folder or a GGUF file."
        )
    opened = resolve.open_model(name)
    if opened.skeleton.spec.classes is not None:
        raise ConfigError(
            f"distill.teacher = {name} is a classifier: it says nothing of next "
            "tokens. Name a model that does."
        )
    return opened


def check_vocabulary(
    teacher: OpenedModel, tokenizer: Tokenizer, config: RunConfig
) -> None:
    """Refuse a teacher whose tokens are not those of the text.

    Raises:
        ConfigError: with the number of tokens that differ.
    """
    ours, theirs = tokenizer.vocabulary(), teacher.tokenizer.vocabulary()
    if ours == theirs:
        return
    differing = len(set(ours.items()) ^ set(theirs.items()))
    name = config.distill.teacher
    raise ConfigError(
        f"distill.teacher = {name}: its vocabulary ({len(theirs):,} tokens) is not "
        f"that of the student ({len(ours):,}); {differing:,} tokens differ, so "
        "what the two predict cannot be compared. Take a teacher with the student's "
        f"tokenizer; or, for a student from random weights, set data.tokenizer={name} "
        "and a model with its vocab_size."
    )


def taught(
    teacher: OpenedModel, config: RunConfig, chosen: Plan, plan: Planned
) -> Taught:
    """How the student learns: with the teacher in its step, read onto its mesh, or
    from answers that are kept.

    Raises:
        ConfigError: the mesh, or `distill.top_k`, does not go with it.
        TrainingError: both do not fit into a device.
        NoFeasiblePlan: the teacher cannot be split as the student is.
    """
    from llmos_jax import lowering, training

    asked = config.distill
    training.check_mesh(chosen, asked)
    student = chosen.params.spec
    spec = teacher.skeleton.spec
    assert asked.teacher is not None and student is not None
    V = min(student.vocab_size, spec.vocab_size)
    if asked.top_k is not None:
        if asked.top_k > V:
            raise ConfigError(
                f"distill.top_k = {asked.top_k}: {spec.name} has {V} tokens. Set at "
                "most that; 32 to 128 keep nearly all that it says."
            )
        return training.Taught(vocab_size=V)
    like = replace(
        config, rules=None, evaluate=replace(config.evaluate, against=asked.teacher)
    )
    theirs = plan(resolve.on_same_mesh(_unpinned(like), chosen))
    training.check_room(chosen, theirs, asked.teacher)
    dtype = config.train.compute_dtype
    return training.Taught(
        vocab_size=V,
        teacher=training.open_teacher(
            *(teacher.skeleton, theirs, lowering.device_mesh(chosen), dtype),
            partial(resolve.read_to_compute, teacher, dtype),
        ),
    )


def source_of(
    teacher: OpenedModel,
    session: Session,
    text: PreparedText,
    start: int,
    plan: Planned,
    say: Callable[[str], None],
) -> Source:
    """The batches of a text with the answers of a teacher, who is asked for those that
    are not kept yet.

    Raises:
        DataError: the folder keeps another teacher's answers.
    """
    from llmos_jax import training

    config = session.config
    asked, spec = config.distill, teacher.skeleton.spec
    dtype = config.train.compute_dtype
    assert asked.teacher is not None and asked.top_k is not None
    V = min(session.skeleton.spec.vocab_size, spec.vocab_size)
    folder = Path(asked.cache or Path(config.run.dir) / "teacher").expanduser()
    answers = training.Answers(
        folder,
        training.Asked(
            teacher=asked.teacher,
            fingerprint=resolve.lineage(asked.teacher)["fingerprint"],
            tokenizer=fingerprint_of(sorted(teacher.tokenizer.vocabulary().items())),
            top_k=asked.top_k,
            vocab_size=V,
            dtype=dtype,
        ),
        say,
    )

    teacher_name = asked.teacher

    def ask() -> Any:
        say(f"asking {spec.name} for its {asked.top_k} likeliest tokens")
        mesh = {"stage": 1, "context": 1}
        alone = replace(
            resolve.to_score(_unpinned(config)),
            model=teacher_name,
            rules=None,
            lora=LoraSection(),
            plan=PlanSection(phase="prefill", mesh=mesh),
        )
        return training.asker(
            *(teacher.skeleton, plan(alone)),
            partial(resolve.read_to_compute, teacher, dtype),
            compute_dtype=dtype,
            top_k=asked.top_k or 0,
            vocab_size=V,
            has_segments="segments" in session.program.arguments[1],
        )

    count = training.collect(
        answers,
        training.text_batches(session, text, start),
        batches=max(0, config.train.steps - start),
        rows=session.plan.workload.global_batch,
        ask=ask,
        on_progress=training.said_now_and_then(say, "asking the teacher"),
    )
    say(f"{folder} keeps the answers to {len(answers)} rows, {count} of them new")
    return training.WithAnswers(training.text_batches(session, text, start), answers)


def _unpinned(config: RunConfig) -> RunConfig:
    """Without what is decided by hand for the student's step."""
    return replace(config, plan=PlanSection())
