"""Turn what a config names into artefacts: a model, its weights, a machine, a workload.

A model is a name under configs/models/, a TOML file, or something with weights: a run
folder or a checkpoint of ours, somebody else's Hugging Face folder or GGUF file. All of
the latter answer alike once they are open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from llmos_jax import hardware, stores
from llmos_jax.config import (
    BatchSection,
    ClassifySection,
    CompressSection,
    DataSection,
    LoraSection,
    PlanSection,
    RunConfig,
    ServeSection,
    SyncSection,
    load_config,
    load_model,
    override_config,
)
from llmos_jax.errors import ConfigError
from llmos_jax.ir import (
    CLASSIFIERS,
    Classes,
    Lora,
    ModelSpec,
    Pins,
    Plan,
    Quantization,
    Topology,
    Workload,
    fingerprint_of,
)
from llmos_jax.places import cache_folder

if TYPE_CHECKING:
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Params


def open_model(name: str) -> OpenedModel:
    """Open what has weights: a run folder, a checkpoint, a Bundle, a Hugging Face
    folder, a GGUF file.

    Raises:
        CheckpointError: nothing there, or damaged.
        BundleError: a Bundle that is damaged.
    """
    from llmos_jax import bundle, interchange

    name = brought(name)
    if bundle.is_bundle(name):
        return bundle.open_bundle(name)
    if interchange.is_foreign(name):
        return interchange.open_archive(name)
    from llmos_jax import checkpoint  # Orbax takes a second to import

    return checkpoint.open_checkpoint(name)


@lru_cache(maxsize=8)  # a verb asks several times
def brought(name: str) -> str:
    """Where a model lies here: of a Bundle or a Hugging Face folder in an object store,
    a copy, of which only what differs is fetched again. Other names stay as they are.

    Raises:
        StoreError: the store does not answer, or refuses.
    """
    if not stores.is_remote(name):
        return name
    url = name.rstrip("/")
    pages = ("bundle.json", "config.json")
    if not any(stores.exists(f"{url}/{page}") for page in pages):
        return name
    folder = cache_folder() / "models" / fingerprint_of(url) / url.rpartition("/")[2]
    stores.download_folder(url, folder)
    return str(folder)


def inspect(name: str) -> dict[str, Any]:
    """What a model with weights holds, as plain figures."""
    from llmos_jax import bundle, checkpoint, interchange

    name = brought(name)
    if bundle.is_bundle(name):
        return bundle.inspect(name)
    if interchange.is_foreign(name):
        return interchange.inspect(name)
    return checkpoint.inspect(name)


def lineage(name: str) -> dict[str, Any]:
    """What a model is, for those that are made of it: a fingerprint, not its bytes.

    Of a checkpoint, its manifest's; of a Bundle, its page's, which has a SHA-256 of
    every file; of foreign models, one of their config, tensors and sizes.
    """
    from llmos_jax import bundle, checkpoint, interchange

    path = str(Path(name).expanduser().absolute())
    name = brought(name)
    if bundle.is_bundle(name):
        page = bundle.open_bundle(name).page
        return {"bundle": path, "fingerprint": page.fingerprint} | {
            "parent": page.provenance.get("parent")
        }
    if interchange.is_foreign(name):
        archive = interchange.open_archive(name).archive
        tensors = {key: repr(facts) for key, facts in archive.tensors.items()}
        return {"model": path, "fingerprint": fingerprint_of([archive.config, tensors])}
    found = checkpoint.find_checkpoint(name)
    manifest = found.store.manifest(found.step)
    return {"checkpoint": path, "step": found.step} | {
        "fingerprint": manifest.fingerprint,
        "made_by": manifest.made_by,
    }


def read_to_compute(
    opened: OpenedModel, dtype: str, shardings: dict[str, Any] | None = None
) -> Params:
    """Read a model's parameters in the dtype that they are computed with, so that none
    lies in memory in two; some as they are stored (models.Skeleton.keeps_dtype)."""
    import jax

    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = {row.path: here for row in opened.skeleton.table.rows}
    keeps = opened.skeleton.keeps_dtype
    kept = {path: x for path, x in shardings.items() if keeps(path)}
    others = {path: x for path, x in shardings.items() if path not in kept}
    params = opened.params(others, dtype=dtype)
    return params | opened.params(kept) if kept else params


def lay_over(opened: OpenedModel, adapter: str) -> OpenedModel:
    """Lay an adapter in PEFT's format over a model."""
    from llmos_jax import interchange

    return interchange.Adapted(opened, interchange.read_adapter(adapter))


def has_weights(name: str) -> bool:
    """Whether a model's name is a place with weights, not a mere description."""
    path = Path(name).expanduser()
    return stores.is_remote(name) or path.is_dir() or path.suffix == ".gguf"


def usual_form(model: str, out: str) -> Literal["checkpoint", "hf", "gguf"]:
    """What a model is converted to if nobody says."""
    from llmos_jax import interchange

    if Path(out).suffix == ".gguf":
        return "gguf"
    return "checkpoint" if interchange.is_foreign(model) else "hf"


def origin_of(config: RunConfig) -> OpenedModel | None:
    """What training begins with: the weights and the tokenizer of a model that has
    them; None where they are to be drawn and trained."""
    if config.train.from_scratch or not has_weights(config.model):
        asked = config.lora.adapter is not None or config.lora.rank > 0
        if asked:
            raise ConfigError(
                "[lora] trains factors beside weights that stay as they are, and "
                f"model = {config.model} begins with random ones. Name a run, a "
                "Hugging Face folder or a GGUF file, or leave lora.* out."
            )
        return None
    opened = open_model(config.model)
    adapter = config.lora.adapter
    return opened if adapter is None else lay_over(opened, adapter)


def spec_of(config: RunConfig) -> ModelSpec:
    """The model of a config, with the factors that `[lora]` puts beside its weights and
    the classes that labelled data have."""
    return with_classes(with_lora(resolve_model(config.model), config.lora), config)


def with_classes(spec: ModelSpec, config: RunConfig) -> ModelSpec:
    """A classifier of the labels of `[classify]`, else its own, else those of the
    training data; a model that predicts tokens as it is.

    Raises:
        DataError: the labels cannot be read, or are all the same.
        ConfigError: a model that cannot classify, or only classifies.
    """
    asked, fmt = config.classify, config.data.format
    is_classifier = spec.family in CLASSIFIERS or spec.classes is not None
    if is_classifier and fmt not in ("auto", "labelled"):
        raise ConfigError(
            f"data.format = {fmt}: {spec.name} is a classifier, and learns from "
            "labelled texts. Leave data.format out."
        )
    if not is_classifier and fmt != "labelled":
        return spec
    own = spec.classes.labels if spec.classes else ()
    labels = asked.labels or own or _labels_of(config.data)
    is_frozen = asked.backbone == "frozen"
    if is_frozen and not has_weights(config.model):
        raise ConfigError(
            f"classify.backbone = frozen: model = {config.model} has no weights that "
            "could stay as they are. Name a run, a Hugging Face folder or a GGUF file."
        )
    if is_frozen and spec.lora is not None:
        raise ConfigError(
            "classify.backbone = frozen leaves all but the head as it is, and [lora] "
            "trains factors beside it. Leave one of them out."
        )
    classes = Classes(labels=labels, pooling=_pooling(spec, asked), is_frozen=is_frozen)
    return replace(spec, classes=classes).check()


def _pooling(spec: ModelSpec, asked: ClassifySection) -> Literal["mean", "last", "max"]:
    """As asked; else as the model does; else the last token of a decoder, which alone
    has seen all others."""
    if asked.pooling != "auto":
        return asked.pooling
    if spec.classes is not None:
        return spec.classes.pooling
    return "mean" if spec.family in CLASSIFIERS else "last"


@lru_cache(maxsize=2)  # a verb asks several times
def _labels_of(section: DataSection) -> tuple[str, ...]:
    from llmos_jax.data.labelled import labels_of

    return labels_of(section)


def trainable(spec: ModelSpec) -> ModelSpec:
    """The same model, or ConfigError where its weights are whole numbers."""
    if spec.quantization is None:
        return spec
    raise ConfigError(
        f"model {spec.name} is quantized ({spec.quantization.weights}), and whole "
        "numbers have no gradient. Train the model that it was made of, or take its "
        "weights as floating-point numbers: convert MODEL --to hf --out FOLDER."
    )


def with_lora(spec: ModelSpec, lora: LoraSection) -> ModelSpec:
    """A model with factors beside its weights, if any are asked for."""
    if lora.adapter is not None:
        from llmos_jax import interchange

        adapter = interchange.read_adapter(lora.adapter)
        return replace(spec, lora=adapter.lora).check()
    if not lora.rank:
        return spec
    asked = Lora(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets))
    if spec.lora not in (None, asked):
        raise ConfigError(
            f"model {spec.name} has LoRA factors of rank {spec.lora.rank} already, and "
            f"lora.rank = {lora.rank} asks for others. Leave lora.* out to train those "
            "on, or merge them first: convert MODEL --to hf --out FOLDER."
        )
    return replace(spec, lora=asked).check()


def resolve_model(name: str) -> ModelSpec:
    """What a model is: see the module."""
    if not has_weights(name):
        return load_model(name)
    from llmos_jax import bundle, interchange

    name = brought(name)
    if bundle.is_bundle(name):
        return bundle.open_bundle(name).page.model
    if interchange.is_foreign(name):
        return interchange.foreign_spec(name)
    from llmos_jax.checkpoint import find_checkpoint

    found = find_checkpoint(name)
    return found.store.manifest(found.step).model


def served(spec: ModelSpec, config: RunConfig, topology: Topology) -> ModelSpec:
    """The model as a step of a config runs it on a machine: to prefill and to decode,
    with its matrices in as few bits as `serve.weight_dtype` says.

    A quantized checkpoint brings its own. Experts have no few-bit product in this
    release: they are planned by their bytes alone.

    Raises:
        ConfigError: few bits that the model, or the chip, does not go with.
    """
    asked, chip = config.serve, topology.chip
    kind = asked.weight_dtype
    if config.plan.phase == "train" or kind == "float32" or kind == "bfloat16":
        return spec
    if spec.quantization is not None:
        if spec.quantization.weights != kind:
            raise ConfigError(
                f"serve.weight_dtype = {kind}: the weights of {spec.name} are "
                f"{spec.quantization.weights} already. Leave it out, or name the model "
                "that it was made of."
            )
        return spec
    if kind == "float8" and not _is_faster(topology, kind):
        raise ConfigError(
            f"serve.weight_dtype = float8: {chip.name} multiplies float8 no faster "
            "than bfloat16, and int8 is as small and more exact. Set "
            "serve.weight_dtype=int8; float8 is for tpu7x and GPUs from H100 on."
        )
    if spec.num_experts and kind != "int4":
        return spec
    how = Quantization(
        weights=kind, group=asked.group, activations=_activations(asked, topology)
    )
    return replace(spec, quantization=how).check()


_Activations = Literal["none", "int8", "float8"]


def _activations(asked: ServeSection, topology: Topology) -> _Activations:
    """What tokens become: with `auto`, what weights are in where that is faster."""
    kind = asked.weight_dtype
    if asked.activations != "auto":
        return asked.activations
    is_plain = topology.chip.vendor == "tpu" and asked.group is None
    if is_plain and (kind == "int8" or kind == "float8") and _is_faster(topology, kind):
        return kind
    return "none"


def _is_faster(topology: Topology, dtype: str) -> bool:
    """Whether a chip multiplies a dtype faster than bfloat16."""
    return topology.peak_flops_per_s(dtype) > topology.peak_flops_per_s("bfloat16")


def resolve_topology(name: str | None) -> Topology:
    """A topology by name, or the devices that are here, as fast as they are."""
    if name is not None:
        return hardware.parse_topology(name)
    from llmos_jax import lowering

    return lowering.measured_topology(lowering.local_topology())


def resolve_workload(
    config: RunConfig, spec: ModelSpec, topology: Topology
) -> Workload:
    """The step a config asks for on a machine.

    Raises:
        ConfigError: a sequence longer than the model's context, a `batch.per_device`
            that makes no whole batch, or replicas that never agree.
    """
    batch = config.batch
    if batch.seq_len > spec.max_seq_len:
        raise ConfigError(
            f"batch.seq_len = {batch.seq_len} is longer than the context of "
            f"{spec.name} ({spec.max_seq_len}). Set batch.seq_len to at most that."
        )
    if batch.global_ is not None:
        global_batch = float(batch.global_)
    else:
        per_device = 1.0 if batch.per_device is None else batch.per_device
        global_batch = per_device * topology.num_devices
    if global_batch != round(global_batch):
        raise ConfigError(
            f"batch.per_device = {batch.per_device} on {topology.num_devices} devices "
            f"makes {global_batch:g} sequences, which is no whole number."
        )
    step = Workload(
        phase=config.plan.phase,
        global_batch=round(global_batch),
        seq_len=batch.seq_len,
        compute_dtype=config.train.compute_dtype,
        optimizer_moments=2 if config.train.optimizer == "adamw" else 0,
    )
    if config.sync.strategy == "local" and step.phase == "train":
        step = replace(step, local_steps=_local_steps(config))
    if step.phase != "train":
        goal_ms = config.serve.max_step_ms
        how = spec.quantization
        step = replace(
            step,
            param_dtype=config.serve.weight_dtype if how is None else how.weights,
            kv_dtype=config.serve.kv_dtype,
            max_step_s=None if goal_ms is None else goal_ms / 1000,
        )
    return step.check()


def _local_steps(config: RunConfig) -> int:
    if config.sync.steps < 1:
        raise ConfigError(
            f"sync.steps = {config.sync.steps}: replicas that learn alone must agree "
            "after some number of steps. Set sync.steps to 1 or more."
        )
    return config.sync.steps


def open_with_config(
    model: str, overrides: Sequence[str]
) -> tuple[OpenedModel, RunConfig]:
    """Open a model to use it, and say how: the config of its run, or the defaults."""
    opened = open_model(model)
    config = config_of(opened, model, overrides)
    if config.lora.adapter is not None:
        opened = lay_over(opened, config.lora.adapter)
    return opened, config


def open_to_compress(
    name: str, overrides: Sequence[str]
) -> tuple[OpenedModel, RunConfig]:
    """Open the model that is to be made smaller, and say how.

    Args:
        name: a model with weights, or a config whose `model` is one.
        overrides: config keys.
    """
    if has_weights(name):
        opened, config = open_with_config(name, overrides)
        check_speaks(opened.skeleton.spec, "compress")
        return opened, as_it_was_trained(opened, config, overrides)
    config = load_config(name, overrides).config
    if not has_weights(config.model):
        raise ConfigError(
            f"compress makes weights smaller, and model = {config.model} has none. Set "
            "model to a run, a checkpoint, a Hugging Face folder or a GGUF file."
        )
    opened = open_model(config.model)
    check_speaks(opened.skeleton.spec, "compress")
    adapter = config.lora.adapter
    config = as_it_was_trained(opened, config, overrides)
    return (opened if adapter is None else lay_over(opened, adapter)), config


def as_it_was_trained(
    opened: OpenedModel, config: RunConfig, overrides: Sequence[str]
) -> RunConfig:
    """The config, with the rounding that the model's run trained it for (`[qat]`),
    where nothing else is asked for: to nearest, without a search for scales.

    Args:
        opened: the model.
        config: what `compress` is asked.
        overrides: keys that are asked for by name; what a file sets to a key's default
            cannot be told from the default.
    """
    if opened.config_path is None:
        return config
    trained = load_config(str(opened.config_path), []).config.qat
    if trained.weights is None:
        return config
    asked, usual = config.compress, CompressSection()
    given = {text.partition("=")[0].strip() for text in overrides}
    names = ("weights", "group", "embedding", "head", "method", "clip")
    free = {
        name
        for name in names
        if f"compress.{name}" not in given
        and getattr(asked, name) == getattr(usual, name)
    }
    if "weights" not in free and asked.weights != trained.weights:
        return config
    own: dict[str, Any] = {
        "weights": trained.weights,
        "group": trained.group,
        "embedding": trained.embedding,
        "head": trained.head,
        "method": "nearest",
        "clip": False,
    }
    chosen = {name: own[name] for name in names if name in free}
    return replace(config, compress=replace(asked, **chosen))


def check_speaks(spec: ModelSpec, verb: str) -> None:
    """Refuse a classifier where tokens are to be predicted.

    Raises:
        ConfigError: naming what classifiers are for.
    """
    if spec.classes is not None:
        raise ConfigError(
            f"{spec.name} is a classifier, and {verb} is for models that predict "
            "tokens. Use evaluate (--predict FILE) or serve (/v1/classify)."
        )


def out_of(config: RunConfig) -> str:
    """Where a smaller model goes."""
    if config.compress.out is None:
        raise ConfigError(
            "nothing says where the smaller model goes. Give --out FOLDER, or set "
            "compress.out."
        )
    return config.compress.out


def reference_of(opened: OpenedModel, config: RunConfig) -> OpenedModel | None:
    """The model that `evaluate.against` names, checked to share a vocabulary."""
    name = config.evaluate.against
    if name is None:
        return None
    reference = open_model(name)
    ours, theirs = opened.tokenizer.vocabulary(), reference.tokenizer.vocabulary()
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise ConfigError(
            f"evaluate.against = {name}: its vocabulary is not that of "
            f"{opened.skeleton.spec.name} ({differing} tokens differ), so what the two "
            "predict cannot be compared. Compare models with the same tokenizer, or "
            "evaluate each by itself: bits per byte compare across tokenizers."
        )
    return reference


def to_score(config: RunConfig) -> RunConfig:
    """The same run, planned for a forward pass alone, in the dtype it computes in."""
    return replace(
        config,
        plan=replace(config.plan, phase="prefill"),
        serve=replace(config.serve, weight_dtype=config.train.compute_dtype),
    )


def to_serve(config: RunConfig) -> RunConfig:
    """The same run, planned for decoding with all seats taken."""
    asked = config.serve
    batch = replace(
        config.batch, global_=asked.seats, per_device=None, seq_len=_context(config)
    )
    # Any sequence may have any page, so all devices share every layer.
    mesh = {"data": 1, "fsdp": 1} | (config.plan.mesh or {})
    return replace(
        config, plan=replace(config.plan, phase="decode", mesh=mesh), batch=batch
    )


def to_classify(config: RunConfig) -> RunConfig:
    """The same run, planned for classifying with all seats taken.

    Raises:
        ConfigError: layers or texts split over devices, which has no program here.
    """
    asked = to_score(config)
    mesh = {"stage": 1, "context": 1} | (config.plan.mesh or {})
    for axis in ("stage", "context"):
        if mesh[axis] != 1:
            raise ConfigError(
                f"plan.mesh.{axis} = {mesh[axis]}: a classifier is served split over "
                "data, fsdp and tensor. Leave it out."
            )
    batch = replace(
        config.batch,
        global_=config.serve.seats,
        per_device=None,
        seq_len=_context(config),
    )
    return replace(asked, plan=replace(asked.plan, mesh=mesh), batch=batch)


def _context(config: RunConfig) -> int:
    return config.serve.context or spec_of(config).max_seq_len


def on_same_mesh(config: RunConfig, chosen: Plan) -> RunConfig:
    """The run of `evaluate.against`, planned for the mesh that was chosen."""
    assert config.evaluate.against is not None
    asked = to_score(config)
    mesh = dict(chosen.mesh.sizes)
    return replace(
        asked,
        model=config.evaluate.against,
        lora=LoraSection(),
        plan=replace(asked.plan, mesh=mesh),
    )


def config_of(opened: OpenedModel, model: str, overrides: Sequence[str]) -> RunConfig:
    """The config of a checkpoint's run, freed of what only training needs.

    The devices here may be others than the run had, so its batch, mesh, topology and
    way of agreeing go; overrides may set them again. A Bundle says itself how it is to
    be served. What else has no run has the defaults, but computes in float32 on a CPU,
    which has nothing faster.
    """
    from llmos_jax import bundle, lowering

    source = None if opened.config_path is None else str(opened.config_path)
    pins = [f"model={model}"]
    kept = load_config(source, pins).config
    spec, devices = opened.skeleton.spec, lowering.local_topology().num_devices
    freed = replace(
        kept,
        topology=None,
        plan=PlanSection(),
        sync=SyncSection(),
        lora=LoraSection(),
        batch=BatchSection(
            seq_len=min(kept.batch.seq_len, spec.max_seq_len), global_=8 * devices
        ),
    )
    if isinstance(opened, bundle.OpenedBundle):
        freed = replace(
            freed,
            serve=msgspec.convert(opened.page.serve, ServeSection),
            train=replace(freed.train, compute_dtype=opened.page.compute_dtype),
        )
    elif source is None and lowering.local_topology().chip.vendor == "cpu":
        freed = replace(freed, train=replace(freed.train, compute_dtype="float32"))
    return override_config(freed, overrides)


def pins_of(config: RunConfig) -> Pins:
    """The decisions that a config makes by hand."""
    known = {field.name for field in fields(Pins)}
    asked = {
        field.name: getattr(config.plan, field.name)
        for field in fields(config.plan)
        if field.name in known
    }
    return Pins(**{**asked, "mesh": config.plan.mesh or None})
