"""Rules and a mesh give every array its split; nothing is guessed."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_table import spec_of, table_of

from llmos_jax.errors import RuleError
from llmos_jax.ir import MeshShape, ParamRow, ParamTable
from llmos_jax.rules import check_rules, load_rules, resolve, resolve_activation
from llmos_jax.rules.resolve import nearest_divisors

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = load_rules("llama")
MESHES = {
    "one": MeshShape(),
    "fsdp8": MeshShape(fsdp=8),
    "data2_fsdp4_tensor2": MeshShape(data=2, fsdp=4, tensor=2),
    "tensor8": MeshShape(tensor=8),
}


def one_row(axes, shape):
    row = ParamRow(path="w", shape=shape, dtype="float32", axes=axes)
    return ParamTable(name="toy", rows=(row,))


@pytest.mark.parametrize("label", MESHES)
def test_llama_resolves_to_the_golden_table(label):
    table, mesh = table_of("llama3_8b"), MESHES[label]
    specs = resolve(LLAMA, table, mesh)
    lines = [f"# llama3_8b, rules llama, mesh {mesh}"]
    for row in table.rows:
        spec = ", ".join(
            "-" if entry is None else str(entry) for entry in specs[row.path]
        )
        lines.append(f"{row.path:<28} {'x'.join(map(str, row.shape)):<18} {spec}")
    text = "\n".join(lines) + "\n"
    path = GOLDEN / f"llama_specs_{label}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), "UPDATE_GOLDEN=1 writes the golden tables anew"


def test_batch_is_split_over_both_of_its_axes():
    mesh = MeshShape(data=2, fsdp=4, tensor=2)
    spec = resolve_activation(LLAMA, ("batch", "seq", "ffn"), (8, 16, 64), mesh)
    assert spec == (("data", "fsdp"), None, "tensor")


def test_dimension_that_does_not_divide_has_both_numbers():
    with pytest.raises(RuleError, match=r"kv_heads = 8 is not divisible by tensor=16"):
        resolve(LLAMA, table_of("llama3_8b"), MeshShape(tensor=16))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshShape(data=16, stage=3), "layers = 80 is not divisible by stage=3; "
         "nearest: stage=2 or stage=4"),
        (MeshShape(tensor=16), "kv_heads = 8 is not divisible by tensor=16; nearest: "
         r"tensor=8 \("),
        (MeshShape(data=16, fsdp=3), "embed = 8192 is not divisible by fsdp=3; "
         "nearest: fsdp=2 or fsdp=4"),
    ],
)  # fmt: skip
def test_dimension_that_does_not_divide_says_what_would(mesh, message):
    with pytest.raises(RuleError, match=message):
        resolve(LLAMA, table_of("llama3_70b"), mesh)


def test_axes_that_split_together_are_told_together():
    message = "residual = 96 is not divisible by context=4 x tensor=5; nearest: "
    mesh = MeshShape(data=24, context=4, tensor=5)
    with pytest.raises(RuleError, match=message + "context x tensor = 16 or 24"):
        resolve_activation(LLAMA, ("residual",), (96,), mesh)


def test_nearest_ways_of_a_repeated_axis_are_multiples_too():
    rules = load_rules("llama", "decode")
    with pytest.raises(RuleError, match="tensor=12; nearest: tensor=8 or tensor=16"):
        resolve(rules, table_of("llama3_8b"), MeshShape(tensor=12))


@given(st.integers(1, 2000), st.integers(1, 3000))
def test_nearest_divisors_are_the_nearest(size, ways):
    parts = [part for part in range(1, size + 1) if size % part == 0]
    below = [part for part in parts if part < ways][-1:]
    above = [part for part in parts if part > ways][:1]
    assert nearest_divisors(size, ways) == below + above


def test_uneven_replicate_keeps_the_dimension_whole():
    rules = replace(LLAMA, uneven="replicate")
    specs = resolve(rules, table_of("llama3_8b"), MeshShape(tensor=16))
    assert specs["layers.attention.k"] == (None, None, None, None)
    assert specs["layers.attention.q"] == (None, None, "tensor", None)


def test_decode_lets_devices_hold_the_same_heads():
    rules, table = load_rules("llama", "decode"), table_of("llama3_8b")
    specs = resolve(rules, table, MeshShape(tensor=16))
    assert specs["layers.attention.k"] == (None, None, "tensor", None)
    with pytest.raises(RuleError, match="kv_heads = 8 is not divisible by tensor=12"):
        resolve(rules, table, MeshShape(tensor=12))


def test_collision_names_both_logical_axes():
    table = one_row(("heads", "ffn"), (8, 8))
    message = r"llama.toml:\d+: mesh axis 'tensor' would split w twice, along "
    with pytest.raises(RuleError, match=message + "'heads' and along 'ffn'"):
        resolve(LLAMA, table, MeshShape(tensor=2))


def test_missing_rule_says_how_to_add_it():
    rules = replace(LLAMA, weights={"embed": ()})
    with pytest.raises(RuleError, match=r"no rule.*Add vocab = \[\]"):
        check_rules(rules, table_of("tiny"))


def test_unused_rule_is_an_error():
    table = replace(one_row(("embed",), (8,)), spec=spec_of("tiny"))
    with pytest.raises(RuleError, match=r"llama.toml:\d+: model toy has no logical"):
        check_rules(LLAMA, table)


def test_module_of_ones_own_may_use_a_part():
    check_rules(LLAMA, one_row(("embed", "ffn"), (8, 8)))


def test_unknown_axis_of_a_model_is_an_error():
    with pytest.raises(RuleError, match="unknown logical axis 'embde'. Did you mean"):
        check_rules(LLAMA, one_row(("embde",), (8,)))


def test_axes_must_match_the_shape():
    with pytest.raises(RuleError, match="give one per dimension"):
        check_rules(LLAMA, one_row(("embed",), (8, 8)))
    with pytest.raises(RuleError, match="has 1 axes"):
        resolve_activation(LLAMA, ("batch",), (8, 8), MeshShape())


def test_rules_without_a_batch_are_refused():
    activations = {k: v for k, v in LLAMA.activations.items() if k != "batch"}
    with pytest.raises(RuleError, match="nothing splits the batch"):
        check_rules(replace(LLAMA, activations=activations), table_of("tiny"))


@pytest.mark.parametrize("model", ["tiny", "smollm2_135m", "llama3_405b"])
def test_llama_rules_fit_every_llama_model(model):
    check_rules(LLAMA, table_of(model))


@given(*(st.sampled_from([1, 2, 4]) for _ in range(3)))
def test_resolve_is_total_and_uses_each_mesh_axis_once(data, fsdp, tensor):
    mesh, table = MeshShape(data=data, fsdp=fsdp, tensor=tensor), table_of("tiny")
    specs = resolve(LLAMA, table, mesh)
    assert set(specs) == {row.path for row in table.rows}
    for row in table.rows:
        flat = [axis for axis in specs[row.path] if axis is not None]
        assert len(specs[row.path]) == len(row.shape) and len(set(flat)) == len(flat)
        assert row.size % math.prod(mesh.sizes[axis] for axis in flat) == 0
