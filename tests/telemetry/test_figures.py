"""Figures: colours from the page, labels that do not meet, rows of any number."""

import math

import pytest

from llmos_jax.telemetry import loss_figure, memory_figure, throughput_figure
from llmos_jax.telemetry.figures import _apart, _series, _smooth


def losses(count):
    return [{"step": step, "loss": 2 + 6 / step} for step in range(1, count + 1)]


def test_svg_takes_its_colours_from_the_page():
    svg = loss_figure(losses(30), [(30, 2.3)]).svg
    assert svg.startswith("<svg role=")
    assert "var(--first, #0072b2)" in svg
    assert "var(--second, #d55e00)" in svg


def test_baselines_need_the_unit_they_are_in():
    nats = loss_figure(losses(30), [], {"gzip": 2.7}).svg
    bits = loss_figure(losses(30), [], {"gzip": 2.7}, bytes_per_token=3.0).svg
    assert "Loss, nats per token" in nats
    assert "gzip" not in nats
    assert "Loss, bits per byte" in bits
    assert "gzip 2.70" in bits


def test_rows_without_a_number_are_left_out():
    rows = [{"step": 1, "loss": None}, {"step": 2, "val_loss": 1.0}, *losses(3)[2:]]
    assert _series(rows, "loss", 2.0) == ([3.0], [8.0])


def test_many_rows_are_drawn_as_few_points():
    steps, values = _series(losses(10_000), "loss", 1.0)
    assert len(steps) == len(values) <= 800
    assert values == sorted(values, reverse=True)


def test_smoothing_keeps_a_constant():
    assert _smooth([2.0] * 500) == pytest.approx([2.0] * 500)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 1.0], [0.75, 1.25]),
        ([1.0, 1.1, 5.0], [0.8, 1.3, 5.0]),
        ([0.0, 0.4, 0.8], [-0.1, 0.4, 0.9]),
        ([], []),
    ],
)
def test_labels_move_apart_around_their_place(levels, expected):
    assert _apart(levels, 0.5) == pytest.approx(expected)


def test_throughput_names_its_median():
    rows = [{"step": s, "tokens_per_s": 1000.0 * s, "mfu": 0.4} for s in (1, 2, 3)]
    svg = throughput_figure(rows).svg
    assert "Tokens per second, median 2,000 (MFU 40.0%)" in svg


@pytest.mark.parametrize("limit", [3e8, 16e9, math.inf])
def test_memory_shows_each_part_that_is_there(limit):
    svg = memory_figure({"params": 1e8, "optimizer": 2e8, "cache": 0.0}, limit).svg
    assert "optimizer" in svg
    assert "cache" not in svg
    assert ("limit" in svg) == (limit < 1e9)
