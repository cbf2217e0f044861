"""LoRA factors in PEFT's format: adapter_config.json, adapter_model.safetensors.

PEFT keeps, for each weight [out, in] of a layer, `lora_A` [r, in] and `lora_B`
[out, r]; ours are [*in, r] and [r, *out], stacked over layers. alpha is that of the
paper; with `use_rslora` PEFT divides by sqrt(r) instead of r (arXiv 2312.03732), which
is the same as another alpha.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llmos_jax.data import Tokenizer
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange.archive import OpenedModel
from llmos_jax.interchange.safetensors_file import DTYPES, read_header, read_rows
from llmos_jax.ir import LORA_TARGETS, Lora, ModelSpec
from llmos_jax.models import Params, skeleton

_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Our names of weights -> Hugging Face's, inside a layer of the Llama kind."""

_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
}
"""Keys of PEFT's config that change the mathematics, with the value we can follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Factors somebody trained, not yet read."""

    folder: Path
    lora: Lora

    def factors(self, spec: ModelSpec) -> dict[str, np.ndarray]:
        """Read them as our parameters of a model of `spec`, float32, by path.

        Raises:
            CheckpointError: a factor is missing, is of another shape, or is none of
                this model.
        """
        path = self.folder / "adapter_model.safetensors"
        stored = read_header(path)
        named = {_stripped(name): name for name in stored}
        found: dict[str, list[np.ndarray]] = {}
        for ours, layer, name, shape in _places(replace(spec, lora=self.lora)):
            if name not in named:
                raise CheckpointError(
                    f"{path}: no tensor {name}, which lora target and layer "
                    f"{layer} of {spec.name} need. Is it an adapter of this model?"
                )
            tensor = stored[named.pop(name)]
            if tensor.shape != shape or tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} is {tensor.dtype} {tensor.shape}, and {spec.name} "
                    f"wants {' or '.join(DTYPES)}, {shape}. Is it an adapter of this "
                    "model?"
                )
            x = read_rows(path, name, tensor, slice(None))
            found.setdefault(ours, []).append(x.astype(np.float32))
        if named:
            some = ", ".join(sorted(named)[:10])
            raise CheckpointError(
                f"{path}: {len(named)} tensors that {spec.name} has no place for: "
                f"{some}. Is it an adapter of this model?"
            )
        shapes = _shapes(spec, self.lora)
        return {
            ours: np.stack([layer.T.reshape(shapes[ours]) for layer in layers])
            for ours, layers in found.items()
        }


class Adapted:
    """A model with an adapter laid over it; it answers as any opened model."""

    def __init__(self, under: OpenedModel, adapter: Adapter):
        """Lay `adapter` over a model without factors of its own."""
        if under.skeleton.spec.lora is not None:
            raise ConfigError(
                f"lora.adapter = {adapter.folder}: the model has LoRA factors already. "
                "Merge them first: convert MODEL --to checkpoint --out FOLDER."
            )
        self._under, self._adapter = under, adapter
        spec = replace(under.skeleton.spec, lora=adapter.lora).check()
        self.skeleton = skeleton(spec)
        self.step, self.config_path = under.step, under.config_path

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._under.tokenizer

    def params(
        self, shardings: dict[str, Any] | None = None, *, dtype: str | None = None
    ) -> Params:
        """The model's parameters and the factors, on shardings."""
        factors = {
            path: x.astype(dtype or np.float32)
            for path, x in self._adapter.factors(self._under.skeleton.spec).items()
            if shardings is None or path in shardings
        }
        theirs = None
        if shardings is not None:
            theirs = {path: x for path, x in shardings.items() if "_lora." not in path}
        params = self._under.params(theirs, dtype=dtype)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        for path, x in factors.items():
            target = here if shardings is None else shardings[path]
            params[path] = jax.make_array_from_callback(x.shape, target, x.__getitem__)
        return params


def read_adapter(folder: str) -> Adapter:
    """Open a folder in PEFT's format.

    Raises:
        CheckpointError: it is none.
        ConfigError: it does what we cannot follow.
    """
    path = Path(folder).expanduser()
    config_path = path / "adapter_config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or f"it is no JSON: {problem}"
        raise CheckpointError(
            f"{config_path} cannot be read: {reason}. An adapter is a folder with "
            "adapter_config.json and adapter_model.safetensors, as PEFT saves it."
        ) from None
    wanted = {"r": int, "lora_alpha": int | float}
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key), kind) for key, kind in wanted.items()
    ):
        raise CheckpointError(
            f"{config_path}: wanted an object with the numbers r and lora_alpha, as "
            "PEFT saves it for LoRA. Fetch the adapter again."
        )
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{config_path}: peft_type is {config.get('peft_type')!r}; "
                          "only LORA adapters can be laid over a model.")  # fmt: skip
    for key, plain in _UNSUPPORTED.items():
        if (config.get(key) or None) != (plain or None):
            raise ConfigError(
                f"{config_path}: {key} = {config[key]!r} cannot be followed; only "
                f"{plain!r} can. Merge the adapter with PEFT first "
                "(merge_and_unload), and use the merged folder."
            )
    rank = config["r"]
    scale = config["lora_alpha"] / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )
    targets = _targets(config.get("target_modules"), config_path)
    return Adapter(
        folder=path, lora=Lora(rank=rank, alpha=scale * rank, targets=targets)
    )


def _targets(modules: Any, where: Path) -> tuple[str, ...]:
    """Our names of the weights that PEFT's `target_modules` names."""
    if modules == "all-linear":
        return LORA_TARGETS
    names = [modules] if isinstance(modules, str) else list(modules or ())
    known = {full.split(".")[-1]: ours for ours, full in _MODULES.items()}
    found = {known.get(name.split(".")[-1]) for name in names}
    if not names or None in found:
        raise ConfigError(
            f"{where}: target_modules = {modules!r}; of a model's layers "
            f"{', '.join(known)} can be followed."
        )
    return tuple(name for name in LORA_TARGETS if name in found)


def write_adapter(
    folder: str, spec: ModelSpec, params: Mapping[str, jax.Array], base: str
) -> None:
    """Write a model's factors as PEFT does, into a new folder.

    Args:
        folder: must not exist.
        spec: has `lora`.
        params: the factors among them.
        base: the name of the model they lie over, for PEFT to find.

    Raises:
        ConfigError: the model has no factors, or the folder is there.
    """
    if spec.lora is None:
        raise ConfigError(
            f"{spec.name} has no LoRA factors to write; train with lora.rank above 0."
        )
    path = Path(folder).expanduser()
    if path.exists():
        raise ConfigError(f"{path} exists; name a new folder.")
    tensors: dict[str, np.ndarray] = {}
    stacks = {name: np.asarray(params[name]) for name in _shapes(spec, spec.lora)}
    for ours, layer, name, shape in _places(spec):
        flat = stacks[ours][layer].reshape(shape[::-1])
        tensors[f"base_model.model.{name}"] = np.ascontiguousarray(flat.T)
    config = {
        **_UNSUPPORTED,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": [_MODULES[x].split(".")[-1] for x in spec.lora.targets],
    }
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
    (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    part.rename(path)


def merged(spec: ModelSpec, params: Params) -> tuple[ModelSpec, Params]:
    """A model without factors that computes the same: W + alpha / rank * A B, in
    float32, in the dtype of W. One without factors comes back as it is."""
    if spec.lora is None:
        return spec, params
    scale = spec.lora.alpha / spec.lora.rank

    @jax.jit
    def joined(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        L, r = a.shape[0], a.shape[-1]
        a, b = a.reshape(L, -1, r), b.reshape(L, r, -1)
        added = jnp.einsum(
            *("Lir,Lro->Lio", a.astype(jnp.float32), b.astype(jnp.float32)),
            precision=jax.lax.Precision.HIGHEST,
        )
        total = w.astype(jnp.float32) + jnp.float32(scale) * added.reshape(w.shape)
        return total.astype(w.dtype)

    plain = {path: x for path, x in params.items() if "_lora." not in path}
    for path in params:
        if path.endswith("_lora.a"):
            weight = path.removesuffix("_lora.a")
            factors = params[path], params[f"{weight}_lora.b"]
            plain[weight] = joined(plain[weight], *factors)
    return replace(spec, lora=None), plain


def _places(spec: ModelSpec) -> list[tuple[str, int, str, tuple[int, int]]]:
    """(our path, layer, PEFT's name without prefix, PEFT's shape) of every factor."""
    assert spec.lora is not None
    shapes, found = _shapes(spec, spec.lora), []
    for ours, shape in shapes.items():
        target = ours.split(".")[-2].removesuffix("_lora")
        kind = ours.split(".")[-1]
        r, wide = spec.lora.rank, math.prod(shape) // spec.lora.rank
        theirs = (r, wide) if kind == "a" else (wide, r)
        for layer in range(spec.num_layers):
            name = f"model.layers.{layer}.{_MODULES[target]}.lora_{kind.upper()}.weight"
            found.append((ours, layer, name, theirs))
    return found


def _shapes(spec: ModelSpec, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's factors, by our path."""
    table = skeleton(replace(spec, lora=lora)).table
    return {row.path: row.shape[1:] for row in table.rows if "_lora." in row.path}


def _stripped(name: str) -> str:
    """PEFT's name without `base_model.model.` and the name of the adapter."""
    plain = name.removeprefix("base_model.model.")
    for kind in ("lora_A", "lora_B"):
        plain = plain.replace(f"{kind}.default.", f"{kind}.")
    return plain
