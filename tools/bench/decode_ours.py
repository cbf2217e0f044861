"""Ours as a worker (workers.py) of decode.py: the programs that `generate` runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from workers import serve

MODELS: dict[str, Any] = {}


class Model:
    """A mode of few_bits.MODES, and its states from call to call."""

    def __init__(self, runner: Any, context: int):
        self._runner, self._context = runner, context
        self._states: dict[tuple[int, int], Any] = {}

    def _take_state(self, slots: int, tokens: int) -> Any:
        length = self._runner.slot_length(tokens, self._context)
        kept = self._states.pop((slots, length), None)
        return kept or self._runner.empty_state(slots, length)

    def _keep_state(self, state: Any) -> None:
        self._states[state.pool.shape] = state

    def decode(self, prompts: list[list[int]], blocks: int, steps: int) -> list[float]:
        """Seconds of each block of steps, which is one dispatch."""
        from llmos_jax.serving import Needs, Row, Sampling, rows_on_device

        B, T = len(prompts), len(prompts[0])
        limit = T + 1 + blocks * steps
        row = Row(prompt=T, limit=limit, stop=frozenset(), sampling=Sampling())
        needs = Needs.of([row.sampling])
        state = self._take_state(B, limit)
        for slot, prompt in enumerate(np.asarray(prompts, np.int32)):
            state, _ = self._runner.prefill(state, slot, prompt, row, needs)
        seconds = []
        for _ in range(blocks):
            start = time.perf_counter()
            rows = rows_on_device([row] * B, needs)
            state, tokens_BK = self._runner.decode(state, rows, steps=steps)
            seconds.append(time.perf_counter() - start)
            assert (tokens_BK[:, :steps] >= 0).all(), "a sequence ended early"
        self._keep_state(state)
        return seconds

    def prefill(self, prompt: list[int], times: int) -> list[float]:
        """Seconds that a prompt takes until its first token is known."""
        from llmos_jax.serving import Needs, Row, Sampling

        T = len(prompt)
        row = Row(prompt=T, limit=T + 1, stop=frozenset(), sampling=Sampling())
        needs, tokens = Needs.of([row.sampling]), np.asarray(prompt, np.int32)
        state, seconds = self._take_state(1, T + 1), []
        for _ in range(times):
            start = time.perf_counter()
            state, _ = self._runner.prefill(state, 0, tokens, row, needs)
            seconds.append(time.perf_counter() - start)
        self._keep_state(state)
        return seconds


def load(path: str, names: list[str]) -> dict[str, int]:
    """Make modes of a float model; return the bytes of each one's weights."""
    import few_bits

    from llmos_jax import compression, resolve
    from llmos_jax.serving import Runner

    source, found = resolve.open_model(path), {}
    spec = source.skeleton.spec
    for name in names:
        mode = few_bits.MODES[name]
        made = few_bits.quantized(source, mode.weights)
        found[name] = compression.num_bytes(made.params)["all"]
        runner = Runner(*few_bits.opened(made, mode), vocab_size=spec.vocab_size)
        MODELS[name] = Model(runner, spec.max_seq_len)
    return found


def idle() -> int:
    """Bytes that this process has needed once all is imported and a program has run."""
    import jax

    from llmos_jax import checkpoint, data, driver, serving  # noqa: F401

    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    return _peak_bytes()


def generate(folder: str, tokens: int) -> int:
    """Bytes that this process has needed once it has generated from a checkpoint."""
    from llmos_jax import driver
    from llmos_jax.serving import Sampling

    sets = ["train.compute_dtype=float32"]
    prompt = "The house stands where the river"
    driver.generate(folder, prompt, sets, max_tokens=tokens, sampling=Sampling())
    return _peak_bytes()


def sizes(folder: str, tokens: int) -> dict[str, int]:
    """Bytes of a checkpoint's weights, and of a cache for one sequence of it."""
    import jax

    from llmos_jax import compression, models, resolve
    from llmos_jax.serving.runner import SHORTEST_SLOT, power_of_two

    source = resolve.open_model(folder)
    length = max(SHORTEST_SLOT, power_of_two(tokens))
    cache = jax.eval_shape(
        lambda: models.empty_cache(source.skeleton.spec, 1, length, "float32")
    )
    return {
        "weights": compression.num_bytes(source.params())["all"],
        "cache": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    }


def _peak_bytes() -> int:
    """Of this program alone: ru_maxrss would count the parent that it was forked of."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    serve(
        {
            "load": load,
            "decode": lambda name, **rest: MODELS[name].decode(**rest),
            "prefill": lambda name, **rest: MODELS[name].prefill(**rest),
            "idle": idle,
            "generate": generate,
            "sizes": sizes,
        }
    )
