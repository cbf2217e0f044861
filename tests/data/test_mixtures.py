"""Laws of mixtures: shares, epochs, and the same order for whoever asks, whenever."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from chatting import CHATML, chat_tokenizer
from corpora import TEXTS, make_corpus

from llmos_jax.config import load_config
from llmos_jax.config.schema import DataSection
from llmos_jax.data import TokenFile, TrainBatches, prepare, prepare_scored
from llmos_jax.data.joined import Joined
from llmos_jax.errors import ConfigError, DataError

SHAPE = {"seq_len": 8, "global_batch": 12, "seed": 3}
SIZES = (800, 160, 2400)
WEIGHTS = (5.0, 2.0, 3.0)


def quiet(message):
    """Nobody listens."""


def part(folder, number, size):
    """A source whose tokens are 10000 * its number, and up."""
    path = folder / f"part{number}.bin"
    (10_000 * number + np.arange(size + 1)).astype(np.uint16).tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=size + 1,
        num_bytes=size,
        num_documents=1,
        fingerprint=f"f00{number}",
    )


def talks(folder):
    """A source of conversations of 3 to 20 tokens."""
    sizes = np.random.default_rng(1).integers(3, 20, 150)
    path = folder / "talks.bin"
    np.arange(sizes.sum(), dtype=np.uint16).tofile(path)
    np.ones(sizes.sum(), np.uint8).tofile(path.with_suffix(".weights"))
    sizes.astype(np.uint32).tofile(path.with_suffix(".lengths"))
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=int(sizes.sum()),
        num_bytes=10,
        num_documents=150,
        fingerprint="ta1c",
        weights=path.with_suffix(".weights"),
        lengths=path.with_suffix(".lengths"),
    )


def corpus_side(folder):
    section = DataSection(train=(str(make_corpus(folder / "corpus")),))
    return prepare(
        section, vocab_size=300, model_name="m", cache=folder, on_progress=quiet
    ).train


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return Joined(
        parts=tuple(part(folder, number, size) for number, size in enumerate(SIZES))
    )


@pytest.fixture(scope="module", params=["corpus", "mixture", "packed"])
def asked(request, tmp_path_factory, mixture):
    """(tokens, weights): what laws hold for."""
    folder = tmp_path_factory.mktemp("asked")
    if request.param == "mixture":
        return mixture, WEIGHTS
    return (corpus_side if request.param == "corpus" else talks)(folder), ()


def batches(tokens, weights, count, **options):
    source = TrainBatches(tokens, weights=weights, **{**SHAPE, **options})
    taken = list(islice(source, count))
    source.close()
    return taken


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


def firsts(taken):
    return [int(token) for batch in taken for token in batch["inputs"][:, 0]]


@pytest.mark.parametrize("step", [0, 1, 17, 250])
def test_after_a_restore_the_batches_are_those_of_an_undisturbed_run(asked, step):
    tokens, weights = asked
    wanted = batches(tokens, weights, step + 5)[step:]
    stopped = TrainBatches(tokens, weights=weights, **SHAPE)
    list(islice(stopped, step))
    state = json.loads(json.dumps(stopped.get_state()))
    stopped.close()
    resumed = TrainBatches(tokens, weights=weights, **SHAPE)
    resumed.set_state(state)
    assert_same(list(islice(resumed, 5)), wanted)
    resumed.close()
    assert_same(batches(tokens, weights, 5, start_step=step), wanted)


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_readers_together_have_the_batch_of_one(asked, readers):
    tokens, weights = asked
    size = SHAPE["global_batch"] // readers
    parts = [
        batches(tokens, weights, 40, rows=range(size * n, size * (n + 1)))
        for n in range(readers)
    ]
    together = [
        {name: np.concatenate([one[name] for one in same]) for name in same[0]}
        for same in zip(*parts)
    ]
    assert_same(together, batches(tokens, weights, 40))


def test_a_run_goes_on_with_any_number_of_readers(asked):
    """2, then 3, then 1 of them: each begins from the state that one of the last left,
    whichever; nothing is read twice and nothing is left out."""
    tokens, weights = asked
    state, found = None, []
    for readers in (2, 3, 1):
        size = SHAPE["global_batch"] // readers
        sources = [
            TrainBatches(
                tokens, weights=weights, rows=range(size * n, size * (n + 1)), **SHAPE
            )
            for n in range(readers)
        ]
        for source in sources:
            if state is not None:
                source.set_state(state)
        for _ in range(23):
            same = [next(source) for source in sources]
            found.append(
                {name: np.concatenate([one[name] for one in same]) for name in same[0]}
            )
        states = [source.get_state() for source in sources]
        assert all(one == states[0] for one in states)
        state = states[-1]
        for source in sources:
            source.close()
    assert_same(found, batches(tokens, weights, 69))


def test_shares_are_those_of_the_weights(mixture):
    counts = Counter(
        token // 10_000 for token in firsts(batches(mixture, WEIGHTS, 500))
    )
    found = [counts[number] / 6000 for number in range(3)]
    np.testing.assert_allclose(found, [0.5, 0.2, 0.3], atol=1e-3)


def test_every_stretch_of_a_mixture_is_mixed(mixture):
    for batch in batches(mixture, WEIGHTS, 30):
        found = Counter(int(token) // 10_000 for token in batch["inputs"][:, 0])
        assert all(abs(found[n] - share) < 1.5 for n, share in enumerate((6, 2.4, 3.6)))


def test_each_source_has_epochs_of_its_own(mixture):
    rows = firsts(batches(mixture, WEIGHTS, 200))
    for number, size in enumerate(SIZES):
        mine = [row for row in rows if row // 10_000 == number]
        rows_in_epoch = size // 8
        epochs = [
            mine[start : start + rows_in_epoch]
            for start in range(0, len(mine) - rows_in_epoch + 1, rows_in_epoch)
        ]
        assert len(epochs) >= 2
        wanted = list(range(10_000 * number, 10_000 * number + size, 8))
        assert all(sorted(epoch) == wanted for epoch in epochs)
        assert epochs[0] != epochs[1] and epochs[0] != wanted


def test_equal_sources_are_shuffled_by_keys_of_their_own(tmp_path):
    one = part(tmp_path, 0, 800)
    twins = Joined(parts=(one, one))
    source = TrainBatches(twins, weights=(1, 1), **SHAPE)
    rows = [firsts([batch]) for batch in islice(source, 10)]
    source.close()
    flat = sum(rows, [])
    assert flat[0::2] != flat[1::2]


def test_a_mixture_far_along_is_found_at_once_and_exactly(mixture):
    step = 10**12
    (one,) = batches(mixture, WEIGHTS, 1, start_step=step)
    (_, again) = batches(mixture, WEIGHTS, 2, start_step=step - 1)
    assert_same([one], [again])


@pytest.mark.parametrize("change", ["weights", "none", "order", "part"])
def test_another_mixture_cannot_go_on(mixture, tmp_path, change):
    source = TrainBatches(mixture, weights=WEIGHTS, **SHAPE)
    state = source.get_state()
    source.close()
    one, two, three = mixture.parts
    parts = {
        "order": (two, one, three),
        "part": (one, two, part(tmp_path, 7, 80)),
    }.get(change, mixture.parts)
    weights = {"weights": (5.0, 2.0, 2.0), "none": ()}.get(change, WEIGHTS)
    other = TrainBatches(Joined(parts=parts), weights=weights, **SHAPE)
    with pytest.raises(DataError, match="cannot go on: (weights|tokens) was"):
        other.set_state(state)
    other.close()


def test_a_source_too_short_for_a_row_is_named(mixture, tmp_path):
    short = Joined(parts=(*mixture.parts, part(tmp_path, 4, 5)))
    with pytest.raises(DataError, match=r"source 4 of the mixture: part4 .* 6 tokens"):
        TrainBatches(short, weights=(1, 1, 1, 1), **SHAPE)


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepared(section, cache, vocab_size=300):
    return prepare(
        section, vocab_size=vocab_size, model_name="m", cache=cache, on_progress=quiet
    )


@pytest.fixture
def section(tmp_path):
    ticks = lines(tmp_path / "a.jsonl", TEXTS)
    hums = lines(tmp_path / "b.jsonl", [f"{n} hum de dum" for n in range(300)])
    return DataSection(train=(ticks, hums), weights=(1.0, 3.0), validation_share=0.1)


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_each_entry_is_a_source_with_its_own_held_out_text(
    section, tmp_path, tokenizer
):
    section = DataSection(
        train=section.train,
        weights=section.weights,
        validation_share=0.1,
        tokenizer=tokenizer,
    )
    text = prepared(section, tmp_path / "cache")
    assert text.weights == (1.0, 3.0)
    alone = [
        prepared(
            DataSection(train=(entry,), validation_share=0.1, tokenizer="bytes"),
            tmp_path / "cache",
        )
        for entry in section.train
    ]
    held_out = b"".join(one.validation.raw_bytes() for one in alone)
    assert text.validation.raw_bytes() == held_out
    for mine, one in zip(text.train.parts, alone, strict=True):
        assert mine.num_documents == one.train.num_documents
    assert [one["share"] for one in text.stats["sources"]] == [0.25, 0.75]
    assert [one["name"] for one in text.stats["sources"]] == list(section.train)
    assert (
        sum(one["tokens"] for one in text.stats["sources"])
        == (text.stats["train"]["tokens"])
    )
    again = prepared(section, tmp_path / "cache")
    assert again.stats == text.stats


def test_a_tokenizer_of_a_mixture_is_trained_without_held_out_text(tmp_path):
    ticks = lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("zq zq zq " * 100 + "xjxjxj " * 6)
    section = DataSection(
        train=(ticks, str(tmp_path / "b.txt")), weights=(1, 1), validation_share=0.03
    )
    text = prepared(section, tmp_path / "cache", vocab_size=270)
    assert b"xjxj" in text.validation.raw_bytes()
    names = " ".join(text.tokenizer.vocabulary())
    assert "zq" in names and "xj" not in names


def test_a_corpus_mixes_with_text_and_decides_the_tokenizer(section, tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    section = DataSection(
        train=(str(corpus), section.train[1]), weights=(2, 1), validation_share=0.1
    )
    text = prepared(section, tmp_path / "cache")
    assert text.tokenizer.vocab_size == 257
    source = TrainBatches(text.train, weights=text.weights, **SHAPE)
    assert next(source)["inputs"].shape == (12, 8)
    source.close()
    scored = prepare_scored(
        section, text.tokenizer, cache=tmp_path / "cache", on_progress=quiet
    )
    assert scored.raw_bytes() == text.validation.raw_bytes()
    assert scored.fingerprint == text.validation.fingerprint


def test_named_validation_is_for_the_whole_mixture(section, tmp_path):
    (tmp_path / "held.txt").write_text("held out by name")
    section = DataSection(
        train=section.train,
        weights=section.weights,
        validation=(str(tmp_path / "held.txt"),),
        tokenizer="bytes",
    )
    text = prepared(section, tmp_path / "cache")
    assert text.validation.raw_bytes() == b"held out by name"
    assert text.train.num_documents == len(TEXTS) + 300


def talk_lines(path, count):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"},
                      {"role": "assistant", "content": "yes " * (n % 5 + 1)}]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_conversations_are_mixed_and_not_with_text(section, tmp_path):
    own = chat_tokenizer(CHATML)
    entries = [talk_lines(tmp_path / f"{n}.jsonl", 40 * n) for n in (1, 2)]
    make = {
        "vocab_size": 300,
        "model_name": "m",
        "cache": tmp_path / "cache",
        "on_progress": quiet,
        "own": own,
    }
    mixed = DataSection(train=tuple(entries), weights=(1, 1), validation_share=0.1)
    text = prepare(mixed, **make)
    assert text.train.is_chat
    assert text.validation.num_answer_tokens == sum(
        part.num_answer_tokens for part in text.validation.parts
    )
    source = TrainBatches(text.train, weights=text.weights, **{**SHAPE, "seq_len": 64})
    assert set(next(source)) == {"inputs", "targets", "segments", "weights"}
    source.close()
    both = DataSection(train=(entries[0], section.train[0]), weights=(1, 1))
    with pytest.raises(DataError, match="conversations and plain text together"):
        prepare(both, **make)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0,), r"data\.weights has 1 numbers, but data\.train names 2 sources"),
        ((1.0, 2.0, 3.0), r"has 3 numbers, but data\.train names 2"),
        ((1.0, 0.0), r"b\.jsonl the weight 0; it must be more than 0"),
        ((-1.0, 1.0), r"a\.jsonl the weight -1; it must be more than 0"),
        ((1.0, float("inf")), r"the weight inf"),
    ],
)
def test_weights_that_are_none_are_an_error(section, tmp_path, weights, said):
    section = DataSection(train=section.train, weights=weights)
    with pytest.raises(ConfigError, match=said):
        prepared(section, tmp_path)


def test_weights_are_set_as_a_list():
    config = load_config(
        "quickstart", ['data.train=["a", "b"]', "data.weights=[0.7, 1]"]
    ).config
    assert config.data.weights == (0.7, 1.0)
