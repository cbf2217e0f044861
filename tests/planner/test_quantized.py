"""Plans of models in few bits: what they hold, read and multiply."""

from dataclasses import replace

import pytest
import small

from llmos_jax import driver, models, planner, resolve
from llmos_jax.config import load_model
from llmos_jax.errors import ConfigError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Pins, Quantization, Workload
from llmos_jax.planner.sizes import sizes_of

W8A8 = Quantization(activations="int8")
INT4 = Quantization(weights="int4", group=128)


def table_of(how, name="llama3_8b"):
    return models.param_table(replace(load_model(name), quantization=how))


def work_of(table, **more):
    how = table.spec.quantization
    given = {"global_batch": 64, "seq_len": 2048, "phase": "decode", "kv_dtype": "int8"}
    dtype = "bfloat16" if how is None else how.weights
    return Workload(**{**given, "param_dtype": dtype, **more})


def planned(how, topology="v5e:2x4", name="llama3_8b", **more):
    table = table_of(how, name)
    work = work_of(table, **more)
    return planner.plan(table, topology, work, "llama", Pins(mesh={"tensor": 8}))


def test_one_device_holds_each_row_in_its_own_dtype():
    table = table_of(INT4, "qwen3_0_6b")
    work = work_of(table, global_batch=8)
    found = planner.plan(table, "v5e:1x1", work, "llama").predicted.memory["params"]
    widths = {"uint8": 1, "int8": 1, "bfloat16": 2}
    matrices = {
        row.path.rpartition(".")[0] for row in table.rows if "values" in row.path
    }
    of_scales = {f"{path}.scale" for path in matrices}
    wanted = 0
    for row in table.rows:
        # Norms are in the dtype of activations; scales of a token are float32.
        is_norm = row.dtype == "float32" and row.path not in of_scales
        width = 2 if is_norm else widths.get(row.dtype, 4)
        wanted += row.size * width
    assert found == wanted


@pytest.mark.parametrize("how", [W8A8, INT4])
def test_a_model_in_few_bits_has_the_products_of_the_model(how):
    few, whole = sizes_of(table_of(how)), sizes_of(table_of(None))
    bare = [replace(product, few_bits=None) for product in few.products]
    assert bare == list(whole.products)
    assert replace(few, products=(), is_quantized=False) == replace(whole, products=())


def test_a_tied_table_in_few_bits_is_a_lookup_and_a_product():
    sizes = sizes_of(table_of(W8A8, "qwen3_0_6b"))
    (head,) = (product for product in sizes.products if product.tensor == "head")
    assert head.made == sizes.vocab and head.few_bits.activations == "int8"


def test_bytes_of_a_weight_have_their_share_of_the_scales():
    products = {one.tensor: one.few_bits for one in sizes_of(table_of(INT4)).products}
    assert products["ffn_up"].bytes_ == 0.5 + 2 / 128
    assert products["head"].bytes_ == pytest.approx(1 + 4 / 4096)


def test_tables_beside_float8_are_multiplied_as_they_are():
    how = Quantization(weights="float8", activations="float8")
    products = {one.tensor: one.few_bits for one in sizes_of(table_of(how)).products}
    assert products["ffn_up"].activations == "float8"
    assert products["head"].activations == "none"


def test_int8_tokens_multiply_at_the_int8_peak_where_a_chip_has_one():
    plain, fast = (
        planned(how, topology="v5e:2x4").predicted for how in (Quantization(), W8A8)
    )
    assert fast.seconds["compute"] == pytest.approx(plain.seconds["compute"] / 2)
    assert fast.seconds["hbm"] == plain.seconds["hbm"]
    plain, same = (
        planned(how, topology="v4:2x2x2").predicted for how in (Quantization(), W8A8)
    )
    assert same.seconds["compute"] == pytest.approx(plain.seconds["compute"])


def test_a_prefill_of_int8_tokens_is_faster():
    plain, fast = (
        planned(how, phase="prefill").predicted for how in (Quantization(), W8A8)
    )
    assert fast.seconds["compute"] < 0.8 * plain.seconds["compute"]
    assert fast.step_s < plain.step_s


def test_int4_weights_are_read_in_half_the_time_of_int8():
    int8, int4 = (
        planned(how, global_batch=1, seq_len=128).predicted.seconds["hbm"]
        for how in (Quantization(), INT4)
    )
    # Norms, the cache and the head stay.
    assert 0.5 < int4 / int8 < 0.6


def test_shards_in_few_bits_are_gathered_in_few_bits():
    pins = Pins(mesh={"fsdp": 8})
    few, whole = (table_of(how) for how in (W8A8, None))
    memory = [
        planner.plan(table, "v6e:2x4", work_of(table), "llama", pins).predicted.memory
        for table in (few, whole)
    ]
    assert memory[0]["gathered weights"] == pytest.approx(
        memory[1]["gathered weights"] / 2, rel=0.01
    )


def config_of(*texts):
    given = ("plan.phase=decode", "batch.global=8", "batch.seq_len=64")
    return small.config_of([*given, *texts])


def asked(topology, *texts, name="llama3_8b"):
    """The model that a decode step runs."""
    spec = load_model(name)
    return resolve.served(spec, config_of(*texts), parse_topology(topology))


@pytest.mark.parametrize(
    ("topology", "dtype", "activations"),
    [
        ("v5e:2x4", "int8", "int8"),
        ("v5p:2x2x1", "int8", "int8"),
        ("v6e:2x4", "int8", "int8"),
        ("v4:2x2x1", "int8", "none"),
        ("tpu7x:2x2x1", "int8", "none"),
        ("tpu7x:2x2x1", "float8", "float8"),
        ("h100:8", "int8", "none"),
        ("cpu:8", "int8", "none"),
    ],
)
def test_tokens_are_quantized_where_a_tpu_multiplies_them_faster(
    topology, dtype, activations
):
    spec = asked(topology, f"serve.weight_dtype={dtype}")
    assert spec.quantization == Quantization(weights=dtype, activations=activations)


def test_what_activations_become_can_be_said():
    texts = ("serve.weight_dtype=int8", "serve.activations=none")
    assert asked("v5e:2x4", *texts).quantization == Quantization()


def test_weights_in_floating_point_and_training_quantize_nothing():
    assert asked("v5e:2x4").quantization is None
    train = ("plan.phase=train", "serve.weight_dtype=int8")
    assert asked("v5e:2x4", *train).quantization is None


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4", "a100:8"])
def test_float8_is_refused_where_int8_is_better(topology):
    with pytest.raises(ConfigError, match="float8 no faster than bfloat16, and int8"):
        asked(topology, "serve.weight_dtype=float8")


def test_int4_wants_a_group():
    with pytest.raises(ConfigError, match="weights = int4 needs group"):
        asked("v5e:2x4", "serve.weight_dtype=int4")
    texts = ("serve.weight_dtype=int4", "serve.group=32")
    how = asked("v5e:2x4", *texts).quantization
    assert how == Quantization(weights="int4", group=32)


def test_a_quantized_checkpoint_brings_its_own():
    spec = replace(load_model("tiny"), quantization=Quantization())
    machine, config = parse_topology("v5e:2x4"), config_of()
    assert resolve.served(spec, config, machine) is spec
    assert resolve.resolve_workload(config, spec, machine).param_dtype == "int8"
    with pytest.raises(ConfigError, match="are int8 already"):
        how = ("serve.weight_dtype=int4", "serve.group=32")
        resolve.served(spec, config_of(*how), machine)


def test_experts_are_planned_by_their_bytes_alone():
    texts = ("model=mixtral_8x7b", "topology=v5e:4x4", "serve.weight_dtype=int8")
    found = driver.plan(config_of(*texts))
    assert found.params.spec.quantization is None
    assert found.workload.param_dtype == "int8"


def test_a_plan_says_what_is_multiplied_and_kept():
    texts = ("model=llama3_8b", "topology=v5e:2x4", "serve.weight_dtype=int8")
    text = driver.plan(config_of(*texts, "serve.kv_dtype=int8")).explain()
    assert "tokens multiplied as int8; keys and values kept as int8" in text
