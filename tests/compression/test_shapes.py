"""Sizes for a share of the parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmos_jax import hardware
from llmos_jax.compression import Candidate, Cost, Shape, multiple_of, shapes
from llmos_jax.compression.prune import promising
from llmos_jax.compression.shapes import TOLERANCE
from llmos_jax.config import load_model
from llmos_jax.config.schema import PruneSection
from llmos_jax.errors import ConfigError


@pytest.fixture(scope="module")
def spec():
    return load_model("smollm2_135m")


@pytest.mark.parametrize("keep", [0.5, 0.67, 0.8])
def test_shapes_have_the_asked_parameters_in_suitable_widths(spec, keep):
    found = shapes(spec, PruneSection(keep=keep), 32)
    assert len({shape.shrinks(spec) for shape in found}) >= 6
    for shape in found:
        made = shape.of(spec)
        assert abs(made.num_params / (keep * spec.num_params) - 1) <= TOLERANCE
        assert shape.ffn_dim % 32 == 0 and shape.embed_dim % 32 == 0
        assert made.num_heads == 3 * made.num_kv_heads and made.head_dim == 64


def test_pins_and_what_may_not_shrink_are_kept(spec):
    asked = PruneSection(num_layers=24, shrink=("ffn", "layers"))
    found = shapes(spec, asked, 64)
    assert {(s.num_layers, s.embed_dim, s.num_kv_heads) for s in found} == {
        (24, 576, 3)
    }
    whole = PruneSection(ffn_dim=1000, num_kv_heads=2, embed_dim=500, num_layers=7)
    (shape,) = shapes(spec, whole, 128)
    assert shape == Shape(num_layers=7, embed_dim=500, num_kv_heads=2, ffn_dim=1000)


def test_depth_alone(spec):
    (shape,) = shapes(spec, PruneSection(shrink=("layers",)), 32)
    assert shape.shrinks(spec) == {"num_layers"} and 16 <= shape.num_layers <= 19


def test_the_name_says_how_many_parameters_are_left(spec):
    (shape,) = shapes(spec, PruneSection(shrink=("layers",)), 32)
    made = shape.of(spec)
    assert made.name == f"{spec.name}-{made.num_params / 1e6:.0f}m"


@pytest.mark.parametrize(
    ("topology", "multiple"), [("v5e:2x2", 128), ("h100:1", 64), ("cpu:1", 32)]
)
def test_widths_suit_the_chip(topology, multiple):
    chip = hardware.parse_topology(topology)
    assert multiple_of(PruneSection(), chip) == multiple
    assert multiple_of(PruneSection(multiple=48), chip) == 48


MISTAKES = {
    "all": ({"keep": 1.0}, "between 0 and 1"),
    "nothing": ({"keep": 0.0}, "between 0 and 1"),
    "too wide": ({"ffn_dim": 5000}, "has 1536"),
    "no heads": ({"num_kv_heads": 0}, "between 1 and all"),
    "nothing may": ({"shrink": ()}, "nothing may become smaller"),
    "nothing does": ({"shrink": ("embed",), "embed_dim": 576}, "no shape smaller"),
    "none tried": ({"candidates": 0}, "at least one shape"),
    "no step": ({"multiple": 0}, "at least 1"),
}


@pytest.mark.parametrize(("asked", "told"), MISTAKES.values(), ids=MISTAKES)
def test_what_makes_no_sense_is_refused(asked, told, spec):
    with pytest.raises(ConfigError, match=told):
        shapes(spec, PruneSection(**asked), 32)


def candidate(spec, lost, problem=None, **sizes):
    """Of a shape that is whole but for these sizes."""
    shape = Shape(num_layers=30, embed_dim=576, num_kv_heads=3, ffn_dim=1536)
    shape = replace(shape, **sizes)
    cost = Cost(problem=problem)
    return Candidate(shape=shape, kept=None, params=1, lost=lost, cost=cost)


def test_every_way_to_shrink_has_its_turn(spec):
    narrow = [candidate(spec, 0.1 + n / 1000, ffn_dim=600 + n) for n in range(5)]
    flat = [candidate(spec, 0.5 + n / 1000, num_layers=20 - n) for n in range(5)]
    found = promising([*flat, *narrow], spec, 3)
    assert found == [narrow[0], flat[0], narrow[1]]


def test_what_cannot_be_served_is_left_out(spec):
    bad = candidate(spec, 0.1, "too large", ffn_dim=600)
    good = candidate(spec, 0.9, num_layers=10)
    assert promising([bad, good], spec, 2) == [good]
    assert promising([bad], spec, 2) == [bad]
    assert bad.to_json()["not_tried"] == "too large"
