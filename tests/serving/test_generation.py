"""Generation with a cache equals choosing from the whole sequence, again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Skeleton, skeleton
from llmos_jax.serving import Generator, Sampling


@pytest.fixture(scope="module")
def model(tiny: ModelSpec) -> tuple[Skeleton, dict[str, jax.Array]]:
    found = skeleton(tiny)
    return found, found.init(jax.random.key(7))


@pytest.mark.parametrize(
    "prompt_length",
    [17, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 5, 16))],
)
def test_greedy_tokens_are_those_of_the_whole_forward_pass(
    model: tuple[Skeleton, dict[str, jax.Array]], prompt_length: int
) -> None:
    found, params = model
    prompt = np.arange(prompt_length) * 3 % found.spec.vocab_size
    got = Generator(found, params, compute_dtype="float32").complete(
        prompt, max_tokens=6, sampling=Sampling()
    )
    sequence = list(prompt)
    for _ in range(6):
        logits = found.bind(params)(jnp.array([sequence], jnp.int32))
        sequence.append(int(jnp.argmax(logits[0, -1])))
    assert list(got.token_ids) == sequence[prompt_length:]
    assert (got.prompt_tokens, got.finish_reason) == (prompt_length, "length")


def test_a_seed_gives_the_same_text_and_another_seed_another(
    model: tuple[Skeleton, dict[str, jax.Array]],
) -> None:
    generator = Generator(*model, compute_dtype="float32")

    def tokens(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        return generator.complete(
            np.array([1, 2, 3]), max_tokens=12, sampling=sampling
        ).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(
    model: tuple[Skeleton, dict[str, jax.Array]],
) -> None:
    generator = Generator(*model, compute_dtype="float32")
    prompt = np.array([1, 2, 3])
    free = generator.complete(prompt, max_tokens=8, sampling=Sampling()).token_ids
    stop = free[3]
    cut = free[: free.index(stop)]
    got = generator.complete(
        prompt, max_tokens=8, sampling=Sampling(), stop_ids=frozenset({stop})
    )
    assert (got.token_ids, got.finish_reason) == (cut, "stop")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt is empty"),
        ([1], 0, "max_tokens is 0"),
        ([1] * 120, 64, "exceed the model's context of 128. Ask for at most 8"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    model: tuple[Skeleton, dict[str, jax.Array]],
    prompt: list[int],
    max_tokens: int,
    message: str,
) -> None:
    generator = Generator(*model, compute_dtype="float32")
    with pytest.raises(ConfigError, match=message):
        generator.complete(np.array(prompt), max_tokens=max_tokens, sampling=Sampling())
