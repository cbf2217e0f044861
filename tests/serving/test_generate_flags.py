"""Every flag of generate reaches the sampler, and serve.kv_dtype the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmos_jax import generate, serving
from llmos_jax.serving import Completion, Sampling

FLAGS = """--temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.05 --seed 7
--repetition-penalty 1.1 --presence-penalty 0.5 --frequency-penalty 0.25""".split()
ASKED = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    seed=7,
)


def test_flags_and_settings_reach_the_generator(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, object] = {}

    class Spy:
        def __init__(self, *_: object, **settings: object) -> None:
            given.update(settings)

        def complete(self, _: object, **settings: object) -> Completion:
            given.update(settings)
            return Completion(
                token_ids=(72,),
                prompt_tokens=1,
                finish_reason="length",
                tokens_per_s=1.0,
            )

    monkeypatch.setattr(serving, "Generator", Spy)
    words = [str(small_run), "--prompt", "a", "--json", *FLAGS]
    assert generate.main([*words, "--set", "serve.kv_dtype=int8"]) == 0
    assert (given["sampling"], given["kv_dtype"]) == (ASKED, "int8")
    assert given["on_token"] is None, "nobody watches: more steps at a time"
    assert json.loads(capsys.readouterr().out)["token_ids"] == [72]
    assert generate.main([str(small_run), "--prompt", "a"]) == 0
    assert given["kv_dtype"] is None and given["sampling"] == Sampling()
