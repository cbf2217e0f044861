"""Pages are never lost, never held twice by mistake, and found by equal beginnings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.scheduling.pages import Pages, digests_of

C = 4


def filled(pages: Pages, tokens: list[int]) -> list[int]:
    """Pages of a sequence whose full ones can be found."""
    digests = list(digests_of(tokens, C))
    found = pages.find(digests)
    taken = pages.take(-(-len(tokens) // C) - len(found))
    assert taken is not None
    for page, digest in zip([*found, *taken], digests):
        pages.remember(page, digest)
    return found + taken


def test_equal_beginnings_share_their_full_pages() -> None:
    pages = Pages(8)
    one = filled(pages, [*range(10)])
    other = filled(pages, [*range(8), 99, 98])
    assert one[:2] == other[:2] and one[2] != other[2]
    assert pages.held == 4


def test_a_page_is_known_by_all_that_came_before_it() -> None:
    pages = Pages(8)
    one = filled(pages, [1, 2, 3, 4, 5, 6, 7, 8])
    other = filled(pages, [9, 9, 9, 9, 5, 6, 7, 8])
    assert set(one).isdisjoint(other)


def test_what_was_let_go_is_found_until_its_room_is_wanted() -> None:
    pages = Pages(4)
    one = filled(pages, [*range(8)])
    pages.let_go(one)
    assert (pages.held, pages.cached, pages.available) == (0, 2, 4)
    again = filled(pages, [*range(8)])
    assert again == one
    pages.let_go(again)
    assert pages.take(4) is not None
    pages.check()
    assert pages.find(list(digests_of([*range(8)], C))) == []


def test_the_last_page_of_a_sequence_goes_before_its_first() -> None:
    pages = Pages(4)
    one = filled(pages, [*range(12)])
    pages.let_go(one)
    assert pages.take(2) is not None
    assert pages.find(list(digests_of([*range(12)], C))) == one[:2]


def test_what_is_forgotten_is_found_by_nobody() -> None:
    pages = Pages(4)
    one = filled(pages, [*range(8)])
    pages.let_go(one, forget=True)
    assert pages.cached == 0
    assert pages.find(list(digests_of([*range(8)], C))) == []


def test_more_than_there_is_is_not_given() -> None:
    pages = Pages(2)
    assert pages.take(3) is None
    assert pages.available == 2


def test_letting_go_twice_is_noticed() -> None:
    pages = Pages(2)
    taken = pages.take(1)
    assert taken is not None
    pages.let_go(taken)
    with pytest.raises(AssertionError, match="let go twice"):
        pages.let_go(taken)


@given(st.data())
def test_pages_are_conserved_whatever_happens(data: st.DataObject) -> None:
    pages = Pages(data.draw(st.integers(1, 12)))
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(held) - 1))
            pages.let_go(held.pop(index), forget=data.draw(st.booleans()))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), max_size=3 * C))
            digests = list(digests_of(tokens, C))
            found = pages.find(digests)
            taken = pages.take(-(-len(tokens) // C) - len(found))
            if taken is None:
                pages.let_go(found)
                continue
            for page, digest in zip([*found, *taken], digests):
                pages.remember(page, digest)
            held.append(found + taken)
        pages.check()
        total = sum(pages.holders().values())
        assert total == sum(map(len, held))
