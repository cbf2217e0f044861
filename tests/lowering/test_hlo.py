"""HLO text: instructions, groups, loops and fused forms, each as XLA printed it."""

from __future__ import annotations

import pytest
from jax.sharding import Mesh

from llmos_jax.errors import LowerError
from llmos_jax.lowering.collectives import collectives_of
from llmos_jax.lowering.groups import parse_dcn_groups, parse_groups
from llmos_jax.lowering.hlo import Instruction, arrays_of, parse_hlo

RAGGED_TUPLE = (
    "(bf16[1,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, /*index=2*/f8e4m3fn[3])"
)


def line(attributes: str) -> Instruction:
    return Instruction("%x", "f32[8]", "all-gather", "%y", ", " + attributes, False)


def program(*computations: str, partitions: int = 8) -> str:
    head = f"HloModule jit_f, num_partitions={partitions}"
    return "\n\n".join([head, *computations])


def test_a_shape_counts_every_array_of_a_tuple_without_its_layout():
    arrays = arrays_of(RAGGED_TUPLE)
    assert [array.dims for array in arrays] == [(1, 64), (), (3,)]
    assert [array.bytes for array in arrays] == [128, 4, 3]


def test_four_bit_elements_take_half_a_byte():
    assert arrays_of("s4[3,5]{1,0}")[0].bytes == 8


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups={}, to_apply=%add", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        (
            "channel_id=3, replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}",
            ((0, 4), (2, 6), (1, 5), (3, 7)),
        ),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x={0}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, u=true",
            ((0, 1), (2, 3)),
        ),
        ("source_target_pairs={{0,1},{1,0}}, metadata={}", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_form_that_xla_prints(text, wanted):
    assert parse_groups(line(text), 4) == wanted


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ('"{1,2}x{0:1}"', ((100000, 200000), (100001, 200001))),
        ("{{100000,200000},{100001,200001}}", ((100000, 200000), (100001, 200001))),
        ("{{100000->200000},{200000->100000}}", ((100000, 200000), (200000, 100000))),
    ],
)
def test_what_crosses_slices_names_device_ids(target, wanted):
    text = f'frontend_attributes={{a="b",_xla_megascale_target={target},c="d"}}'
    assert parse_dcn_groups(line(text)) == wanted


LOOP = """%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %ag = f32[16]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %y = f32[8]{0} slice(%ag), slice={[0:8]}
  ROOT %t = (u32[]{:T(128)}, f32[8]{0}) tuple(%next, %y)
}"""
CONDITION = """%condition (p.1: (u32[], f32[8])) -> pred[] {
  %p.1 = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %end = u32[] constant(8)
  ROOT %lt = pred[] compare(%i.1, %end), direction=LT
}"""


def entry(start: str, attributes: str = "") -> str:
    return f"""ENTRY %main (a: f32[8], n: u32[]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %n = u32[] parameter(1)
  %zero = u32[] {start}
  %start = (u32[], f32[8]{{0}}) tuple(%zero, %a)
  %loop = (u32[], f32[8]{{0}}) while(%start), condition=%condition, \
body=%body{attributes}
  ROOT %r = f32[8]{{0}} get-tuple-element(%loop), index=1
}}"""


def test_a_loop_without_a_named_length_is_followed():
    runs = parse_hlo(program(LOOP, CONDITION, entry("constant(1)"))).runs()
    assert (runs["%body"].count, runs["%body"].is_known) == (4, True)


def test_the_length_that_the_text_names_is_taken():
    named = ', backend_config={"known_trip_count":{"n":"7"},"x":1}'
    runs = parse_hlo(program(LOOP, CONDITION, entry("copy(%n)", named))).runs()
    assert runs["%body"].count == 7


def test_a_loop_that_depends_on_data_is_counted_once_and_says_so():
    runs = parse_hlo(program(LOOP, CONDITION, entry("copy(%n)"))).runs()
    assert (runs["%body"].count, runs["%body"].is_known) == (1, False)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(LowerError, match="ENTRY"):
        parse_hlo("module @jit_f attributes {}")


class _Device:
    def __init__(self, number: int):
        self.id, self.slice_index = number, None


def fake_mesh(**sizes: int) -> Mesh:
    import programs

    return programs.mesh_of([_Device(n) for n in range(8)], **sizes)


def one(*computations: str):
    found = collectives_of(program(*computations), fake_mesh(data=2, fsdp=4))
    assert len(found) == 1, found
    return found[0]


ASYNC = """%start (p: f32[8]) -> (f32[8], f32[32]) {
  %p = f32[8]{0} parameter(0)
  %ag.1 = f32[32]{0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %c = (f32[8]{0}, f32[32]{0}) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}

%step (q: f32[8]) -> f32[32] {
  %q = f32[8]{0} parameter(0)
  ROOT %ag.2 = f32[32]{0} all-gather(%q), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) fusion(%a), kind=kCustom, calls=%start
  ROOT %f = f32[32]{0} fusion(%a), kind=kOutput, calls=%step
}"""

SCATTER = """%all-reduce-scatter (p: f32[32]) -> f32[8] {
  %p = f32[32]{0} parameter(0)
  %ar = f32[32]{0} all-reduce(%p), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %id), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[32]) -> f32[8] {
  %a = f32[32]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter, \
metadata={op_name="jit(f)/dot_general"}
}"""

STARTED = """ENTRY %main (a: f32[8], b: bf16[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  %s = ((f32[8]{0}, bf16[8]{0}), (f32[32]{0}, bf16[32]{0})) all-gather-start(%a, %b), \
replica_groups=[2,4]<=[8], dimensions={0}
  %d = (f32[32]{0}, bf16[32]{0}) all-gather-done(%s)
  ROOT %r = f32[32]{0} get-tuple-element(%d), index=0
}"""

GATHERED_BY_A_SUM = """%write (z: f32[32], p: f32[8], i: s32[]) -> f32[32] {
  %z = f32[32]{0} parameter(0)
  %p = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %dus = f32[32]{0} dynamic-update-slice(%z, %p, %i)
}

ENTRY %main (a: f32[8], i: s32[]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[32]{0} broadcast(%zero), dimensions={}
  %f = f32[32]{0} fusion(%zeros, %a, %i.1), kind=kLoop, calls=%write
  ROOT %ar = f32[32]{0} all-reduce(%f), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}"""

PALLAS = """ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/pallas_call"}
  ROOT %ag = f32[32]{0} all-gather(%k), replica_groups=[2,4]<=[8], dimensions={0}
}"""

RING = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%a), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %d = f32[8]{0} collective-permute-done(%s)
}"""


@pytest.mark.parametrize(
    ("text", "op", "num_bytes"),
    [
        (ASYNC, "all-gather", 128),
        (SCATTER, "reduce-scatter", 128),
        (STARTED, "all-gather", 32 * 4 + 32 * 2),
        (GATHERED_BY_A_SUM, "all-gather", 128),
        (PALLAS, "all-gather", 128),
        (RING, "collective-permute", 32),
    ],
    ids=[
        "async fusion",
        "all-reduce-scatter",
        "combined start",
        "sum of own parts",
        "kernel",
        "ring",
    ],
)
def test_each_form_counts_once_over_its_axes_with_its_whole_payload(
    text, op, num_bytes
):
    found = one(text)
    assert (found.op, found.axes, found.count) == (op, ("fsdp",), 1)
    assert (found.bytes, found.link) == (num_bytes, "ici")


def test_a_sum_of_own_parts_and_of_gradients_is_taken_apart():
    text = GATHERED_BY_A_SUM.replace(
        "  ROOT %ar = f32[32]{0} all-reduce(%f), ",
        "  %g = f32[64]{0} broadcast(%a), dimensions={0}\n"
        "  ROOT %ar = (f32[32]{0}, f32[64]{0}) all-reduce(%f, %g), ",
    )
    found = collectives_of(program(text), fake_mesh(data=2, fsdp=4))
    said = {item.op: (item.bytes, [a.elements for a in item.arrays]) for item in found}
    assert said == {"all-gather": (128, [32]), "all-reduce": (256, [64])}


def test_a_collective_in_a_loop_counts_every_iteration():
    found = one(LOOP, CONDITION, entry("constant(0)"))
    assert (found.count, found.bytes, found.total_bytes) == (4, 64, 256)


def test_the_source_of_a_fused_collective_is_its_fusions():
    assert one(SCATTER).where == "jit(f)/dot_general"


def test_a_mesh_of_another_size_is_refused():
    text = program(SCATTER, partitions=4)
    with pytest.raises(LowerError, match="4 devices.*8 in 1 slices"):
        collectives_of(text, fake_mesh(data=2, fsdp=4))


def test_devices_of_two_slices_make_it_dcn():
    found = collectives_of(
        program(SCATTER), fake_mesh(data=2, fsdp=4), [0, 0, 1, 1, 0, 0, 1, 1]
    )
    assert [item.link for item in found] == ["dcn"]
