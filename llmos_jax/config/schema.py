"""The keys a run config may hold: one frozen dataclass per TOML section.

A field without a default is required. `key` metadata gives the name in the file where
it is a Python keyword. Adding a field here adds the key, its type check, its `--set`
and its place in the expanded config; nothing else lists the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmos_jax.ir.artefact import Artefact

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """Where the run lives and which random numbers it uses."""

    dir: str = "runs/{name}"
    """The run folder; running again on it resumes. `{name}` is the config's name."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSection:
    """One step: `global` (sequences over all devices) or `per_device`, not both."""

    seq_len: int = 2048
    global_: int | None = field(default=None, metadata={"key": "global"})
    per_device: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSection:
    """Pins: decisions made by hand; the planner makes the rest."""

    phase: Literal["train", "prefill", "decode"] = "train"
    """What is planned; `train` runs only the first."""
    mesh: dict[str, int] = field(default_factory=dict)
    remat: str | None = None
    """none, dots, attention, full; or the names of the tensors to save."""
    microbatches: int | None = None
    offload: tuple[str, ...] | None = None
    """Saved tensors that wait in host memory."""
    loss_tiles: int | None = None
    state_dtype: Dtype | None = None
    """Of the optimizer's moments; float32 unless pinned."""
    gradient_dtype: Dtype | None = None
    """Of gradients summed over microbatches; float32 unless pinned."""
    schedule: Literal["gpipe", "1f1b", "circular"] | None = None
    """In which order pipeline stages take microbatches (plan.mesh.stage above 1)."""
    rounds: int | None = None
    """Chunks of layers per stage of a circular pipeline."""
    context_exchange: Literal["ring", "gather"] | None = None
    """How keys and values travel where plan.mesh.context splits sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSection:
    """What a prefill or decode step is planned for: batch.global sequences, each with
    batch.seq_len tokens of context; and how `serve` runs it."""

    weight_dtype: Literal["float32", "bfloat16", "int8", "int4", "float8"] = "bfloat16"
    """Of the model's matrices; one that is quantized already stays as it is."""
    group: int | None = None
    """Inputs that share a scale of few-bit weights: 32 or 128 for int4; None: all
    inputs of an output."""
    activations: Literal["auto", "none", "int8", "float8"] = "auto"
    """In what tokens are multiplied with few-bit weights; `none`: in floating point;
    `auto`: in few bits where a TPU is faster at it (llmos_jax/resolve.py)."""
    kv_dtype: Literal["float32", "bfloat16", "int8", "float8"] = "bfloat16"
    rotate_keys: bool = False
    """Turn keys by a Hadamard matrix before an int8 cache rounds them (`generate`)."""
    max_step_ms: float | None = None
    """Latency goal of one step; slower plans are turned down."""
    seats: int = 32
    """Sequences that run at once, at most (`serve`)."""
    context: int | None = None
    """Tokens of a sequence, prompt and answer, at most; None: the model's own."""
    step_tokens: int = 512
    """Tokens that one step computes, at most: long prompts come in chunks of so many
    (`serve`)."""
    cache_gib: float | None = None
    """Memory for keys and values on each device; None: on a CPU a tenth of what the
    weights and programs leave, elsewhere all of it; never more than the seats fill."""
    prefix_cache: bool = True
    """Prompts that begin alike share keys and values (`serve`)."""
    drafts: int = 0
    """Tokens that a sequence guesses from its own text and checks in one step, up to 7;
    0: none. It changes no answer (`serve`)."""
    overlap: bool = True
    """Send a step before the last one is known (`serve`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSection:
    """AdamW with linear warm-up and cosine decay, clipped by global norm."""

    steps: int = 1000
    from_scratch: bool = False
    """Draw new weights although `model` names some; otherwise training begins there."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is plain gradient descent, without momentum: for comparisons."""
    max_minutes: float | None = None
    """Stop (saved, evaluated, reported) when this much training time has passed."""
    compute_dtype: Dtype = "bfloat16"
    learning_rate: float = 3e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    router_balance_weight: float = 0.01
    """Of the load-balancing loss of each layer of experts (Switch Transformer, arXiv
    2101.03961, section 2.2)."""
    router_z_weight: float = 0.001
    """Of the mean squared log-sum-exp of each router's logits (ST-MoE, arXiv
    2202.08906, section 3)."""
    keep_zeros: bool = False
    """Weights that a pruned model has lost stay lost."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a lower `checkpoint.best` (or
    val_loss), and end with the checkpoint where it was lowest; None: train on."""
    explode_ratio: float = 3.0
    """Stop when the loss exceeds this many times its running median."""
    eval_every: int = 0
    """Steps between evaluations on the validation text; 0: only at the end."""
    eval_batches: int | None = None
    """Batches per evaluation on the way; None: the whole validation text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSection:
    """When replicas agree: after every step, or after many local ones (DiLoCo, arXiv
    2311.08105: inner AdamW, outer Nesterov on how far the parameters moved)."""

    strategy: Literal["every_step", "local"] = "every_step"
    steps: int = 30
    """`local`: steps each replica takes alone between two agreements."""
    learning_rate: float = 0.7
    """`local`: of the outer optimizer (DiLoCo, section 3.1)."""
    momentum: float = 0.9
    """`local`: of the outer optimizer, in Nesterov's form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSection:
    """Train small factors beside frozen weights (arXiv 2106.09685)."""

    rank: int = 0
    """Of the factors; 0 trains all weights."""
    alpha: float = 16.0
    """What the factors add is multiplied with alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Weights that have factors."""
    adapter: str | None = None
    """A folder in PEFT's format to lay over the model: to use, to train on, to merge;
    rank, alpha and targets are then its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSection:
    """How text is scored."""

    stride: int | None = None
    """Tokens from one window of batch.seq_len tokens to the next: all but the first
    have the rest as context. None: windows lie end to end."""
    against: str | None = None
    """Another model over the same vocabulary: how far is it from this one?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifySection:
    """How a classifier is made and trained; its data are labelled (`[data]`)."""

    labels: tuple[str, ...] = ()
    """Names of the classes, in order; empty: those of the training data."""
    pooling: Literal["auto", "mean", "last", "max"] = "auto"
    """How the features of all tokens become those of the text; `auto`: the last
    token's of a decoder, else the mean."""
    backbone: Literal["train", "frozen"] = "train"
    """Of a model with weights: whether they learn beside the head (with `lora.rank`,
    their factors do)."""
    dropout: float = 0.3
    """Share of features that are dropped in training, before the head and in layers."""
    word_dropout: float = 0.1
    """Share of tokens whose embedding is dropped in training."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes (arXiv 1512.00567, 7)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: a class counts by the inverse of its share of the training data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSection:
    """What `compress` with `compress.kind = "prune"` takes out of a model."""

    method: Literal["wanda", "magnitude", "structured"] = "structured"
    """`wanda` (arXiv 2306.11695) and `magnitude` make weights zero; `structured` makes
    the model smaller: narrower or with fewer layers."""
    sparsity: float = 0.5
    """Share of the weights that become zero: of each output (`wanda`), or of each
    matrix (`magnitude`)."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """`2:4`: two of every four inputs of an output stay."""
    keep: float = 0.67
    """`structured`: share of the parameters that is to stay, about."""
    shrink: tuple[Literal["ffn", "kv_heads", "embed", "layers"], ...] = (
        "ffn",
        "kv_heads",
        "embed",
        "layers",
    )
    """`structured`: what may become smaller."""
    ffn_dim: int | None = None
    num_kv_heads: int | None = None
    embed_dim: int | None = None
    num_layers: int | None = None
    """Pins: the sizes of the new model; those without one are the planner's to find."""
    multiple: int | None = None
    """Widths are multiples of this; None: what the chip likes."""
    candidates: int = 6
    """Shapes that are cut and tried on the calibration text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSection:
    """Learn from what a larger model says, not from the text alone (arXiv 1503.02531).

    loss = weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * next token's.
    """

    teacher: str | None = None
    """A model with weights over the same vocabulary; None: no teacher."""
    temperature: float = 1.0
    """T: logits are divided by it."""
    weight: float = 0.5
    """Of the teacher's part of the loss, 0 to 1."""
    final_temperature: float | None = None
    """Approached in a straight line until the last step; None: as at the beginning."""
    final_weight: float | None = None
    """The same of `weight`."""
    top_k: int | None = None
    """Keep the teacher's so many likeliest tokens of each position on disk, and train
    without the teacher in memory; None: both models are in one step."""
    cache: str | None = None
    """With `top_k`: the folder they are kept in, for other runs, too; None: the run
    folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QatSection:
    """Train with matrices rounded as they will be stored (quantization-aware training):
    gradients go straight through the rounding (arXiv 1308.3432)."""

    weights: Literal["int8", "int4"] | None = None
    """None: training does not round."""
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output."""
    embedding: Literal["int8", "none"] = "int8"
    head: Literal["int8", "none"] = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressSection:
    """What `compress` makes of a model (llmos_jax/compression/README.md)."""

    kind: Literal["quantize", "prune", "distill"] = "quantize"
    chain: tuple[Literal["prune", "distill", "train", "quantize", "export"], ...] = ()
    """Several passes, each on what the one before made, in folders below
    `compress.out`; finished ones are not done again. Empty: `kind` alone."""
    out: str | None = None
    """A new folder, for the checkpoint and report.json."""
    weights: Literal["int8", "int4", "float8"] = "int8"
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output."""
    activations: Literal["none", "int8", "float8"] = "none"
    """In what tokens are multiplied with the weights; `none`: in floating point."""
    embedding: Literal["int8", "none"] = "int8"
    """The table of embeddings; where embeddings are tied, also the head."""
    head: Literal["int8", "none"] = "int8"
    method: Literal["nearest", "gptq"] = "nearest"
    """How weights are rounded: each by itself, or so that later ones make good what
    rounding the earlier ones does to a calibration text (arXiv 2210.17323)."""
    smooth: float = 0.0
    """alpha of SmoothQuant (arXiv 2211.10438), 0.5 to 0.9: how much of the range of
    activations is moved into weights; 0: none."""
    clip: bool | None = None
    """Search for the scales that lose least on a calibration text; None: for int4."""
    calibration: tuple[str, ...] = ()
    """Files, folders or patterns; empty: the training side of `[data]`."""
    sequences: int = 32
    """Of the calibration text."""
    seq_len: int = 512
    """Tokens of each."""
    max_kld: float | None = None
    """Refuse what is further than this from the source (mean KL divergence in nats)."""
    evaluate_batches: int | None = None
    """Batches of the evaluation text, spread over it; None: all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    """Asynchronous sharded checkpoints."""

    every: int = 500
    keep: int = 3
    """The latest so many are kept, and those of the next two keys beside them."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps are kept for ever."""
    best: str | None = None
    """A figure of metrics.jsonl, `val_loss` for example: the checkpoint where it was
    lowest is kept, too."""
    dir: str | None = None
    """Where checkpoints lie, if not in run.dir: a folder, or s3:// or gs://."""
    on_damage: Literal["refuse", "previous"] = "refuse"
    """What to do where the latest checkpoint is damaged: stop and name it, or go on
    from the one before."""
    grace_s: float = 15.0
    """Seconds from SIGTERM to the machine's end, in which a last save must be whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperviseSection:
    """How `train --supervise` starts a run again."""

    restarts: int = 10
    """In a row without a new checkpoint between them; then it gives up."""
    backoff_s: float = 1.0
    """Before the first restart; doubled each time, with jitter, up to five minutes."""
    hang_ratio: float = 10.0
    """A run that finishes no step in so many times its median step is killed."""
    hang_s: float = 60.0
    """But it always has so many seconds, and before its first step ten times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSection:
    """What `export` makes of a model (llmos_jax/bundle/README.md)."""

    programs: bool = True
    """Put the programs beside the weights: compiled for this machine, and portable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSection:
    """How `tools/prepare` makes a corpus of `data.train` (corpus/README.md)."""

    out: str | None = None
    """The folder of the corpus, to be made; an unfinished one is gone on with."""
    workers: int | None = None
    """Processes; None: one per core. The corpus does not depend on it."""
    shard_tokens: int = 1 << 24
    """Of a shard, about: 32 MiB of 16-bit tokens."""
    test_share: float = 0.0
    """Of the training documents, by content hash, as `data.validation_share`."""
    repair: bool = True
    """Mend text that was decoded wrongly, as `schÃ¶n` (ftfy)."""
    min_words: int = 5
    """Shorter documents are dropped (C4 drops such lines: arXiv 1910.10683, 2.2)."""
    max_words: int | None = None
    """Longer ones are dropped; Gopher took 50 to 100,000 words of web pages."""
    min_characters: int = 1
    repetition: bool = True
    """Drop documents that repeat themselves, by the limits of Gopher (arXiv 2112.11446,
    table A1)."""
    exact_duplicates: bool = True
    """Drop documents whose words are those of an earlier one, in capitals or not."""
    near_duplicates: float = 0.8
    """Drop documents that share this much of their runs of five words with an earlier
    one (Jaccard, estimated by MinHash); 0: keep them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """Text to learn from: files, folders or patterns; .txt .jsonl .parquet .csv, or
    `python-docs`, the text that every Python carries; or conversations in .jsonl; or
    the folder of a corpus (tools/prepare). Files may lie at s3:// and gs://, too."""

    train: tuple[str, ...] = ("python-docs",)
    weights: tuple[float, ...] = ()
    """A mixture: how much of the batches comes of each entry of `train`, each a source
    of its own; empty: all text is one source, by its size."""
    validation: tuple[str, ...] = ()
    """Empty: `validation_share` of the training documents, chosen by content hash."""
    test: tuple[str, ...] = ()
    validation_share: float = 0.01
    text_key: str = "text"
    """The field that holds the text in JSONL, Parquet and CSV."""
    format: Literal["auto", "text", "chat", "labelled"] = "auto"
    """`chat`: JSON lines of conversations, of which the assistant's answers are
    learned; `labelled`: rows of a text and its label, for classifiers; `auto`: chat
    where the first row has `messages_key`, labelled for a classifier, else text."""
    label_key: str = "label"
    """The field that holds the label of a labelled row."""
    label_until: str = ""
    """Labels end where this begins: with ":", DESC:manner is DESC."""
    messages_key: str = "messages"
    """The field that holds the list of messages of a conversation."""
    chat_template: str | None = None
    """Path of a Jinja template for conversations; None: the tokenizer's own."""
    tokenizer: str = "auto"
    """`auto`: the one that the model came with, else `train`; `train`: a byte-level BPE
    with the model's vocabulary, trained on data.train and cached; `bytes`: 256 bytes
    and an end mark; `words`: of labelled texts, the words that occur at least twice; or
    the path of a tokenizer.json, a SentencePiece *.model or a model's folder."""
    document_mask: bool = False
    """Tokens attend within their own document only; rows still hold several."""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat`: documents lie end to end and are cut where a row ends; `best_fit`: rows
    are packed with whole documents, each attending to itself (arXiv 2404.10830)."""

    @property
    def is_masked(self) -> bool:
        """Whether tokens attend within their own document only."""
        return self.document_mask or self.packing == "best_fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSection:
    """What a finished run says, printed and shown in its report."""

    prompts: tuple[str, ...] = ()
    max_tokens: int = 48
    temperature: float = 0.0
    top_k: int = 0
    """Sampled with `run.seed`; temperature 0 is greedy, top_k 0 keeps every token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(Artefact):
    """Everything one `train` or `plan` run was asked for."""

    model: str
    topology: str | None = None
    rules: str | None = None
    """A name under sharding_rules/ or a path; None: the model family's."""
    run: RunSection = field(default_factory=RunSection)
    batch: BatchSection = field(default_factory=BatchSection)
    plan: PlanSection = field(default_factory=PlanSection)
    train: TrainSection = field(default_factory=TrainSection)
    sync: SyncSection = field(default_factory=SyncSection)
    lora: LoraSection = field(default_factory=LoraSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    data: DataSection = field(default_factory=DataSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    classify: ClassifySection = field(default_factory=ClassifySection)
    compress: CompressSection = field(default_factory=CompressSection)
    prune: PruneSection = field(default_factory=PruneSection)
    distill: DistillSection = field(default_factory=DistillSection)
    qat: QatSection = field(default_factory=QatSection)
    export: ExportSection = field(default_factory=ExportSection)
    prepare: PrepareSection = field(default_factory=PrepareSection)
    supervise: SuperviseSection = field(default_factory=SuperviseSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    serve: ServeSection = field(default_factory=ServeSection)
