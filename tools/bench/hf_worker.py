"""transformers and CTranslate2 as workers (workers.py) of decode.py."""

from __future__ import annotations

import pathlib
import sys
import time
from typing import Any

from workers import serve


class Transformers:
    """Float32, eager, one forward pass a step."""

    def __init__(self, folder: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def decode(self, prompts: list[list[int]], blocks: int, steps: int) -> list[float]:
        """Seconds of each block of steps of greedy decoding."""
        import torch

        seconds = []
        with torch.inference_mode():
            out = self._model(input_ids=torch.tensor(prompts), use_cache=True)
            for _ in range(blocks):
                start = time.perf_counter()
                for _ in range(steps):
                    out = self._model(
                        input_ids=out.logits[:, -1:].argmax(-1),
                        past_key_values=out.past_key_values,
                        use_cache=True,
                    )
                seconds.append(time.perf_counter() - start)
        return seconds

    def prefill(self, prompt: list[int], times: int) -> list[float]:
        """Seconds that a prompt takes until its first token is known."""
        import torch

        seconds = []
        with torch.inference_mode():
            for _ in range(times):
                start = time.perf_counter()
                out = self._model(
                    input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1
                )
                int(out.logits[0, -1].argmax())
                seconds.append(time.perf_counter() - start)
        return seconds


class CTranslate2:
    """Weights and activations in int8, which is all that it has."""

    def __init__(self, folder: str, threads: int):
        import ctranslate2

        made = pathlib.Path(folder) / "ctranslate2"
        converter = ctranslate2.converters.TransformersConverter(folder)
        converter.convert(str(made), quantization="int8")
        self._generator = ctranslate2.Generator(
            str(made), intra_threads=threads, compute_type="int8"
        )
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        named = [self._tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
        start = time.perf_counter()
        self._generator.generate_batch(
            named,
            max_batch_size=len(prompts),
            min_length=tokens,
            max_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], blocks: int, steps: int) -> list[float]:
        """Seconds of each block: what an answer takes that is longer by one block."""
        ends = [
            self._seconds(prompts, 1 + block * steps) for block in range(blocks + 1)
        ]
        return [after - before for before, after in zip(ends, ends[1:])]

    def prefill(self, prompt: list[int], times: int) -> list[float]:
        """Seconds that a prompt takes until its first token is known."""
        return [self._seconds([prompt], 1) for _ in range(times)]


MODELS: dict[str, Any] = {}


def load(name: str, folder: str, threads: int) -> None:
    """Open a Hugging Face folder under a name."""
    kinds = {"transformers": Transformers, "ctranslate2": CTranslate2}
    MODELS[name] = kinds[name](folder, threads)


if __name__ == "__main__":
    assert sys.argv[1:] == [], sys.argv
    serve(
        {
            "load": load,
            "decode": lambda name, **rest: MODELS[name].decode(**rest),
            "prefill": lambda name, **rest: MODELS[name].prefill(**rest),
        }
    )
