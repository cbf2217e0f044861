"""Generation with a cache equals choosing from the whole sequence, again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.errors import ConfigError, LlmosError
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Skeleton, skeleton
from llmos_jax.serving import NOT_A_NUMBER, Generator, Row, Sampling
from llmos_jax.serving.session import Request

WARM = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=1)
PROMPT = np.array([1, 2, 3])


@pytest.fixture(scope="module")
def model(tiny: ModelSpec) -> tuple[Skeleton, dict[str, jax.Array]]:
    found = skeleton(tiny)
    return found, found.init(jax.random.key(7))


@pytest.fixture(scope="module")
def generator(model: tuple[Skeleton, dict[str, jax.Array]]) -> Generator:
    """Shared: what it did before must not matter."""
    return Generator(*model, compute_dtype="float32", max_batch=4)


def prompts(count: int) -> list[np.ndarray]:
    """Of 1 to 16 tokens."""
    return [(np.arange(index % 16 + 1) * 7 + index) % 256 for index in range(count)]


@pytest.mark.parametrize(
    "prompt_length",
    [17, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 5, 16))],
)
def test_greedy_tokens_are_those_of_the_whole_forward_pass(
    model: tuple[Skeleton, dict[str, jax.Array]],
    generator: Generator,
    prompt_length: int,
) -> None:
    found, params = model
    prompt = np.arange(prompt_length) * 3 % found.spec.vocab_size
    got = generator.complete(prompt, max_tokens=6, sampling=Sampling())
    sequence = list(prompt)
    for _ in range(6):
        logits = found.bind(params)(jnp.array([sequence], jnp.int32))
        sequence.append(int(jnp.argmax(logits[0, -1])))
    assert list(got.token_ids) == sequence[prompt_length:]
    assert (got.prompt_tokens, got.finish_reason) == (prompt_length, "length")
    assert got.tokens_per_s > 0


def test_a_seed_gives_the_same_text_and_another_seed_another(
    generator: Generator,
) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        return generator.complete(PROMPT, max_tokens=12, sampling=sampling).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_many_prompts_get_the_tokens_that_each_gets_alone(generator: Generator) -> None:
    asked = prompts(11)
    samplings = [Sampling() if index % 3 == 0 else WARM for index in range(len(asked))]
    lengths = [3 + 5 * (index % 4) for index in range(len(asked))]
    together = generator.complete_all(asked, samplings, max_tokens=lengths)
    for index in (0, 4, 10):
        alone = generator.complete(
            asked[index], max_tokens=lengths[index], sampling=samplings[index]
        )
        assert alone.token_ids == together[index].token_ids
    assert [len(one.token_ids) for one in together] == lengths


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_a_request_gets_its_tokens_inside_a_batch_of_32(
    model: tuple[Skeleton, dict[str, jax.Array]],
    generator: Generator,
    sampling: Sampling,
) -> None:
    wide = Generator(*model, compute_dtype="float32", max_batch=32)
    asked = [(np.arange(3 * index + 1) * 7 + index) % 256 for index in range(32)]
    together = wide.complete_all(asked, [sampling] * 32, max_tokens=24)
    for prompt, one in zip(asked, together, strict=True):
        alone = generator.complete(prompt, max_tokens=24, sampling=sampling)
        assert alone.token_ids == one.token_ids


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(generator: Generator) -> None:
    free = generator.complete(PROMPT, max_tokens=8, sampling=Sampling()).token_ids
    stop = free[3]
    cut = free[: free.index(stop)]
    got = generator.complete(
        PROMPT, max_tokens=8, sampling=Sampling(), stop_ids=frozenset({stop})
    )
    assert (got.token_ids, got.finish_reason) == (cut, "stop")


def test_a_listener_hears_every_token_and_may_end_the_text(
    generator: Generator,
) -> None:
    free = generator.complete(PROMPT, max_tokens=12, sampling=WARM).token_ids
    heard: list[int] = []

    def hear(token: int) -> bool:
        heard.append(token)
        return len(heard) == 7

    got = generator.complete(PROMPT, max_tokens=12, sampling=WARM, on_token=hear)
    assert heard == list(got.token_ids) == list(free[:7])
    assert got.finish_reason == "stop"


def test_an_error_of_a_listener_leaves_the_generator_of_use(
    generator: Generator,
) -> None:
    wanted = generator.complete(PROMPT, max_tokens=6, sampling=WARM)

    def hear(token: int) -> None:
        raise KeyError(token)

    with pytest.raises(KeyError):
        generator.complete(PROMPT, max_tokens=6, sampling=WARM, on_token=hear)
    again = generator.complete(PROMPT, max_tokens=6, sampling=WARM)
    assert again.token_ids == wanted.token_ids


def test_no_prompts_have_no_answers(generator: Generator) -> None:
    assert generator.complete_all([], [], max_tokens=4) == []


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt is empty"),
        ([1], 0, "max_tokens is 0"),
        ([1] * 120, 64, "exceed the model's context of 128. Ask for at most 8"),
        ([1, 256], 4, "token ids from 1 to 256; the model knows 0 to 255"),
        ([-1], 4, "token ids from -1 to -1"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    generator: Generator, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generator.complete(np.array(prompt), max_tokens=max_tokens, sampling=Sampling())


def test_a_parameter_out_of_range_is_refused(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="top_p is 0.0"):
        generator.complete(PROMPT, max_tokens=4, sampling=Sampling(top_p=0.0))


def test_settings_that_cannot_be_met_are_refused(
    model: tuple[Skeleton, dict[str, jax.Array]],
) -> None:
    with pytest.raises(ConfigError, match="kept as float8 here, only as one of"):
        Generator(*model, compute_dtype="float32", kv_dtype="float8")
    with pytest.raises(ConfigError, match="max_batch is 0"):
        Generator(*model, compute_dtype="float32", max_batch=0)


def test_a_token_that_is_none_is_an_error_that_says_where() -> None:
    request = Request(
        index=2, prompt=PROMPT, row=Row(3, 9, frozenset(), WARM), tokens=[5]
    )
    with pytest.raises(LlmosError, match="for token 4 of request 2 are not finite"):
        request.take(NOT_A_NUMBER, None)


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_an_error_not_a_text(
    model: tuple[Skeleton, dict[str, jax.Array]],
) -> None:
    found, params = model
    damaged = params | {"final_norm.scale": params["final_norm.scale"] * jnp.nan}
    broken = Generator(found, damaged, compute_dtype="float32")
    with pytest.raises(LlmosError, match="logits for token 3 of request 0 are not fin"):
        broken.complete(PROMPT, max_tokens=4, sampling=Sampling())


@pytest.mark.slow
def test_an_int8_cache_gives_nearly_the_same_text(
    model: tuple[Skeleton, dict[str, jax.Array]], generator: Generator
) -> None:
    small = Generator(*model, compute_dtype="float32", kv_dtype="int8", max_batch=4)
    asked, greedy = prompts(4), [Sampling()] * 4
    wanted = generator.complete_all(asked, greedy, max_tokens=8)
    got = small.complete_all(asked, greedy, max_tokens=8)
    same = [
        one == other
        for here, there in zip(got, wanted, strict=True)
        for one, other in zip(here.token_ids, there.token_ids, strict=True)
    ]
    assert sum(same) > 16  # of 32; a text that parts once seldom comes back
