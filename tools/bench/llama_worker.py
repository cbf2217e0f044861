"""llama.cpp as a worker (workers.py), run with the Python that has llama-cpp-python.

Through its C interface, for that alone decodes batches: what a call of llama_decode and
an argmax for every sequence take, without tokenizer or Python objects.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as llama
import numpy as np
from workers import serve

CONTEXT = 256
"""Tokens that a sequence of a batch has room for."""


class Model:
    """A GGUF file, and a context for each number of sequences."""

    def __init__(self, path: str, threads: int, extra_buffers: bool):
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = extra_buffers
        self._model = llama.llama_model_load_from_file(path.encode(), options)
        assert self._model, path
        vocabulary = llama.llama_model_get_vocab(self._model)
        self._vocab_size = llama.llama_vocab_n_tokens(vocabulary)
        self._threads = threads
        self._contexts: dict[tuple[int, int], Any] = {}

    def _context(self, sequences: int, length: int = CONTEXT) -> Any:
        """A cleared context; every sequence has a cache of its own."""
        if (sequences, length) not in self._contexts:
            options = llama.llama_context_default_params()
            options.n_ctx, options.n_seq_max = sequences * length, sequences
            options.n_threads = options.n_threads_batch = self._threads
            made = llama.llama_init_from_model(self._model, options)
            assert made, f"no context of {sequences} x {length} tokens"
            self._contexts[sequences, length] = made
        context = self._contexts[sequences, length]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        return context

    def _logits(self, context: Any, index: int) -> np.ndarray:
        found = llama.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(found, shape=(self._vocab_size,))

    def decode(self, prompts: list[list[int]], blocks: int, steps: int) -> list[float]:
        """Seconds of each block of steps of greedy decoding."""
        context = self._context(len(prompts))
        tokens = []
        for sequence, prompt in enumerate(prompts):
            _run(context, [(x, i, sequence) for i, x in enumerate(prompt)], {-1})
            tokens.append(int(self._logits(context, -1).argmax()))
        position, seconds = len(prompts[0]), []
        for _ in range(blocks):
            start = time.perf_counter()
            for _ in range(steps):
                batch = [(token, position, row) for row, token in enumerate(tokens)]
                _run(context, batch, set(range(len(batch))))
                tokens = [
                    int(self._logits(context, row).argmax())
                    for row in range(len(tokens))
                ]
                position += 1
            seconds.append(time.perf_counter() - start)
        return seconds

    def prefill(self, prompt: list[int], times: int) -> list[float]:
        """Seconds that a prompt takes until its first token is known."""
        seconds = []
        for _ in range(times):
            context = self._context(1, 2 * CONTEXT)
            start = time.perf_counter()
            _run(context, [(x, i, 0) for i, x in enumerate(prompt)], {-1})
            int(self._logits(context, -1).argmax())
            seconds.append(time.perf_counter() - start)
        return seconds

    def logits(self, tokens: list[int], first: int, out: str) -> None:
        """Write the logits of tokens from `first` on, float32 [tokens, V]."""
        context, scored = self._context(1, 2 * CONTEXT), range(first, len(tokens))
        _run(context, [(x, i, 0) for i, x in enumerate(tokens)], set(scored))
        np.save(out, np.stack([self._logits(context, i) for i in scored]))


def _run(context: Any, tokens: list[tuple[int, int, int]], wanted: set[int]) -> None:
    """Decode (token, position, sequence), with the logits of some of them."""
    wanted = {index % len(tokens) for index in wanted}
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, (token, position, sequence) in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = index in wanted
    status = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    assert status == 0, f"llama_decode: {status}"


MODELS: dict[str, Model] = {}


def load(name: str, path: str, threads: int, extra_buffers: bool) -> None:
    """Open a file under a name."""
    MODELS[name] = Model(path, threads, extra_buffers)


def quantize(source: str, out: str, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp's own means."""
    options = llama.llama_model_quantize_default_params()
    options.ftype = {
        "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[kind]
    status = llama.llama_model_quantize(
        source.encode(), out.encode(), ctypes.byref(options)
    )
    assert status == 0, f"llama_model_quantize: {status}"


@llama.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Take llama.cpp's log."""


if __name__ == "__main__":
    llama.llama_log_set(_silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    serve(
        {
            "load": load,
            "quantize": quantize,
            "decode": lambda name, **rest: MODELS[name].decode(**rest),
            "prefill": lambda name, **rest: MODELS[name].prefill(**rest),
            "logits": lambda name, **rest: MODELS[name].logits(**rest),
        }
    )
