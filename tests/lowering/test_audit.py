"""The audit passes programs that do what their plan means, and no other."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from programs import D, F, L, Wrongs, compiled_text, mesh_of, plan_of, tpu_devices

from llmos_jax.ir import MESH_AXES
from llmos_jax.lowering.audit import RULES, audit
from llmos_jax.lowering.collectives import Collective, collectives_of, table
from llmos_jax.lowering.hlo import Array

MESHES = [
    {"fsdp": 8},
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def replicate(value, mesh):
    whole = NamedSharding(mesh, jax.P())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), value)


def keep_tensor(value, mesh):
    """Gather over fsdp only, all layers at once: a gather that left its loop."""
    specs = {
        "layers.up": jax.P(None, None, "tensor"),
        "layers.down": jax.P(None, "tensor", None),
        "layers.norm": jax.P(),
    }
    return {
        path: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[path]))
        for path, x in value.items()
    }


UNSPLIT = Wrongs(keep=lambda spec, mesh: jax.P())
WRONG = {
    "all layers at once": (Wrongs(stacked=replicate), {"fsdp": 8}, "4 layers"),
    "gather before the loop": (
        Wrongs(stacked=keep_tensor),
        {"fsdp": 4, "tensor": 2},
        "4 layers",
    ),
    "weights not split": (UNSPLIT, {"fsdp": 8}, "its weight is split over fsdp"),
    "activations gathered": (Wrongs(x=replicate), {"fsdp": 8}, "has this size"),
    "tensor gathered": (
        Wrongs(layer=replicate),
        {"fsdp": 4, "tensor": 2},
        "has this size",
    ),
}

DISSOLVED = "activations gathered"
"""XLA:TPU drops this constraint beside the right one: nothing wrong is compiled."""


def run(topology, sizes, wrongs=None, devices=None, mesh=None):
    """Compile the step of a plan and audit it: (rows of the table, reasons)."""
    plan = plan_of(topology, **sizes)
    text, mesh = compiled_text(plan, devices, mesh, wrongs)
    found = collectives_of(text, mesh)
    return table(found), [one.why for one in audit(found, plan)]


def row(rows, op, *axes):
    found = [row for row in rows if (row["op"], row["axes"]) == (op, list(axes))]
    assert len(found) == 1, rows
    return found[0]


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu")
    return tpu_devices("v5e:2x4")


@pytest.fixture(scope="module")
def two_slices():
    pytest.importorskip("libtpu")
    return tpu_devices("v5e:2x4", num_slices=2)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_right_program_passes_on_cpu(sizes):
    rows, reasons = run("cpu:8", sizes)
    assert rows and reasons == []


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_right_program_passes_on_tpu(sizes, v5e):
    rows, reasons = run("v5e-8", sizes, devices=v5e)
    assert rows and reasons == []


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_program_is_flagged_on_cpu(wrong):
    wrongs, sizes, words = WRONG[wrong]
    reasons = run("cpu:8", sizes, wrongs)[1]
    assert any(words in why for why in reasons), reasons


@pytest.mark.parametrize("wrong", [name for name in WRONG if name != DISSOLVED])
def test_a_wrong_program_is_flagged_on_tpu(wrong, v5e):
    wrongs, sizes, words = WRONG[wrong]
    reasons = run("v5e-8", sizes, wrongs, devices=v5e)[1]
    assert any(words in why for why in reasons), reasons


def test_bytes_and_counts_are_those_worked_by_hand(v5e):
    """fsdp=8, bf16: each of 2 L matrices is gathered forward and backward."""
    rows, _ = run("v5e-8", {"fsdp": 8}, devices=v5e)
    gathers = row(rows, "all-gather", "fsdp")
    assert (gathers["count"], gathers["bytes"]) == (4 * L, 4 * L * D * F * 2)
    scatters = row(rows, "reduce-scatter", "fsdp")
    assert scatters["bytes"] == 2 * L * D * F * 2
    assert {row["link"] for row in rows} == {"ici"}


def test_every_row_of_the_table_names_its_line_in_the_source(v5e):
    rows, _ = run("v5e-8", {"fsdp": 4, "tensor": 2}, devices=v5e)
    assert all("programs.py:" in row["where"] for row in rows), rows


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 4}], ids=str
)
def test_between_slices_only_gradients_are_summed(sizes, two_slices):
    rows, reasons = run("2*v5e:2x4", sizes, devices=two_slices)
    assert reasons == []
    across = [(row["op"], row["axes"]) for row in rows if row["link"] == "dcn"]
    assert across == [("all-reduce", ["data"])]


def test_gradient_bytes_over_dcn_are_the_parts_of_one_device(two_slices):
    rows, _ = run("2*v5e:2x4", {"data": 4, "fsdp": 4}, devices=two_slices)
    [across] = [row for row in rows if row["link"] == "dcn"]
    weights = 2 * L * D * F * 2 // 4 // 2
    norms = L * D * 2
    assert weights <= across["bytes"] <= weights + 4 * norms


def test_weights_gathered_between_slices_are_flagged(two_slices):
    """fsdp crosses slices where data should."""
    order = np.array(two_slices).reshape(2, 2, 4).transpose(1, 0, 2).ravel()
    sizes = {"data": 2, "fsdp": 8}
    mesh = mesh_of(order.tolist(), **sizes)
    _, reasons = run("2*v5e:2x4", sizes, mesh=mesh)
    assert any(why.startswith("all-gather between slices") for why in reasons)


def test_activations_summed_between_slices_are_flagged(two_slices):
    order = np.array(two_slices).reshape(2, 8).T.ravel()
    sizes = {"data": 8, "tensor": 2}
    _, reasons = run("2*v5e:2x4", sizes, mesh=mesh_of(order.tolist(), **sizes))
    assert "activations are summed over tensor between slices." in reasons


@pytest.mark.parametrize("order", [range(8), [5, 0, 3, 6, 1, 7, 2, 4]], ids=str)
def test_groups_are_positions_on_the_mesh_whatever_the_devices(order, v5e):
    """Three sums of three sizes, each over axes of its own."""
    mesh = mesh_of([v5e[n] for n in order], data=2, fsdp=2, tensor=2)
    over = {1024: "data", 2048: ("fsdp", "tensor"), 4096: "tensor"}

    def sums(*xs):
        axes = over.values()
        return tuple(jax.lax.psum(x, one) for x, one in zip(xs, axes))

    specs = (jax.P(),) * 3
    mapped = jax.shard_map(
        sums, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
    whole = NamedSharding(mesh, jax.P())
    xs = [jax.ShapeDtypeStruct((n,), np.float32, sharding=whole) for n in over]
    text = jax.jit(mapped).lower(*xs).compile().as_text()
    found = {item.bytes // 4: item.axes for item in collectives_of(text, mesh)}
    assert found == {1024: ("data",), 2048: ("fsdp", "tensor"), 4096: ("tensor",)}


def made(op, axes, dims, **more):
    array = Array("bf16", dims)
    values = {"op": op, "axes": axes, "link": "ici", "count": 4, "bytes": array.bytes}
    values |= {"where": "here", "arrays": (array,), "sliced": (False,)} | more
    return Collective(**values)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (made("all-reduce", ("expert",), (D, F)), "splits nothing over expert"),
        (made("all-gather", ("data",), (D, F)), "no weight is split over data"),
        (made("all-to-all", ("tensor",), (96, D)), "exchanges nothing there"),
        (made("all-to-all", ("fsdp",), (192, D), count=99), "exchanges nothing"),
        (made("collective-permute", ("data", "fsdp"), (D, F)), "resharding"),
        (made("collective-permute", ("fsdp",), (D, F)), "resharding"),
        (made("all-reduce", ("fsdp",), (288, D)), "summed over fsdp, and no weight"),
        (made("reduce-scatter", ("fsdp",), (288, D)), "scatters nothing of this size"),
        (made("reduce-scatter", ("fsdp",), (F // 2 + F // 16, D)), "nothing of this"),
        (made("all-reduce", ("tensor",), (7, 999)), "no activation has this size"),
        (made("all-gather", ("fsdp",), (D, F // 2), count=999), "together move"),
        (made("all-reduce", ("data",), (5,), is_count_known=False), "loop whose"),
        (made("all-gather", ("tensor",), (D, F)), "uses in parts"),
        (made("collective-broadcast", ("data",), (D, F)), "exchanges nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_objects_with_its_sentence(item, words):
    plan = plan_of("v5e-8", data=2, fsdp=2, tensor=2)
    reasons = [one.why for one in audit([item], plan)]
    assert len(reasons) == 1 and words in reasons[0], reasons


@pytest.mark.parametrize(
    "item",
    [
        made("all-gather", ("fsdp",), (1, D, F // 2)),
        made("collective-permute", ("fsdp",), (D // 2, F // 2)),
        made("reduce-scatter", ("fsdp",), (F // 2, D)),
        made("reduce-scatter", ("fsdp",), (F // 2 + F // 64, D)),
        made("all-reduce", ("data",), (D // 2, F // 2)),
        made("all-reduce", ("data", "fsdp"), (D,)),
        made("all-reduce", ("tensor",), (4, 48, D)),
        made("all-to-all", ("fsdp",), (2, 2, 48, D), count=2),
        made("all-gather", ("fsdp",), (16, 48), arrays=(Array("s32", (16, 48)),)),
    ],
    ids=lambda item: f"{item.op} {item.axes}",
)
def test_what_the_plan_means_passes(item):
    assert audit([item], plan_of("v5e-8", data=2, fsdp=2, tensor=2)) == ()


def test_a_sum_on_cpu_counts_as_a_scatter_only_if_its_slices_are_read():
    plan = plan_of("cpu:8", fsdp=8)
    item = made("all-reduce", ("fsdp",), (D, F), sliced=(True,))
    assert audit([item], plan) == ()
    [one] = audit([dataclasses.replace(item, sliced=(False,))], plan)
    assert "reduce-scatter takes half" in one.why


def test_the_json_of_an_unplanned_collective_has_the_keys_scripts_read():
    item = made("all-gather", ("data",), (D, F))
    [one] = audit([item], plan_of("v5e-8", data=2, fsdp=4))
    assert one.to_json() == {
        "op": "all-gather",
        "axes": ["data"],
        "link": "ici",
        "count": 4,
        "bytes": 4 * D * F * 2,
        "where": "here",
        "why": one.why,
    }


@pytest.mark.parametrize(
    ("sliced", "unplanned"), [((True, False), 0), ((False, False), 1)]
)
def test_a_sum_of_which_only_the_own_slice_is_read_is_a_scatter(sliced, unplanned):
    """A norm's gradient that is summed along is small and changes nothing."""
    arrays = (Array("bf16", (D, F)), Array("bf16", (D,)))
    item = made("all-reduce", ("fsdp",), (D, F), arrays=arrays, sliced=sliced)
    assert len(audit([item], plan_of("v5e-8", fsdp=8))) == unplanned


def test_rules_are_named_for_what_they_look_at():
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
    assert all(rule.__doc__ for rule in RULES)


def test_axes_of_a_mesh_are_the_six_of_the_house(v5e):
    assert mesh_of(v5e, data=8).axis_names == MESH_AXES
