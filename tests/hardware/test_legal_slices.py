"""Every machine of a chip, and the next one down and up."""

from __future__ import annotations

import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.hardware import CHIPS, legal_topologies, next_slices, parse_topology


@pytest.mark.parametrize("chip", CHIPS)
def test_every_machine_that_is_listed_can_be_named(chip):
    found = list(legal_topologies(chip, 128, 2))
    assert found
    for machine in found:
        assert parse_topology(machine.name).shape == machine.shape
        assert machine.chips <= 128
    assert [one.chips for one in found] == sorted(one.chips for one in found)
    assert len({one.name for one in found}) == len(found)


def test_flat_slices_are_the_eight_that_exist():
    names = [one.name for one in legal_topologies("v5e", 256)]
    assert names[0] == "v5e:1x1" and names[-1] == "v5e:16x16" and len(names) == 8


def test_gpus_come_in_powers_of_two_and_then_in_whole_hosts():
    names = [one.name for one in legal_topologies("h100", 24, 3)]
    assert names == ["h100:1", "h100:2", "h100:4", "h100:8", "2*h100:8", "3*h100:8"]


def test_no_machine_is_small_enough():
    assert list(legal_topologies("v5e", 0)) == []


def test_an_unknown_chip_is_refused():
    with pytest.raises(ConfigError, match="v9z"):
        list(legal_topologies("v9z", 8))


@pytest.mark.parametrize(
    ("name", "smaller", "larger"),
    [
        ("v5e:4x4", "v5e:2x4", "v5e:4x8"),
        ("v5p:4x4x4", "v5p:2x4x4", "v5p:4x4x8"),
        ("v5p:8x8x16", "v5p:8x8x8", "v5p:8x16x16"),
        ("v6e:1x1", None, "v6e:2x2"),
        ("v6e:16x16", "v6e:8x16", "2*v6e:16x16"),
        ("2*v6e:1x1", "v6e:1x1", "2*v6e:2x2"),
        ("h100:8", "h100:4", "2*h100:8"),
        ("4*h100:8", "2*h100:8", "8*h100:8"),
    ],
)
def test_the_next_slices(name, smaller, larger):
    found = [one and one.name for one in next_slices(parse_topology(name))]
    assert found == [smaller, larger]
