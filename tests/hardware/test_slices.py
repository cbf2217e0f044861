"""Names of machines become topologies, or errors that say what to write."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.errors import ConfigError
from llmos_jax.hardware import CHIPS, parse_topology, topology_of_devices
from llmos_jax.units import GIB


@pytest.mark.parametrize(
    ("name", "canonical", "chips", "devices"),
    [
        ("cpu:8", "cpu:8", 8, 8),
        ("v5e:4x4", "v5e:4x4", 16, 16),
        ("v5e:1x1", "v5e:1x1", 1, 1),
        ("v6e:16x16", "v6e:16x16", 256, 256),
        ("v5p:4x4x8", "v5p:4x4x8", 128, 128),
        ("v5p:8x4x4", "v5p:4x4x8", 128, 128),
        ("v5p:16x20x28", "v5p:16x20x28", 8960, 8960),
        ("v4:2x2x4", "v4:2x2x4", 16, 16),
        ("v4:2x2x1", "v4:2x2x1", 4, 4),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128),
        ("h100:8", "h100:8", 8, 8),
        ("h100:1", "h100:1", 1, 1),
        ("2*v6e:16x16", "2*v6e:16x16", 512, 512),
        ("1*v6e:16x16", "v6e:16x16", 256, 256),
        ("4*h100:8", "4*h100:8", 32, 32),
        (" 4*h100:8 ", "4*h100:8", 32, 32),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-2048", "v5p:8x8x16", 1024, 1024),
        ("2*v5p-128", "2*v5p:4x4x4", 128, 128),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128),
        ("v4-128", "v4:4x4x4", 64, 64),
    ],
)
def test_name_parses(name, canonical, chips, devices):
    topology = parse_topology(name)
    assert (topology.name, topology.chips) == (canonical, chips)
    assert topology.num_devices == devices
    assert parse_topology(canonical) == topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", r"unknown chip 'v5x'. Did you mean 'v5[ep]'\?"),
        ("h101:8", r"unknown chip 'h101'. Did you mean 'h100'\?"),
        ("", "is no machine's name"),
        ("v5e", "is no machine's name"),
        ("v5e:", "'' is no shape"),
        ("v5e:4x", "'4x' is no shape"),
        ("v5e:axb", "'axb' is no shape"),
        ("v5e:-4x4", "'-4x4' is no shape"),
        ("cpu:0", "every dimension must be at least 1"),
        ("v5e:0x4", "every dimension must be at least 1"),
        ("v5e:16", "v5e takes a 2-D torus, not 1 numbers; as in v5e:4x4"),
        ("v5p:4x4", "v5p takes a 3-D torus, not 2 numbers; as in v5p:4x4x4"),
        ("h100:2x4", "h100 takes one number of chips"),
        ("v5e:3x5", "no v5e slice has this shape. Slices: 2x2, 2x4"),
        ("v5p:4x4x6", "every dimension is a multiple of 4"),
        (
            "v6e:32x32",
            "1024 chips do not fit in one v6e slice, whose",
        ),
        ("v5p:16x16x64", "16384 chips do not fit"),
        ("h100:16", r"one NVLink domain of 8 GPUs. Write 2\*h100:8"),
        ("0*v6e:16x16", "'0' slices"),
        ("x*v6e:16x16", "'x' slices"),
        ("v5p-100", "counts cores, 2 a chip.*nearest: v5p-64 and v5p-128"),
        ("v5p-7", "no v5p slice of this size"),
        ("v6e-512", "512 chips do not fit in one v6e slice"),
        ("v9-128", "unknown Cloud TPU 'v9'"),
        ("h100-8", "Write h100:8"),
    ],
)
def test_bad_name_says_what_to_write(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("v4:2x2x4", (False, False, False)),
        ("h100:8", (False,)),
    ],
)
def test_rings_close_where_the_hardware_closes_them(name, wraps):
    assert parse_topology(name).wraps == wraps


@pytest.mark.parametrize(
    ("name", "gib"),
    [("v5e:4x4", 15.75), ("v6e:2x2", 31.25), ("v4:2x2x1", 30.75)]
    + [("v5p:4x4x4", 95.74), ("tpu7x:4x4x4", 94.75)],
)
def test_usable_memory_is_what_the_compiler_allows(name, gib):
    assert parse_topology(name).hbm_bytes_per_device == pytest.approx(gib * GIB)


def test_cpu_devices_share_the_machine():
    one, eight = parse_topology("cpu:1"), parse_topology("cpu:8")
    assert eight.hbm_bytes_per_device * 8 == pytest.approx(one.hbm_bytes_per_device)


@pytest.mark.parametrize(
    ("platform", "kind", "count", "slices", "name"),
    [
        ("cpu", "cpu", 8, 1, "cpu:8"),
        ("tpu", "TPU v4", 16, 1, "v4:2x2x4"),
        ("tpu", "TPU v5 lite", 8, 1, "v5e:2x4"),
        ("tpu", "TPU v5", 64, 1, "v5p:4x4x4"),
        ("tpu", "TPU v5p", 4, 1, "v5p:2x2x1"),
        ("tpu", "TPU v6 lite", 512, 2, "2*v6e:16x16"),
        ("tpu", "TPU7x", 128, 1, "tpu7x:4x4x4"),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, 1, "h100:8"),
        ("cuda", "NVIDIA A100-SXM4-80GB", 16, 2, "2*a100:8"),
        ("cuda", "NVIDIA B200", 1, 1, "b200:1"),
    ],
)
def test_reported_devices_become_a_topology(platform, kind, count, slices, name):
    assert topology_of_devices(platform, kind, count, slices=slices).name == name


def test_reported_memory_wins_over_the_table():
    topology = topology_of_devices("tpu", "TPU7x", 8, memory_bytes=90e9)
    assert topology.hbm_bytes_per_device == 90e9


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("AMD Instinct MI300X", 8, "'AMD Instinct MI300X'.*--set topology="),
        ("NVIDIA GB200", 8, "'NVIDIA GB200'.*--set topology="),
        ("NVIDIA H100 80GB HBM3", 9, "no h100 slice has 9 chips.*--set topology="),
        ("TPU7x", 3, "whole number of tpu7x chips"),
        ("NVIDIA H100 80GB HBM3", 0, "0 devices"),
    ],
)
def test_unknown_devices_name_the_remedy(kind, count, message):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    with pytest.raises(ConfigError, match=message):
        topology_of_devices(platform, kind, count)


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_a_source_and_sane_figures(name):
    chip = CHIPS[name]
    assert chip.name == name and len(chip.source) > 20
    assert all(peak > 1e9 for peak in chip.peak_flops_per_s.values())
    shares = (chip.matmul_efficiency, chip.hbm_efficiency, chip.link_efficiency)
    assert all(0 < share <= 1 for share in shares)


@given(st.text(alphabet="vh5e6p4x10:*-cpu ", max_size=14))
def test_any_text_parses_or_is_a_config_error(text):
    try:
        topology = parse_topology(text)
    except ConfigError:
        return
    assert topology.chips == topology.slices * math.prod(topology.shape) > 0
