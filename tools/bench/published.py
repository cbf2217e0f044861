"""Turn published rows (published_perf.csv, model_dims.csv) into planner questions.

Not a bench of its own: planner_time.py and others import it. The files are not part of
the repository; LLMOS_FACTS or --rows says where they are.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import (
    MeshShape,
    ModelSpec,
    ParamRow,
    ParamTable,
    Topology,
    Way,
    Workload,
)

TENSOR_OF = {
    "decoder_layer_input": "layer_input",
    "query_proj": "query",
    "key_proj": "key",
    "value_proj": "value",
    "qkv_proj": "query,key,value",
    "context": "context",
    "out_proj": "out",
    "mlpwi_0": "ffn_gate",
    "mlpwi_1": "ffn_up",
    "mlpwi": "ffn_gate,ffn_up",
    "mlpwo": "ffn_out",
}
"""MaxText's names of saved tensors, and ours."""
POLICY_OF = {
    "": "query,key,value,context,out",  # AXLearn's default saves attention
    "full": "full",
    "minimal": "dots",
    "dots_saveable": "dots",
    "minimal_with_context": "query,key,value,context,out,ffn_gate,ffn_up,ffn_out",
    "minimal_flash": "query,key,value,context,out,ffn_gate,ffn_up,ffn_out",
    "save_dot_with_context_except_mlp": "query,key,value,context,out",
    "selective AC": "query,key,value,context,out",
    "full AC": "full",
}
FAMILIES = {"fuji": "llama2", "llama2": "llama2", "llama3": "llama3"}
# MaxText at the commit of the tables: pre-2025 rows count attention non-causally.
_GIVEN = {"fuji-7B-v1": "llama2-7b", "fuji-7B-v2": "llama2-7b"}
# From the models' own configurations, not from model_dims.csv, which has one ffn.
_MOE_EXTRA = {
    # model: (layers with experts, dense layers, dense ffn, shared experts)
    "deepseek3-671b": (58, 3, 18432, 1),
    "llama4-17b-128e": (24, 24, 16384, 1),
    "llama4-17b-16e": (48, 0, 0, 1),
}
_DIMS_EXTRA = {
    "llama4-17b-128e": "48,5120,40,8,128,8192,202048,2,128,1,8192",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One published run: what was asked, and the seconds a step took."""

    name: str
    family: str
    chip: str
    kind: str  # dense or moe
    dtype: str
    table: ParamTable
    topology: Topology
    workload: Workload
    way: Way
    step_s: float
    is_strict: bool  # mesh, batch, sequence and a speed, all as published


def load_rows(folder: pathlib.Path, vendor: str = "tpu") -> list[Row]:
    """Every row of `published_perf.csv` that says enough to be asked."""
    dims = {}
    with open(folder / "model_dims.csv") as file:
        for line in csv.DictReader(file):
            dims[line["model"]] = line
    for model, text in _DIMS_EXTRA.items():
        keys = list(next(iter(dims.values())))[1:-1]
        dims.setdefault(model, dict(zip(keys, text.split(","), strict=True)))
    with open(folder / "published_perf.csv") as file:
        lines = list(csv.DictReader(file))
    rows = [_row(line, dims, vendor) for line in lines]
    return [row for row in rows if row is not None]


def table_of(name: str, dims: dict[str, str]) -> ParamTable:
    """The parameters of a model, in the form of models.param_table."""
    L, D, N, K, F, V = (
        int(dims[key])
        for key in ("layers", "d_model", "heads", "kv_heads", "ffn", "vocab")
    )
    mla = name.startswith("deepseek")
    H = int(dims["head_dim"] or (160 if mla else 128))
    E, chosen = int(dims["experts"]), int(dims["experts_per_token"])
    moe_ffn = int(dims["moe_ffn"])
    two_matrix = name in ("gpt3-175b", "maxtext-default-22B")
    rows: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "embed.table": ((V, D), ("vocab", "embed")),
        "final_norm.scale": ((D,), ("norm",)),
        "layers.attention.o": ((L, N, H, D), ("layers", "heads", "head_dim", "embed")),
    }
    if mla:  # two narrow products in front of each wide one (arXiv 2412.19437)
        rows["layers.attention.q_a"] = ((L, D, 1536), ("layers", "embed", None))
        rows["layers.attention.q_b"] = (
            (L, 1536, N, 192),
            ("layers", None, "heads", None),
        )
        rows["layers.attention.kv_a"] = ((L, D, 576), ("layers", "embed", None))
        rows["layers.attention.kv_b"] = (
            (L, 512, N, 256),
            ("layers", None, "heads", None),
        )
        rows["layers.attention.o"] = (
            (L, N, 128, D),
            ("layers", "heads", None, "embed"),
        )
        K = N
    else:
        wide = ("layers", "embed", "heads", "head_dim")
        kv = ("layers", "embed", "kv_heads", "head_dim")
        rows["layers.attention.q"] = ((L, D, N, H), wide)
        rows["layers.attention.k"] = ((L, D, K, H), kv)
        rows["layers.attention.v"] = ((L, D, K, H), kv)
    sparse, dense, dense_ffn, shared = _MOE_EXTRA.get(name, (L, 0, 0, 0))
    inner = ("up",) if two_matrix else ("gate", "up")

    def ffn(path: str, layers: int, width: int, experts: int) -> None:
        e, ax = ((experts,), ("experts",)) if experts else ((), ())
        for part in inner:
            rows[f"{path}.{part}"] = (
                (layers, *e, D, width),
                ("layers", *ax, "embed", "ffn"),
            )
        rows[f"{path}.down"] = ((layers, *e, width, D), ("layers", *ax, "ffn", "embed"))

    if E:
        ffn("layers.ffn", sparse, moe_ffn, E)
        rows["layers.ffn.router"] = ((sparse, D, E), ("layers", "embed", None))
        if shared:
            ffn("layers.shared", sparse, moe_ffn * shared, 0)
        if dense:
            ffn("dense.ffn", dense, dense_ffn, 0)
    else:
        ffn("layers.ffn", L, F, 0)
    if not name.startswith("gpt3"):
        rows["head.kernel"] = ((D, V), ("embed", "vocab"))
    spec = ModelSpec(
        name=name, family="llama", num_layers=L, embed_dim=D, ffn_dim=moe_ffn or F,
        num_heads=N, num_kv_heads=K, head_dim=H, vocab_size=V, max_seq_len=131072,
        num_experts=E, experts_per_token=chosen,
    )  # fmt: skip
    return ParamTable(
        name=name,
        rows=tuple(
            ParamRow(path=path, shape=shape, dtype="float32", axes=axes)
            for path, (shape, axes) in sorted(rows.items())
        ),
        spec=spec,
    )


def _row(line: dict[str, str], dims: dict[str, dict[str, str]], vendor: str):
    hw = line["hw"]
    chip = _gpu(hw)
    if chip not in ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "b200"):
        return None
    if (vendor == "tpu") != chip.startswith(("v", "tpu")):
        return None
    notes = dict(re.findall(r"([\w]+)=([^;]*)", line["notes"]))
    model = _GIVEN.get(line["model"], line["model"])
    if model not in dims or not line["per_device_batch"] or "outcome" in notes:
        return None
    topology = _topology(line, chip)
    if topology is None:
        return None
    seq = int(line["seq"] or 2048)
    mesh = _mesh(line, topology)
    if mesh is None:
        return None
    per_device = float(line["per_device_batch"])
    units = topology.num_devices
    # torchtitan says the batch of a replica, and cuts it into single sequences.
    is_replica = line["source"].startswith("pytorch/torchtitan")
    batch = round(per_device * (mesh.data * mesh.fsdp if is_replica else units))
    parts = round(per_device) if mesh.stage > 1 else 1
    precision = notes.get("precision", "") + notes.get("cfg", "")
    dtype = "bfloat16"
    if "fp8" in precision or "float8" in precision:
        dtype = "float8"
    if "int8" in precision:
        dtype = "int8"
    remat = _remat(line["remat"])
    if remat is None:
        return None
    policy, offload = remat
    table = table_of(model, dims[model])
    work = Workload(global_batch=batch, seq_len=seq, compute_dtype=dtype)
    step_s = _step_s(line, notes, table, topology, work)
    if step_s is None:
        return None
    stem = re.match(r"[a-z]+[0-9]*", line["model"])
    family = stem[0] if stem else line["model"]
    if line["model"].startswith("maxtext-default"):
        family = "maxtext-default"
    return Row(
        name=f"{line['model']} {topology.name} {mesh} x{per_device:g}x{seq} {dtype}",
        family=FAMILIES.get(family, family),
        chip=chip,
        kind="moe" if table.spec and table.spec.num_experts else "dense",
        dtype=dtype,
        table=table,
        topology=topology,
        workload=work,
        way=Way(mesh=mesh, remat=policy, offload=offload, microbatches=parts),
        step_s=step_s,
        is_strict=bool(line["seq"]) and "warn" not in notes,
    )


def _gpu(hw: str) -> str:
    for name in ("H100", "H200", "B200"):
        if name in hw and "DGX" not in hw and "GB200" not in hw:
            return name.lower()
    return hw


def _topology(line: dict[str, str], chip: str) -> Topology | None:
    text = line["topology_or_chips"]
    if chip in ("h100", "h200", "b200"):
        count = re.match(r"(\d+)(?:x(\d+))? GPUs", text)
        if not count:
            return None
        chips = int(count[1]) * int(count[2] or 1)
        hosts = max(1, chips // 8)
        return parse_topology(f"{hosts}*{chip}:8" if hosts > 1 else f"{chip}:8")
    if chip == "tpu7x":
        return parse_topology(f"tpu7x:{text.split()[0]}")
    shape = re.search(
        r"\((?:\d+ chips, )?(\d+x\d+x\d+)\)|\(\d+ chips, (\d+x\d+x\d+)", text
    )
    found = re.search(r"(?:(\d+)x)?(?:tpu-)?(v\w+-\d+)", text)
    if "as published" in text and chip == "v6e":
        return parse_topology("2*v6e-256")
    if "as published" in text:
        return parse_topology("v5p:4x4x8")
    if not found:
        return None
    slices = int(found[1] or 1)
    name = f"{chip}:{shape[1] or shape[2]}" if shape else found[2]
    return parse_topology(f"{slices}*{name}" if slices > 1 else name)


def _mesh(line: dict[str, str], topology: Topology) -> MeshShape | None:
    sizes = {
        "data": int(line["dp"] or 1),
        "fsdp": int(line["fsdp"] or 1),
        "tensor": int(line["tp"] or 1),
        "stage": int(line["pp"] or 1),
        "context": int(line["cp"] or 1),
        "expert": int(line["ep"] or 1),
    }
    devices = topology.num_devices
    if not line["fsdp"]:
        rest = 1
        for axis, size in sizes.items():
            rest *= size if axis != "fsdp" else 1
        sizes["fsdp"] = devices // rest
    # Only `data` crosses slices here: what a row shards over DCN becomes replicas.
    while sizes["data"] % topology.slices and sizes["fsdp"] % 2 == 0:
        sizes["data"] *= 2
        sizes["fsdp"] //= 2
    mesh = MeshShape(**sizes)
    return mesh if mesh.num_devices == devices else None


def _remat(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Ours for MaxText's or AXLearn's policy: what is saved, and what of it is away."""
    if text in POLICY_OF:
        return POLICY_OF[text], ()
    inside = re.fullmatch(r"custom\((.*)\)", text)
    if not inside:
        return None
    saved, away, pending = [], [], []
    for item in inside[1].split(","):
        name, _, how = item.partition("=")
        pending.append(name)
        if how:
            ours = [t for each in pending for t in TENSOR_OF[each].split(",")]
            saved += ours
            away += ours if how == "offload" else []
            pending = []
    saved = [name for name in dict.fromkeys(saved) if name != "layer_input"]
    return ",".join(saved) or "full", tuple(dict.fromkeys(away))


def _step_s(line, notes, table, topology, work) -> float | None:
    tokens = work.tokens / topology.chips
    if line["step_s"]:
        return float(line["step_s"])
    if "tokens_per_s_per_chip" in notes:
        return tokens / float(notes["tokens_per_s_per_chip"])
    spec = table.spec
    per_token = 6 * table.active_params
    attention = 12 * spec.num_layers * spec.num_heads * spec.head_dim * work.seq_len
    if "non-causal" not in line["notes"]:
        attention /= 2
    flops = tokens * (per_token + attention)
    if line["tflops_per_chip"]:
        return flops / (float(line["tflops_per_chip"]) * 1e12)
    if line["mfu"]:
        peak = topology.chip.peak_flops_per_s["bfloat16"]
        return flops / (float(line["mfu"]) * peak)
    return None
