"""Batches of texts: everybody once, in rows that fit, and no row without need."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.scheduling import Batching, Drawn, Progress, Request, Sizes, Work

SIZES = st.builds(
    Sizes,
    seats=st.integers(1, 40),
    context=st.integers(1, 5000),
    ways=st.sampled_from([1, 2, 8]),
)


def text(name: object, tokens: int, **rest) -> Request:
    prompt = np.zeros((tokens,), np.int32)
    return Request(id=str(name), prompt=prompt, max_tokens=0, wants="classes", **rest)


def answer(batching: Batching, work: Work) -> None:
    batching.take(work, tuple(Drawn(total=np.zeros(2)) for _ in work.parts), 2.0)


@given(SIZES)
def test_sizes_are_few_and_have_room_for_all(sizes: Sizes):
    every = list(sizes)
    assert len(set(every)) == len(every) <= 9 * 7
    assert all(size.rows % sizes.ways == 0 for size in every)
    assert max(size.tokens for size in every) == sizes.context
    assert max(size.rows for size in every) < sizes.seats + sizes.ways
    for tokens in {1, sizes.context, 1 + sizes.context // 2}:
        assert sizes.length_of(tokens) >= tokens and sizes.rows_of(tokens)


ROUNDS = st.lists(st.lists(st.floats(0, 1), max_size=12), max_size=8).map(list)


@settings(deadline=None)
@given(SIZES, ROUNDS)
def test_each_is_answered_once_in_a_batch_that_exists(sizes: Sizes, rounds):
    """Some come before each batch; lengths are shares of the context."""
    batching, programs = Batching(sizes), set(sizes)
    lengths: list[int] = []
    ended: list[int] = []
    while rounds or not batching.is_idle:
        for share in rounds.pop() if rounds else ():
            index = len(lengths)
            lengths.append(max(1, round(share * sizes.context)))

            def hear(progress: Progress, index: int = index) -> None:
                assert progress.reason == "stop"
                ended.append(index)

            batching.add(text(index, lengths[-1]), hear, 0.0)
        first = min((one.order for one in batching.waiting), default=None)
        for work in batching.plan(1.0):
            assert first in {part.sequence.order for part in work.parts}
            size = batching.size_of(work)
            assert size in programs and len(work.parts) <= size.rows
            smaller = [one for one in sizes.rows_of(size.tokens) if one < size.rows]
            assert not smaller or len(work.parts) > smaller[-1], "rows without need"
            batching.check()
            answer(batching, work)
        batching.check()
    assert sorted(ended) == list(range(len(lengths)))
    assert batching.counters.texts == len(lengths)
    assert batching.counters.prompt_tokens == sum(lengths)


def test_like_lengths_go_together_and_shorter_ones_fill_empty_rows():
    batching = Batching(Sizes(seats=4, context=64))
    for index, tokens in enumerate((40, 5, 50, 64, 3, 2)):
        batching.add(text(index, tokens), lambda progress: None, 0.0)
    (first,) = batching.plan(1.0)
    names = [part.sequence.request.id for part in first.parts]
    assert names == ["0", "2", "3", "1"], "three alike, and who waits longest"
    assert batching.size_of(first) == (4, 64)
    (second,) = batching.plan(1.0)
    assert batching.size_of(second) == (2, 16)
    assert batching.plan(1.0) == []


def test_a_batch_of_long_texts_has_few_rows():
    sizes = Sizes(seats=32, context=8192)
    assert sizes.rows_of(16)[-1] == 32
    assert sizes.rows_of(1024) == [1, 2, 4]
    assert sizes.rows_of(8192) == [1]


def test_priority_and_tenants_come_before_order():
    batching = Batching(Sizes(seats=1, context=16))
    for name, tenant, priority in (
        ("a0", "a", 0), ("a1", "a", 0), ("b0", "b", 0), ("c0", "c", -1),
    ):  # fmt: skip
        request = text(name, 4, tenant=tenant, priority=priority)
        batching.add(request, lambda progress: None, 0.0)
    order = []
    while not batching.is_idle:
        (work,) = batching.plan(1.0)
        order.append(work.parts[0].sequence.request.id)
        answer(batching, work)
    assert order == ["c0", "a0", "b0", "a1"]
