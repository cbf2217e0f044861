"""The front over slices: who is on it, what it costs, what was left out."""

from __future__ import annotations

import pytest
from llama_table import table_of

from llmos_jax.errors import NoFeasiblePlan
from llmos_jax.hardware import legal_topologies
from llmos_jax.ir import Front, Pins, Prices, Workload
from llmos_jax.planner import explain_front, frontier
from llmos_jax.planner.frontier import _beats, dollars
from llmos_jax.rules import load_rules

PRICES = Prices(usd_per_chip_hour={"v5e": 1.2, "v6e": 2.7}, source="made up")
WORK = Workload(global_batch=64, seq_len=2048)


def front_of(*chips: str, max_chips=64, prices=PRICES, work=WORK, **more) -> Front:
    machines = [one for chip in chips for one in legal_topologies(chip, max_chips)]
    return frontier(
        table_of("llama3_8b"), machines, work, load_rules("llama"), Pins(), prices,
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def front() -> Front:
    return front_of("v5e", "v6e")


def test_every_slice_is_on_the_front_beaten_or_without_a_plan(front):
    tried = sum(1 for chip in ("v5e", "v6e") for _ in legal_topologies(chip, 64))
    assert len(front.front) + len(front.beaten) + len(front.infeasible) == tried
    assert front.front and front.infeasible


def test_nothing_beats_the_front_and_something_beats_the_rest(front):
    everyone = [*front.front, *front.beaten]
    assert not any(_beats(a, b) for a in everyone for b in front.front)
    assert all(any(_beats(a, b) for a in everyone) for b in front.beaten)


def test_the_front_is_ordered_by_time(front):
    times = [item.best.predicted.step_s for item in front.front]
    assert times == sorted(times)


def test_cost_is_price_over_speed(front):
    item = front.front[0]
    price = PRICES.usd_per_chip_hour[item.chip]
    per_token = item.chips * price / 3600 / item.best.predicted.tokens_per_s
    assert item.usd_per_million_tokens == pytest.approx(per_token * 1e6)
    assert 0 < item.headroom < 1


def test_the_batch_is_the_same_on_every_slice(front):
    for item in (*front.front, *front.beaten):
        found = item.best.predicted
        assert found.tokens_per_s * found.step_s == pytest.approx(64 * 2048)


def test_a_slice_that_does_not_fit_says_why(front):
    assert "does not fit: needs" in front.infeasible["v5e:1x1"]


def test_a_chip_without_a_price_is_planned_and_has_no_cost():
    found = front_of("v6e", "v5p", max_chips=32)
    assert found.unpriced == ("v5p",)
    assert any(item.chip == "v5p" for item in found.front)
    by_chip = {item.chip: item.usd_per_million_tokens for item in found.front}
    assert by_chip["v5p"] is None and by_chip["v6e"] is not None
    assert "no price, so no cost: v5p" in explain_front(found)


def test_prices_move_the_front():
    dear = Prices(usd_per_chip_hour={"v5e": 1.2, "v6e": 270.0}, source="made up")
    cheap, costly = front_of("v5e", "v6e"), front_of("v5e", "v6e", prices=dear)
    count = {
        name: sum(item.chip == "v5e" for item in found.front)
        for name, found in (("cheap", cheap), ("costly", costly))
    }
    assert count["costly"] > count["cheap"]


def test_shapes_that_come_to_the_same_stand_once():
    found = front_of("v5p", max_chips=256, prices=PRICES)
    keys = [
        (item.chips, f"{item.best.predicted.step_s:.3g}", int(10 * item.headroom))
        for item in found.front
    ]
    assert len(keys) == len(set(keys))


def test_json_counts_what_the_front_leaves_out(front):
    found = front.summary()
    assert found["dominated"] == len(front.beaten) == len(found["dominated_slices"])
    assert found["infeasible"] == len(front.infeasible)
    assert found["front"][0].keys() >= {
        "topology", "chips", "step_s", "usd_per_million_tokens", "headroom", "mesh",
    }  # fmt: skip


def test_the_table_fits_88_columns(front):
    lines = explain_front(front).splitlines()
    assert all(len(line) <= 88 for line in lines)
    assert any(front.front[0].topology in line for line in lines)


def test_progress_names_every_slice():
    told: list[str] = []
    front_of("v6e", max_chips=16, on_progress=told.append)
    assert told[-1].startswith(f"planning {len(told)} of {len(told)}: v6e:4x4")


def test_nothing_fits_says_what_would_help():
    with pytest.raises(NoFeasiblePlan, match="any of 2 slices") as caught:
        front_of("v5e", max_chips=4)
    assert "does not fit" in str(caught.value)
    assert "a larger --max-chips" in str(caught.value)


@pytest.mark.parametrize(
    ("usd", "text"),
    [(None, "-"), (0.00456, "0.0046"), (0.868, "0.868"), (1234.5, "1,234.50")],
)
def test_dollars(usd, text):
    assert dollars(usd) == text
