"""LoRA: what is frozen stays, what is merged computes the same, PEFT agrees."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import interchange, models, resolve, training
from llmos_jax.config import LoraSection
from llmos_jax.config.schema import TrainSection
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.ir import Lora, Way

B, T = 4, 12
LORA = Lora(rank=4, alpha=6.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
LOGITS = 1e-5
"""Float32 sums of 64 terms, once as x W + (x A) B and once as x (W + A B)."""


@pytest.fixture(scope="module")
def spec(tiny):
    return dataclasses.replace(tiny, lora=LORA)


@pytest.fixture(scope="module")
def skeleton(spec):
    return models.skeleton(spec)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(0, 256, (B, T + 1)).astype("int32")
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
    }


def drawn(skeleton, seed=0):
    """Parameters whose factors are all random: fresh ones add nothing."""
    params = skeleton.init(jax.random.key(seed))
    generator = np.random.default_rng(seed)
    return {
        path: jnp.asarray(generator.normal(size=x.shape) * 0.1, jnp.float32)
        if path.endswith("_lora.b")
        else x
        for path, x in params.items()
    }


def logits(skeleton, params, batch):
    return np.asarray(skeleton.bind(params)(batch["inputs"]))


def test_fresh_factors_add_nothing(skeleton, tiny, batch):
    params = skeleton.init(jax.random.key(0))
    plain = {path: x for path, x in params.items() if "_lora." not in path}
    wanted = logits(models.skeleton(tiny), plain, batch)
    np.testing.assert_array_equal(logits(skeleton, params, batch), wanted)


def test_a_step_changes_factors_alone_and_keeps_moments_of_them_alone(skeleton, batch):
    config = TrainSection(steps=10, warmup_steps=0, learning_rate=0.01)
    optimizer = training.make_optimizer(config, skeleton.table)
    step = training.train_step(
        skeleton, optimizer, compute_dtype="float32", way=Way(microbatches=2)
    )
    state = training.TrainState(
        jnp.zeros((), jnp.int32), drawn(skeleton), optimizer.init(drawn(skeleton))
    )
    after, _ = jax.jit(step)(state, batch)
    factors = set(skeleton.table.trained)
    assert factors == {path for path in state.params if "_lora." in path}
    moved = {
        path
        for path in state.params
        if not np.array_equal(state.params[path], after.params[path])
    }
    assert moved == factors
    assert after.optimizer[1].mu.keys() == factors


def test_merged_factors_compute_the_same(skeleton, spec, batch):
    params = drawn(skeleton)
    plain, joined = interchange.merged(spec, dict(params))
    assert plain.lora is None and not any("_lora." in path for path in joined)
    found = logits(models.skeleton(plain), joined, batch)
    np.testing.assert_allclose(found, logits(skeleton, params, batch), atol=LOGITS)
    untouched = {path for path in joined if np.array_equal(joined[path], params[path])}
    assert untouched == {path for path in joined if not _is_target(path)}


def _is_target(path):
    return re.search(r"\.(q|k|v|o|gate|up|down)$", path) is not None


def test_an_adapter_reads_back_as_it_was(skeleton, spec, tiny, tmp_path):
    params = drawn(skeleton)
    folder = str(tmp_path / "adapter")
    interchange.write_adapter(folder, spec, params, "base")
    adapter = interchange.read_adapter(folder)
    assert adapter.lora == LORA
    found = adapter.factors(tiny)
    assert found.keys() == set(skeleton.table.trained)
    for path, x in found.items():
        np.testing.assert_array_equal(x, params[path], err_msg=path)


def test_an_adapter_in_bfloat16_is_read_as_it_is(skeleton, spec, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    params = drawn(skeleton)
    folder = tmp_path / "adapter"
    interchange.write_adapter(str(folder), spec, params, "base")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    safetensors.save_file({k: x.to(torch.bfloat16) for k, x in tensors.items()}, file)
    for path, x in interchange.read_adapter(str(folder)).factors(tiny).items():
        rounded = jnp.asarray(params[path]).astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(x, rounded, err_msg=path)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(
    skeleton, spec, tmp_path
):
    """PEFT: alpha / sqrt(r) instead of alpha / r; 6 / 2 is 12 / 4."""
    folder = tmp_path / "adapter"
    interchange.write_adapter(str(folder), spec, drawn(skeleton), "base")
    page = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**page, "use_rslora": True})
    )
    found = interchange.read_adapter(str(folder)).lora
    assert found.alpha == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
)
def test_adapters_that_do_more_are_refused_by_key(
    skeleton, spec, tmp_path, change, said
):
    folder = tmp_path / "adapter"
    interchange.write_adapter(str(folder), spec, drawn(skeleton), "base")
    page = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**page, **change}))
    with pytest.raises(ConfigError, match=re.escape(said)):
        interchange.read_adapter(str(folder))


@pytest.mark.parametrize("page", ["[]", "{}", '{"r": "8", "lora_alpha": 1}', "{"])
def test_a_damaged_adapter_is_one_clear_error(page, tmp_path):
    (tmp_path / "adapter_config.json").write_text(page)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        interchange.read_adapter(str(tmp_path))


def test_other_factors_than_a_model_has_are_refused(spec, tiny):
    same = LoraSection(rank=4, alpha=6.0, targets=LORA.targets)
    assert resolve.with_lora(spec, same) == resolve.with_lora(tiny, same) == spec
    with pytest.raises(ConfigError, match="has LoRA factors of rank 4 already"):
        resolve.with_lora(spec, LoraSection(rank=8))


def test_an_adapter_of_another_model_is_refused_by_tensor(skeleton, spec, tmp_path):
    folder = str(tmp_path / "adapter")
    interchange.write_adapter(folder, spec, drawn(skeleton), "base")
    adapter = interchange.read_adapter(folder)
    deeper = dataclasses.replace(spec, num_layers=3, lora=None)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.2\."):
        adapter.factors(deeper)
    wider = dataclasses.replace(spec, ffn_dim=256, lora=None)
    with pytest.raises(CheckpointError, match=r"is F32 \(.*, and .* wants .*\("):
        adapter.factors(wider)
    shallower = dataclasses.replace(spec, num_layers=1, lora=None)
    with pytest.raises(CheckpointError, match="has no place for"):
        adapter.factors(shallower)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (Lora(rank=0, alpha=1.0, targets=("q",)), "lora.rank = 0"),
        (Lora(rank=2, alpha=1.0, targets=()), "lora.targets"),
        (Lora(rank=2, alpha=1.0, targets=("query",)), "choose among q, k"),
    ],
)
def test_factors_that_make_no_sense_are_refused(tiny, lora, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        dataclasses.replace(tiny, lora=lora).check()


def test_experts_take_no_factors(tiny):
    moe = dataclasses.replace(tiny, family="moe", num_experts=4, experts_per_token=2)
    with pytest.raises(ConfigError, match="choose lora.targets among q, k, v, o"):
        dataclasses.replace(moe, lora=LORA).check()
    attention = dataclasses.replace(LORA, targets=("q", "o"))
    dataclasses.replace(moe, lora=attention).check()
