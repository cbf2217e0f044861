"""A classifier's programs: batches of texts, each size compiled before it is asked for.

B texts, T tokens, C classes. A batch goes to the device in one transfer, int32
[B, 1 + T]: the length of each text and its tokens, padded on the right; float32 [B, C]
comes back. Rows without a text hold one token, and are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.config.schema import ServeSection
from llmos_jax.errors import ConfigError, ServeError
from llmos_jax.ir import Plan
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering import MeshSharder, placed, replicated
from llmos_jax.models import Params, Skeleton, annotated_by
from llmos_jax.scheduling import Batching, Drawn, Room, Size, Sizes, Work
from llmos_jax.serving.engine import Engine, Options

_WORKERS = 2
"""Threads that compile: a judgement; each compilation uses several itself."""


class SentBatch(NamedTuple):
    """A batch under way."""

    work: Work
    made: jax.Array


class ClassifierPrograms:
    """Compiled programs by size: (parameters, int32 [B, 1 + T]) -> float32 [B, C]."""

    def __init__(
        self,
        skeleton: Skeleton,
        params: Params,
        sizes: Sizes,
        placement: tuple[Plan, Mesh] | None = None,
    ):
        """Compile nothing yet.

        Args:
            skeleton: of the model.
            params: in the dtype it computes in, where they are to lie.
            sizes: of batches.
            placement: a plan and its mesh, for several devices; None: one.
        """
        self._skeleton, self._params = skeleton, params
        self.sizes, self._placement = sizes, placement
        self._made: dict[Size, Any] = {}
        self.unplanned = 0
        """Programs that were wanted, and not compiled before the doors opened."""

    def __len__(self) -> int:
        return len(self._made)

    def compile_all(
        self,
        is_wanted: Callable[[], bool],
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Have them all, or stop where nobody wants them any more."""
        wanted = list(self.sizes)
        with ThreadPoolExecutor(_WORKERS) as pool:
            for done, (size, made) in enumerate(pool.map(self._compiled, wanted), 1):
                self._made[size] = made
                if done % 8 == 0 or done == len(wanted):
                    on_progress(f"compiled {done} of {len(wanted)} programs")
                if not is_wanted():
                    pool.shutdown(wait=True, cancel_futures=True)
                    return

    def run(self, words: np.ndarray) -> jax.Array:
        """Dispatch a batch; returns before it is done.

        Raises:
            ServeError: no program of this size was compiled.
        """
        size = Size(words.shape[0], words.shape[1] - 1)
        program = self._made.get(size)
        if program is None:
            self.unplanned += 1
            raise ServeError(
                f"a batch needs the program {size}, which was not planned. This is a "
                "fault of the engine."
            )
        given: Any = words
        if self._placement is not None:
            given = placed(words, replicated(self._placement[1]))
        made: jax.Array = program(self._params, given)
        made.copy_to_host_async()
        return made

    def _compiled(self, size: Size) -> tuple[Size, Any]:
        where = None if self._placement is None else replicated(self._placement[1])
        shape = (size.rows, 1 + size.tokens)
        words = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
        jitted = jax.jit(self._traced(), out_shardings=where)
        return size, jitted.lower(self._params, words).compile()

    def _traced(self) -> Callable[[Params, jax.Array], jax.Array]:
        def classify(params: Params, words_BS: jax.Array) -> jax.Array:
            module = self._skeleton.bind(params)
            logits_BC: jax.Array = module.class_logits(words_BS[:, 1:], words_BS[:, 0])
            return logits_BC

        if self._placement is None:
            return classify
        plan, mesh = self._placement
        target = Target(mesh.devices.flat[0].platform, mesh.size)

        def classify_on_mesh(params: Params, words_BS: jax.Array) -> jax.Array:
            with annotated_by(MeshSharder(plan, mesh)), lowered_for(target):
                return classify(params, words_BS)

        return classify_on_mesh


class ClassifierRunner:
    """Sends batches, and reads what became of them."""

    def __init__(self, programs: ClassifierPrograms, batching: Batching):
        self.programs, self._batching = programs, batching

    def send(self, work: Work) -> SentBatch:
        """Dispatch a batch; returns before it is done."""
        size = self._batching.size_of(work)
        words = np.zeros((size.rows, 1 + size.tokens), np.int32)
        words[:, 0] = 1
        for row, part in zip(words, work.parts):
            prompt = part.sequence.request.prompt
            row[0], row[1 : 1 + prompt.size] = prompt.size, prompt
        return SentBatch(work, self.programs.run(words))

    def read(self, sent: SentBatch) -> tuple[Drawn, ...]:
        """Wait for a batch; return the logits of each text."""
        logits_BC = np.asarray(sent.made)
        return tuple(Drawn(total=row) for row in logits_BC[: len(sent.work.parts)])

    def end(self) -> None:
        """Send no more."""


def open_classifier(
    skeleton: Skeleton,
    params: Params,
    asked: ServeSection,
    options: Options,
    *,
    placement: tuple[Plan, Mesh] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Return an engine that prepares itself, and then classifies.

    Args:
        skeleton: a model with classes.
        params: in the dtype it computes in, where they are to lie.
        asked: `seats` and `context`.
        options: what it may do; `max_queue` counts texts.
        placement: a plan and its mesh, for several devices; None: one.
        on_progress: told what takes long.

    Raises:
        ConfigError: sizes that cannot be.
    """
    spec = skeleton.spec
    assert spec.classes is not None
    context = spec.max_seq_len if asked.context is None else asked.context
    if not 1 <= context <= spec.max_seq_len:
        raise ConfigError(
            f"serve.context is {context}; {spec.name} classifies texts of 1 to "
            f"{spec.max_seq_len} tokens."
        )
    if asked.seats < 1:
        raise ConfigError(f"serve.seats is {asked.seats}; it must be at least 1.")
    ways = 1
    if placement is not None:
        mesh = placement[0].mesh.sizes
        ways = mesh["data"] * mesh["fsdp"]
    sizes = Sizes(seats=asked.seats, context=context, ways=ways)
    programs = ClassifierPrograms(skeleton, params, sizes, placement)
    batching = Batching(sizes)
    room = Room(
        seats=asked.seats,
        pages=0,
        page_size=1,
        context=context,
        step_tokens=context,
        vocab_size=spec.vocab_size,
        is_ragged=False,
    )
    return Engine(
        ClassifierRunner(programs, batching),
        room,
        options,
        scheduler=batching,
        labels=spec.classes.labels,
        prepare=lambda is_wanted: programs.compile_all(is_wanted, on_progress),
    )
