"""Two real pretrained models, and what transformers makes of them.

`tools/get-model smollm2 gemma3` fetches them; where they are not, tests that want them
are skipped and say so.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NAMES = ("smollm2", "gemma3")
CONTEXT = 512
TEXT = """
The harbour at low tide smelled of rope and diesel. Nobody in the village could say who
had built the long stone wall, though the parish register of 1683 mentions "the mole,
much decayed". In 1911 the council voted 7 to 2 to repair it; the war came first. My
grandmother, who was born in the yellow house behind the net loft, used to say that the
wall kept the sea out of the kitchens and the gossip in.

She kept bees. There were nine hives in a row under the hawthorn, painted in colours
left over from the boats: red, white, a green so dark that it looked black in the
evening. When somebody in the family died, she walked along the row at dusk and knocked
on each hive with the key of the front door, and told the bees. "They leave if nobody
tells them," she said. I asked her once whether that was true. She thought about it for
longer than the question deserved and said that in seventy years she had never dared to
find out.

The boats are gone now, all but three. Two of them belong to a man from the city who
paints them every spring and has never, as far as anyone knows, caught a fish. The third
is my uncle's. He goes out before five, in the dark, with a thermos and a radio that
only gets the shipping forecast, and he comes back with mackerel that he sells from a
cool box by the church. On Sundays he gives what is left to the nuns.

    def tide(hour: float, spring: bool = False) -> float:
        amplitude = 2.4 if spring else 1.1
        return amplitude * math.sin(2 * math.pi * hour / 12.42)

He wrote that, in the winter he taught himself to program, on the back of a receipt for
40 metres of blue rope (EUR 63.20). It is pinned above the sink still. He says that it
is wrong by about a quarter of an hour, and that so is the almanac.
"""
"""Prose, numbers and code: about 500 tokens, written for this test."""


def gguf(name: str) -> Path:
    """The model's file; the test is skipped where it is not."""
    path = Path.home() / ".cache" / "llmos-models" / name / "model.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there; get it with: tools/get-model {name}")
    return path


@functools.cache
def theirs(name: str) -> Any:
    """transformers' model of the same file, float32 on the CPU."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = gguf(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def their_logits(name: str, ids: np.ndarray) -> np.ndarray:
    """float32 [T, V] of token ids [T]."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        logits = theirs(name)(torch.tensor(ids[None].astype(np.int64))).logits
    return logits[0].numpy()


def their_greedy(name: str, ids: np.ndarray, tokens: int, stops: Any) -> list[int]:
    """What transformers generates after a prompt; a stop token is left out."""
    torch = pytest.importorskip("torch")
    prompt = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        made = theirs(name).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )
    found = made[0, prompt.shape[1] :].tolist()
    return found[:-1] if found and found[-1] in stops else found
