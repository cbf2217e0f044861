"""Whatever the order, the chunks, the pages: everybody is answered as if alone."""

from __future__ import annotations

import pytest
from device import Client, Device, V, request_of, serve, wanted
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.scheduling import Room, Scheduler

ROOM = Room(
    seats=4,
    pages=24,
    page_size=4,
    context=32,
    step_tokens=16,
    is_ragged=True,
    vocab_size=V,
)


@st.composite
def rooms(draw: st.DrawFn) -> Room:
    """Few pages and seats, so that they run out."""
    size = draw(st.sampled_from([1, 2, 4]))
    context = 8 * draw(st.integers(2, 4))
    seats = draw(st.integers(1, 5))
    return Room(
        seats=seats,
        pages=context // size + draw(st.integers(0, 20)),
        page_size=size,
        context=context,
        step_tokens=draw(st.sampled_from([8, 16])),
        is_ragged=draw(st.booleans()),
        vocab_size=V,
    )


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_everybody_is_answered_as_if_alone(data: st.DataObject) -> None:
    room = data.draw(rooms())
    scheduler = Scheduler(room, keeps_prefixes=data.draw(st.booleans()))
    clients, requests = [], []
    for index in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(
            st.lists(st.integers(0, 2), min_size=1, max_size=room.context - 1)
        )
        request = request_of(
            str(index),
            prompt,
            data.draw(st.integers(1, 20)),
            stop=data.draw(st.integers(0, 60)),
            tenant=data.draw(st.sampled_from("ab")),
            priority=data.draw(st.integers(0, 1)),
        )
        requests.append(request)
        clients.append(Client())
        scheduler.add(request, clients[-1], 0.0)
    drafts = data.draw(st.sampled_from([0, 0, 2]))
    if drafts * room.seats + room.seats > room.step_tokens:
        drafts = 0
    serve(
        scheduler,
        Device(room),
        steps=data.draw(st.integers(1, 4)),
        drafts=drafts,
        late=data.draw(st.integers(0, 1)),
    )
    for request, client in zip(requests, clients, strict=True):
        assert client.end is not None
        assert client.tokens == wanted(request, room)
    assert scheduler.pages.held == 0


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_who_leaves_takes_nobody_along(data: st.DataObject) -> None:
    """Requests are cancelled at any moment; the rest is answered as if alone."""
    scheduler, device = Scheduler(ROOM), Device(ROOM)
    requests = [
        request_of(str(index), [index % 3] * (3 * index + 1), 12) for index in range(6)
    ]
    clients = [Client() for _ in requests]
    for request, client in zip(requests, clients, strict=True):
        scheduler.add(request, client, 0.0)
    leaving = data.draw(st.lists(st.integers(0, 5), max_size=3, unique=True))
    flying = []
    for round_ in range(200):
        if leaving and data.draw(st.booleans()):
            scheduler.cancel(str(leaving[0]), float(round_))
            ended = clients[leaving.pop(0)].end
            assert ended is not None
        sent = [(work, device.run(work)) for work in scheduler.plan(0.0, steps=2)]
        for one in flying:
            scheduler.take(*one, 0.0)
        flying = sent
        scheduler.check()
        if scheduler.is_idle and not flying:
            break
    for request, client in zip(requests, clients, strict=True):
        assert client.end is not None
        if client.end.reason != "cancelled":
            assert client.tokens == wanted(request, ROOM)
    assert scheduler.pages.held == 0


def run_all(scheduler: Scheduler, *requests: object) -> list[Client]:
    clients = [Client() for _ in requests]
    for request, client in zip(requests, clients, strict=True):
        scheduler.add(request, client, 0.0)  # type: ignore[arg-type]
    serve(scheduler, Device(ROOM), steps=1, drafts=0, late=1)
    return clients


def test_a_second_prompt_finds_the_pages_of_the_first() -> None:
    scheduler, device = Scheduler(ROOM), Device(ROOM)
    for name in "ab":
        client = Client()
        scheduler.add(request_of(name, [1, 2] * 5, 4), client, 0.0)
        serve(scheduler, device, steps=1, drafts=0, late=1)
        assert client.end is not None
    assert client.end.cached_tokens == 8
    assert scheduler.counters.prefix_hits == 8


def test_prompts_that_come_together_share_what_the_first_computes() -> None:
    scheduler = Scheduler(ROOM)
    requests = [request_of(name, [1, 2] * 8, 2) for name in "abc"]
    clients = run_all(scheduler, *requests)
    ends = [client.end for client in clients]
    assert [end and end.cached_tokens for end in ends] == [0, 12, 12]
    assert scheduler.counters.prefix_hits == 24


def test_who_is_preempted_says_the_same() -> None:
    room = Room(
        seats=4,
        pages=8,
        page_size=4,
        context=32,
        step_tokens=16,
        is_ragged=True,
        vocab_size=V,
    )
    scheduler = Scheduler(room)
    requests = [request_of(str(index), [index] * 5, 20) for index in range(3)]
    clients = [Client() for _ in requests]
    for request, client in zip(requests, clients, strict=True):
        scheduler.add(request, client, 0.0)
    serve(scheduler, Device(room), steps=2, drafts=0, late=1)
    assert scheduler.counters.preemptions > 0
    for request, client in zip(requests, clients, strict=True):
        assert client.tokens == wanted(request, room)
    last = clients[-1].end
    assert last is not None and last.preemptions > 0


def order_of_seats(scheduler: Scheduler) -> list[str]:
    """Names in the order in which they are seated, one after another."""
    device, seated = Device(scheduler.room), []
    while not scheduler.is_idle:
        for work in scheduler.plan(0.0):
            for part in work.parts:
                name = part.sequence.request.id
                if name not in seated:
                    seated.append(name)
            scheduler.take(work, device.run(work), 0.0)
    return seated


ONE_SEAT = Room(
    seats=1,
    pages=8,
    page_size=4,
    context=32,
    step_tokens=16,
    is_ragged=True,
    vocab_size=V,
)


def test_lower_priorities_go_first() -> None:
    scheduler = Scheduler(ONE_SEAT)
    for name, priority in (("late", 5), ("soon", 0), ("now", -3)):
        scheduler.add(request_of(name, [1], 2, priority=priority), Client(), 0.0)
    assert order_of_seats(scheduler) == ["now", "soon", "late"]


def test_a_tenant_with_many_requests_does_not_hold_up_another() -> None:
    scheduler = Scheduler(ONE_SEAT)
    for index in range(4):
        request = request_of(f"big{index}", [1] * 10, 10, tenant="big")
        scheduler.add(request, Client(), 0.0)
    for index in range(2):
        request = request_of(f"small{index}", [2], 2, tenant="small")
        scheduler.add(request, Client(), 0.0)
    assert order_of_seats(scheduler)[:3] == ["big0", "small0", "small1"]


def test_a_deadline_ends_who_waits_and_who_runs() -> None:
    scheduler = Scheduler(ONE_SEAT)
    clients = [Client(), Client()]
    for name, client in zip("ab", clients):
        scheduler.add(request_of(name, [1], 20, deadline=5.0), client, 0.0)
    scheduler.plan(1.0)
    assert clients[0].end is None
    scheduler.plan(6.0)
    assert [client.end and client.end.reason for client in clients] == ["deadline"] * 2
    scheduler.check()


def test_many_decode_steps_go_out_together_only_while_no_prompt_waits() -> None:
    scheduler, device = Scheduler(ROOM), Device(ROOM)
    scheduler.add(request_of("a", [1, 2], 12), Client(), 0.0)
    (work,) = scheduler.plan(0.0, steps=4)
    assert work.kind == "step"
    scheduler.take(work, device.run(work), 0.0)
    (work,) = scheduler.plan(0.0, steps=4)
    assert (work.kind, work.steps) == ("decode", 4)
    scheduler.take(work, device.run(work), 0.0)
    scheduler.add(request_of("b", [3], 4), Client(), 0.0)
    (work,) = scheduler.plan(0.0, steps=4)
    assert work.kind == "step" and len(work.parts) == 2


@pytest.mark.parametrize("wanted", [1, 7, 16, 137, 144, 200, 512])
def test_steps_are_well_filled(wanted: int) -> None:
    room = Room(
        seats=4,
        pages=24,
        page_size=4,
        context=32,
        step_tokens=512,
        is_ragged=True,
        vocab_size=V,
    )
    taken = room.well_filled(wanted)
    size = next(size for size in room.step_sizes if size >= taken)
    assert 0 < taken <= wanted and (taken >= 0.75 * size or size == 8)
