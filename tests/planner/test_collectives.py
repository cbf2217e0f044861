"""Seconds of collectives on a torus, and which links carry which mesh axis."""

import pytest

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape
from llmos_jax.planner.collectives import (
    PART_SHARE,
    dcn_sum_s,
    exchange_s,
    gather_s,
    links_of,
    sum_s,
)

SHARE = 0.65
"""Of a link, on every TPU but tpu7x."""


def links(topology, **mesh):
    return links_of(parse_topology(topology), MeshShape(**mesh))


def test_gather_over_a_closed_axis_takes_v_over_w():
    # v5p, one closed axis of 4: W = 2 * 9e10 * 0.65; 3/4 of 1 GB arrives at each
    # device.
    found = links("v5p:4x4x4", data=4, fsdp=4, tensor=4)
    seconds = gather_s(found, ("fsdp",), 1e9, 1)
    assert seconds == pytest.approx(0.75e9 / (2 * 9e10 * SHARE))
    assert sum_s(found, ("fsdp",), 1e9, 1) == pytest.approx(2 * seconds)


def test_open_axis_halves_the_rate_and_more_axes_add_up():
    slow = links("v5e:4x4", fsdp=16)["fsdp"]
    fast = links("v5e:16x16", fsdp=256)["fsdp"]
    one = links("v5e:16x16", data=16, fsdp=16)["fsdp"]
    assert fast.bytes_per_s == pytest.approx(2 * slow.bytes_per_s)
    assert fast.bytes_per_s == pytest.approx(2 * one.bytes_per_s)


def test_small_gather_is_bound_by_latency():
    found = links("v5p:4x4x4", fsdp=64)
    assert gather_s(found, ("fsdp",), 64.0, 1) == pytest.approx(6e-6)


def test_axes_that_share_a_physical_axis_share_its_links():
    found = links("v5p:8x8x8", fsdp=256, tensor=2)
    rate = 9e10 * SHARE
    assert found["tensor"].bytes_per_s == pytest.approx(PART_SHARE * rate)
    assert found["fsdp"].bytes_per_s == pytest.approx((2 + 2 + PART_SHARE) * rate)


def test_exchange_is_bound_by_the_middle_of_the_longest_axis():
    # Ring of 16: half of 16 V crosses the middle, in each direction a half of that,
    # over two cuts of 4.5e10 * 0.65 one way: 16 V / 4 / 2 links.
    ring = links("v5e:16x16", data=16, expert=16)
    rate = 4.5e10 * SHARE
    assert exchange_s(ring, "expert", 1e9, 1) == pytest.approx(16e9 / 8 / rate)
    torus = links("v5p:8x8x8", expert=512)
    assert exchange_s(torus, "expert", 1e9, 1) == pytest.approx(8e9 / 8 / (2 * rate))


@pytest.mark.parametrize(
    ("topology", "mesh", "axis", "words"),
    [
        ("v5e:16x16", {"fsdp": 256}, "fsdp", "ICI, rings of 16 x 16"),
        ("v5e:4x4", {"data": 4, "tensor": 4}, "tensor", "ICI, line of 4"),
        ("2*v5p:4x4x8", {"data": 2, "fsdp": 128}, "data", "DCN, 2 slices"),
        ("2*v6e:4x4", {"data": 8, "fsdp": 4}, "data", "DCN, 2 slices; ICI, line of 4"),
        ("4*h100:8", {"data": 4, "fsdp": 8}, "fsdp", "NVLink, 8"),
        ("2*v5p:4x4x4", {"stage": 2, "fsdp": 64}, "stage", "DCN, 2 slices"),
    ],
)
def test_placement_says_what_carries_an_axis(topology, mesh, axis, words):
    placement = links(topology, **mesh).placement
    assert placement[axis] == words
    assert set(placement) == {name for name, size in mesh.items() if size > 1}


def test_gradients_between_slices_go_once_there_and_back():
    machine = parse_topology("2*v6e:16x16")
    found = links_of(machine, MeshShape(data=2, fsdp=256))
    # v6e: 12.5 GB/s a chip, of which psum was measured to get a third.
    assert dcn_sum_s(machine, found, 1e9) == pytest.approx(1e9 / (12.5e9 * 0.33))
    alone = links_of(parse_topology("v6e:16x16"), MeshShape(fsdp=256))
    assert dcn_sum_s(parse_topology("v6e:16x16"), alone, 1e9) == 0
