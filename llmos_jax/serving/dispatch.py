"""Send works to the device, and read what became of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.scheduling import (
    Drawn,
    Likelihood,
    Part,
    Room,
    Work,
    variant_of,
)
from llmos_jax.serving.choose import Choice, Chosen, rows_of_choices
from llmos_jax.serving.followers import Leader
from llmos_jax.serving.forward import Forward, Weights
from llmos_jax.serving.packing import packed
from llmos_jax.serving.programs import Programs
from llmos_jax.serving.shapes import Shape, shape_of
from llmos_jax.serving.steps import ENDED, FROM_POOL, DecodeRows, State, StepRows


class Sent(NamedTuple):
    """A work under way."""

    work: Work
    shape: Shape
    made: Any
    """What the program returns, on the device."""


class Runner:
    """Parameters, state and programs; the state goes from step to step."""

    def __init__(self, model: Forward, params: Weights, programs: Programs, room: Room):
        """Begin with empty pages.

        Args:
            model: for the state.
            params: as the model wants them.
            programs: of this model and room.
            room: sizes.
        """
        self._params, self._room = params, room
        self.programs = programs
        self._sharding = programs.sharding
        self._state = jax.jit(
            lambda: empty_state(model, room), out_shardings=programs.state_shardings
        )()
        self._leader = Leader()
        self._table = np.full(
            (room.seats, room.context // room.page_size), -1, np.int32
        )

    def send(self, work: Work) -> Sent:
        """Dispatch a work; returns before it is done."""
        variant = variant_of(part.sequence.request for part in work.parts)
        shape = shape_of(work, variant, self._room)
        for part in work.parts:
            pages = part.sequence.pages
            self._table[part.seat, : len(pages)] = pages
            self._table[part.seat, len(pages) :] = -1
        words = packed(self._rows(work, shape))
        self.programs[shape]  # what is not planned goes to nobody
        self._leader.tell(shape, words)
        made = self.send_words(shape, words)
        for leaf in jax.tree.leaves(made):
            leaf.copy_to_host_async()
        return Sent(work, shape, made)

    def send_words(self, shape: Shape, words: np.ndarray) -> Any:
        """Dispatch a program with what it is told; return what it makes."""
        given: Any = words
        if self._sharding is not None:
            given = jax.make_array_from_callback(
                words.shape, self._sharding, lambda index: words[index]
            )
        self._state, made = self.programs[shape](self._params, self._state, given)
        return made

    def end(self) -> None:
        """Send no more: who follows may go."""
        self._leader.tell(None, None)

    def read(self, sent: Sent) -> tuple[Drawn, ...]:
        """Wait for a work, and say what became of each part."""
        parts = sent.work.parts
        if sent.work.kind == "embed":
            return (Drawn(total=np.asarray(sent.made)),)
        if sent.work.kind == "decode":
            rows = np.asarray(sent.made)[:, : sent.work.steps].tolist()
            return tuple(Drawn(tokens=tuple(row)) for row in rows[: len(parts)])
        chosen: Chosen = jax.tree.map(np.asarray, sent.made)
        drawn, at = [], 0
        for part in parts:
            drawn.append(_drawn(chosen, at, part))
            at += part.draws
        return tuple(drawn)

    def _rows(self, work: Work, shape: Shape) -> Any:
        if work.kind == "decode":
            return self._decode_rows(work, shape)
        rows, choices = _step_rows(work, shape)
        if work.kind == "embed":
            return self._table, rows
        draw = rows_of_choices(choices, shape.variant, shape.draws, self._room)
        return self._table, rows, draw

    def _decode_rows(self, work: Work, shape: Shape) -> Any:
        seat_B = np.full((shape.rows,), self._room.seats, np.int32)
        position_B = np.zeros((shape.rows,), np.int32)
        for row, part in enumerate(work.parts):
            seat_B[row], position_B[row] = part.seat, part.start
        choices = [_choice(part, 0, row, 1) for row, part in enumerate(work.parts)]
        draw = rows_of_choices(choices, shape.variant, shape.rows, self._room)
        rows = DecodeRows(seat_B=seat_B, position_B=position_B, draw=draw)
        return self._table, rows, np.array([work.steps], np.int32)


def _step_rows(work: Work, shape: Shape) -> tuple[StepRows, list[Choice]]:
    """Tokens row by row: all of one prompt in a row, or one in each."""
    B, T = shape.rows, shape.tokens
    token_BT = np.zeros((B, T), np.int32)
    seat_B, start_B, length_B = (np.zeros((B,), np.int32) for _ in range(3))
    choices: list[Choice] = []
    at = 0
    for part in work.parts:
        tokens = (FROM_POOL,) if part.tokens is None else part.tokens
        count = len(tokens)
        if T > 1:
            token_BT[0, :count] = tokens
            seat_B[0], start_B[0], length_B[0] = part.seat, part.start, count
        else:
            rows = slice(at, at + count)
            token_BT[rows, 0] = tokens
            seat_B[rows], length_B[rows] = part.seat, 1
            start_B[rows] = np.arange(part.start, part.start + count)
        first = count - part.draws
        choices += [_choice(part, at + i, i, i + 1) for i in range(first, count)]
        at += count
    return StepRows(token_BT, seat_B, start_B, length_B), choices


def _choice(part: Part, at: int, row: int, after: int) -> Choice:
    sequence = part.sequence
    return Choice(
        at=at,
        seat=part.seat,
        position=part.start + after,
        limit=sequence.limit,
        prompt=sequence.prompt_tokens,
        request=sequence.request,
        mask=sequence.mask,
    )


def _drawn(chosen: Chosen, at: int, part: Part) -> Drawn:
    rows = slice(at, at + part.draws)
    tokens = tuple(chosen.token_R[rows].tolist())
    most = part.sequence.request.alternatives
    if most is None or chosen.logprob_R is None:
        return Drawn(tokens=tokens)
    assert chosen.top_token_RA is not None and chosen.top_logprob_RA is not None
    tops = [
        tuple(zip(names.tolist(), values.tolist()))[:most]
        for names, values in zip(chosen.top_token_RA[rows], chosen.top_logprob_RA[rows])
    ]
    likelihoods = tuple(
        Likelihood(logprob=logprob, top=top)
        for logprob, top in zip(chosen.logprob_R[rows].tolist(), tops)
    )
    return Drawn(tokens=tokens, likelihoods=likelihoods)


def empty_state(model: Forward, room: Room) -> State:
    """Pages that nobody has, and a pool of nothing."""
    return State(
        cache=model.empty_pages(room.pages, room.page_size),
        pool=jnp.full((room.seats, room.context), ENDED, jnp.int32),
    )
