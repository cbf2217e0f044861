"""Long reads say how far they are on stderr; short ones say nothing."""

from __future__ import annotations

import io

import pytest

from llmos_jax.interchange import ByteProgress, progress


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until told otherwise."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_quick_read_says_nothing(clock):
    stream = io.StringIO()
    with ByteProgress("reading m", stream=stream) as bar:
        for done in range(100):
            clock[0] += 0.05
            bar.update(done, 100)
    assert stream.getvalue() == ""


def test_a_long_read_says_bytes_rate_and_time_left_every_ten_seconds(clock):
    stream = io.StringIO()
    with ByteProgress("reading m", stream=stream) as bar:
        for done in (1, 2, 3):
            clock[0] += 5
            bar.update(done << 30, 4 << 30)
    assert stream.getvalue() == (
        "reading m: 2.00 GiB of 4.00 GiB (205 MiB/s, ETA 10.0 s)\n"
    )


def test_other_processes_are_silent(clock):
    stream = io.StringIO()
    with ByteProgress("reading m", stream=stream, enabled=False) as bar:
        clock[0] += 100
        bar.update(1, 2)
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ByteProgress("reading m", stream=stream) as bar:
        bar.update(1 << 20, 2 << 20)
    assert "reading m" in stream.getvalue() and "1.0/2.0 MiB" in stream.getvalue()
